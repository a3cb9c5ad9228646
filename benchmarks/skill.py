"""Does self-play teach what the base model cannot do, and does training the proposer matter? Seeds x controls.

What it does: a queue of runs of `python azr.py --preset tiny-skill`, that goes on after a stop: finished runs are kept,
stopped ones resumed. Then base and final checkpoints are measured on the held-out tasks (measuring.py), by depth and
with intervals over seeds and tasks; the tasks deeper than the solver was ever shown are sampled for pass@k. With
`--ablations` the runs change one thing of the setting at a time, and are compared with their neighbours.
What it leaves out: choosing anything. Settings were chosen on tiny/skill/dev.jsonl; the test file is read here only.
Paper: section 4; it has neither such controls nor these ablations. Sharpened or unlocked: Yue et al., 2025.

    python benchmarks/skill.py --out runs/skill                 # everything; the same command goes on after a stop
    python benchmarks/skill.py --out runs/skill --ablations --only runs
"""

import argparse
import hashlib
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import measuring
from measuring import (
    ROOT,
    advantage,
    call,
    claim,
    head,
    measured,
    proposer,
    read_rows,
    row_of,
    score,
    signed,
    statements,
)

from buffers import load_tasks, save_tasks
from harness.checkpoint import read_log
from harness.config import SKILL_MODEL
from harness.plots import svg_text
from prompts import KINDS
from suites.compare import pass_at_k

SHOWN = 4  # statements of the deepest program that the base model's solver was shown (tiny/make.py)
CONDITIONS = {
    "trained": [],
    "frozen": ["--no-train-proposer"],
    "shuffled rewards": ["--control", "shuffle"],
    "fixed seeds": ["--control", "fixed", "--solve-prompts", "128"],  # as many attempts as self-play has
}
SAMPLED = ("base", "trained", "frozen")  # for pass@k
KS = (1, 4, 16, 64, 256)
KEPT = re.compile(  # of the metrics of a run
    "step|score|valid_share|solve_rate|eval/[^/]+/([^/]+/)?accuracy|solve/[^/]+/accuracy|"
    "propose/[^/]+/(reward_mean|solve_rate_mean|lines_mean|distinct_share)"
)
# What differs, by group; an empty list is the condition "trained". B x G attempts a type are always 128, save where the
# measuring attempts do not train: there the tokens are as many, the attempts that train are half.
APART = ["--no-reuse-measurement-rollouts", "--baseline", "cell", "--rollouts", "4"]
FEW = [*APART, "--batch", "32", "--solve-prompts", "32"]
ABLATIONS: dict[str, dict[str, list[str]]] = {
    "baseline": {"task": [], "cell": ["--baseline", "cell"], "global": ["--baseline", "global"]},
    "reward at r = 0 and 1": {"0": [], "-0.5": ["--zero-reward", "-0.5"]},
    "attempts per task (G)": {
        "8": [],
        "4": ["--rollouts", "4", "--batch", "32"],
        "16": ["--rollouts", "16", "--batch", "8"],
    },
    "tasks of the solver's batch": {
        "this step's": FEW,
        "previous step's": [*FEW, "--solve-batch", "previous"],
    },
    "a full buffer of 256 drops": {
        "oldest": ["--buffer-size", "256"],
        "newest": ["--buffer-size", "256", "--buffer-drops", "newest"],
    },
    "references (K)": {"2": [], "1": ["--references", "1"], "6": ["--references", "6"]},
    "references drawn": {"at the frontier": [], "uniformly": ["--reference-draw", "uniform"]},
    "a program that is not new earns": {"at most -0.5": [], "as a new one": ["--duplicate-reward", "1"]},
    "tasks that enter a buffer": {"all": [], "solved sometimes": ["--admit", "learnable"]},
    "measuring attempts": {
        "train": ["--baseline", "cell"],
        "do not train": [*APART, "--solve-prompts", "64"],
    },
}


