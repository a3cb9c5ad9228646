"""The run folder: what a run writes, and how it comes back after a stop at any moment.

    RUN/config.json            every field of the configuration, versions, sandbox layers
    RUN/metrics.jsonl          one flat record per step (step 0: before training); the same bytes in every repeat
    RUN/timing.jsonl           seconds per phase, tokens and peak memory of each step, which no repeat reproduces
    RUN/tasks.jsonl            every proposal with verdict, solve rate, reward and the references it was shown
    RUN/rollouts.jsonl         sampled full texts                RUN/flagged.jsonl   texts for a person to read
    RUN/seeds.jsonl            the seed tasks (reusable: --seeds RUN/seeds.jsonl)
    RUN/buffers/KIND.jsonl     every task that entered a buffer, in order; the last --buffer-size of them are in it
    RUN/checkpoint             -> checkpoint-000123: a Hugging Face model folder and trainer.pt (optimizer, step, RNG
                                  states, log sizes)
    RUN/best                   -> best-000100: the same for the best held-out score (--keep-best)
    RUN/report.html            all of this to look at, in one file (report.py)
    RUN/curve.svg              held-out accuracy over the steps, once there were two evaluations

A checkpoint is written to a temporary name, renamed, and only then does the link `checkpoint` move: a kill or a full
disk leaves the previous one whole. Logs and buffers are files that only grow: a step appends what is new, a checkpoint
records their sizes, and on resume they are cut back to these, so that the continued run writes the same bytes as an
uninterrupted one.
What it leaves out: checkpoints of a half-finished step. Usage: `save(run, "checkpoint")`, `load(run_dir, ...)`.
"""

import json
import os
import pickle
import random
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from buffers import Buffer, refill
from policy.engine import first_line
from policy.logprobs import ran_out_of_memory
from policy.lora import merged_weights
from prompts import Kind

LOGS = ("metrics.jsonl", "timing.jsonl", "tasks.jsonl", "rollouts.jsonl", "flagged.jsonl")  # these and the buffers grow


def append(path: Path, records: list[dict]) -> None:
    """Append records to a JSONL log."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def read_log(path: Path, torn: bool = False) -> list[dict]:
    """The records of a JSONL log; `torn`: but for a last line that is being written, or was when the run was killed.
    Raises ValueError naming the line that is none."""
    records, text = [], path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate((text[: text.rfind("\n") + 1] if torn else text).splitlines(), 1):
        try:
            record = json.loads(line)
            records.append(record | {"step": int(record["step"])})
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}, line {number}: not a record; restore the file") from None
    return records


def write_atomically(path: Path, text: str) -> None:
    """Write a small file under a temporary name, then rename it into place."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def move_link(link: Path, target: str) -> None:
    temporary = link.with_name(link.name + ".link")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)


def log_sizes(run_dir: Path, logs: Iterable[str]) -> dict[str, int]:
    """Bytes of each log; 0 where there is none yet."""
    return {log: (run_dir / log).stat().st_size if (run_dir / log).exists() else 0 for log in logs}


def save_due(run, record: dict, last: bool) -> None:
    """RUN/checkpoint every --save-every steps and after the last one, RUN/best when the held-out score is the best so
    far (--keep-best)."""
    scores = [earlier.get("score", -1.0) for earlier in run.watch.history]
    if run.config.keep_best and "score" in record and record["score"] >= max(scores):
        save(run, "best")  # first: a step that is killed here is done again, and `best` with it
    if last or run.step % run.config.save_every == 0:
        save(run, "checkpoint")


