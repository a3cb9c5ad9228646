"""Judges of benchmark code: EvalPlus's rules for HumanEval+ and MBPP+, LiveCodeBench's for stdin and functional tests.

What it does: runs a solution in the project's executor, one process per group of tests. The process only *claims* what
the solution returned; expected values never enter it, and the comparison happens here on parsed literals.
What it leaves out: running a solution in this process, unpickling anything but plain values, partial marks, threads
(the sandbox refuses them) and files in the solutions.
Sources of the rules: EvalPlus 0.3.1 (comparison, 16 special oracles, MBPP's types) and LiveCodeBench's test runner.
Where EvalPlus limits wall time this limits CPU time, so that a busy machine never turns a pass into a fail.

    score_evalplus([(row, code)], plus=True)          # -> [1.0], row as in HumanEvalPlus.jsonl
    score_lcb([(row, code)])                          # -> [1.0], row as in LiveCodeBench's release files
"""

import ast
import base64
import io
import json
import os
import pickle
import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from decimal import Decimal, InvalidOperation
from functools import cache
from itertools import repeat

import numpy as np

from executor import BadLiteral, Executor, Verdict, parse_literal

Progress = Callable[[int], None] | None

# ---------------------------------------------------------------------------------------------------------------------
# Code in the executor: what runs beside the solution, in its process

# The solution is judged by what it returns, so nothing but these modules' absence could turn a pass into a fail.
MODULES = """
abc array ast base64 bisect builtins calendar cmath collections contextlib copy dataclasses datetime decimal enum
fractions functools hashlib heapq inspect io itertools json keyword locale marshal math numbers operator os pprint
queue random re secrets statistics string struct sys textwrap threading time timeit traceback types typing unicodedata
unittest uuid warnings zlib
""".split()  # noqa: SIM905
ENTRY = "_azr_call"  # a name no solution uses
CLAIM = r'''
pass
def _azr_plain(x):
    """A value of another class as the builtin one that it equals; raises TypeError where there is none."""
    for kind in (bool, str, bytes, type(None)):
        if type(x) is kind:
            return x
    for kind in (dict, list, tuple, set, frozenset):
        if isinstance(x, kind):
            if kind is dict:
                return {_azr_plain(k): _azr_plain(v) for k, v in dict.items(x)}
            return kind([_azr_plain(item) for item in kind.__iter__(x)])
    if isinstance(x, str):
        return str.__str__(x)
    for kind in (int, float, complex):
        if isinstance(x, kind) or hasattr(type(x), "__float__"):
            try:
                if kind(x) == x:
                    return kind(x)
            except (TypeError, ValueError, OverflowError):
                continue
    raise TypeError("not a value")

def _azr_leaf(x):
    """Bytes that are equal for 1, 1.0 and True, as == is."""
    import marshal
    if type(x) is bool or type(x) is float and x.is_integer():
        x = int(x)
    return marshal.dumps(x, 2)

def _azr_claim(x):
    """One line of text for a value: its repr, or for a large one `#` and a digest. `=`: was of another class."""
    import hashlib, marshal
    mark, sized = "", (list, tuple, str, set, frozenset, dict)
    large = type(x) in sized and len(x) > 400 or type(x) is int and x.bit_length() > 13000
    if not large:
        try:
            size = len(marshal.dumps(x, 2))  # refuses, in C and at any depth, what is not a builtin value
        except ValueError:
            mark, x = "=", _azr_plain(x)
            size = len(marshal.dumps(x, 2))
        large = size > 65536
    if not large:
        return mark + repr(x)
    digest = hashlib.sha256(type(x).__name__.encode())
    if type(x) in (list, tuple):
        parts = map(_azr_leaf, x)
    elif type(x) in (dict, set, frozenset):
        parts = sorted(map(_azr_leaf, x.items() if type(x) is dict else x))
    else:
        parts = [_azr_leaf(x)]
    for part in parts:
        digest.update(part)
    return "#" + digest.hexdigest()
'''


