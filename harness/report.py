"""A run in one file to open and to show: RUN/report.html, which needs no network, and the picture RUN/curve.svg.

What it does: reads what a run has written so far (it may be going on, or was killed), draws its curves with matplotlib
and fills the template report.html: the result and what it does not show, curves, the curriculum, the tasks with their
lineage, sampled rollouts, the paper's behaviours, alarms, configuration. What a model wrote is escaped.
What it leaves out: what would make the file too large; the page says how much that is.
Paper: section 4 (Figures 4 to 6, behaviours that emerge, the "uh-oh moment").

    python -m harness.report runs/NAME
"""

import base64
import hashlib
import json
import math
import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

from jinja2 import Environment, StrictUndefined, UndefinedError
from markupsafe import Markup, escape

from harness.checkpoint import read_log, write_atomically
from harness.config import Config, flag
from harness.metrics import compare
from harness.plots import inline, svg_histograms, svg_plot, thin
from policy.dialogue import Tags, fenced_blocks, read_tags, split_response

TABLE, STEP, MOST = 1_080_000, 20_000, 5_000_000  # bytes of the table of tasks: at least, per step, at most
ROLLOUTS = 100_000  # bytes of the sampled rollouts, and as many of the flagged texts
ROW = 400  # bytes of a row of either beside its texts
LONGEST = 4_000  # characters of one task in the table
LINE = 4  # generations of a lineage
SHARES = 10  # points of a curve of sampled texts, each the share in several steps
HELD_OUT = "eval/([^/]+(?:/(?!depth)[^/]+)?)/accuracy"
TRIES = re.compile(r"\b(try|tries|trying|suppose|assume|guess|what if|let'?s (take|test|say)|start with)\b", re.I)
CHECKS = re.compile(r"\b(check\w*|verif\w+|match\w*|gives?|returns?|equals?|works?|wrong|too (big|small|long))\b", re.I)

# ---------------------------------------------------------------------------------------------------------------------
# What a run has written


