"""Does self-play on the embedded model raise held-out accuracy, and what is the effect made of? Seeds x controls.

What it does: runs `python azr.py` for every seed under four conditions (self-play; rewards shuffled; proposer frozen;
solver on the fixed seed tasks only), measures every final checkpoint and the base model on the same held-out tasks
(greedy, T = 1, and with reasoning forced), and writes table, intervals and figure. A step of a forced reasoning counts
as true when the operation, run on the value the model itself wrote before, gives the value it wrote after.
What it leaves out: choosing anything. Settings were chosen on tiny/dev.jsonl; the test file is read here only.
Paper: section 4 has no such control; the idea of the shuffled control is from "Spurious Rewards" (Shao et al., 2025).

    python benchmarks/learning.py --seeds 0,1,2 --out runs/learning      # finished runs and measurements are kept
"""

import argparse
import ast
import json
import os
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from buffers import Task, load_tasks  # noqa: E402
from harness.plots import svg_plot  # noqa: E402
from prompts import KINDS  # noqa: E402

CONDITIONS = {
    "self-play": [],
    "shuffled rewards": ["--control", "shuffle"],
    "frozen proposer": ["--no-train-proposer"],
    "fixed seeds": ["--control", "fixed"],
}
CURVE = 150  # tasks of the curve during a run (the file is balanced in every prefix); the tables use all of them
FORCED = "Step by step: "  # the first words of every reasoning in the corpus (tiny/make.py)
MODES = {"greedy": ("", 0.0), "T=1": ("", 1.0), "forced": (FORCED, 0.0), "forced T=1": (FORCED, 1.0)}

# ---------------------------------------------------------------------------------------------------------------------
# One model measured (runs in its own process)


def measure(model: str, tasks_file: Path, out: Path) -> None:
    """Write one row per mode and held-out task: correct, reasons first, and the truth of each step it wrote."""
    import torch

    from executor import Executor
    from policy.dialogue import encode, response_text, split_response, wrap
    from policy.load import load_policy, make_engine

    torch.set_num_threads(1)
    tasks = load_tasks(tasks_file, KINDS)
    policy, tokenizer = load_policy(model, "cpu", "float32")
    engine = make_engine("transformers", model, policy, tokenizer, max_model_len=1024, token_budget=65536)
    rows = []
    with Executor() as executor:
        for mode, (prefix, temperature) in MODES.items():
            texts = [wrap(KINDS[task.kind].solve(task), tokenizer) + prefix for task in tasks]
            encoded = [encode(text, tokenizer) for text in texts]
            found = engine.generate(encoded, max_new_tokens=160, temperature=temperature, seed=0)
            texts = [prefix + response_text(item[0].token_ids, tokenizer, engine.eos) for item in found]
            parts = [split_response(text) for text in texts]
            answers = [KINDS[task.kind].parse_answer(part.answer) for task, part in zip(tasks, parts, strict=True)]
            correct = judge(executor, tasks, answers)
            for task, part, right in zip(tasks, parts, correct, strict=True):
                row = {"mode": mode, "id": task.id, "kind": task.kind, "depth": task.depth, "correct": right}
                row |= {"reasons": bool(part.think), "formatted": part.formatted, "steps": true_steps(task, part.think)}
                rows.append(row)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def judge(executor, tasks: list[Task], answers: list[str | None]) -> list[bool]:
    right = [False] * len(tasks)
    for name, kind in KINDS.items():
        chosen = [i for i, task in enumerate(tasks) if task.kind == name and answers[i] is not None]
        found = kind.verify(executor, [(tasks[i], answers[i]) for i in chosen])
        for i, judgement in zip(chosen, found, strict=True):
            right[i] = judgement.correct
    return right


def true_steps(task: Task, think: str) -> list[tuple[str, bool]]:
    """(operation, whether the step is true) for each statement of a deduction or abduction task that the reasoning
    goes through in order; a step that is missing or out of order is not true. Only our own statements are run."""
    if task.kind == "induction" or not think.startswith(FORCED.strip()):
        return []
    statements = [line.removeprefix("    x = ") for line in task.program.split("\n")[1:-1]]
    back = task.kind == "abduction"
    if back:
        statements.reverse()
    clauses = think.removeprefix(FORCED.strip()).strip().split("; ")
    value, steps, known = read(task.outputs[0] if back else task.inputs[0])[0], [], True
    for number, statement in enumerate(statements):
        code, _, text = (clauses[number] if number < len(clauses) else "").partition(" <- " if back else " -> ")
        written, readable = read(text)
        before, after = (written, value) if back else (value, written)
        if not known:
            break  # what the model wrote before is no value: nothing to judge this step by
        true = code == statement and readable and runs_to(statement, before, after)
        steps.append((operation(statement), true))
        value, known = written, readable
    return steps


def read(text: str) -> tuple:
    try:
        return ast.literal_eval(text), True
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None, False


def runs_to(statement: str, before, after) -> bool:
    try:
        return repr(eval(statement, {}, {"x": before})) == repr(after)
    except (TypeError, ValueError, IndexError, AttributeError, NameError):
        return False


def operation(statement: str) -> str:
    """The statement with its constant taken out, so that `x + 1` and `x + 3` are one operation."""
    kept = (
        "x[::-1]",
        "x[1:]",
        "x[:-1]",
        "x[:2]",
        "x[0]",
        "x[-1]",
        "x * 2",
        "v * 2",
        "x[1:] + x[:1]",
        "x[-1:] + x[:-1]",
    )
    if any(word in statement and "v +" not in statement for word in kept):
        return statement
    return "".join("c" if char in "123" else char for char in statement) if "'" not in statement else letter(statement)


def letter(statement: str) -> str:
    for name in "abcde":
        statement = statement.replace(f"'{name}'", "'c'")
    return statement


