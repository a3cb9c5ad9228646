"""Extraction of answers, and the judges of code reasoning and mathematics.

What it does: finds the answer in a response (code, last answer tag, last box), judges predicted outputs and inputs with
the executor exactly as training does, and mathematics with math-verify in child processes of its own.
What it leaves out: benchmark code, which has its own file (`scoring_code.py`), and any guess at an answer that a
response does not mark (no "last number in the text").
The math child is this file run as a program (`python scoring.py`), so it starts without the engines.
Sources: math-verify 0.9.0; LiveCodeBench-Execution's and CRUXEval's formats.

    judge_math([("3 \\\\times 10^{8}", "3e8")])         # -> [True]
"""

import ast
import importlib.util
import json
import os
import re
import select
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

from executor import Executor

Progress = Callable[[int], None] | None
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# ---------------------------------------------------------------------------------------------------------------------
# Extraction


def answer_text(response: str) -> str | None:
    """The text of the last `<answer>`, closed or cut off; None without one."""
    head, tag, tail = response.rpartition("<answer>")
    return tail.partition("</answer>")[0].strip() if tag else None


def last_box(text: str) -> str | None:
    """Content of the last complete `\\boxed{...}` with balanced braces; None without one."""
    for start in reversed([match.end() for match in re.finditer(r"\\f?boxed\s*\{", text)]):
        depth = 1
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0) if text[end - 1] != "\\" else 0
            if depth == 0:
                return text[start:end].strip()
    return None


PHRASE = re.compile(r"(?:final\s+)?answer\s*(?:is|:)\s*:?\s*", re.IGNORECASE)


def extract_math(response: str) -> str | None:
    """Last answer tag, in it the last box or else all of it; without tags the last box, the last display formula, or
    what follows the last "answer is". None: nothing to judge (counted apart from a wrong answer)."""
    answer = answer_text(response)
    found = last_box(response if answer is None else answer)
    if found is None and answer is None:
        display = re.findall(r"\\\[(.*?)\\\]", response, re.DOTALL)
        phrases = list(PHRASE.finditer(response))
        found = display[-1] if display else response[phrases[-1].end() :].split("\n")[0] if phrases else ""
    elif found is None:
        found = PHRASE.split(answer)[-1]
    found = re.sub(r"(?<!\.)\.$", "", found.strip()).strip()
    for left, right in ((r"\[", r"\]"), (r"\(", r"\)"), ("$$", "$$"), ("$", "$")):
        inner = found[len(left) : -len(right)]
        if found.startswith(left) and found.endswith(right) and inner and left not in inner:
            found = inner.strip()
    return found or None


def extract_code(response: str) -> str | None:
    """Last python fence of the last answer; without fences the whole answer, without tags the whole response."""
    answer = answer_text(response)
    text = response if answer is None else answer
    fences = re.findall(r"```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return (fences[-1] if fences else text).strip("\n") or None


def sanitize(code: str) -> str:
    """The longest prefix of lines that parses, reduced to imports, functions, classes and assignments.

    Drops what a model appends to a solution: prose, self-tests, prints. (EvalPlus walks a tree-sitter tree to the same
    verdicts.) A text of which no line parses is returned as it is.
    """
    lines = code.replace("\t", "    ").split("\n")
    for end in range(len(lines), 0, -1):
        try:
            tree = ast.parse("\n".join(lines[:end]))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        keep = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign
        kept = [node for node in tree.body if isinstance(node, keep | ast.AnnAssign)]
        spans = [(min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]), node) for node in kept]
        if kept:
            return "\n".join("\n".join(lines[start - 1 : node.end_lineno]) for start, node in spans)
    return code


# ---------------------------------------------------------------------------------------------------------------------
# Code reasoning: CRUXEval, LiveCodeBench-Execution, the project's own tasks


def rename_to_f(code: str, call: str, name: str) -> tuple[str, str]:
    """LiveCodeBench-Execution's program and call as a program with entry `f` and the arguments alone.

    Renames the definition and every call, not attributes of that name; a name `f` that is in the way becomes `f_`.
    Keyword arguments of the call are put in the order of the parameters.
    """
    taken = name != "f" and re.search(r"(?<![\w.])f(?!\w)", code)
    if taken:
        code = re.sub(r"(?<![\w.'\"])f(?![\w'\"])", "f_", code)
    code = re.sub(rf"(?<![\w.]){re.escape(name)}(?!\w)", "f", code)
    parameters = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef) and node.name == "f":
            parameters = {arg.arg: position for position, arg in enumerate(node.args.args)}
    node = ast.parse(call.strip(), mode="eval").body
    keywords = sorted(node.keywords, key=lambda keyword: parameters.get(keyword.arg, len(parameters)))
    return code, ", ".join(ast.unparse(value) for value in [*node.args, *(keyword.value for keyword in keywords)])


def extract_assert(text: str, side: str) -> str | None:
    """The answer in `assert f(input) == output`, the form of CRUXEval's own prompt. `side`: "input" or "output"."""
    for line in (text.strip(), text.strip().split("\n")[0]):
        try:
            test = ast.parse(line).body[0].test
            call, output = test.left, test.comparators[0]
        except (SyntaxError, ValueError, IndexError, AttributeError):
            continue
        if side == "output":
            return ast.get_source_segment(line, output)
        if isinstance(call, ast.Call):
            inner = ast.get_source_segment(line, call)
            return inner[inner.index("(") + 1 : -1].strip()
    return None


