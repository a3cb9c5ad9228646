"""Judges of benchmark code: EvalPlus's rules for HumanEval+ and MBPP+, LiveCodeBench's for stdin and functional tests.

What it does: runs a solution in the project's executor, one process per group of tests. The process only *claims* what
the solution returned; expected values never enter it, and the comparison happens here on parsed literals.
What it leaves out: running a solution in this process, unpickling, partial marks, threads (the sandbox refuses them)
and files in the solutions.
Sources of the rules: EvalPlus 0.3.1 (comparison, 16 special oracles, MBPP's types) and LiveCodeBench's test runner.
Where EvalPlus limits wall time this limits CPU time, so that a busy machine never turns a pass into a fail.

    with code_executor() as executor:
        judge_evalplus(executor, [(row, code)], plus=True)      # -> [True], row as in HumanEvalPlus.jsonl
        judge_lcb(executor, [(row, code)])                      # -> [True], row as in LiveCodeBench's release files
"""

import ast
import base64
import json
import os
import pickletools
import sys
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from pathlib import Path

import numpy as np

from executor import BadLiteral, Executor, Result, parse_literal

Progress = Callable[[int], None] | None

# ---------------------------------------------------------------------------------------------------------------------
# Code in the executor: what runs beside the solution, in its process

# What a solution may import has to be there before the sandbox closes: the whole standard library, but what opens a
# window or a browser, tests and installers.
UNWANTED = {"__init__", "__main__", "antigravity", "ensurepip", "idlelib", "lib2to3", "test", "tests", "tkinter",
            "turtle", "turtledemo", "venv"}  # fmt: skip
LIBRARY = Path(os.__file__).parent
PATHS = [path.relative_to(LIBRARY) for name in sys.stdlib_module_names for path in LIBRARY.glob(f"{name}/**/*.py")]
NAMES = [*sys.stdlib_module_names, *(".".join(path.with_suffix("").parts) for path in PATHS)]
MODULES = sorted(name for name in NAMES if not UNWANTED.intersection(name.split(".")))
# The program of every job. The solution has a module of its own.
HARNESS = r'''
import builtins, hashlib, io, json, marshal, sys, types

def load(source, name, prelude=""):
    """The globals of a solution after it ran as module `name`; with another name than __main__ no such block runs."""
    module = sys.modules[name] = types.ModuleType(name)
    exec(prelude, vars(module))
    exec(compile(source, "<solution>", "exec", dont_inherit=True), vars(module))
    return vars(module)

def plain(x):
    """A value of another class as the builtin one that it equals; what has none stays."""
    for kind in (dict, list, tuple, set, frozenset):
        if isinstance(x, kind):
            return kind(map(plain, dict.items(x) if kind is dict else kind.__iter__(x)))
    for kind in (int, float, complex):
        if hasattr(type(x), "__float__") and kind(x) == x:
            return kind(x)
    return str.__str__(x) if isinstance(x, str) else x

def whole(x):
    """A bool or float as the int that it equals, if any."""
    return int(x) if type(x) is bool or type(x) is float and x.is_integer() else x

def claim(x):
    """One line of text for a value: its repr, or for a large one `#` and a digest. `=`: was of another class."""
    mark = ""
    try:
        size = len(marshal.dumps(x, 2))  # refuses, in C and at any depth, what is not a builtin value
    except ValueError:
        mark, x = "=", plain(x)
        size = len(marshal.dumps(x, 2))
    if size <= 65536 and not (type(x) is int and x.bit_length() > 13000):
        return mark + repr(x)
    same = type(x)(map(whole, x)) if type(x) in (list, tuple) else x
    return "#" + hashlib.sha256(marshal.dumps(same, 2)).hexdigest()
'''


def code_executor(lanes: int | None = None) -> Executor:
    """The executor with the limits of a benchmark: ordinary Python in the child, caps that no honest solution meets."""
    return Executor(
        lanes or os.cpu_count() or 2,
        hash_seeds=(0,),  # nothing is validated here, so every lane serves
        gate=False,
        full_builtins=True,
        modules=MODULES,
        memory_mb=3277,  # a quarter more in `run`: EvalPlus's 4 GB
        max_source_chars=1_000_000,
        max_literal_chars=50_000_000,
        max_output_chars=50_000_000,
    )