def code_executor(lanes: int | None = None) -> Executor:
    """The executor with the limits of a benchmark: ordinary Python in the child, caps that no honest solution meets."""
    return Executor(
        lanes or os.cpu_count() or 2,
        hash_seeds=(0,),  # nothing is validated here, so every lane serves
        gate=False,
        full_builtins=True,
        modules=MODULES,
        entry=ENTRY,
        memory_mb=3277,  # a quarter more in `run`: EvalPlus's 4 GB
        max_source_chars=1_000_000,
        max_literal_chars=50_000_000,
        max_output_chars=50_000_000,
    )


def run_claims(executor, jobs: Sequence[tuple[str, str]], limits: Sequence[float], progress: Progress = None):
    """Run (program, text) pairs, one call of ENTRY with the text each. Returns (claimed text or None, Result) pairs."""
    results = executor.run([(program, [repr(text)]) for program, text in jobs], progress, list(limits))
    return [(ast.literal_eval(r.output) if r.ok else None, r) for [r] in results]


# ---------------------------------------------------------------------------------------------------------------------
# HumanEval+ and MBPP+ (EvalPlus)

MIN_LIMIT_S, LIMIT_FACTOR, GROUP_LIMIT_S = 10.0, 8.0, 60.0  # the paper's settings of EvalPlus; CPU seconds here
ATOL, RTOL = 1e-6, 1e-7

# MBPP's JSON has lists where the tests have tuples, sets and complex numbers: how to turn arguments back, by task.
MBPP_TYPES: dict[str, tuple[str, Callable[[list], list]]] = {
    "every argument is a tuple": (
        "2 116 132 143 222 261 273 394 399 421 424 429 470 560 579 596 616 630 726 740 744 809",
        lambda args: [tuple(a) for a in args],
    ),
    "every argument is a list of tuples": (
        "63 64 70 94 120 237 272 299 400 409 417 438 473 614 780",
        lambda args: [[tuple(item) for item in a] for a in args],
    ),
    "the first argument is a list of tuples": (
        "75 413 444 753",
        lambda args: [[tuple(item) for item in args[0]], args[1]],
    ),
    "the second argument is a tuple": ("106 750", lambda args: [args[0], tuple(args[1])]),
    "the first argument is a tuple": (
        "250 307 405 446 617 720 763 808",
        lambda args: [tuple(args[0]), *args[1:]],
    ),
    "every argument is a tuple of tuples": (
        "259 401 445",
        lambda args: [tuple(tuple(item) for item in a) for a in args],
    ),
    "tuples at every depth": ("580 615 791", lambda args: list(_tuples(args))),
    "a tuple that may hold tuples": (
        "278",
        lambda args: [tuple(tuple(item) if isinstance(item, list) else item for item in args[0])],
    ),
    "a list of sets": (
        "115",
        lambda args: [[set(item) if isinstance(item, list) and item else {} for item in args[0]]],
    ),
    "a dict of tuples": ("722", lambda args: [{k: tuple(v) for k, v in args[0].items()}, *args[1:]]),
    "complex numbers": ("252", lambda args: [complex(args[0])]),
    "a float and a complex number": ("124", lambda args: [float(args[0]), complex(args[1])]),
}
MBPP_ARGUMENTS = {f"Mbpp/{i}": turn for ids, turn in MBPP_TYPES.values() for i in ids.split()}

SET_TASKS = {"similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly", "larg_nnum",
             "intersection_array", "find_dissimilar", "Diff"}  # fmt: skip
NOT_NONE_TASKS = {"check_str", "text_match_three", "text_starta_endb"}  # they return match objects


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def test_inputs(row: dict, group: str) -> list[list]:
    """Argument lists of a task's "base" or "plus" tests, with the types that the tests mean."""
    turn = MBPP_ARGUMENTS.get(row["task_id"], list)
    return [turn(args) for args in row[f"{group}_input"] or []]  # one task has {} for no inputs


