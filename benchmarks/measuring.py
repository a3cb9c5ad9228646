"""What the learning benchmarks share: one model measured on held-out tasks, and what its rows say.

What it does: asks a model every held-out task in four modes (greedy, T = 1, and both with reasoning forced) and writes
one row per task and mode; scores rows, with bootstrap intervals over seeds and tasks together; reads a run's own logs.
A step of a forced reasoning counts as true when the operation, run on the value the model itself wrote before, gives
the value it wrote after.
What it leaves out: which runs there are and what is said about them (learning.py, skill.py).

    python benchmarks/measuring.py MODEL TASKS.jsonl OUT.jsonl      # one row per mode and task
"""

import ast
import hashlib
import json
import os
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from buffers import Task, load_tasks  # noqa: E402
from prompts import KINDS  # noqa: E402

FORCED = "Step by step: "  # the first words of every reasoning in the corpus (tiny/make.py)
MODES = {"greedy": ("", 0.0), "T=1": ("", 1.0), "forced": (FORCED, 0.0), "forced T=1": (FORCED, 1.0)}


def call(command: list[str], log: Path) -> None:
    """Run a command with one thread, its output at the end of `log`. Raises RuntimeError where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with log.open("a") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT).returncode
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with code {code}: see {log}")


def finished(folder: Path) -> bool:
    """Whether a run has all its steps, which is when its last checkpoint is there."""
    about = folder / "config.json"
    if not about.exists():
        return False
    steps = json.loads(about.read_text(encoding="utf-8"))["config"]["steps"]
    return (folder / f"checkpoint-{steps:06d}").is_dir()


def claim(folder: Path, flags: list[str], log: Path) -> None:
    """Keep the flags, or the digest of the tasks, of a result beside its log. SystemExit where it had others."""
    kept, text = log.with_suffix(".flags"), " ".join(flags)
    log.parent.mkdir(parents=True, exist_ok=True)
    if not (folder.exists() and kept.exists()):
        kept.write_text(text, encoding="utf-8")
    elif kept.read_text(encoding="utf-8") != text:
        sys.exit(f"{folder} was made with other flags or tasks ({kept}): give another --out, or delete it")


def train(folder: Path, log: Path, flags: list[str]) -> None:
    """Run azr.py with these flags into a folder, or go on with a run that was stopped; leave a finished one."""
    claim(folder, flags, log)
    if finished(folder):
        return
    started = (folder / "config.json").exists()
    command = ["--resume", str(folder)] if started else [*flags, "--out", str(folder)]
    call([sys.executable, "azr.py", *command], log)


def measured(model: Path, tasks: Path, out: Path, name: str) -> Path:
    """The rows of a model, OUT/rows/NAME.jsonl, measured in a process of its own unless they are there."""
    rows, log = out / "rows" / f"{name}.jsonl", out / "logs" / f"measure-{name}.log"
    claim(rows, [hashlib.sha256(tasks.read_bytes()).hexdigest()], log)
    if not rows.exists():
        call([sys.executable, __file__, str(model), str(tasks), str(rows)], log)
    return rows


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
# What rows say


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


def statements(record: dict) -> int:
    """Of a proposed program of the embedded models' domain."""
    return record["program"].count("\n") - 1


def proposer(path: Path) -> dict:
    """First and last five steps of a run: valid share, solve rate, share with 0 < r < 1, statements per program, and
    the shares of programs with more than four statements and of different programs."""
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
            "solve_rate": mean(record["solve_rate"] for record in valid) if valid else 0.0,
            "learnable": mean(0 < record["solve_rate"] < 1 for record in valid) if valid else 0.0,
            "statements": mean(map(statements, own)) if own else 0.0,
            "deep": mean(statements(record) > 4 for record in own) if own else 0.0,
            "distinct": len({record["program"] for record in own}) / len(own) if own else 0.0,
        }
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def signed(gap: dict) -> str:
    """A difference as `advantage` gives it: points, interval, and each seed."""
    each = " ".join(f"{100 * value:+.1f}" for value in gap["per_seed"])
    return f"{100 * gap['mean']:+.1f} [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}] ({each})"


def row_of(cells: Sequence) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def head(cells: Sequence[str]) -> list[str]:
    return [row_of(cells), "|" + "---|" * len(cells)]


if __name__ == "__main__":
    measure(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
