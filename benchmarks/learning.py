"""Does self-play on the embedded model raise held-out accuracy, and what is the effect made of? Seeds x controls.

What it does: runs `python azr.py --preset tiny` for every seed under four conditions (self-play; rewards shuffled;
proposer frozen; solver on the fixed seed tasks only), measures every final checkpoint and the base model on the same
held-out tasks (greedy, T = 1, and with reasoning forced: measuring.py), and writes table, intervals and figure.
What it leaves out: choosing anything. Settings were chosen on tiny/dev.jsonl; the test file is read here only.
Paper: section 4 has no such control; the idea of the shuffled control is from "Spurious Rewards" (Shao et al., 2025).

    python benchmarks/learning.py --seeds 0,1,2 --out runs/learning      # finished runs and measurements are kept
"""

import argparse
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from measuring import (
    MODES,
    ROOT,
    advantage,
    claim,
    curve,
    gain_interval,
    measured,
    proposer,
    read_rows,
    score,
    spread,
    summary,
    train,
)

from harness.plots import svg_plot
from prompts import KINDS

CONDITIONS = {
    "self-play": [],
    "shuffled rewards": ["--control", "shuffle"],
    "frozen proposer": ["--no-train-proposer"],
    "fixed seeds": ["--control", "fixed"],
}
CURVE = 150  # tasks of the curve during a run (the file is balanced in every prefix); the tables use all of them

# ---------------------------------------------------------------------------------------------------------------------
# The runs


def run_all(seeds: list[int], conditions: list[str], extra: list[str], tasks_file: Path, out: Path, lanes: int) -> None:
    """Every condition and seed, `lanes` at a time with one thread each; what is finished is not run again."""

    def one(job: tuple[str, list[str], Path]) -> None:
        name, flags, log = job
        train(out / name, log, flags)
        measured(out / name / "checkpoint", tasks_file, out, name)
        print(f"done: {name}", flush=True)

    jobs, suite = [], f"tasks:{tasks_file}:{CURVE}"
    for seed, condition in itertools.product(seeds, conditions):
        name = f"{condition.replace(' ', '-')}-{seed}"
        flags = ["--preset", "tiny", "--seed", str(seed), *CONDITIONS[condition], *extra, "--eval-suites", suite]
        jobs.append((name, flags, out / "logs" / f"{name}.log"))
        claim(out / name, *jobs[-1][1:])  # before any of them runs
    with ThreadPoolExecutor(lanes) as pool:
        waiting = [pool.submit(measured, ROOT / "tiny" / "model", tasks_file, out, "base")]
        for item in waiting + [pool.submit(one, job) for job in jobs]:
            item.result()


# ---------------------------------------------------------------------------------------------------------------------
# What comes out


def analyse(out: Path, seeds: list[int], conditions: list[str]) -> dict:
    base = read_rows(out / "rows" / "base.jsonl")
    result: dict = {"seeds": seeds, "n": len(base["greedy"]), "base": {}, "conditions": {}}
    result["base"] = {mode: summary([base[mode]]) for mode in MODES}
    ours = [read_rows(out / "rows" / f"self-play-{seed}.jsonl") for seed in seeds]
    for condition in conditions:
        runs = [read_rows(out / "rows" / f"{condition.replace(' ', '-')}-{seed}.jsonl") for seed in seeds]
        entry: dict = {mode: summary([run[mode] for run in runs]) for mode in MODES}
        for mode in MODES:
            for kind in ("", *KINDS):
                after = [run[mode] for run in runs]
                gains = [score(rows, kind) - score(base[mode], kind) for rows in after]
                low, high = gain_interval(base[mode], after, kind)
                entry[mode][f"gain {kind or 'all'}"] = {
                    "mean": mean(gains), "sd": spread(gains), "low": low, "high": high, "per_seed": gains
                }  # fmt: skip
            entry[mode]["self-play minus this"] = advantage([run[mode] for run in ours], [run[mode] for run in runs])
        entry["curve"] = [curve(out / f"{condition.replace(' ', '-')}-{seed}" / "metrics.jsonl") for seed in seeds]
        entry["proposer"] = [proposer(out / f"{condition.replace(' ', '-')}-{seed}" / "tasks.jsonl") for seed in seeds]
        result["conditions"][condition] = entry
    return result