def evalplus_program(row: dict, code: str) -> str:
    """`code` with an entry that calls it on every argument list of a text and claims one line per call.

    All calls of a group share one process, as in EvalPlus: a solution that keeps state between calls is judged so.
    """
    name = row["entry_point"]
    value = "out"
    if row["task_id"].startswith("Mbpp/") and name in SET_TASKS:
        value = "list(out)"
    elif row["task_id"].startswith("Mbpp/") and name in NOT_NONE_TASKS:
        value = "out if type(out) is bool else out is not None"
    return f"""{code}
{CLAIM}
def {ENTRY}(text):
    lines = []
    for args in eval(text, {{"inf": float("inf"), "nan": float("nan")}}):
        out = {name}(*args)
        try:
            lines.append(_azr_claim({value}))
        except (TypeError, ValueError, RecursionError):
            lines.append("")
    return "\\n".join(lines)
"""


def _digit_distance(a: int, b: int) -> int:
    width = max(len(str(a)), len(str(b)))
    return sum(abs(int(x) - int(y)) for x, y in zip(str(a).zfill(width), str(b).zfill(width), strict=True))


def _pyramid_surface(base: float, height: float) -> int:
    return round(base**2 + 2 * base * np.hypot(base / 2, height))


def _floats(value) -> bool:
    items = value if isinstance(value, list | tuple) else [value]
    return len(items) > 0 and all(isinstance(item, float) for item in items)


def same_outputs(row: dict, inputs: list[list], gold: list[str], claims: list[str]) -> bool:
    """Whether a group of claimed outputs passes EvalPlus's comparison with the reference's claims.

    Equal values pass, whatever their types (1 == 1.0 == True); else, where a tolerance holds, values of one type within
    it. The tolerance is the task's, or 1e-6 from the first float output of the group on. Tasks with several right
    answers have an oracle of their own.
    """
    name, mbpp, atol = row["entry_point"], row["task_id"].startswith("Mbpp/"), row["atol"]
    if len(claims) != len(inputs):
        return False
    for args, want_text, text in zip(inputs, gold, claims, strict=True):
        try:
            want, out = _value(want_text), _value(text)
        except BadLiteral:
            return False
        try:
            if name == "find_zero" and not mbpp:
                if not abs(sum(c * out**i for i, c in enumerate(args[0]))) <= atol:
                    return False
                continue
            if mbpp and name in SET_TASKS:
                equal = set(want) == set(out)
            else:
                equal = bool(want == out)
            if mbpp and not equal:
                equal = (
                    name == "are_equivalent"
                    or (name == "sum_div" and out == 0)
                    or (name == "surface_Area" and abs(out - _pyramid_surface(*args)) <= atol)
                    or (name == "digit_distance_nums" and out == _digit_distance(*args))
                )
            atol = ATOL if atol == 0 and _floats(want) else atol
            if not equal:
                if atol == 0 or type(want) is not type(out) or text.startswith("="):
                    return False
                if isinstance(want, list | tuple) and len(want) != len(out):
                    return False
                if not np.allclose(out, want, rtol=RTOL, atol=atol):
                    return False
        except (TypeError, ValueError, OverflowError):
            return False
    return True


@cache
def _digest_type() -> type:
    return type("Digest", (str,), {})


def _value(claim: str):
    """The claimed value; a digest stays a text of a type of its own, equal to the same digest only."""
    if claim.startswith("#"):
        return _digest_type()(claim)
    return parse_literal(claim.removeprefix("="), max_chars=1 << 20)