# ---------------------------------------------------------------------------------------------------------------------
# The runs


def run_all(seeds: list[int], conditions: list[str], extra: list[str], tasks_file: Path, out: Path, lanes: int) -> None:
    """Every condition and seed, `lanes` at a time with one thread each; what is finished is not run again."""

    def call(command: list[str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with log.open("w") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT).returncode
        if code:
            raise RuntimeError(f"{' '.join(command)} ended with code {code}: see {log}")

    def measured(model: Path, name: str) -> None:
        rows = out / "rows" / f"{name}.jsonl"
        if not rows.exists():
            arguments = ["--measure", str(model), "--tasks", str(tasks_file), "--out", str(rows)]
            call([sys.executable, __file__, *arguments], out / "logs" / f"measure-{name}.log")

    def one(job: tuple[int, str]) -> None:
        seed, condition = job
        name = f"{condition.replace(' ', '-')}-{seed}"
        folder = out / name
        if not (folder / "curve.svg").exists():
            command = [sys.executable, "azr.py", "--seed", str(seed), *CONDITIONS[condition], *extra]
            command += ["--eval-suites", f"tasks:{tasks_file}:{CURVE}", "--out", str(folder)]
            call(command, out / "logs" / f"{name}.log")
        measured(folder / "checkpoint", name)
        print(f"done: {name}", flush=True)

    jobs = [(seed, condition) for seed in seeds for condition in conditions]
    with ThreadPoolExecutor(lanes) as pool:
        waiting = [pool.submit(measured, ROOT / "tiny" / "model", "base")] + [pool.submit(one, job) for job in jobs]
        for item in waiting:
            item.result()


# ---------------------------------------------------------------------------------------------------------------------
# What comes out


def read_rows(path: Path) -> dict[str, list[dict]]:
    rows = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[row["mode"]].append(row)
    return rows


def score(rows: list[dict], kind: str = "") -> float:
    return mean(row["correct"] for row in rows if kind in ("", row["kind"]))


def interval(statistic: Callable[[random.Random], float], draws: int = 2000) -> tuple[float, float]:
    rng = random.Random(0)
    values = sorted(statistic(rng) for _ in range(draws))
    return values[int(0.025 * draws)], values[int(0.975 * draws)]


def gain_interval(before: list[dict], after: list[list[dict]], kind: str = "") -> tuple[float, float]:
    """Bootstrap over seeds and over held-out tasks together; before and after are paired by task."""
    chosen = [i for i, row in enumerate(before) if kind in ("", row["kind"])]

    def statistic(rng: random.Random) -> float:
        tasks, runs = rng.choices(chosen, k=len(chosen)), rng.choices(after, k=len(after))
        return mean(mean(run[i]["correct"] - before[i]["correct"] for i in tasks) for run in runs)

    return interval(statistic, 500)


def advantage(ours: list[list[dict]], other: list[list[dict]]) -> dict:
    """Mean difference of two conditions, paired by seed and held-out task, with its bootstrap interval."""

    def statistic(rng: random.Random) -> float:
        tasks = rng.choices(range(len(ours[0])), k=len(ours[0]))
        pairs = rng.choices(list(zip(ours, other, strict=True)), k=len(ours))
        return mean(mean(a[i]["correct"] - b[i]["correct"] for i in tasks) for a, b in pairs)

    each = [score(a) - score(b) for a, b in zip(ours, other, strict=True)]
    low, high = interval(statistic, 500)
    return {"mean": mean(each), "low": low, "high": high, "per_seed": each}


def spread(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


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


def summary(runs: list[list[dict]]) -> dict:
    """Accuracy per kind and depth, share that reasons first and accuracy when it does, truth of forced steps."""
    rows = [row for run in runs for row in run]
    reasoned, steps = [row for row in rows if row["reasons"]], defaultdict(list)
    for row in rows:
        for name, true in row["steps"]:
            steps[name].append(true)
    per_run = [score(run) for run in runs]
    return {
        "all": mean(per_run), "sd": spread(per_run),
        **{kind: score(rows, kind) for kind in KINDS},
        "depth": {
            str(depth): mean(row["correct"] for row in rows if row["depth"] == depth)
            for depth in sorted({row["depth"] for row in rows})
        },
        "formatted": mean(row["formatted"] for row in rows),
        "reasons": len(reasoned) / len(rows),
        "correct_when_reasoning": score(reasoned) if reasoned else None,
        "steps": mean(true for found in steps.values() for true in found) if steps else None,
        "operations": {name: [mean(found), len(found)] for name, found in sorted(steps.items())},
    }  # fmt: skip


def curve(path: Path) -> list[tuple[int, float]]:
    """(step, greedy held-out accuracy) from a run's own log."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(record["step"], record["score"]) for record in records if "score" in record]


def proposer(path: Path) -> dict:
    """First and last five steps of a run: valid share, solve rate, share with 0 < r < 1, statements per program."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    if not records:
        return {}
    last, found = max(record["step"] for record in records), {}
    for name, steps in (("first", range(1, 6)), ("last", range(last - 4, last + 1))):
        chosen = [record for record in records if record["step"] in steps]
        valid = [record for record in chosen if record["solve_rate"] is not None]
        own = [record for record in valid if record["kind"] != "induction"]
        found[name] = {
            "valid": len(valid) / len(chosen),
            "solve_rate": mean(record["solve_rate"] for record in valid),
            "learnable": mean(0 < record["solve_rate"] < 1 for record in valid),
            "statements": mean(record["program"].count("\n") - 1 for record in own) if own else 0.0,
        }
    return found


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
    parser.add_argument("--measure", default="", help="only measure this model folder into --out (used internally)")
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.tasks, arguments.out)
        return
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
