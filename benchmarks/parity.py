"""Do the judges agree with the reference scorers? The complete, slow comparison behind `tests/test_suites.py`.

What it does: the booleans of stored samples against EvalPlus's, all 164 + 378 reference solutions, CRUXEval's verdicts
and gold answers, math-verify's pairs, and every gold of the six mathematics sets against itself.
What it leaves out: generation. Data and stored verdicts are not in this repository: give their folder.

    python benchmarks/parity.py FOLDER
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suites import table as suites  # noqa: E402
from suites.extract import extract_assert  # noqa: E402
from suites.judge_code import code_executor  # noqa: E402
from suites.judge_math import judge_math, math_equal  # noqa: E402

STORED = {
    "humaneval": "humaneval_qwen25coder05b",
    "humaneval+": "humaneval_qwen25coder05b",
    "mbpp": "mbpp100_qwen25coder05b",
    "mbpp+": "mbpp100_qwen25coder05b",
}


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def report(what: str, right: int, of: int, started: float, wrong=()) -> bool:
    print(
        f"{what:<44} {right:>5} / {of:<5} {time.monotonic() - started:7.1f} s  {' '.join(map(str, wrong))}", flush=True
    )
    return right == of


def main(folder: str) -> int:
    bench, good = Path(folder), []
    with code_executor() as executor:
        for name, stem in STORED.items():
            suite, items, _ = suites.load_items(name, bench, {})
            rows = {item.id: item.gold for item in items}
            started, samples = time.monotonic(), lines_of(bench / "parity" / f"{stem}.jsonl")
            verdicts = json.loads((bench / "parity" / f"{stem}_verdicts.json").read_text())["verdicts"]
            scores = suite.score([(rows[s["task_id"]], s["solution"]) for s in samples], executor=executor)
            theirs = [verdicts[s["task_id"]]["plus" if name.endswith("+") else "base"] for s in samples]
            wrong = [s["task_id"] for s, ours, ref in zip(samples, scores, theirs, strict=True) if bool(ours) != ref]
            good.append(
                report(f"{name}: same verdict as EvalPlus", len(samples) - len(wrong), len(samples), started, wrong)
            )
            if name.endswith("+"):
                started = time.monotonic()
                scores = suite.score(
                    [(r, r["prompt"] + r["canonical_solution"]) for r in rows.values()], executor=executor
                )
                wrong = [task for task, score in zip(rows, scores, strict=True) if not score]
                good.append(
                    report(f"{name}: reference solutions pass", len(rows) - len(wrong), len(rows), started, wrong)
                )
    for name, side, rule in (("cruxeval-o", "output", "o"), ("cruxeval-i", "input", "i")):
        suite, items, _ = suites.load_items(name, bench, {})
        tasks = {item.id: item.gold for item in items}
        started = time.monotonic()
        golds = [task.outputs[0] if side == "output" else task.inputs[0] for task in tasks.values()]
        scores = suite.score(list(zip(tasks.values(), golds, strict=True)))
        wrong = [task for task, score in zip(tasks, scores, strict=True) if not score]
        report(f"{name}: gold answers pass", len(tasks) - len(wrong), len(tasks), started, wrong)
        good.append(
            len(wrong) <= (0 if side == "output" else 14)
        )  # 14 inputs are no literals, see tests/test_suites.py
        stem, started = f"cruxeval_{rule}_qwen25coder05b", time.monotonic()
        samples = lines_of(bench / "parity" / f"{stem}.jsonl")
        verdicts = json.loads((bench / "parity" / f"{stem}_verdicts.json").read_text())["verdicts"]
        answers = [extract_assert(s["completion"], side) for s in samples]
        scores = suite.score([(tasks[s["task_id"]], answer) for s, answer in zip(samples, answers, strict=True)])
        wrong = [s["task_id"] for s, ours in zip(samples, scores, strict=True)
                 if bool(ours) != verdicts[s["task_id"]]["azr_rule_pass"]]  # fmt: skip
        good.append(report(f"{name}: same verdict", len(samples) - len(wrong), len(samples), started, wrong))
    pairs, started = lines_of(bench / "parity" / "math_pairs.jsonl"), time.monotonic()
    raw = [math_equal(r["prediction"], r["gold"], normalise=False, call=r["call"]) for r in pairs]
    ours = [math_equal(r["prediction"], r["gold"], call=r["call"]) for r in pairs]
    wrong = [r["id"] for r, v in zip(pairs, raw, strict=True) if v != r["expected"]]
    good.append(report("math pairs: raw verdict as stored", len(pairs) - len(wrong), len(pairs), started, wrong))
    wrong = [r["id"] for r, a, b in zip(pairs, raw, ours, strict=True) if a != b and b != r["intended"]]
    good.append(
        report("math pairs: normalised only towards intent", len(pairs) - len(wrong), len(pairs), started, wrong)
    )
    changed, known = (
        sum(a != b for a, b in zip(raw, ours, strict=True)),
        [r for r in pairs if r["intended"] is not None],
    )
    agree = [
        sum(v == r["intended"] for r, v in zip(pairs, vs, strict=True) if r["intended"] is not None)
        for vs in (raw, ours)
    ]
    print(f"  normalisation changed {changed} verdicts; agrees with intent {agree[0]} -> {agree[1]} of {len(known)}")
    for name in suites.TABLE1["math"]:
        _, items, _ = suites.load_items(name, bench, {})
        started = time.monotonic()
        verdicts = judge_math([(item.gold, item.gold) for item in items])
        wrong = [item.id for item, verdict in zip(items, verdicts, strict=True) if not verdict]
        good.append(report(f"{name}: golds match themselves", len(items) - len(wrong), len(items), started, wrong))
    return 0 if all(good) else 1


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1], "parity").is_dir():
        sys.exit("usage: python benchmarks/parity.py FOLDER, with the data and a folder `parity` of stored verdicts")
    sys.exit(main(sys.argv[1]))