@dataclass(frozen=True)
class Job:
    """One run. `name`: its folder, which is the same for equal flags and seed."""

    condition: str
    seed: int
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.condition.replace(' ', '-')}-{self.seed}"


def jobs_of(conditions: dict[str, list[str]], seeds: Sequence[int]) -> list[Job]:
    """All runs, seed by seed, so that a queue that is stopped has whole seeds."""
    return [Job(name, seed, tuple(flags)) for seed in seeds for name, flags in conditions.items()]


def named(flags: Sequence[str]) -> str:
    """The name of a setting of the ablations: what stands twice among them is run once."""
    return "-".join(re.findall(r"\w+", " ".join(flags))) or "trained"


def ablated(groups: Iterable[str] = ABLATIONS) -> dict[str, list[str]]:
    return {named(flags): flags for group in groups for flags in ABLATIONS[group].values()}


# ---------------------------------------------------------------------------------------------------------------------
# Runs, measurements, samples: each is done once


def in_lanes(work: Callable, items: Sequence, lanes: int) -> None:
    with ThreadPoolExecutor(lanes) as pool:
        for waiting in [pool.submit(work, item) for item in items]:
            waiting.result()


def flags_of(job: Job, extra: list[str]) -> list[str]:
    return ["--preset", "tiny-skill", "--steps", "300", "--seed", str(job.seed), *job.flags, *extra]


def log_of(job: Job, out: Path) -> Path:
    return out / "logs" / f"{job.name}.log"


def train(job: Job, out: Path, extra: list[str]) -> None:
    """Run one job, or go on with it, or leave it as it is when it is finished."""
    measuring.train(out / job.name, log_of(job, out), flags_of(job, extra))
    print(f"done: {job.name}", flush=True)


def sample(model: Path, tasks: Path, out: Path, name: str, count: int) -> dict[str, float]:
    """The share of `count` samples at T = 1 that is right, per task of a file (evaluate.py resumes by itself)."""
    folder, suite, log = out / "samples" / name, f"tasks:{tasks}", out / "logs" / f"sample-{name}.log"
    claim(folder, [hashlib.sha256(tasks.read_bytes()).hexdigest(), str(count)], log)
    if not (folder / "results.json").exists():
        options = {"suites": suite, "samples": count, "temperature": 1, "max-tokens": 160, "max-model-len": 1024}
        flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        flags += ["--engine", "transformers", "--model", str(model), "--out", str(folder)]
        call([sys.executable, "evaluate.py", *flags], log)
    [record] = json.loads((folder / "results.json").read_text(encoding="utf-8")).values()
    return record["scores"]


def beyond(tasks: Path, out: Path) -> Path:
    """The held-out tasks deeper than the solver was shown, in a file of their own."""
    path = out / f"beyond-{tasks.name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tasks(path, [task for task in load_tasks(tasks, KINDS) if task.depth > SHOWN])
    return path


# ---------------------------------------------------------------------------------------------------------------------
# What comes out

PARTS: dict[str, Callable[[dict], bool]] = {
    "unshown": lambda row: row["depth"] > SHOWN,
    "shown": lambda row: row["depth"] <= SHOWN,
    **{f"unshown {kind}": (lambda row, kind=kind: row["depth"] > SHOWN and row["kind"] == kind) for kind in KINDS},
}


def of(rows: list[dict], part: str) -> list[dict]:
    return [row for row in rows if PARTS[part](row)]


def compare(before: list[list[dict]], after: list[list[dict]]) -> dict[str, dict]:
    """Difference of the parts, mean, interval and per seed: paired by task, and by seed where there are two lists."""
    before = before * len(after) if len(before) == 1 else before
    return {part: advantage([of(rows, part) for rows in after], [of(rows, part) for rows in before]) for part in PARTS}


