"""The judge of mathematics: math-verify's verdict on rewritten texts, in child processes.

What it does: rewrites gold and answer alike (`3e8`, degree signs, thousands) and asks math-verify. The children are
this file run as a program, so that they start without the engines.
What it leaves out: rules that could turn a right verdict into a wrong one: none drops letters or digits.
Source: math-verify 0.9.0.

    judge_math([("3e8", "3 \\\\times 10^{8}")])               # -> [True]; pairs are (gold, answer)
"""

import importlib.util
import json
import os
import re
import resource
import select
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

NUMBER_E = re.compile(r"(?<![\w.\\])(\d+\.?\d*|\.\d+)[eE]([+-]?\d+)(?![\w.])")
RULES: tuple[tuple[re.Pattern, str], ...] = (
    (re.compile(r"(?<!\.)\.\s*$"), ""),
    (re.compile(r"\\!|(?<=\d)(?:\\,|\{,\})(?=\d{3})"), ""),  # negative space; thousands
    (re.compile(r"\\[,;:]"), " "),
    (re.compile("°"), r"^\\circ"),
    (NUMBER_E, r"\1 \\times 10^{\2}"),  # math-verify reads 3e8 as 3*E*8
    (re.compile(r"(?<=\d)\s+i(?![A-Za-z])"), "i"),
)
LIMIT_S = 30  # wall clock, for math-verify knows no other; short limits fail easy pairs on a busy machine
MEMORY = 4 << 30  # bytes of a child


def normalise_math(text: str) -> str:
    for pattern, replacement in RULES:
        text = pattern.sub(replacement, text.strip())
    return text


def math_equal(prediction: str, gold: str, normalise: bool = True, call: str = "boxed") -> bool:
    """math-verify's verdict. `call`: "boxed" wraps the prediction in a box, "text" lets math-verify search it.

    Main thread only (math-verify sets an alarm).
    """
    from math_verify import parse, verify

    if normalise:
        prediction, gold = normalise_math(prediction), normalise_math(gold)
    boxed = f"\\boxed{{{prediction}}}" if call == "boxed" else prediction
    want = parse(f"\\boxed{{{gold}}}", parsing_timeout=LIMIT_S)
    got = parse(boxed, parsing_timeout=LIMIT_S)
    return bool(verify(want, got, timeout_seconds=LIMIT_S))


def require_math_verify() -> None:
    """Raise ValueError in one sentence where math-verify is missing."""
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("Math suites need math-verify: pip install -r requirements-eval.txt")


def judge_math(pairs: Sequence[tuple[str, str]], progress: Callable[[int], None] | None = None) -> list[bool]:
    """Verdicts on (gold, answer) pairs. One that hangs or kills its child is wrong and costs the others nothing."""
    require_math_verify()
    workers = max(1, (os.cpu_count() or 2) // 2)
    with ThreadPoolExecutor(workers) as pool:
        parts = list(pool.map(judge_part, [pairs[w::workers] for w in range(workers)], repeat(progress)))
    return [parts[i % workers][i // workers] for i in range(len(pairs))]


def judge_part(pairs: Sequence[tuple[str, str]], progress: Callable[[int], None] | None) -> list[bool]:
    """One child at a time answers pair after pair; when it dies or is silent too long, a new one takes the rest."""
    verdicts: list[bool] = []
    while len(verdicts) < len(pairs):
        command, pipe = [sys.executable, "-m", "suites.judge_math"], subprocess.PIPE
        with subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, cwd=Path(__file__).parents[1]
        ) as child:
            if child.stdout.readline() != "ready\n":
                raise RuntimeError(f"The math child did not start: try `{' '.join(command)}` and read its error.")
            for pair in pairs[len(verdicts) :]:
                print(json.dumps(pair), file=child.stdin, flush=True)
                ready, _, _ = select.select([child.stdout], [], [], 4 * LIMIT_S)
                line = child.stdout.readline() if ready else ""
                verdicts.append(line == "true\n")
                if progress:
                    progress(1)
                if not line:
                    break
            child.kill()
    return verdicts


def serve() -> None:
    """The child: say "ready", then answer each [gold, answer] line with true or false. An exception ends the process:
    whatever sympy raises on a model's text, the answer is not right."""
    if math_equal("1", "1"):
        print("ready", flush=True)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        gold, answer = json.loads(line)
        print("true" if math_equal(answer, gold) else "false", flush=True)


if __name__ == "__main__":
    serve()