def run_claims(
    executor: Executor, jobs: Sequence[tuple[str, str]], limits: Sequence[float], progress: Progress = None
) -> list[tuple[str | None, Result]]:
    """Run (program, text) pairs, one call of `f` with the text each. Returns (claimed text or None, Result) pairs: what
    claims anything but a text has tampered with its process."""
    results = executor.run([(program, [repr(text)]) for program, text in jobs], progress, limits)
    return [(ast.literal_eval(r.output) if r.ok and r.output[0] in "'\"" else None, r) for [r] in results]


# ---------------------------------------------------------------------------------------------------------------------
# HumanEval+ and MBPP+ (EvalPlus)

GROUP_LIMIT_S = 60.0  # CPU seconds of a group of tests (EvalPlus: wall time); twice the reference's where that is more
ATOL, RTOL = 1e-6, 1e-7


def tuples(value, depth: int = 99):
    """Lists as tuples, `depth` levels of them."""
    return tuple(tuples(item, depth - 1) for item in value) if isinstance(value, list) and depth else value


# MBPP's JSON has lists where the tests have tuples, sets and complex numbers: tasks, and their arguments turned back.
MBPP_TYPES: tuple[tuple[str, Callable[[list], Sequence]], ...] = (
    ("2 116 132 143 222 261 273 394 399 421 424 429 470 560 579 596 616 630 726 740 744 809", lambda a: tuples(a, 2)),
    ("63 64 70 94 120 237 272 299 400 409 417 438 473 614 780", lambda a: [list(tuples(x, 2)) for x in a]),
    ("75 413 444 753", lambda a: [list(tuples(a[0], 2)), a[1]]),
    ("106 750", lambda a: [a[0], tuple(a[1])]),
    ("250 307 405 446 617 720 763 808", lambda a: [tuple(a[0]), *a[1:]]),
    ("259 401 445", lambda a: tuples(a, 3)),
    ("580 615 791", tuples),
    ("278", lambda a: [tuples(a[0], 2)]),
    ("115", lambda a: [[set(item) if isinstance(item, list) and item else {} for item in a[0]]]),
    ("722", lambda a: [{key: tuple(item) for key, item in a[0].items()}, *a[1:]]),
    ("252", lambda a: [complex(a[0])]),
    ("124", lambda a: [float(a[0]), complex(a[1])]),
)
MBPP_ARGUMENTS = {f"Mbpp/{i}": turn for ids, turn in MBPP_TYPES for i in ids.split()}
SET_TASKS = {"similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly", "larg_nnum",
             "intersection_array", "find_dissimilar", "Diff"}  # fmt: skip
NOT_NONE_TASKS = {"check_str", "text_match_three", "text_starta_endb"}  # they return match objects
EVALPLUS_ENTRY = """
def f(text):
    sys.stdin = None  # EvalPlus lets nobody read
    call, lines = load({source!r}, "solution")[{name!r}], []
    for args in eval(text, {{"inf": float("inf"), "nan": float("nan")}}):
        out = call(*args)
        try:
            lines.append(claim({value}))
        except (TypeError, ValueError, ArithmeticError, RecursionError):
            lines.append("")
    return "\\n".join(lines)
"""


def test_inputs(row: dict, group: str) -> list[Sequence]:
    """Arguments of a task's "base" or "plus" tests, with the types that the tests mean."""
    turn = MBPP_ARGUMENTS.get(row["task_id"], list)
    return [turn(args) for args in row[f"{group}_input"] or []]  # one task has {} for no inputs


def evalplus_job(row: dict, code: str, group: str) -> tuple[str, str]:
    """A program that calls the entry of `code` on every argument list of a text, one line claimed per call; the text.

    All calls share one process, as in EvalPlus: a solution that keeps state between calls is judged so.
    """
    name, value = row["entry_point"], "out"
    if name in SET_TASKS:
        value = "list(out)"
    elif name in NOT_NONE_TASKS:
        value = "out if type(out) is bool else out is not None"
    return HARNESS + EVALPLUS_ENTRY.format(source=code, name=name, value=value), repr(test_inputs(row, group))