def accuracies(runs: list[list[dict]]) -> dict:
    """Mean over runs of the accuracy at each depth and in each part, and the standard error of part over tasks."""
    rows = [row for run in runs for row in run]
    depths = sorted({row["depth"] for row in rows})
    found = {"depth": {str(d): score([row for row in rows if row["depth"] == d]) for d in depths}}
    found |= {part: score(of(rows, part)) for part in PARTS}
    share, count = found["shown"], len(of(runs[0], "shown"))
    return found | {"reasons": mean(row["reasons"] for row in rows), "se shown": (share * (1 - share) / count) ** 0.5}


def curriculum(folder: Path) -> dict:
    """Over the steps of a run: how many of the proposed programs have how many statements, and accuracy by depth."""
    proposals: dict[int, Counter] = defaultdict(Counter)
    for record in read_log(folder / "tasks.jsonl"):
        if record["solve_rate"] is not None and record["kind"] != "induction":
            proposals[record["step"]][statements(record)] += 1
    accuracy = []
    for record in read_log(folder / "metrics.jsonl"):
        if "score" in record:
            by_depth = {
                int(key.split("/depth")[1].split("/")[0]): value
                for key, value in record.items()
                if key.startswith("eval/") and key.count("/") == 3 and "/depth" in key and key.endswith("/accuracy")
            }
            accuracy.append([record["step"], by_depth])
    return {"proposals": {step: dict(counts) for step, counts in proposals.items()}, "accuracy": accuracy}


def run_facts(folder: Path) -> dict:
    """How a run went: wall-clock minutes in steps, and what its proposer did."""
    seconds = sum(record["seconds/step"] for record in read_log(folder / "timing.jsonl"))
    return {"minutes": seconds / 60, "proposer": proposer(folder / "tasks.jsonl")}


def kept_curves(folder: Path) -> str:
    """What is kept of a run's metrics.jsonl beside the tables: rewards, accuracies, what was proposed."""
    records = [{k: v for k, v in record.items() if KEPT.fullmatch(k)} for record in read_log(folder / "metrics.jsonl")]
    rounded = [{k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()} for record in records]
    return "".join(json.dumps(record) + "\n" for record in rounded)


MODES = ("greedy", "forced", "T=1")
INTERVAL = "[95 % bootstrap interval over seeds and tasks] (per seed)"


def analyse(out: Path, conditions: Sequence[str], seeds: Sequence[int], samples: dict) -> dict:
    """Everything that the table says. `samples`: shares of right samples by task, of "base" and of each job."""
    base = read_rows(out / "rows" / "base.jsonl")
    result: dict = {"seeds": list(seeds), "n": len(base["greedy"]), "n unshown": len(of(base["greedy"], "unshown"))}
    result |= {"base": {mode: accuracies([base[mode]]) for mode in MODES}, "conditions": {}}
    runs = {name: [read_rows(out / "rows" / f"{Job(name, s, ()).name}.jsonl") for s in seeds] for name in conditions}
    for name in conditions:
        entry: dict = {"runs": [run_facts(out / Job(name, seed, ()).name) for seed in seeds]}
        for mode in MODES:
            rows, trained = [run[mode] for run in runs[name]], [run[mode] for run in runs["trained"]]
            entry[mode] = accuracies(rows) | {"gain": compare([base[mode]], rows)}
            if name != "trained":
                entry[mode]["trained minus this"] = compare(rows, trained)
        result["conditions"][name] = entry
    if samples:
        result["samples"] = sampled(samples, base["greedy"], runs, seeds)
    return result


def sampled(samples: dict, base: list[dict], runs: dict, seeds: Sequence[int]) -> dict:
    """pass@k of each sampled condition (mean over the seeds that were sampled), and the tasks that changed sides
    between 0 of all samples before and greedily right after, and the reverse (per seed)."""
    count, shares, greedy = samples["count"], {"base": [samples["base"]]}, {}
    for name in SAMPLED[1:]:
        pairs = [(samples.get(Job(name, s, ()).name), run) for s, run in zip(seeds, runs.get(name, ()), strict=False)]
        if pairs := [(share, run) for share, run in pairs if share]:
            shares[name], greedy[name] = [share for share, _ in pairs], [run["greedy"] for _, run in pairs]
    found: dict = {"count": count, "tasks": len(samples["base"]), "pass": {}, "unlocked": {}, "lost": {}, "never": {}}
    for name, each in shares.items():
        right = [round(share * count) for run in each for share in run.values()]
        found["pass"][name] = {str(k): mean(pass_at_k(count, n, k) for n in right) for k in KS if k <= count}
        found["never"][name] = [sum(not share for share in run.values()) for run in each]
    for name, after in greedy.items():
        found["unlocked"][name] = [right_where_never(rows, samples["base"]) for rows in after]
        found["lost"][name] = [right_where_never(base, share) for share in shares[name]]
    return found