def save(run, name: str) -> None:
    """Write the last finished step of `run` (azr.Run) as a checkpoint and point RUN/`name` at it. Raises OSError naming
    the folder if the disk is full; the previous checkpoint stays as it was. All processes of a run take part, since the
    state may lie in parts on each; one writes it."""
    merged = {key: weight.cpu() for key, weight in merged_weights(run.policy)} if run.config.lora else None
    weights, optimizer = merged or run.policy.state_dict(), run.optimizer.state_dict()
    if not run.writes:
        return
    folder, partial = run.folder / f"{name}-{run.step:06d}", run.folder / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        run.policy.save_pretrained(partial, state_dict=weights)
        run.tokenizer.save_pretrained(partial)
        name_, keys, *rest = np.random.get_state()
        rng = {"python": random.getstate(), "numpy": (name_, keys.tolist(), *rest), "torch": torch.get_rng_state()}
        rng["cuda"] = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        sizes = log_sizes(run.folder, [*LOGS, *(f"buffers/{kind}.jsonl" for kind in run.buffers)])
        state = {"step": run.step, "optimizer": optimizer, "rng": rng, "log_sizes": sizes}
        torch.save(state, partial / "trainer.pt")
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        if ran_out_of_memory(error):
            raise
        what = f"could not write the checkpoint to {folder} ({first_line(error)})"
        free = f"{shutil.disk_usage(run.folder).free / 1e9:.3f} GB are free there"
        raise OSError(f"{what}; {free}: free more and --resume {run.folder}") from error
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    move_link(run.folder / name, folder.name)
    for older in run.folder.glob(f"{name}-[0-9]*"):
        if older.name != folder.name:
            shutil.rmtree(older, ignore_errors=True)
    if name == "checkpoint":
        run.saved = run.step


def find(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run, None before the first one. A link that a copy lost, or that was not yet made when
    the run was killed, is made again. Raises ValueError for a folder where the link should be."""
    link, numbered = run_dir / "checkpoint", sorted(run_dir.glob("checkpoint-[0-9]*"))
    if link.is_dir() and not link.is_symlink():
        way = f"remove it, {numbered[-1].name} is the same" if numbered else f"rename it to {link}-000000"
        raise ValueError(f"{link} must be a link to a numbered folder, not a folder; {way}, then resume again")
    if not link.exists() and numbered:
        move_link(link, numbered[-1].name)
    return link if link.exists() else None


def load(run_dir: Path, optimizer, buffers: Mapping[str, Buffer], kinds: Mapping[str, Kind], steps: int) -> int:
    """Read the newest checkpoint into the optimizer, the RNGs and the empty buffers, cut the logs back, return the
    step. The policy's weights were read from RUN/checkpoint already. Raises ValueError naming the broken file and the
    remedy, for a run of other task types, and for one that has more than `steps` steps."""
    folder = run_dir / "checkpoint"
    anew = f"start a new run from the weights with --model {folder}"
    try:
        # mapped: an offloaded optimizer fills host memory already, and its saved states are as large again
        state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True, mmap=True)
        optimizer.load_state_dict(state["optimizer"])
        step, rng, saved = int(state["step"]), state["rng"], dict(state["log_sizes"])
        random.setstate(rng["python"])
        np.random.set_state(rng["numpy"])
        torch.set_rng_state(rng["torch"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(rng.get("cuda", []))
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, EOFError, pickle.UnpicklingError) as error:
        if ran_out_of_memory(error):
            raise
        raise ValueError(f"{folder}/trainer.pt cannot be read ({first_line(error)}); {anew}") from None
    if step > steps:
        raise ValueError(f"{run_dir} has {step} steps already, --steps {steps} is less; raise it")
    if other := [kind for kind in kinds if f"buffers/{kind}.jsonl" not in saved]:
        raise ValueError(f"{run_dir} is a run of other task types, without a buffer for {other[0]}; start a new run")
    found = log_sizes(run_dir, saved)
    for log, size in saved.items():
        if found[log] < size and (log == "metrics.jsonl" or log.startswith("buffers")):  # the others are not read again
            had = f"{run_dir / log} has {found[log]} of the {size} bytes it had at the checkpoint"
            raise ValueError(f"{had}; restore it, or {anew}")
    for log, size in saved.items():
        if found[log] > size:
            os.truncate(run_dir / log, size)
    for name, kind in kinds.items():
        refill(buffers[name], run_dir / f"buffers/{name}.jsonl", kind)
    return step