def score_reasoning(
    pairs: Sequence[tuple], *, executor: Executor | None = None, progress: Progress = None
) -> list[float]:
    """Scores of (task, answer) pairs, answers as `prompts.parse_answer` gives them: the judge of training itself.

    Right or wrong; an induction answer counts when it is right on every hidden pair.
    """
    scores = [0.0] * len(pairs)
    with nullcontext(executor) if executor else Executor() as judge:
        for kind in ("abduction", "deduction", "induction"):
            chosen = [i for i, (task, answer) in enumerate(pairs) if answer and task.kind == kind]
            if not chosen:
                continue
            if kind == "deduction":
                found = judge.verify_deduction([(pairs[i][0].outputs[0], pairs[i][1]) for i in chosen])
            elif kind == "abduction":
                jobs = [(pairs[i][0].program, pairs[i][0].outputs[0], pairs[i][1]) for i in chosen]
                found = judge.verify_abduction(jobs, progress)
            else:
                jobs = [(pairs[i][1], pairs[i][0].hidden_inputs, pairs[i][0].hidden_outputs) for i in chosen]
                found = judge.verify_induction(jobs, progress)
            for i, judgement in zip(chosen, found, strict=True):
                scores[i] = float(judgement.correct)
    return scores


# ---------------------------------------------------------------------------------------------------------------------
# Mathematics

NUMBER_E = re.compile(r"(?<![\w.\\])(\d+\.?\d*|\.\d+)[eE]([+-]?\d+)(?![\w.])")
MATH_RULES: tuple[tuple[re.Pattern, str], ...] = (  # applied to gold and prediction alike; none drops letters or digits
    (re.compile(r"(?<!\.)\.\s*$"), ""),
    (re.compile(r"\\!|(?<=\d)(?:\\,|\{,\})(?=\d{3})"), ""),  # negative space; thousands
    (re.compile(r"\\[,;:]"), " "),
    (re.compile("°"), r"^\\circ"),
    (NUMBER_E, r"\1 \\times 10^{\2}"),  # math-verify reads 3e8 as 3*E*8
    (re.compile(r"(?<=\d)\s+i(?![A-Za-z])"), "i"),
)
MATH_LIMIT_S = 30  # wall clock, for math-verify knows no other; short limits fail easy pairs on a busy machine


def normalise_math(text: str) -> str:
    for pattern, replacement in MATH_RULES:
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
    want = parse(f"\\boxed{{{gold}}}", parsing_timeout=MATH_LIMIT_S)
    got = parse(boxed, parsing_timeout=MATH_LIMIT_S)
    return bool(verify(want, got, timeout_seconds=MATH_LIMIT_S))


def require_math_verify() -> None:
    """Raise ValueError in one sentence where math-verify is missing."""
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("Math suites need math-verify: pip install -r requirements-eval.txt")


def judge_math(pairs: Sequence[tuple[str, str]], progress: Progress = None, workers: int | None = None) -> list[bool]:
    """Verdicts of (prediction, gold) pairs, computed in child processes with a memory limit.

    A pair that hangs or kills its child is wrong and costs the others nothing. Raises RuntimeError where math-verify is
    missing.
    """
    require_math_verify()
    workers = min(workers or max(1, (os.cpu_count() or 2) // 2), len(pairs)) or 1
    with ThreadPoolExecutor(workers) as pool:
        parts = list(pool.map(lambda part: _judge_part(part, progress), [pairs[w::workers] for w in range(workers)]))
    verdicts = [False] * len(pairs)
    for w, part in enumerate(parts):
        verdicts[w::workers] = part
    return verdicts


def _judge_part(pairs: Sequence[tuple[str, str]], progress: Progress) -> list[bool]:
    """One child at a time answers pair after pair; when it dies or is silent too long, a new one takes the rest."""
    verdicts: list[bool] = []
    while len(verdicts) < len(pairs):
        command = [sys.executable, "-m", "suites.scoring"]
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
        ) as child:
            if child.stdout.readline() != "ready\n":
                raise RuntimeError("The math child did not start: try `python -m suites.scoring` and read its error.")
            for pair in pairs[len(verdicts) :]:
                child.stdin.write(json.dumps(pair) + "\n")
                child.stdin.flush()
                ready, _, _ = select.select([child.stdout], [], [], 4 * MATH_LIMIT_S)
                line = child.stdout.readline() if ready else ""
                verdicts.append(line == "true\n")
                if progress:
                    progress(1)
                if not line:
                    break
            child.kill()
    return verdicts


def _math_child() -> None:
    """Say "ready", then answer each [prediction, gold] line with true or false. An exception ends the process: whatever
    sympy raises on a model's text, the answer is not right."""
    import resource

    if math_equal("1", "1"):
        print("ready", flush=True)
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    for line in sys.stdin:
        print("true" if math_equal(*json.loads(line)) else "false", flush=True)


if __name__ == "__main__":
    _math_child()