def score_evalplus(
    pairs: Sequence[tuple[dict, str | None]], *, plus: bool, executor: Executor | None = None, progress: Progress = None
) -> list[float]:
    """1.0 for each (row, code) that passes the base tests, with `plus` also the plus tests, else 0.0.

    A group may use max(10 s, 8 x the reference's time) of CPU time: the program's own clock, so a busy machine fails
    nobody. A group that runs out is tried again in sixths with that limit each: EvalPlus has a limit per input and 60 s
    in all, which a slow but honest solution may use up.
    """
    alive = [i for i, (_, code) in enumerate(pairs) if code]
    with nullcontext(executor) if executor else code_executor() as runner:
        for group in ("base", "plus") if plus else ("base",):
            rows = {pairs[i][0]["task_id"]: pairs[i][0] for i in alive}
            inputs = {task: test_inputs(row, group) for task, row in rows.items()}
            programs = [
                (evalplus_program(r, r["prompt"] + r["canonical_solution"]), repr(inputs[t])) for t, r in rows.items()
            ]
            gold = dict(zip(rows, run_claims(runner, programs, repeat(4 * GROUP_LIMIT_S, len(rows))), strict=True))
            for task, (claim, result) in gold.items():
                if claim is None:
                    raise RuntimeError(f"the reference solution of {task} did not run: {result.verdict} {result.error}")
            jobs = [(evalplus_program(pairs[i][0], pairs[i][1]), repr(inputs[pairs[i][0]["task_id"]])) for i in alive]
            spent = [gold[pairs[i][0]["task_id"]][1].cpu_s for i in alive]
            limits = [min(max(MIN_LIMIT_S, LIMIT_FACTOR * s), max(GROUP_LIMIT_S, 2 * s)) for s in spent]
            passed = []
            for i, (program, _), limit, (claim, result) in zip(
                alive, jobs, limits, run_claims(runner, jobs, limits, progress), strict=True
            ):
                row = pairs[i][0]
                args, want = inputs[row["task_id"]], gold[row["task_id"]][0].split("\n")
                if claim is None and result.verdict == Verdict.TIMEOUT:
                    claim = _in_sixths(runner, program, args, limit)
                if not args or claim is not None and same_outputs(row, args, want, claim.split("\n")):
                    passed.append(i)
            alive = passed
    return [float(i in set(alive)) for i in range(len(pairs))]