def markdown(result: dict) -> str:
    def percent(value) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    lines = [
        f"# Learning of the embedded model: {len(result['seeds'])} seeds, {result['n']} held-out tasks", "",
        "Accuracy in percent, mean over seeds. Gain: points against the base model, mean (sd over seeds) "
        "[95 % bootstrap interval over seeds and tasks].", "",
        "| condition | mode | all | abduction | deduction | induction | reasons first | gain of all | per seed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    groups = {"base": result["base"]} | result["conditions"]
    for condition, entry in groups.items():
        for mode in MODES:
            row, gain = entry[mode], entry[mode].get("gain all")
            cells = [percent(row[name]) for name in ("all", *KINDS, "reasons")]
            text, each = "-", "-"
            if gain:
                low, high = 100 * gain["low"], 100 * gain["high"]
                text = f"{100 * gain['mean']:+.1f} ({100 * gain['sd']:.1f}) [{low:+.1f}, {high:+.1f}]"
                each = " ".join(f"{100 * value:+.1f}" for value in gain["per_seed"])
            lines.append(f"| {condition} | {mode} | {' | '.join(cells)} | {text} | {each} |")
    lines += ["", "Gain per task type:", "", "| condition | mode | " + " | ".join(KINDS) + " |"]
    lines += ["|---|---|---|---|---|"]
    for condition, entry in result["conditions"].items():
        for mode in MODES:
            found = [entry[mode][f"gain {kind}"] for kind in KINDS]
            cells = [f"{100 * g['mean']:+.1f} [{100 * g['low']:+.1f}, {100 * g['high']:+.1f}]" for g in found]
            lines.append(f"| {condition} | {mode} | {' | '.join(cells)} |")
    lines += ["", "Self-play minus the other conditions, paired by seed and task:", ""]
    lines += ["| condition | mode | difference | per seed |", "|---|---|---|---|"]
    for condition in list(result["conditions"])[1:]:
        for mode in MODES:
            gap = result["conditions"][condition][mode]["self-play minus this"]
            text = f"{100 * gap['mean']:+.1f} [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]"
            lines.append(f"| {condition} | {mode} | {text} | {' '.join(f'{100 * v:+.1f}' for v in gap['per_seed'])} |")
    lines += ["", "Accuracy by depth (statements); programs of the base model's corpus have up to 4:", ""]
    depths = list(result["base"]["greedy"]["depth"])
    lines += ["| condition | mode | " + " | ".join(depths) + " | true steps | correct when reasoning |"]
    lines += ["|---|---|" + "---|" * (len(depths) + 2)]
    for condition, entry in groups.items():
        for mode in MODES:
            row = entry[mode]
            cells = [percent(row["depth"][depth]) for depth in depths]
            cells += [percent(row["steps"]), percent(row["correct_when_reasoning"])]
            lines.append(f"| {condition} | {mode} | {' | '.join(cells)} |")
    lines += ["", "True steps with reasoning forced (greedy), per operation, base and self-play:", ""]
    lines += ["| operation | base | self-play | steps judged |", "|---|---|---|---|"]
    after = result["conditions"]["self-play"]["forced"]["operations"]
    for name, (value, count) in result["base"]["forced"]["operations"].items():
        trained, more = after.get(name, (None, 0))
        lines.append(f"| `{name}` | {percent(value)} | {percent(trained)} | {count}, {more} |")
    lines += ["", "Proposer, mean of the first and the last five steps:", ""]
    lines += ["| condition | valid | solve rate | 0 < r < 1 | statements |", "|---|---|---|---|---|"]
    for condition, entry in result["conditions"].items():
        runs = [run for run in entry["proposer"] if run]
        if runs:
            cells = [
                f"{mean(run['first'][name] for run in runs):.2f} to {mean(run['last'][name] for run in runs):.2f}"
                for name in ("valid", "solve_rate", "learnable", "statements")
            ]
            lines.append(f"| {condition} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def svg(result: dict) -> str:
    """Greedy held-out accuracy over steps: the mean of each condition's seeds, and their range as a pale band."""
    curves, bands = {}, {}
    for name, entry in result["conditions"].items():
        runs = [dict(run) for run in entry["curve"]]
        steps = [step for step in runs[0] if all(step in run for run in runs)]
        values = {step: [100 * run[step] for run in runs] for step in steps}
        curves[name] = [(step, mean(found)) for step, found in values.items()]
        bands[name] = [(step, min(found), max(found)) for step, found in values.items()]
    return svg_plot(curves, "Greedy held-out accuracy, mean and range of the seeds", "percent", bands)


def main() -> None:
    parser = argparse.ArgumentParser(description="Seeds x controls on the embedded model.")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--tasks", type=Path, default=ROOT / "tiny" / "test.jsonl")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "learning")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results", help="where table and figure go")
    parser.add_argument("--lanes", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--conditions", default=",".join(CONDITIONS), help="the first must be self-play")
    parser.add_argument("--extra", default="", help="more flags for azr.py, as one text: --extra '--steps 160'")
    parser.add_argument("--name", default="learning", help="name of table and figure")
    arguments = parser.parse_args()
    seeds, conditions = [int(seed) for seed in arguments.seeds.split(",")], arguments.conditions.split(",")
    out = arguments.out.resolve()
    run_all(seeds, conditions, arguments.extra.split(), arguments.tasks.resolve(), out, arguments.lanes)
    result = analyse(out, seeds, conditions)
    arguments.results.mkdir(parents=True, exist_ok=True)
    texts = {"json": json.dumps(result, indent=1), "md": markdown(result), "svg": svg(result)}
    for ending, text in texts.items():
        (arguments.results / f"{arguments.name}.{ending}").write_text(text, encoding="utf-8")
    print(markdown(result))


if __name__ == "__main__":
    main()