def right_where_never(greedy: list[dict], shares: dict[str, float]) -> int:
    """How many tasks are greedily right that another model has never right among its samples."""
    return sum(row["correct"] and shares.get(row["id"]) == 0 for row in greedy)


def markdown(result: dict) -> str:
    depths = list(result["base"]["greedy"]["depth"])
    groups = {"base": result["base"]} | result["conditions"]
    error = 100 * result["base"]["greedy"]["se shown"]
    lines = [f"# New skill by self-play: {len(result['seeds'])} seeds, {result['n']} held-out tasks", ""]
    lines += [f"Accuracy in percent by depth (statements), mean over seeds; depths above {SHOWN} are unshown: the "
              f"solver of the base model never saw them. Differences: points, mean {INTERVAL}.", ""]  # fmt: skip
    lines += [f"One standard error of the base model on the shown tasks: {error:.1f} points.", ""]
    lines += head(["condition", "mode", *depths, *PARTS, "reasons"])
    for name, entry in groups.items():
        for mode in MODES:
            values = [*entry[mode]["depth"].values(), *(entry[mode][part] for part in (*PARTS, "reasons"))]
            lines.append(row_of([name, mode, *(f"{100 * value:.1f}" for value in values)]))
    lines += ["", "Against the base model, paired by task:", "", *head(["condition", "mode", *PARTS])]
    for name, entry in result["conditions"].items():
        for mode in MODES:
            lines.append(row_of([name, mode, *(signed(gap) for gap in entry[mode]["gain"].values())]))
    lines += ["", "Trained proposer minus the other conditions, paired by seed and task:", ""]
    lines += head(["condition", "mode", *PARTS])
    for name, entry in result["conditions"].items():
        for mode in MODES if name != "trained" else ():
            lines.append(row_of([name, mode, *(signed(gap) for gap in entry[mode]["trained minus this"].values())]))
    lines += ["", "Proposer, mean of the first and the last five steps; wall-clock minutes of each run:", ""]
    names = ("valid", "solve_rate", "learnable", "statements", "deep", "distinct")
    shown = ("valid", "solve rate", "0 < r < 1", "statements", "of 5 and more", "different")
    lines += head(["condition", *shown, "minutes"])
    for name, entry in result["conditions"].items():
        found = [run["proposer"] for run in entry["runs"] if run["proposer"]]
        ends = [[mean(run[end][key] for run in found) for end in ("first", "last")] for key in names] if found else []
        cells = [f"{first:.2f} to {last:.2f}" for first, last in ends] or ["-"] * len(names)
        lines.append(row_of([name, *cells, " ".join(f"{run['minutes']:.0f}" for run in entry["runs"])]))
    return "\n".join(lines + passes(result.get("samples"))) + "\n"


def passes(samples: dict | None) -> list[str]:
    if not samples:
        return []
    count, ks = samples["count"], list(samples["pass"]["base"])
    lines = ["", f"pass@k in percent on the {samples['tasks']} unshown tasks, {count} samples at T = 1:", ""]
    lines += head(["model", *(f"k = {k}" for k in ks), f"tasks with 0 of {count}, per seed"])
    for name, values in samples["pass"].items():
        never = " ".join(map(str, samples["never"][name]))
        lines.append(row_of([name, *(f"{100 * value:.1f}" for value in values.values()), never]))
    before, after = f"base 0 of {count}, then greedily right", f"base greedily right, then 0 of {count}"
    lines += ["", "Unshown tasks that changed sides, per seed:", "", *head(["model", before, after])]
    for name in samples["unlocked"]:
        sides = (" ".join(map(str, samples[side][name])) for side in ("unlocked", "lost"))
        lines.append(row_of([name, *sides]))
    return lines


