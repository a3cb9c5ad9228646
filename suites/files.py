"""The files of an evaluation: responses, which are written before anything is scored, and results.json.

What it does: reads and replaces them so that a kill, a full disk or a second evaluation in the same folder loses
nothing; says in one sentence what is damaged, or was made with other settings.
What it leaves out: what stands in them (`evaluate.make_record`). The paper has no counterpart.

    header, done = read_responses(Path("OUT/responses/cruxeval-o.jsonl"), {})
"""

import hashlib
import json
from collections import defaultdict
from pathlib import Path

import numpy as np


def read_responses(path: Path | None, header: dict) -> tuple[dict, dict[str, list[dict]]]:
    """What `path` holds already: settings, and responses by item. A half-written line or item at its end (a kill, a
    full disk) is dropped from the file. Raises ValueError where it was made with other settings or weights than
    `header`, or is damaged."""
    *whole, cut = path.read_text(encoding="utf-8", errors="replace").split("\n") if path and path.is_file() else [""]
    if not whole:
        return {}, {}
    found = defaultdict(list)
    try:
        old, *rows = [dict(json.loads(line)) for line in whole]
        old["samples"], old["template"]
        for row in rows:
            found[row["id"]].append({key: row[key] for key in ("response", "tokens", "truncated")})
        if max(map(len, found.values()), default=0) > old["samples"]:
            raise ValueError("more responses to an item than samples")
        short = {id for id, some in found.items() if len(some) < old["samples"]}
        wrong = [f"{key} {old[key]!r} instead of {value!r}" for key, value in header.items()
                 if key != "data" and value is not None and old.get(key, value) != value]  # fmt: skip
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): delete the file.") from None
    if wrong:
        raise ValueError(f"{path} was made with {', '.join(wrong)}: choose another --out or delete the file.")
    if cut or short:
        kept = [line for line, row in zip(whole, [old, *rows], strict=True) if row.get("id") not in short]
        write_whole(path, "\n".join(kept) + "\n")
    return old, {id: some for id, some in found.items() if id not in short}


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once: what was there is lost only when the new one is whole."""
    path.with_suffix(".tmp").write_text(text, encoding="utf-8")
    path.with_suffix(".tmp").replace(path)


def fingerprint(model: str) -> str | None:
    """A digest of the ends of a folder's weight files, which change with any training; None for a hub name."""
    digest = hashlib.sha256()
    for path in sorted([*Path(model).glob("*.safetensors"), *Path(model).glob("*.bin")]):
        weights = np.memmap(path, mode="r")
        digest.update(weights[: 1 << 20])
        digest.update(weights[-1 << 20 :])
    return digest.hexdigest()[:16] if Path(model).is_dir() else None


def read_results(path: Path) -> dict[str, dict]:
    """Records by suite, as `write_results` left them in a file or its folder. Raises ValueError for anything else."""
    path = path / "results.json" if path.is_dir() else path
    try:
        records = dict(json.loads(path.read_text(encoding="utf-8")))
        for record in records.values():
            sum(record["scores"].values())
        return records
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is no results.json of an evaluation ({error!r}): give another, move or restore it."
        ) from None


def write_results(path: Path, records: dict[str, dict]) -> None:
    """Put records among those that are there; another evaluation may have written meanwhile."""
    kept = read_results(path) if path.is_file() else {}
    write_whole(path, json.dumps(kept | records, indent=1) + "\n")