def read_run(folder: Path) -> dict:
    """config.json and the whole lines of the logs. Raises ValueError where there is no run, or none to show yet."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a run folder: it has no config.json; give the folder of a run")
    try:
        run = {"about": json.loads(path.read_text(encoding="utf-8"))}
    except ValueError:
        raise ValueError(f"{path} is damaged; restore it") from None
    for name in ("metrics", "timing", "tasks", "rollouts", "flagged"):
        path = folder / f"{name}.jsonl"
        run[name] = read_log(path, torn=True) if path.exists() else []
    if not run["metrics"]:
        raise ValueError(f"{folder} has no record of a step yet; look again when its buffers are seeded")
    seeds: dict[str, dict] = {}  # the same one is in several buffers; without seeds.jsonl, --seeds gave them
    for path in (folder / "seeds.jsonl", *sorted(folder.glob("buffers/*.jsonl"))):
        for task in read_log(path, torn=True) if path.exists() else ():
            if task["step"] == 0:
                seeds.setdefault(task["id"], task | {"verdict": "seed", "admitted": True})
    names = dict.fromkeys(key for record in run["metrics"] for key in record)  # a file that --tasks named may be gone
    kinds = [found[1] for name in names if (found := re.fullmatch("(?:propose|solve)/([^/]+)/count", name))]
    kinds = kinds or [found[1] for name in names if (found := re.fullmatch("buffer/([^/]+)/size", name))]
    return run | {"seeds": list(seeds.values()), "kinds": list(dict.fromkeys(kinds))}


def series(records: Iterable[Mapping], keys: str, kinds: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """Name -> [(step, value), ...] of the keys that match a pattern, whose group is the name: only its last part where
    that is a task type. All kinds come first, so that each has the same colour in every picture."""
    found: dict[str, list] = {kind: [] for kind in kinds}
    owners: dict[str, str] = {}  # of two suites with the same kinds, the first gets the short names
    for record in records:
        for key, value in record.items():
            if match := re.fullmatch(keys, key):
                kind = match[1].split("/")[-1]
                short = kind in found and owners.setdefault(kind, match[1]) == match[1]
                found.setdefault(kind if short else match[1], []).append((record["step"], value))
    return {name: thin(points) for name, points in found.items()}


def behaviours(rollouts: Iterable[Mapping], tags: Tags) -> dict[str, dict[str, list]]:
    """What the paper saw emerge, in the sampled solving responses: name -> kind -> [(step, seen or not), ...].
    plans: a program of the answer has two lines of comments or more; tries: a thought has words of trying a value,
    then of checking it."""
    seen: dict[str, dict] = {"plans": defaultdict(list), "tries": defaultdict(list)}
    for item in (item for item in rollouts if item["role"] == "solve"):
        text = split_response(item["response"], tags=tags)
        if programs := [content for label, content in fenced_blocks(text.answer) if label == "python"]:
            comments = re.findall(r"^\s*#", programs[0], re.MULTILINE)
            seen["plans"][item["kind"]].append((item["step"], len(comments) > 1))
        if thought := text.think if text.formatted else item["response"]:
            tried = TRIES.search(thought)
            seen["tries"][item["kind"]].append((item["step"], bool(tried and CHECKS.search(thought, tried.end()))))
    return seen


# ---------------------------------------------------------------------------------------------------------------------
# Tasks and their lineage


def with_lineage(tasks: Iterable[Mapping]) -> list[dict]:
    """The rows of the table, in the order in which they were made. `parents`: the rows of the tasks that the proposer
    was shown; `generation`: the length of the longest line back to a task that was made from none; `line`: the first
    rows of that line, nearest first."""
    rows, known = [], {}
    for task in tasks:
        parents = [known[name] for name in task["references"] if name in known]
        eldest = max(parents, key=lambda row: row["generation"], default=None)
        row = {"number": len(rows), "parents": parents, "generation": 0, "line": [], "reward": None, **task}
        if eldest:
            row |= {"generation": eldest["generation"] + 1, "line": [eldest, *eldest["line"]][:LINE]}
        rows.append(row | {"text": task_text(task)})
        known.setdefault(row.get("id"), rows[-1])
    return rows


def task_text(task: Mapping) -> str:
    if "program" not in task:
        return cut(task["answer"] or "(no answer)")
    pairs = zip(task["inputs"], task["outputs"], strict=True)
    return cut("\n".join([task["program"], "", *(f"f({given}) -> {output}" for given, output in pairs)]))


def cut(text: str) -> str:
    more = len(text) - LONGEST
    return f"{text[:LONGEST]}\n... and {more} characters more, in tasks.jsonl" if more > 0 else text


def choose(rows: list[dict], texts: Sequence[str], limit: int) -> list[dict]:
    """Rows of all steps alike, each with the line it comes from, that take `limit` bytes or less on the page."""
    chosen: dict[int, dict] = {}
    for row in random.Random(0).sample(rows, len(rows)):
        new = [item for item in (row, *row.get("line", ())) if id(item) not in chosen]
        limit -= sum(ROW + len(escape("".join(item.get(name, "") for name in texts)).encode()) for item in new)
        if limit < 0:
            break
        chosen |= {id(item): item for item in new}
    return [row for row in rows if id(row) in chosen]


# ---------------------------------------------------------------------------------------------------------------------
# The page


def figure(found: Mapping) -> dict:
    """Curves for the template, with (colour, name) of each; empty where there is nothing to draw."""
    drawn = [any(math.isfinite(value) for _, value in points) for points in found.values()]
    legend = [(number % 10, name) for number, name in enumerate(found) if drawn[number]]
    return {"legend": legend, "svg": Markup(inline(svg_plot(found, small=True)))} if legend else {}


def histogram(records: Iterable[Mapping], kind: str, colour: str) -> dict:
    """The same of how often the new tasks of a type were solved."""
    key = f"propose/{kind}/solve_rate_hist"
    found = [(record["step"], record[key]) for record in records if key in record]
    return {"legend": [(colour[1:], kind)], "svg": Markup(inline(svg_histograms(found, colour)))} if found else {}


def write(folder: Path) -> Path:
    """Write report.html and, after two evaluations, curve.svg; returns the page's path. Raises ValueError with one
    sentence where there is nothing to show, or nothing to draw with."""
    if find_spec("matplotlib") is None:
        raise ValueError(f"it needs matplotlib; pip install matplotlib, then python -m harness.report {folder}")
    try:
        page, curve = compose(read_run(folder), folder.resolve().name)
    except (LookupError, TypeError, AttributeError, UndefinedError) as error:
        raise ValueError(f"{folder} has records that no run writes ({error!r}); restore its files") from error
    if curve:
        write_atomically(folder / "curve.svg", curve)
    write_atomically(folder / "report.html", page)
    return folder / "report.html"


def compose(run: dict, name: str) -> tuple[str, str]:
    """The page, and the picture of held-out accuracy ("" before the second evaluation)."""
    records, kinds, about = run["metrics"], run["kinds"], run["about"]
    evaluated = [record for record in records if "score" in record]
    tasks, seen = with_lineage([*run["seeds"], *run["tasks"]]), behaviours(run["rollouts"], read_tags(about["tags"]))
    table = choose(tasks, ("text", "message"), min(max(TABLE, STEP * records[-1]["step"]), MOST))
    defaults = {item.name: item.default for item in fields(Config)}
    source = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    script = re.search("<script>(.*?)</script>", source, re.DOTALL)[1]
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = page.from_string(source).render(
        run,
        name=name,
        last=records[-1],
        evaluated=evaluated,
        changes=compare(evaluated[0], evaluated[-1]) if len(evaluated) > 1 else [],
        held_out=HELD_OUT,
        curve=lambda keys: figure(series([*records, *run["timing"]], keys, kinds)),
        solved=lambda kind: histogram(records, kind, f"C{kinds.index(kind) % 10}"),
        seen=lambda what: figure({kind: thin(seen[what][kind], SHARES) for kind in kinds}),
        counted=lambda what: ", ".join(f"{len(points)} {kind}" for kind, points in seen[what].items()),
        tasks=tasks,
        shown_tasks=table,
        on_page={row["number"] for row in table},
        shown_rollouts=choose(run["rollouts"], ("prompt", "response"), ROLLOUTS),
        shown_flagged=choose(run["flagged"], ("prompt", "response"), ROLLOUTS),
        options=[(flag(key), value, defaults.get(key, value)) for key, value in about["config"].items()],
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    curve = series(evaluated, HELD_OUT, kinds) if len(evaluated) > 1 else {}
    return text, curve and svg_plot(curve, "Held-out accuracy", "accuracy")


def main(arguments: list[str]) -> int:
    """The command line: one run folder. Returns 2 after one sentence on what to change."""
    try:
        if len(arguments) != 1:
            raise ValueError("give the folder of one run: python -m harness.report runs/NAME")
        print(write(Path(arguments[0])))
    except (ValueError, OSError) as error:
        print(f"no report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