def figure(out: Path, conditions: Sequence[str], seeds: Sequence[int]) -> str:
    """Above: statements of the proposed programs over the steps (mean, and the middle 80 %). Below: accuracy by depth
    on held-out tasks. One column per condition, all seeds together."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(4.6 * len(conditions), 6.4), layout="constrained")
    axes = picture.subplots(2, len(conditions), sharex=True, sharey="row", squeeze=False)
    for column, name in enumerate(conditions):
        above, below = axes[0][column], axes[1][column]
        found = [curriculum(out / Job(name, seed, ()).name) for seed in seeds]
        steps = sorted({step for run in found for step in run["proposals"]})
        window = max(1, len(steps) // 45)
        points = []
        for start in range(0, len(steps) - window + 1, window):
            part = steps[start : start + window]
            counts = sum((Counter(run["proposals"].get(step, {})) for run in found for step in part), Counter())
            depths = sorted(counts.elements())
            points.append((mean(part), mean(depths), depths[len(depths) // 10], depths[len(depths) * 9 // 10]))
        if points:
            x, middle, low, high = zip(*points, strict=True)
            above.plot(x, middle)
            above.fill_between(x, low, high, alpha=0.18, linewidth=0)
        above.axhline(SHOWN, color="#888888", linestyle=":")
        above.set(title=f"{name} proposer" if name in SAMPLED else name)
        for depth in sorted({depth for run in found for _, values in run["accuracy"] for depth in values}):
            at = defaultdict(list)
            for run in found:
                for step, values in run["accuracy"]:
                    at[step].append(100 * values[depth])
            style = "-" if depth > SHOWN else ":"
            label = f"{depth} statement{'s' * (depth > 1)}"
            below.plot(list(at), [mean(values) for values in at.values()], style, label=label)
        below.set(xlabel="step")
    axes[0][0].set(ylabel="statements of proposed programs")
    axes[1][0].set(ylabel="held-out accuracy, percent")
    axes[1][-1].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    for each in axes.flat:
        each.grid(color="#dddddd")
    return svg_text(picture)


def ablation_table(out: Path, seeds: Sequence[int], groups: Iterable[str]) -> tuple[dict, str]:
    """Of each setting: accuracy at the unshown depths, gain over the base model, difference to the first setting of its
    group, and how long the proposer's programs are at the end. Greedy."""
    base = read_rows(out / "rows" / "base.jsonl")["greedy"]
    result: dict = {"seeds": list(seeds), "n": len(base), "groups": {}}
    lines = [f"# Ablations: {len(seeds)} seeds, {len(base)} held-out tasks", ""]
    lines += ["Greedy accuracy at the unshown depths, in percent; points against the base model, and against the first "
              f"setting of the group: mean {INTERVAL}; statements of the last five steps' programs.", ""]  # fmt: skip
    deep = [depth for depth in accuracies([base])["depth"] if int(depth) > SHOWN]
    lines += head(["setting", "", *deep, "unshown", "shown", "unshown, difference", "shown, difference", "statements"])
    for group, labels in ((group, ABLATIONS[group]) for group in groups):
        first = None
        for label, flags in labels.items():
            rows = [read_rows(out / "rows" / f"{named(flags)}-{seed}.jsonl")["greedy"] for seed in seeds]
            entry = {"gain": compare([base], rows), "difference": compare(first, rows) if first else None}
            entry |= {"depth": accuracies(rows)["depth"]}
            entry |= {"runs": [run_facts(out / f"{named(flags)}-{seed}") for seed in seeds]}
            result["groups"].setdefault(group, {})[label] = entry | {"flags": flags}
            cells = [f"{100 * entry['depth'][depth]:.1f}" for depth in deep]
            cells += [signed(entry["gain"][part]) for part in ("unshown", "shown")]
            cells += [signed(entry["difference"][part]) if first else "-" for part in ("unshown", "shown")]
            cells.append(f"{mean(run['proposer']['last']['statements'] for run in entry['runs']):.1f}")
            lines.append(row_of([group, label, *cells]))
            first = first or rows
    return result, "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Seeds x controls, or x ablations, of the preset tiny-skill.")
    add = parser.add_argument
    add("--seeds", default="0,1,2")
    add("--conditions", default=",".join(CONDITIONS), help="the first must be trained")
    add("--ablations", action="store_true", help="one change of the setting at a time instead of the conditions")
    add("--groups", default=",".join(ABLATIONS), help="with --ablations: some of the groups")
    add("--only", default="runs,measure,table", help="some of the three parts, in this order")
    add("--lanes", type=int, default=2, help="processes at a time, one thread each")
    add("--tasks", type=Path, default=SKILL_MODEL.parent / "test.jsonl", help="held-out tasks")
    add("--samples", type=int, default=256, help="of each unshown task, for pass@k; 0: none")
    add("--sample-seeds", default="", help="seeds whose models are sampled; empty: all")
    add("--extra", default="", help="more flags for azr.py, as one text: --extra '--steps 100'")
    add("--out", type=Path, default=ROOT / "runs" / "skill")
    add("--results", type=Path, default=ROOT / "docs" / "results", help="where tables and figure go")
    options = parser.parse_args()
    out, tasks, seeds = options.out.resolve(), options.tasks.resolve(), [int(seed) for seed in options.seeds.split(",")]
    groups = options.groups.split(",")
    for name, known in [(group, ABLATIONS) for group in groups] + [
        (n, CONDITIONS) for n in options.conditions.split(",")
    ]:
        if name not in known:
            parser.error(f"there is no {name!r}; choose from {', '.join(known)}")
    conditions = (
        ablated(groups) if options.ablations else {name: CONDITIONS[name] for name in options.conditions.split(",")}
    )
    jobs, parts = jobs_of(conditions, seeds), options.only.split(",")
    models = {"base": SKILL_MODEL} | {job.name: out / job.name / "checkpoint" for job in jobs}
    if "runs" in parts:
        extra = options.extra.split()
        for job in jobs:  # before any of them runs for hours
            claim(out / job.name, flags_of(job, extra), log_of(job, out))
        in_lanes(lambda job: train(job, out, extra), jobs, options.lanes)
    deep = beyond(tasks, out)
    of_seeds = (options.sample_seeds or options.seeds).split(",")
    wanted = ["base", *(job.name for job in jobs if job.condition in SAMPLED and str(job.seed) in of_seeds)]
    wanted = wanted if options.samples > 1 and not options.ablations else []
    if "measure" in parts:
        in_lanes(lambda name: measured(models[name], tasks, out, name), list(models), options.lanes)
        in_lanes(lambda name: sample(models[name], deep, out, name, options.samples), wanted, options.lanes)
    if "table" not in parts:
        return
    if options.ablations:
        result, table = ablation_table(out, seeds, groups)
        texts = {"ablations.json": json.dumps(result, indent=1), "ablations.md": table}
    else:
        samples = {name: sample(models[name], deep, out, name, options.samples) for name in wanted}
        result = analyse(out, list(conditions), seeds, samples | {"count": options.samples} if samples else {})
        shown = [name for name in ("trained", "frozen") if name in conditions]
        texts = {"skill.json": json.dumps(result, indent=1), "skill.md": markdown(result)}
        texts["skill.svg"] = figure(out, shown, seeds)
        texts |= {f"skill/{job.name}.metrics.jsonl": kept_curves(out / job.name) for job in jobs}
    (options.results / "skill").mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (options.results / name).write_text(text, encoding="utf-8")
    print(next(text for name, text in texts.items() if name.endswith(".md")))


if __name__ == "__main__":
    main()