def judge_evalplus(
    executor: Executor, pairs: Sequence[tuple[dict, str]], progress: Progress = None, *, plus: bool
) -> list[bool]:
    """Whether each (row, code) passes the base tests, with `plus` also the plus tests.

    A group of tests may use EvalPlus's 60 s in all, of CPU time: the program's own clock, so a busy machine fails
    nobody. Raises RuntimeError where a reference solution does not run.
    """
    passed = [True] * len(pairs)
    for group in ("base", "plus") if plus else ("base",):
        tried = [i for i, so_far in enumerate(passed) if so_far and test_inputs(pairs[i][0], group)]
        rows = {row["task_id"]: row for row, _ in map(pairs.__getitem__, tried)}
        jobs = [evalplus_job(row, row["prompt"] + row["canonical_solution"], group) for row in rows.values()]
        gold = dict(zip(rows, run_claims(executor, jobs, [4 * GROUP_LIMIT_S] * len(jobs)), strict=True))
        for task, (claim, result) in gold.items():
            if claim is None:
                raise RuntimeError(f"the reference solution of {task} did not run: {result.verdict} {result.error}")
        jobs = [evalplus_job(*pairs[i], group) for i in tried]
        limits = [max(GROUP_LIMIT_S, 2 * gold[pairs[i][0]["task_id"]][1].cpu_s) for i in tried]
        for i, (claim, _) in zip(tried, run_claims(executor, jobs, limits, progress), strict=True):
            row = pairs[i][0]
            wanted, _ = gold[row["task_id"]]
            passed[i] = claim is not None and same_outputs(row, test_inputs(row, group), wanted, claim)
    return passed


def same_outputs(row: dict, inputs: list[Sequence], gold: str, claim: str) -> bool:
    """Whether a group of claimed outputs, one a line, passes EvalPlus's comparison with the reference's claims.

    Equal values pass, whatever their types (1 == 1.0 == True); else, where a tolerance holds, values of one type within
    it. The tolerance is the task's, or 1e-6 from the first float output of the group on. Tasks with several right
    answers have an oracle of their own.
    """
    atol, gold, claim = row["atol"], gold.split("\n"), claim.split("\n")
    if len(claim) != len(inputs):
        return False
    for args, want_text, text in zip(inputs, gold, claim, strict=True):
        if "#" in (want_text[:1], text[:1]):  # a digest equals itself only
            if want_text != text:
                return False
            continue
        try:
            want, out = (parse_literal(line.removeprefix("="), max_chars=1 << 20) for line in (want_text, text))
            values = want if isinstance(want, list | tuple) else [want]
            atol = atol or (ATOL if values and all(isinstance(value, float) for value in values) else 0)
            near = atol != 0 and type(want) is type(out) and not text.startswith("=")
            if not same_output(row, args, want, out, atol, near):
                return False
        except (BadLiteral, TypeError, ValueError, OverflowError):
            return False
    return True


def same_output(row: dict, args: Sequence, want, out, atol: float, near: bool) -> bool:
    """Equal, right by the task's oracle, or, where values may be `near`, within the tolerance."""
    name = row["entry_point"]
    if name == "find_zero":
        return abs(sum(c * out**i for i, c in enumerate(args[0]))) <= atol
    right = (
        want == out
        or (name in SET_TASKS and set(want) == set(out))
        or name == "are_equivalent"
        or (name == "sum_div" and out == 0)
        or (name == "surface_Area" and abs(out - pyramid_surface(*args)) <= atol)
        or (name == "digit_distance_nums" and out == digit_distance(*args))
    )
    if right or not near or isinstance(want, list | tuple) and len(want) != len(out):
        return right
    return np.allclose(out, want, rtol=RTOL, atol=atol)


def pyramid_surface(base: float, height: float) -> int:
    return round(base**2 + 2 * base * np.hypot(base / 2, height))