def _in_sixths(runner: Executor, program: str, inputs: list[list], limit: float) -> str | None:
    """The claims of a group of tests run as six processes, None as soon as one of them fails."""
    size, claims = -(-len(inputs) // 6), []
    for start in range(0, len(inputs), size):
        [(claim, _)] = run_claims(runner, [(program, repr(inputs[start : start + size]))], [limit])
        if claim is None:
            return None
        claims.append(claim)
    return "\n".join(claims)


# ---------------------------------------------------------------------------------------------------------------------
# LiveCodeBench: stdin and functional problems

LCB_LIMIT_S = 6.0  # CPU seconds per test, LiveCodeBench's own limit (the official AZR script allows 60 s of wall time)
LCB_IMPORTS = "string, re, datetime, collections, heapq, bisect, copy, math, random, statistics, itertools, functools, "
LCB_IMPORTS += "operator, io, json, typing, sys"
LCB_PRELUDE = "".join(f"from {name} import *\n" for name in LCB_IMPORTS.split(", "))
LCB_PRELUDE += f"from builtins import *\nimport {LCB_IMPORTS}\nsys.setrecursionlimit(50000)\n"
RUN_STDIN = """
def {entry}(text):
    import builtins, io, sys
    sys.stdin = io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8")
    sys.stdout = out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", newline="\\n")
    builtins.exit = builtins.quit = sys.exit
    builtins.open = lambda file, *rest, **more: sys.stdin
    try:
        exec(compile({source!r}, "<solution>", "exec"), {{"__name__": "__main__"}})
    except SystemExit:
        pass
    out.flush()
    return out.buffer.getvalue().decode("utf-8", "replace")
"""
RUN_FUNCTION = """
{claim}
def {entry}(text):
    import json
    space = {{"__name__": "solution"}}
    exec(compile({source!r}, "<solution>", "exec"), space)
    args = [json.loads(line) for line in text.split("\\n") if line.strip()]
    owner = space["Solution"]() if "Solution" in space else None
    call = getattr(owner, {name!r}) if owner is not None else space[{name!r}]
    return repr(_azr_plain(call(*args)))
"""


class PlainUnpickler(pickle.Unpickler):
    """Loads pickled strings, numbers and containers; refuses every global, so that data cannot run code."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"test data may not name {module}.{name}")


def lcb_tests(row: dict) -> list[dict]:
    """Public and private tests of a problem as {"input", "output", "testtype"}.

    Private tests are JSON, or base64 of zlib of a pickled JSON string. Raises ValueError for anything else in there.
    """
    tests = json.loads(row["public_test_cases"])
    packed = row.get("private_test_cases") or "[]"
    try:
        return tests + json.loads(packed)
    except json.JSONDecodeError:
        pass
    try:
        text = PlainUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(packed)))).load()
        return tests + json.loads(text)
    except (ValueError, TypeError, zlib.error, pickle.UnpicklingError, EOFError, AttributeError, IndexError) as error:
        raise ValueError(f"private tests of {row['question_id']} are not a pickled JSON string: {error}") from None


def same_stdout(got: str, want: str) -> bool:
    """Equal lines after stripping; a line that differs may hold the same numbers written differently."""
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (got, want))
    if len(ours) != len(theirs):
        return False
    for a, b in zip(ours, theirs, strict=True):
        if a == b:
            continue
        try:
            if [Decimal(token) for token in a.split()] != [Decimal(token) for token in b.split()]:
                return False
        except InvalidOperation:
            return False
    return True


def same_return(got: str, want: str) -> bool:
    """Equal values where the expected one is JSON; a tuple counts as a list."""
    try:
        value = parse_literal(got, max_chars=1 << 26)
        return bool(_lists(value) == json.loads(want))
    except (BadLiteral, json.JSONDecodeError):
        return False


def _lists(value):
    if isinstance(value, list | tuple):
        return [_lists(item) for item in value]
    return {str(k): _lists(v) for k, v in value.items()} if isinstance(value, dict) else value


def score_lcb(
    pairs: Sequence[tuple[dict, str | None]], *, executor: Executor | None = None, progress: Progress = None
) -> list[float]:
    """1.0 for each (row, code) that passes all tests of its problem, public and private.

    Every test runs in a fresh process. Tests go out in growing rounds, so that a solution that fails or hangs early
    costs little.
    """
    tests = [lcb_tests(row) for row, _ in pairs]
    alive = [i for i, (_, code) in enumerate(pairs) if code and tests[i]]
    with nullcontext(executor) if executor else code_executor() as runner:
        start = 0
        for size in (1, 4, *repeat(16, max(map(len, tests), default=0) // 16 + 1)):
            batch = [(i, test) for i in alive for test in tests[i][start : start + size]]
            jobs = [(lcb_program(*pairs[i], test), test["input"]) for i, test in batch]
            failed = set()
            for (i, test), (claim, _) in zip(
                batch, run_claims(runner, jobs, [LCB_LIMIT_S] * len(jobs), progress), strict=True
            ):
                same = same_stdout if test["testtype"] == "stdin" else same_return
                if claim is None or not same(claim, test["output"]):
                    failed.add(i)
            alive, start = [i for i in alive if i not in failed], start + size
    return [float(i in set(alive)) for i in range(len(pairs))]


def lcb_program(row: dict, code: str, test: dict) -> str:
    """The program whose ENTRY runs `code` on the text of one test."""
    if test["testtype"] == "stdin":
        return RUN_STDIN.format(entry=ENTRY, source=LCB_PRELUDE + code)
    name = json.loads(row.get("metadata") or "{}").get("func_name", "")
    return RUN_FUNCTION.format(claim=CLAIM, entry=ENTRY, source=LCB_PRELUDE + code, name=name)