def digit_distance(a: int, b: int) -> int:
    return sum(abs(int(x) - int(y)) for x, y in zip(f"{a:0>999}", f"{b:0>999}", strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# LiveCodeBench: stdin and functional problems

LCB_LIMIT_S = 6.0  # CPU seconds per test, LiveCodeBench's own limit (the official AZR script allows 60 s of wall time)
LCB_IMPORTS = "string, re, datetime, collections, heapq, bisect, copy, math, random, statistics, itertools, functools, "
LCB_IMPORTS += "operator, io, json, typing, sys"
LCB_PRELUDE = "".join(f"from {name} import *\n" for name in LCB_IMPORTS.split(", "))
LCB_PRELUDE += f"from builtins import *\nimport {LCB_IMPORTS}\nsys.setrecursionlimit(50000)\n"
RUN_STDIN = """
def f(text):
    sys.stdin = io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8")
    sys.stdout = out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", newline="\\n")
    builtins.exit = builtins.quit = sys.exit
    builtins.open = lambda file, *rest, **more: sys.stdin
    try:
        load({source!r}, "__main__", {prelude!r})
    except SystemExit:
        pass
    out.flush()
    return out.buffer.getvalue().decode("utf-8", "replace")
"""
RUN_FUNCTION = """
def f(text):
    space = load({source!r}, "solution", {prelude!r})
    args = [json.loads(line) for line in text.split("\\n") if line.strip()]
    owner = space["Solution"]() if "Solution" in space else None
    call = getattr(owner, {name!r}) if owner is not None else space[{name!r}]
    return json.dumps(call(*args), default=float)
"""


def lcb_program(row: dict, code: str, test: dict) -> str:
    """The program whose `f` runs `code` on the text of one test."""
    name = json.loads(row.get("metadata") or "{}").get("func_name", "")
    run = RUN_STDIN if test["testtype"] == "stdin" else RUN_FUNCTION
    return HARNESS + run.format(source=code, prelude=LCB_PRELUDE, name=name)


def judge_lcb(executor: Executor, pairs: Sequence[tuple[dict, str]], progress: Progress = None) -> list[bool]:
    """Whether each (row, code) passes all tests of its problem, public and private.

    Every test runs in a fresh process. Tests go out in growing rounds, so that a solution that fails or hangs early
    costs little.
    """
    tests, start = [lcb_tests(row) for row, _ in pairs], 0
    passed = [bool(some) for some in tests]
    while batch := [(i, t) for i, so_far in enumerate(passed) if so_far for t in tests[i][start : 4 * start + 1]]:
        jobs = [(lcb_program(*pairs[i], test), test["input"]) for i, test in batch]
        claims = run_claims(executor, jobs, [LCB_LIMIT_S] * len(jobs), progress)
        for (i, test), (claim, _) in zip(batch, claims, strict=True):
            same = same_stdout if test["testtype"] == "stdin" else same_return
            passed[i] &= claim is not None and same(claim, test["output"])
        start = 4 * start + 1
    return passed


def lcb_tests(row: dict) -> list[dict]:
    """Public and private tests of a problem as {"input", "output", "testtype"}.

    Private tests are JSON, or base64 of zlib of a pickled JSON string, which is read out of the pickle without running
    it. Raises ValueError for anything else in there.
    """
    tests, packed = json.loads(row["public_test_cases"]), row.get("private_test_cases") or "[]"
    try:
        if not packed.lstrip().startswith("["):
            parts = pickletools.genops(zlib.decompress(base64.b64decode(packed)))
            packed = next(text for _, text, _ in parts if isinstance(text, str))
        return tests + json.loads(packed)
    except (ValueError, TypeError, zlib.error, StopIteration) as error:
        raise ValueError(f"private tests of {row['question_id']} are not a pickled JSON string: {error}") from None


def same_stdout(got: str, want: str) -> bool:
    """Equal lines after stripping; a line that differs may hold the same numbers written differently."""
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (got, want))
    return len(ours) == len(theirs) and all(map(same_line, ours, theirs))


def same_line(got: str, want: str) -> bool:
    with suppress(InvalidOperation):
        return got == want or [Decimal(token) for token in got.split()] == [Decimal(token) for token in want.split()]
    return False


def same_return(got: str, want: str) -> bool:
    """Equal values, both written as JSON, where a tuple is a list."""
    with suppress(ValueError, RecursionError):  # no JSON, or a number of more digits than Python reads
        return json.loads(got) == json.loads(want)
    return False
