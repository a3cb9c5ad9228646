"""Tests of the benchmarks: verdicts against stored ones, judges against attacks, statistics.

The stored samples, verdicts and benchmark data are not in this repository; tests that need them are skipped where
`../shared/bench` (or $AZR_BENCH) is absent. The slow complete comparison is `benchmarks/parity.py`.
"""

import ast
import base64
import errno
import gzip
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import zlib
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import evaluate
from buffers import Task, save_tasks
from prompts import KINDS, load_kinds
from suites import compare as comparison
from suites import extract, judge_code, judge_math
from suites import table as suites
from suites.table import SUITES
from tests.test_policy import build_model

BENCH = Path(os.environ.get("AZR_BENCH", Path(__file__).parent.parent / "../shared/bench"))
needs_bench = pytest.mark.skipif(not BENCH.is_dir(), reason=f"no benchmark data at {BENCH}: set AZR_BENCH")


def rows_of(name):
    data = gzip.decompress((BENCH / f"{name}.jsonl.gz").read_bytes())
    return [json.loads(line) for line in data.splitlines() if line.strip()]


def stored(name):
    lines = (BENCH / "parity" / f"{name}.jsonl").read_text().splitlines()
    verdicts = BENCH / "parity" / f"{name}_verdicts.json"
    return [json.loads(line) for line in lines], json.loads(verdicts.read_text())[
        "verdicts"
    ] if verdicts.exists() else None


@pytest.fixture(scope="module")
def sandbox():
    with judge_code.code_executor(2) as executor:
        yield executor


# ---------------------------------------------------------------------------------------------------------------------
# EvalPlus


@needs_bench
@pytest.mark.parametrize(
    ("data", "samples", "plus"),
    [
        ("HumanEvalPlus", "humaneval_qwen25coder05b", False),
        ("HumanEvalPlus", "humaneval_qwen25coder05b", True),
        ("MbppPlus", "mbpp100_qwen25coder05b", False),
        ("MbppPlus", "mbpp100_qwen25coder05b", True),
    ],
)
def test_verdicts_equal_evalplus(data, samples, plus, sandbox):
    rows = {row["task_id"]: row for row in rows_of(data)}
    solutions, verdicts = stored(samples)
    solutions = [s for s in solutions if not plus or s["task_id"] not in SLOW]
    scores = judge_code.judge_evalplus(sandbox, [(rows[s["task_id"]], s["solution"]) for s in solutions], plus=plus)
    ours = {s["task_id"]: bool(score) for s, score in zip(solutions, scores, strict=True)}
    theirs = {task: verdicts[task]["plus" if plus else "base"] for task in ours}
    assert len(ours) > 10
    assert ours == theirs


# Their references take more than a second; benchmarks/parity.py runs them too.
SLOW = {f"HumanEval/{i}" for i in (15, 36, 59, 83, 94, 100, 130, 139)}
SLOW |= {f"Mbpp/{i}" for i in (84, 123, 255, 271, 300, 389, 392, 583, 589, 592, 599, 603, 630)}


@needs_bench
def test_reference_solutions_pass(sandbox):
    """All base tests, and the plus tests of the tasks with an oracle or MBPP types of their own (all: parity.py)."""
    rows = rows_of("HumanEvalPlus") + rows_of("MbppPlus")
    pairs = [(row, row["prompt"] + row["canonical_solution"]) for row in rows]
    assert len(pairs) == 164 + 378
    assert judge_code.judge_evalplus(sandbox, pairs, plus=False) == [1.0] * len(pairs)
    one_per_type = {f"Mbpp/{ids.split()[0]}" for ids, _ in judge_code.MBPP_TYPES}
    special = one_per_type | {"HumanEval/32"} | {f"Mbpp/{i}" for i in (164, 295, 558, 581, 737, 787, 794, 7, 140, 769)}
    pairs = [(row, code) for row, code in pairs if row["task_id"] in special - SLOW]
    assert judge_code.judge_evalplus(sandbox, pairs, plus=True) == [1.0] * len(pairs)


TASK = {
    "task_id": "HumanEval/0",
    "prompt": "def total(xs):\n",
    "entry_point": "total",
    "canonical_solution": "    return sum(xs)\n",
    "base_input": [[[1, 2]], [[0.1, 0.2]]],
    "plus_input": [[[5]], [[]]],
    "atol": 0,
}
GOOD = "def total(xs):\n    return sum(xs)\n"


def score(*codes, row=TASK, plus=True, sandbox=None):
    return judge_code.judge_evalplus(sandbox, [(row, code) for code in codes], plus=plus)


def test_comparison_rules(sandbox):
    """1 == 1.0 == True pass; floats pass within 1e-6; a tolerance asks for the same type."""
    near = "def total(xs):\n    return sum(xs) + 1e-9\n"
    as_float = "def total(xs):\n    return float(sum(xs))\n"
    far = "def total(xs):\n    return sum(xs) + 1e-4\n"
    text = "def total(xs):\n    return str(sum(xs))\n"
    assert score(GOOD, as_float, far, text, sandbox=sandbox) == [1.0, 1.0, 0.0, 0.0]
    floats = TASK | {"base_input": [[[0.1, 0.2]]], "plus_input": []}
    assert score(near, far, row=floats, sandbox=sandbox) == [1.0, 0.0]
    # EvalPlus's tolerance starts with the first float of a group: an int before it must be met exactly.
    assert score(near, sandbox=sandbox) == [0.0]

    def same(gold, claims):
        return judge_code.same_outputs(TASK, [[0], [0]], "\n".join(gold), "\n".join(claims))

    assert same(["0.5", "1.0"], ["0.5000001", "1.0"])
    assert not same(["0.5", "1"], ["0.5", "1.0000001"])  # types differ
    assert same(["[0.5]", "(1.0,)"], ["[0.5]", "(1.0000001,)"])
    assert not same(["[0.5]", "[1.0]"], ["[0.5]", "(1.0,)"])
    assert not same(["0.5", "1.0"], ["0.5"])
    assert not same(["0.5", "1.0"], ["0.5", "__import__('os')"])


def test_large_outputs_compare_by_digest(sandbox):
    row = TASK | {"prompt": "def big(n):\n", "entry_point": "big",
                  "canonical_solution": "    return [i * 2.0 for i in range(n)]\n",
                  "base_input": [[5000]], "plus_input": [[10]]}  # fmt: skip
    ints, off, tuples = (
        "return [2 * i for i in range(n)]",
        "return [2 * i for i in range(n - 1)] + [0]",
        "return tuple(2 * i for i in range(n))",
    )
    codes = [f"def big(n):\n    {body}\n" for body in (ints, off, tuples)]
    assert score(*codes, row=row, sandbox=sandbox) == [1.0, 0.0, 0.0]
    larger = row | {"base_input": [[50_000]]}  # more than 64 KiB: digests
    assert score(*codes, row=larger, sandbox=sandbox) == [1.0, 0.0, 0.0]
    number = row | {"canonical_solution": "    return 1 << n\n", "base_input": [[20_000]], "plus_input": []}
    codes = [f"def big(n):\n    return {value}\n" for value in ("2**n", "2**n + 1")]
    assert score(*codes, row=number, sandbox=sandbox) == [1.0, 0.0]


def test_state_between_calls_is_judged_as_in_one_process(sandbox):
    assert score("def total(xs, seen=[]):\n    seen.extend(xs)\n    return sum(seen)\n", sandbox=sandbox) == [0.0]


def test_evil_solutions_cost_only_themselves(sandbox, tmp_path):
    marker = tmp_path / "written"
    evil = {
        "exit": "import os\ndef total(xs):\n    os._exit(0)\n",
        "exit at import": "raise SystemExit(0)\n",
        "fork": "import os\ndef total(xs):\n    while True:\n        os.fork()\n",
        "memory": "def total(xs):\n    a = []\n    while True:\n        a.append(bytes(1 << 28))\n",
        "always equal": "class E:\n    def __eq__(s, o): return True\n    def __float__(s): return 3.0\n"
        "def total(xs):\n    return E()\n",
        "equal number": "class E(float):\n    def __eq__(s, o): return True\ndef total(xs):\n    return E(3)\n",
        "file": f"def total(xs):\n    open({str(marker)!r}, 'w').write('x')\n    return sum(xs)\n",
        "frames": "import sys\ndef total(xs):\n    for f in sys._current_frames().values():\n"
        "        f.f_back.f_locals.update(text='[]')\n    return None\n",
        "prints": "print('x' * 100)\ndef total(xs):\n    print('3')\n    return 0\n",
    }
    codes = [code for bad in evil.values() for code in (bad, GOOD)]
    scores = score(*codes, sandbox=sandbox)
    assert dict(zip(evil, scores[::2], strict=True)) == dict.fromkeys(evil, 0.0)
    assert scores[1::2] == [1.0] * len(evil)
    assert not marker.exists()


def test_endless_loop_fails_alone(sandbox, monkeypatch):
    monkeypatch.setattr(judge_code, "GROUP_LIMIT_S", 1.0)
    assert score("def total(xs):\n    while True: pass\n", GOOD, sandbox=sandbox) == [0.0, 1.0]


def test_slow_but_honest_solution_has_the_limit_for_all_inputs_together(sandbox, monkeypatch):
    row = TASK | {"base_input": [[[i]] for i in range(6)], "plus_input": []}
    wait = "    end = time.process_time() + 0.2\n    while time.process_time() < end: pass\n"
    slow = f"import time\ndef total(xs):\n{wait}    return sum(xs)\n"
    for limit, passes in ((3.0, 1.0), (0.5, 0.0)):
        monkeypatch.setattr(judge_code, "GROUP_LIMIT_S", limit)
        assert score(slow, row=row, sandbox=sandbox) == [passes]


# Responses and the verdicts that EvalPlus 0.3.1 gave their `sanitize`d code (`untrusted_check`); GOOD is `total`.
RESPONSES = {
    f"```python\n```python\n{GOOD}```\n": True,
    f"Here's my solution, it is simple:\n\n{GOOD}\nThis can't fail.": True,
    f"```python\nx = 1\n```\nand then\n```python\n{GOOD}```": True,
    f"def broken(:\n    pass\n{GOOD}": True,
    f"1. First sum (easily\n2. Then return\n\n{GOOD}": True,
    f"{GOOD}\nassert total([1]) == 2\nn = int(input())\nif __name__ == '__main__':\n    assert False\n": True,
    f"{GOOD}\ndef other(x):\n    return (x +": True,
    f"{GOOD}\n{GOOD.replace('sum(xs)', '0')}": True,  # the first of a name counts
    f"{GOOD.replace('sum(xs)', '0')}\n{GOOD}": False,
    f"TAB = 'a\tb'\nassert TAB == 1\n{GOOD.replace('sum(xs)', 'sum(xs) + len(TAB) - 3')}": True,
    f"I wrote\n{GOOD.replace(chr(10) + '    ', ' ').strip()}\nand it's good": False,  # a range has two lines
    f"\r\n{GOOD}".replace("\n", "\r\n"): True,
    f"from __future__ import annotations\nimport math\nN: int = 0\n{GOOD.replace('sum(xs)', 'sum(xs) + N')}": True,
    f"def show(x):\n    print(x)\n{GOOD.replace('return', 'show(xs); return')}": False,  # it drops what returns nothing
    "def total(xs): return sum(xs)": True,
    "I cannot do that": False,
    "": False,
}


# Whole solutions, and EvalPlus's verdicts on them.
SOLUTIONS = {
    f"from __future__ import annotations\nimport csv, sqlite3, xml.etree.ElementTree as ET\n{GOOD}": True,
    f"from pathlib import Path\nfrom concurrent.futures import ThreadPoolExecutor\nassert Path('a').name\n{GOOD}": True,
    f"from __future__ import annotations\nimport dataclasses as d\n@d.dataclass\nclass P:\n    x: int\n{GOOD}": True,
    f"import logging, asyncio, subprocess\nlogging.warning('loading %s', __name__)\n{GOOD}": True,
    f"import no_such_module\n{GOOD}": False,
    f"def eval(x): return None\ndef repr(x): return 'no'\ndef exec(x): return 0\n{GOOD}": True,
    f"type = 'kind'\nlist = dict = isinstance = None\nhashlib = marshal = sys = json = len = 5\n{GOOD}": True,
    f"def f(text): return 'mine'\ndef claim(x): return 1\nlines = load = plain = call = leaf = 3\n{GOOD}": True,
    f"class ValueError(Exception): pass\nclass TypeError(Exception): pass\n{GOOD}": True,
    f"{GOOD}\nif __name__ == '__main__':\n    assert False\n": True,
    f"{GOOD}\ndef main():\n    raise SystemExit(1)\nif '__main__' in (__name__,):\n    main()\n": True,
    f"{GOOD}\nimport sys\nsys.exit(0)\n": False,
    f"{GOOD}\nassert False\n": False,
    f"{GOOD}\nimport sys\nsys.stdin.read()\n": False,
    f"{GOOD}\nprint('x' * 1000)\n": True,
    f"Sure:\n{GOOD}": False,
    f"{GOOD}\nS = '\ud800'\n": False,
    "": False,
}


def test_forms_get_the_verdict_of_evalplus(sandbox):
    responses = [extract.sanitize(text, "total") for text in RESPONSES]
    found = score(*responses, *SOLUTIONS, plus=False, sandbox=sandbox)
    wanted = [*RESPONSES.items(), *SOLUTIONS.items()]
    assert [form for form, verdict in zip(wanted, found, strict=True) if form[1] != verdict] == []


def test_the_longest_program_is_that_of_evalplus():
    """Against EvalPlus's own loop over all ranges of lines, on solutions with lines put in, taken out and shifted."""

    def brute(lines):
        best, most = lines[:1], 0
        for i, j in itertools.combinations(range(len(lines)), 2):
            part = lines[i : j + 1]
            with suppress(SyntaxError):
                ast.parse("\n".join(part))
                if (filled := sum(map(bool, map(str.strip, part)))) > most:
                    best, most = part, filled
        return "\n".join(best).strip()

    rng = random.Random(0)
    junk = [
        "```python",
        "It's so",
        "x = (1,",
        "s = '''",
        '"""',
        "    indented",
        "1. First",
        "x = f'{a b}'",
        "try:",
        ")",
        "a\\",
    ]
    for _ in range(300):
        lines = f"import os\nclass A:\n    x = (1,\n      2)\n\n{GOOD}\n\nif A:\n    y = '''a\n  b'''\nprint(1)".split(
            "\n"
        )
        for _ in range(rng.randrange(4)):
            k = rng.randrange(len(lines))
            lines[k : k + rng.randrange(2)] = [rng.choice([*junk, " " + lines[k], lines[k].strip()])]
        assert extract.longest_program("\n".join(lines)).strip() == brute(lines), lines


def test_tabs_are_spaces_where_that_parses_and_never_in_a_string():
    tabs = "def f(x):\n\treturn 'a\tb'"
    assert extract.sanitize(tabs, "f") == tabs
    mixed = "def f(x):\n    y = 1\n\treturn 'a\tb'"
    assert extract.sanitize(mixed, "f") == "def f(x):\n    y = 1\n    return 'a\tb'"


def test_sanitize_keeps_the_solution_only():
    code = "import os\nA = 1\n\n@wraps\ndef f(x):\n    return x\n\nassert f(1) == 2\nprint(f(1))\nThat is all"
    assert extract.sanitize(code) == "import os\nA = 1\n@wraps\ndef f(x):\n    return x"
    assert extract.sanitize("no code at all") == "no code at all"


# ---------------------------------------------------------------------------------------------------------------------
# LiveCodeBench


def problem(tests, starter="", name="", private=None):
    row = {
        "question_id": "q",
        "question_content": "?",
        "starter_code": starter,
        "metadata": json.dumps({"func_name": name} if name else {}),
    }
    kind = "functional" if starter else "stdin"
    listed = [{"input": i, "output": o, "testtype": kind} for i, o in tests]
    return row | {"public_test_cases": json.dumps(listed)} | ({"private_test_cases": private} if private else {})


def test_lcb_stdin(sandbox):
    row = problem([("3\n1 2 3\n", "6\n"), ("1\n5\n", "5.0")])
    codes = {
        "n = int(input())\nprint(sum(map(int, input().split())))\nexit()": 1.0,
        "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split()[1:])))": 1.0,
        "d = open(0).read().split()\nprint(sum(int(i) for i in d[1:]), end='')": 1.0,
        "def main():\n    input()\n    print(reduce(add, map(int, input().split())))\nmain()": 1.0,
        "from __future__ import annotations\nimport csv\nprint(sum(map(int, open(0).read().split()[1:])))": 1.0,
        "io = exec = None\nif __name__ == '__main__':\n    input()\n    print(eval('+'.join(input().split())))": 1.0,
        "print(6)": 0.0,
        "print('6 ')\nprint()\n1 / 0": 0.0,
        "input()\nprint('six')": 0.0,
    }
    scores = SUITES["lcb"].score([(row, code) for code in codes], sandbox)
    assert dict(zip(codes, scores, strict=True)) == codes


def test_lcb_functional_and_private_tests(sandbox):
    hidden = json.dumps([{"input": "[0]\n1", "output": "[0, 1]", "testtype": "functional"}])
    packed = base64.b64encode(zlib.compress(pickle.dumps(hidden))).decode()
    row = problem([("[1, 2]\n3", "[1, 2, 3]")], "class Solution:", "push", packed)
    right = "class Solution:\n    def push(self, xs: List[int], x: int):\n        return tuple(xs + [x])"
    own_names = (
        f"from __future__ import annotations\ntype = json = args = call = 3\n{right}\nif __name__ == '__main__': 1 / 0"
    )
    public_only = "def push(xs, x):\n    return [1, 2, 3]"
    assert SUITES["lcb"].score([(row, code) for code in (right, own_names, public_only, None)], sandbox) == [
        1.0,
        1.0,
        0.0,
        0.0,
    ]


def test_unpickler_refuses_globals():
    class Evil:
        def __reduce__(self):
            return (os.system, ("true",))

    for payload in (Evil(), os.path.join, Path("x")):
        packed = base64.b64encode(zlib.compress(pickle.dumps(payload))).decode()
        with pytest.raises(ValueError, match="private tests of q"):
            judge_code.lcb_tests(problem([], private=packed))


def test_a_claim_that_is_no_text_or_cannot_be_read_is_wrong_and_costs_the_others_nothing(sandbox):
    programs = ["def f(text):\n    return [text]", "def f(text):\n    return text", "def f(text):\n    return {1}"]
    claims = judge_code.run_claims(sandbox, [(program, "ok") for program in programs], [1.0] * 3)
    assert [claim for claim, _ in claims] == [None, "ok", None]
    assert not judge_code.same_return("9" * 5000, "9") and not judge_code.same_return("{", "1")


def test_same_stdout():
    same = judge_code.same_stdout
    assert same(" 1 2 \nYES\n\n", "1 2\nYES") and same("1.0 2", "1 2.00") and same("1e3", "1000")
    assert not same("1\n2", "1 2") and not same("yes", "YES") and not same("1.0001", "1.0")


# ---------------------------------------------------------------------------------------------------------------------
# Code reasoning


@needs_bench
@pytest.mark.parametrize("side", ["o", "i"])
def test_cruxeval_verdicts(side):
    """As the reference, by the stricter of its two rules (values, not precedence inside an assert)."""
    rows = {row["id"]: row for row in rows_of("cruxeval")}
    suite, (samples, verdicts) = SUITES[f"cruxeval-{side}"], stored(f"cruxeval_{side}_qwen25coder05b")
    pairs = []
    for sample in samples:
        gold = suite.item(rows[sample["task_id"]], 0).gold
        pairs.append((gold, extract.extract_assert(sample["completion"], suite.side)))
    ours = {s["task_id"]: bool(v) for s, v in zip(samples, suite.score(pairs), strict=True)}
    assert ours == {task: verdicts[task]["azr_rule_pass"] for task in ours}


@needs_bench
def test_cruxeval_golds_pass():
    """All outputs; all inputs but 14: eleven are expressions where an answer must be a literal (a lambda, a call, a
    global name), one is empty, one needs a codec that the sandbox lacks, one program has a name that the gate
    refuses."""
    rows = rows_of("cruxeval")
    failed = {}
    for kind, name in (("deduction", "cruxeval-o"), ("abduction", "cruxeval-i")):
        suite = SUITES[name]
        scores = suite.score([(suite.item(row, 0).gold, row[suite.side]) for row in rows])
        failed[kind] = {int(row["id"].split("_")[1]) for row, score in zip(rows, scores, strict=True) if not score}
    assert len(rows) == 800 and failed["deduction"] == set()
    assert failed["abduction"] <= {152, 239, 258, 344, 364, 378, 522, 694, 720, 760, 770, 135, 621, 683}


def test_lcb_execution_asks_about_f_with_the_arguments_alone():
    def ask(code, call):
        row = {"code": code, "input": call, "output": "1", "function_name": "g"}
        item, space = SUITES["lcb-execution"].item(row, 0), {}
        exec(item.gold.program, space)
        return eval(f"f({item.gold.inputs[0]})", space)

    assert ask("def g(a, b=1):\n    return g(a - 1, b) + b if a else b", "g(b = 's', a = 3)") == "ssss"
    assert ask("def g(f):\n    return [f for f in f]", "g([1])") == [1]


def test_extract_assert():
    text = "assert f([1], 'a == b') == 'x == y'\nmore"
    assert extract.extract_assert(text, "input") == "[1], 'a == b'"
    assert extract.extract_assert(text, "output") == "'x == y'"
    assert extract.extract_assert("the answer is 3", "output") is None


# ---------------------------------------------------------------------------------------------------------------------
# Mathematics


@needs_bench
def test_math_pairs():
    """Raw: every stored verdict. Normalised: different only towards the intended verdict."""
    pytest.importorskip("math_verify", reason="math-verify is not installed: pip install -r requirements-eval.txt")
    rows = [json.loads(line) for line in (BENCH / "parity/math_pairs.jsonl").read_text().splitlines()]
    improved = 0
    for row in rows:
        raw = judge_math.math_equal(row["prediction"], row["gold"], normalise=False, call=row["call"])
        texts = [row["prediction"], row["gold"]]
        changed = list(map(judge_math.normalise_math, texts)) != texts
        ours = judge_math.math_equal(*texts, call=row["call"]) if changed else raw
        assert raw == row["expected"], row
        assert ours == raw or ours == row["intended"], row
        assert ours or not raw, row
        improved += ours != raw
    assert len(rows) >= 150 and improved >= 10


def test_math_equal_cases():
    pytest.importorskip("math_verify", reason="math-verify is not installed: pip install -r requirements-eval.txt")
    big = ["3e8", "3e8.", "3 \\times 10^{8}", "3E8", "3.0e+8", "300000000", "30 \\times 10^7"]
    assert all(judge_math.math_equal(a, b) for a, b in itertools.product(big, big))
    different = [("3e9", "3e8"), ("1e-3", "1e3"), ("12 and 13", "1213"), ("t+1", "a+1"), ("27.5", "275"), ("1.", "11"),
                 ("2i", "2"), ("3e8", "38"), ("x", "y"), ("2\\,013", "213"), ("2 1/3", "1"), ("12 345", "357"),
                 ("x \\ne 3", "3"), ("2½", "1"), ("33.3\\%", "3.33"), ("x > 3", "[3, \\infty)")]  # fmt: skip
    assert [(a, b) for a, b in different if judge_math.math_equal(a, b) or judge_math.math_equal(b, a)] == []
    same = [("448.", "448"), ("2\\,013", "2013"), ("12,\\!000", "12000"), ("1{,}234", "1234"),
            ("2 1/3", "\\frac{7}{3}"), ("-2 1/3", "-\\frac73"), ("2½", "\\frac52"), ("½x", "\\frac{x}{2}"),
            ("12 345", "12345"), ("1\u2009234", "1234"), ("12\\ 345.5", "12345.5"), ("33.3", "33.3\\%"),
            ("0.333", "33.3\\%"), ("33.3 percent", "33.3"), ("35", "35\\%"),
            ("x \\ne 3", "(-\\infty, 3) \\cup (3, \\infty)"), ("x ≠ 3", "x \\neq 3"), ("x > 3", "(3, \\infty)"),
            ("x² + √2", "x^2+\\sqrt{2}"), ("(-∞, 3)", "(-\\infty,3)"), ("90°", "90"),
            ("\\{1\\}$. \\cup (-\\infty, 0)", "(-\\infty, 0) \\cup\\{1\\}$.")]  # fmt: skip
    assert [pair for pair in same if not judge_math.math_equal(*pair)] == []


def test_small_magnitudes_compare_relatively():
    pytest.importorskip("math_verify", reason="math-verify is not installed: pip install -r requirements-eval.txt")
    same = [("31e-25", "3.1e-24"), ("3.1 \\cdot 10^{-24}", "3.1e-24"), ("3.1*10^-24", "3.1e-24"),
            ("3.1×10⁻²⁴", "3.1e-24"), ("0.0000145", "1.45e-5"), ("x=30e-10", "3e-9"),
            ("(1, 30e-10)", "(1, 3e-9)"), ("4^{-40}", "2^{-80}"), ("1/720", "0.00138889")]  # fmt: skip
    assert [pair for pair in same if not judge_math.math_equal(*pair)] == []
    other = [("6.2e-24", "3.1e-24"), ("3.1e-21", "3.1e-24"), ("-3.1e-24", "3.1e-24"), ("0", "3.1e-24"),
             ("3.1e-24", "0"), ("1.5e-5", "1.45e-5"), ("x=4e-9", "x=3e-9"), ("(1, 4e-9)", "(1, 3e-9)"),
             ("2^{-81}", "2^{-80}"),
             ("\\sqrt{3} \\times 10^{-20}", "\\sqrt{2} \\times 10^{-20}"), ("2e-9 \\text{ m}", "1e-9")]  # fmt: skip
    assert [pair for pair in other if judge_math.math_equal(*pair)] == []


@needs_bench
def test_math_golds_match_themselves():
    pytest.importorskip("math_verify", reason="math-verify is not installed: pip install -r requirements-eval.txt")
    for name in suites.TABLE1["math"]:
        _, items, _ = suites.load_items(name, BENCH, {})
        tiny = [item.gold for item in items if re.fullmatch(r"[\d.]+e-([4-9]|\d\d)", item.gold)]
        forms = ("{}", "<answer>\\boxed{{{}}}</answer>", "The **final answer** is: **{}**.", "**Answer:** ${}$")
        assert [g for g in tiny if any(judge_math.math_equal(other, g) for other in (f"-{g}", f"{g}0", f"2{g}"))] == []
        assert len(tiny) == (20 if name == "minerva" else 0)
        for number, item in enumerate(items[:: 1 if len(items) <= 40 else 8]):
            text = forms[number % 4].format(item.gold)
            answer = extract.extract_math(text) if number % 4 else text
            assert judge_math.math_equal(answer, item.gold), (name, text)


def test_math_child_survives_a_hanging_pair(monkeypatch):
    pytest.importorskip("math_verify", reason="math-verify is not installed: pip install -r requirements-eval.txt")
    monkeypatch.setattr(judge_math, "LIMIT_S", 0.5)  # of the parent's patience; the child's own alarm is longer
    assert judge_math.judge_math([("1", "1"), ("4", "10^{10^{10^{10}}}"), ("2", "2"), ("4", "3")]) == [
        True,
        False,
        True,
        False,
    ]


def test_extract_math():
    cases = {
        "<answer>\\boxed{5}</answer>": "5",
        "<think>\\boxed{3}</think><answer>so \\boxed{4} or \\boxed{\\frac{1}{2}}.</answer> \\boxed{9}": "\\frac{1}{2}",
        "first \\boxed{17}, then \\boxed{1600}.": "1600",
        "cut \\boxed{27": None,
        "The answer is $27$.": "27",
        "<answer>The final answer is 12.</answer>": "12",
        "<answer>$1$ and $2$</answer>": "$1$ and $2$",
        "so \\[ x = 3 \\]": "x = 3",
        "I do not know 3": None,
        "<answer></answer>": None,
        "The answer is **58**.": "58",
        "**Final Answer**: 58": "58",
        "**Final Answer: 58**": "58",
        "## **Final Answer**\n\n**$58$**": "58",
        "<answer>**58**</answer>": "58",
        "<answer>***58***</answer>": "58",
        "<answer>\\boxed{**58**}</answer>": "58",
        "<answer>2**3 + x**(1/2)</answer>": "2**3 + x**(1/2)",
        "so $$42$$": "42",
        "from $$x^2 = 4$$ follows \\[ x = 2 \\]": "x = 2",
        "from $$x^2 = 4, x > 0$$ we see that the answer is 2.": "2",
        "it costs $$5": None,
        "a row ends with \\\\[4pt] here, so \\[ 5 \\]": "5",
        "\\[ x = 1 + 1 \\\\[4pt] = 2 \\] and \\] the end": "x = 1 + 1 \\\\[4pt] = 2",
        "\\boxed{a \\{ b} and \\boxed{1 \\frac{1}{2}} }": "1 \\frac{1}{2}",
        "\\boxed{\\boxed{7}}": "7",
    }
    assert {text: extract.extract_math(text) for text in cases} == cases


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def test_statistics_against_numpy():
    rng = np.random.default_rng(1)
    for n in (2, 5, 40):
        scores = rng.random(n)
        assert comparison.standard_error(scores) == pytest.approx(
            np.sqrt(((scores - scores.mean()) ** 2).sum() / (n - 1) / n)
        )
    assert comparison.standard_error([1.0]) == 0.0
    for n, c, k in [(4, 0, 2), (4, 1, 2), (4, 2, 3), (6, 3, 1), (5, 5, 5), (6, 2, 5)]:
        draws = [any(i < c for i in chosen) for chosen in itertools.combinations(range(n), k)]
        assert comparison.pass_at_k(n, c, k) == pytest.approx(np.mean(draws))


def test_bootstrap_and_mcnemar():
    rng = np.random.default_rng(2)
    differences = rng.normal(0.3, 1.0, size=400)
    low, high = comparison.bootstrap(differences)
    wide = 1.96 * comparison.standard_error(differences)
    assert low == pytest.approx(differences.mean() - wide, abs=0.02) and high == pytest.approx(
        differences.mean() + wide, abs=0.02
    )
    before, after = [0.0] * 10 + [1.0] * 90, [1.0] * 10 + [0.0] * 2 + [1.0] * 88
    table = sum(math.comb(12, i) for i in range(3))
    assert comparison.mcnemar(before, after) == pytest.approx(2 * table / 2**12)
    assert comparison.mcnemar(before, before) == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# The program: table, samples files, generation with a real (tiny, random) model


def write_bench(folder):
    rows = [TASK | {"task_id": f"HumanEval/{i}"} for i in range(4)]
    (folder / "HumanEvalPlus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    crux = [
        {"id": f"sample_{i}", "code": "def f(x):\n    return x", "input": str(i), "output": str(i)} for i in range(70)
    ]
    with gzip.open(folder / "cruxeval.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps(row) for row in crux))  # without a newline at the end
    return folder


def test_unknown_suite_lists_the_known_ones(capsys):
    assert evaluate.main(["--suites", "humanevil", "--model", "x"]) == 2
    message = capsys.readouterr().err
    assert "humanevil" in message and all(name in message for name in suites.SUITES)


def test_missing_data_name_file_and_source(tmp_path, capsys):
    assert evaluate.main(["--suites", "mbpp+", "--model", "x", "--data", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "MbppPlus.jsonl" in message and "https://" in message and str(tmp_path) in message


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--samples", "4"], "--temperature"),
        (["--limit", "0"], "at least 1"),
        (["--baseline", "nowhere.json"], "nowhere.json"),
        (["--temperature", "nan"], "--temperature"),
        (["--top-p", "0"], "--top-p"),
        (["--max-model-len", "0"], "--max-model-len"),
        (["--file", "mbpp"], "SUITE=PATH"),
        (["--model", ""], "--score-only"),
    ],
)
def test_bad_options_get_one_sentence(more, says, capsys):
    assert evaluate.main(["--suites", "mbpp", "--model", "x", *more]) == 2
    message = capsys.readouterr().err
    assert says in message and message.count("\n") == 1


def test_samples_file_that_misses_tasks(tmp_path, capsys):
    samples = tmp_path / "samples.jsonl"
    lines = [{"task_id": "HumanEval/0", "solution": GOOD},
             {"task_id": "HumanEval/2", "completion": "    return sum(xs)\n"},
             {"task_id": "HumanEval/3", "solution": "def total(xs):\n    return 0\n"}]  # fmt: skip
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["--suites", "humaneval+", "--data", str(write_bench(tmp_path)), "--out", str(tmp_path / "out")]
    assert evaluate.main([*command, "--samples-file", str(samples)]) == 0
    assert "3 of the 4 tasks" in capsys.readouterr().out
    record = json.loads((tmp_path / "out/results.json").read_text())["humaneval+"]
    assert record["scores"] == {"HumanEval/0": 1.0, "HumanEval/2": 1.0, "HumanEval/3": 0.0} and record["missing"] == 1
    samples.write_text('{"task_id": "HumanEval/99", "solution": ""}\n')
    assert evaluate.main([*command, "--samples-file", str(samples)]) == 2
    assert "line 1" in capsys.readouterr().err


def test_samples_files_give_a_score_or_one_sentence(tmp_path, capsys):
    command = ["--suites", "humaneval+", "--data", str(write_bench(tmp_path)), "--out", str(tmp_path / "out")]

    def run(name, data):
        (tmp_path / name).write_bytes(data)
        code = evaluate.main([*command, "--samples-file", str(tmp_path / name)])
        return code, capsys.readouterr()

    lines = [{"task_id": f"HumanEval/{i}", "solution": GOOD if n < 3 else ""} for i in (0, 1) for n in range(4 - 3 * i)]
    text = "\n".join(map(json.dumps, lines)).encode()
    for name, data in (("a.jsonl", text), ("b.jsonl.gz", gzip.compress(text)), ("c.jsonl", b"\xef\xbb\xbf" + text)):
        code, said = run(name, data)
        assert code == 0 and "1 to 4 samples" in said.out
        record = json.loads((tmp_path / "out/results.json").read_text())["humaneval+"]
        assert record["scores"] == {"HumanEval/0": 0.75, "HumanEval/1": 1.0} and record["pass_at"] == {}
    bad = [[GOOD], None, 3, {"a": 1}]
    wrong = [{"task_id": "HumanEval/0", key: value} for key in ("solution", "completion") for value in bad]
    wrong += [
        {"task_id": "HumanEval/0"},
        {"task_id": ["HumanEval/0"], "solution": ""},
        {"solution": GOOD},
        [1],
        "x",
        None,
    ]
    for data in (*(text + b"\n" + json.dumps(one).encode() for one in wrong), text + b"\n{", text + b"\n\xff{}"):
        code, said = run("d.jsonl", data)
        assert code == 2 and "d.jsonl, line 6" in said.err and said.err.count("\n") == 1, data
    for data in (b"", b"\n\n", b"[" * 100_000):
        code, said = run("e.jsonl", data)
        assert code == 2 and said.err.count("\n") == 1
    code, said = run("f.jsonl.gz", b"no gzip")
    assert code == 2 and "f.jsonl.gz" in said.err and said.err.count("\n") == 1
    assert json.loads((tmp_path / "out/results.json").read_text())["humaneval+"] == record  # no failure touched it


def test_what_was_scored_is_kept_when_a_later_suite_fails(model, tmp_path, capsys, monkeypatch):
    command = ["--suites", "cruxeval-i:2,cruxeval-o:2", "--data", str(write_bench(tmp_path)), "--out", str(tmp_path)]
    command += ["--model", str(model[0]), "--engine", "transformers", "--max-tokens", "4"]
    assert evaluate.main(command) == 0
    whole = json.loads((tmp_path / "results.json").read_text())
    (tmp_path / "results.json").unlink()
    lines = (tmp_path / "responses/cruxeval-o.jsonl").read_text().splitlines()
    (tmp_path / "responses/cruxeval-o.jsonl").write_text("\n".join([lines[0], "[]", ""]))
    capsys.readouterr()
    assert evaluate.main([*command, "--score-only"]) == 2
    assert "cruxeval-o.jsonl is damaged" in capsys.readouterr().err and not (tmp_path / "results.json").exists()
    (tmp_path / "responses/cruxeval-o.jsonl").unlink()
    monkeypatch.setattr(evaluate, "generate", full_disk(evaluate.generate))
    assert evaluate.main(command) == 2
    message = capsys.readouterr().err.strip()
    assert "No space left" in message and "free some disk space" in message
    assert json.loads((tmp_path / "results.json").read_text()) == {"cruxeval-i:2": whole["cruxeval-i:2"]}


def full_disk(generate):
    def generated(engine, tokenizer, suite, items, header, path, bar):
        if path.stem == "cruxeval-o":
            raise OSError(errno.ENOSPC, "No space left on device")
        return generate(engine, tokenizer, suite, items, header, path, bar)

    return generated


def test_what_cannot_be_gone_on_with_is_refused_before_anything_is_generated(model, tmp_path, capsys, monkeypatch):
    command = ["--suites", "cruxeval-i:2,cruxeval-o:2", "--data", str(write_bench(tmp_path)), "--out", str(tmp_path)]
    command += ["--model", str(model[0]), "--engine", "transformers", "--max-tokens", "4"]
    assert evaluate.main(command) == 0
    (tmp_path / "responses/cruxeval-i.jsonl").unlink()
    monkeypatch.setattr(evaluate, "generate", None)
    assert evaluate.main([*command, "--seed", "1"]) == 2
    assert "cruxeval-o.jsonl was made with seed 0 instead of 1" in capsys.readouterr().err
    for cut in ("", '{"samp'):  # of a kill at the first write
        (tmp_path / "responses/cruxeval-i.jsonl").write_text(cut)
        assert evaluate.main([*command, "--score-only"]) == 2
        assert "There are no responses of cruxeval-i" in capsys.readouterr().err


def test_faults_of_ours_are_not_one_sentence(model, tmp_path, monkeypatch):
    command = [
        "--suites",
        "cruxeval-i:2",
        "--data",
        str(write_bench(tmp_path)),
        "--out",
        str(tmp_path),
        "--samples",
        "1",
    ]
    monkeypatch.setattr(evaluate, "make_record", lambda *_: int("no number"))
    with pytest.raises(ValueError, match="no number"):
        evaluate.main([*command, "--model", str(model[0]), "--engine", "transformers", "--max-tokens", "4"])


def test_a_prompt_of_any_kind_that_changed_is_noticed_and_a_kind_that_comes_to_it_is_not_one(
    model, tmp_path, monkeypatch
):
    tasks = [replace(KINDS[kind].zero(), id=kind) for kind in ("deduction", "abduction")]
    save_tasks(tmp_path / "held.jsonl", tasks)
    spec = f"tasks:{tmp_path / 'held.jsonl'}"
    run = partial(answered, engine=model[1], tokenizer=model[2], out_dir=tmp_path / "out", max_tokens=4)
    run(evaluate.load_suites([f"{spec}:1"], tmp_path))
    run(evaluate.load_suites([spec], tmp_path))
    shutil.rmtree(tmp_path / "out")
    run(evaluate.load_suites([spec], tmp_path))
    monkeypatch.setattr(type(KINDS["abduction"]), "solve", lambda self, task: "Something else?")
    with pytest.raises(ValueError, match="prompts abduction"):
        run(evaluate.load_suites([spec], tmp_path))


def test_tasks_of_two_buffers_that_share_an_id_are_two(model, tmp_path):
    """Abduction and deduction start from the same seeds."""
    tasks = [replace(KINDS[kind].zero(), id="seed-1") for kind in ("abduction", "deduction")]
    save_tasks(tmp_path / "both.jsonl", tasks)
    spec = f"tasks:{tmp_path / 'both.jsonl'}"
    assert [item.gold.kind for item in suites.load_items(spec, tmp_path, {})[1]] == ["abduction", "deduction"]
    record = answered(evaluate.load_suites([spec], tmp_path), *model[1:], max_tokens=4)[spec]
    assert record["n"] == 2 and set(record["scores"]) == {"seed-1", "seed-1#2"}


@pytest.mark.parametrize(("field", "says"), [("public", "is not the data of lcb"), ("private", "private tests of q")])
def test_damaged_tests_of_a_contest_are_found_before_a_model_is_loaded(tmp_path, capsys, field, says):
    row = problem([("1", "1")]) | {"question_id": "q", f"{field}_test_cases": "{oops"}
    (tmp_path / "lcb.jsonl").write_text(json.dumps(row) + "\n")
    assert evaluate.main(["--suites", "lcb", "--model", "x", "--data", str(tmp_path), "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_mathematics_of_a_samples_file_needs_its_packages_too(tmp_path, capsys, monkeypatch):
    (tmp_path / "aime24.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n')
    (tmp_path / "samples.jsonl").write_text('{"task_id": "0", "solution": "2"}\n')
    monkeypatch.setattr(judge_math.importlib.util, "find_spec", lambda name: None)
    command = ["--suites", "aime24", "--data", str(tmp_path), "--out", str(tmp_path)]
    assert evaluate.main([*command, "--samples-file", str(tmp_path / "samples.jsonl")]) == 2
    assert "requirements-eval.txt" in capsys.readouterr().err


@pytest.mark.parametrize(("suite", "file"), [("humaneval+", "HumanEvalPlus.jsonl"), ("lcb", "lcb.jsonl")])
def test_data_without_tests_are_refused_before_a_model_is_loaded(tmp_path, capsys, suite, file):
    row = {"task_id": "HumanEval/0", "prompt": "", "entry_point": "f", "question_id": "q", "question_content": "?"}
    (tmp_path / file).write_text(json.dumps(row | {"starter_code": "", "canonical_solution": ""}))
    assert evaluate.main(["--suites", suite, "--model", "x", "--data", str(tmp_path), "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert file in said and "is not the data of" in said and said.count("\n") == 1


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = build_model(tmp_path_factory.mktemp("model"))
    command = ["--suites", "reasoning", "--model", str(folder), "--engine", "transformers", "--max-model-len", "2048"]
    engine, tokenizer = evaluate.open_engine(evaluate.parse_arguments(command))
    return folder, engine, tokenizer


def answered(suites: list, engine, tokenizer, out_dir=None, **options) -> dict:
    plans = evaluate.plan_suites(suites, engine, tokenizer, out_dir=out_dir, **options)
    return evaluate.run_suites(plans, engine, tokenizer, out_dir=out_dir)


def test_interrupted_run_continues_at_the_first_missing_item(model, tmp_path):
    _, engine, tokenizer = model
    loaded = evaluate.load_suites(["cruxeval-o:70"], write_bench(tmp_path))
    run = partial(answered, loaded, engine, tokenizer, max_tokens=4, temperature=1.0, samples=2, seed=5)
    whole = run(out_dir=tmp_path / "whole")
    path = tmp_path / "cut/responses/cruxeval-o.jsonl"
    text = (tmp_path / "whole/responses/cruxeval-o.jsonl").read_text()
    lines = text.splitlines(keepends=True)
    assert len(lines) == 1 + 2 * 70
    path.parent.mkdir(parents=True)
    for end in (1 + 2 * 64, 2 + 2 * 64):  # one slice, or half an item more; and a line that a kill cut short
        path.write_text("".join(lines[:end]) + lines[end][:20])
        assert run(out_dir=tmp_path / "cut") == whole
        assert path.read_text() == text
    with pytest.raises(ValueError, match="seed 5 instead of 6"):
        run(out_dir=tmp_path / "cut", seed=6)


def test_responses_of_other_weights_are_not_taken_for_the_models(model, tmp_path):
    folder, engine, tokenizer = model
    trained = shutil.copytree(folder, tmp_path / "trained")
    loaded, options = evaluate.load_suites(["cruxeval-o:2"], write_bench(tmp_path)), {"out_dir": tmp_path / "out"}
    run = partial(answered, loaded, engine, tokenizer, max_tokens=4, model=str(trained), **options)
    before = run()
    assert run() == before
    weights = load_file(trained / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, trained / "model.safetensors")
    with pytest.raises(ValueError, match="weights '"):
        run()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("data/cruxeval.jsonl", '{"id": 1}\n'),
        ("data/cruxeval.jsonl", "{"),
        ("data/cruxeval.jsonl", ""),
        ("out/results.json", "[1]"),
        ("out/responses/cruxeval-o.jsonl", '{"samples": 1}\n[]\n'),
        ("before.json", '{"cruxeval-o": 3}'),
    ],
)
def test_damaged_files_are_named_before_anything_is_lost(model, tmp_path, capsys, file, text):
    (tmp_path / "data").mkdir()
    write_bench(tmp_path / "data")
    (tmp_path / "before.json").write_text("{}")
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    command = ["--suites", "cruxeval-o:2", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    command += ["--baseline", str(tmp_path / "before.json")]
    command += ["--score-only"] if "responses" in file else ["--model", str(model[0]), "--engine", "transformers"]
    assert evaluate.main(command) == 2
    message = capsys.readouterr().err.strip()
    assert Path(file).name in message and "\n" not in message and (tmp_path / file).read_text() == text


def test_score_only_repeats_the_scores(model, tmp_path, capsys):
    folder, _, _ = model
    data = write_bench(tmp_path)
    common = ["--suites", "humaneval+,cruxeval-i:3", "--data", str(data), "--out", str(tmp_path / "out")]
    assert evaluate.main([*common, "--model", str(folder), "--engine", "transformers", "--max-tokens", "4"]) == 0
    said = capsys.readouterr()
    assert "no chat template" in said.err and "raw" in said.out
    first = json.loads((tmp_path / "out/results.json").read_text())
    path = tmp_path / "out/responses/HumanEvalPlus.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1] |= {"response": "    return sum(xs)\n"}  # the prompt stands before it: no chat template, so raw completion
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate.main([*common, "--score-only", "--baseline", str(tmp_path / "out")]) == 0
    second = json.loads((tmp_path / "out/results.json").read_text())
    assert first["humaneval+"]["scores"]["HumanEval/0"] == 0.0 and second["humaneval+"]["scores"]["HumanEval/0"] == 1.0
    assert first["cruxeval-i:3"] == second["cruxeval-i:3"] and first["cruxeval-i:3"]["n"] == 3
    assert "+25.0" in capsys.readouterr().out
    samples = [json.loads(line) for line in (tmp_path / "out/humaneval+.samples.jsonl").read_text().splitlines()]
    assert [set(sample) for sample in samples] == [{"task_id", "solution"}] * 4
    assert samples[0]["solution"] == "def total(xs):\n    return sum(xs)"


def test_tasks_file_reports_kinds_and_depths(model, tmp_path):
    _, engine, tokenizer = model
    program = "def f(x):\n    return x + 1"
    tasks = [Task("deduction", program, ["1"], ["2"], depth=1), Task("abduction", program, ["1"], ["2"], depth=2),
             Task("induction", program, ["1", "2"], ["2", "3"], "adds one", 1, depth=2)]  # fmt: skip
    save_tasks(tmp_path / "held.jsonl", tasks)
    spec = f"tasks:{tmp_path / 'held.jsonl'}"
    record = answered(evaluate.load_suites([spec], tmp_path), engine, tokenizer, max_tokens=4)[spec]
    assert record["n"] == 3 and record["groups"]["depth2"]["n"] == 2 and set(record) >= {"formatted", "reasons_first"}
    flat = evaluate.flatten(record)
    assert flat["abduction/accuracy"] == 0.0 and [key for key in flat if "/" not in key] == ["accuracy"]
    gold = {
        "deduction": "```output\n2\n```",
        "abduction": "```input\n1\n```",
        "induction": f"```python\n{program}\n```",
    }
    suite, items, _ = suites.load_items(spec, tmp_path, {})
    responses = [f"because</think>\n<answer>\n{gold[item.gold.kind]}\n</answer>" for item in items]
    answers = [suite.extract(item, response) for item, response in zip(items, responses, strict=True)]
    assert suite.score([(i.gold, a) for i, a in zip(items, answers, strict=True)]) == [1.0, 1.0, 1.0]


def test_kinds_of_a_file_are_asked_and_judged(model, tmp_path, capsys):
    spec = f"tasks:{tmp_path / 'held.jsonl'}"
    example = str(Path(__file__).parent.parent / "examples/rewriting.py")
    kinds = load_kinds(f"deduction,{example}")
    tasks = [kind.zero() for kind in kinds.values()]
    save_tasks(tmp_path / "held.jsonl", tasks)
    right = [f"because</think>\n<answer>\n{kinds[task.kind].gold(task)}\n</answer>" for task in tasks]
    lines = [{"task_id": task.id, "completion": text} for task, text in zip(tasks, right, strict=True)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["--suites", spec, "--out", str(tmp_path / "out"), "--samples-file", str(tmp_path / "samples.jsonl")]
    assert evaluate.main([*command, "--tasks", f"deduction,{example}"]) == 0
    groups = json.loads((tmp_path / "out/results.json").read_text())[spec]["groups"]
    assert groups == {name: {"accuracy": 1.0, "n": 1} for name in ("deduction", "rewriting")}
    record = answered(evaluate.load_suites([spec], tmp_path, kinds), *model[1:], max_tokens=4)[spec]
    assert record["n"] == 2 and record["accuracy"] == 0.0
    capsys.readouterr()
    for wrong, says in ((command, "held.jsonl, line 2"), ([*command, "--tasks", "divination"], "divination")):
        assert evaluate.main(wrong) == 2
        message = capsys.readouterr().err.strip()
        assert says in message and "\n" not in message


def test_summary_shows_the_averages_of_table_1():
    record = {
        "se": 0.01,
        "n": 10,
        "truncated": 0.0,
        "no_answer": 0.0,
        "template": "plain",
        "data_sha256": "0" * 64,
        "samples": 1,
    }
    scores = {"humaneval+": 0.8, "mbpp+": 0.7, "lcb": 0.3, "math500": 0.5, "cruxeval-o": 0.9}
    text = "\n".join(comparison.summary({name: record | {"accuracy": value} for name, value in scores.items()}))
    assert "60.0       (3 of 3" in text and "50.0       (1 of 6" in text and "55.0" in text


def test_public_tests_only_is_said(tmp_path):
    row = problem([("1", "1")])
    (tmp_path / "lcb.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"private_test_cases": "[]"}) + "\n")
    _, items, about = suites.load_items("lcb", tmp_path, {})
    assert len(items) == 2 and "1 of 2" in about["note"]
    assert suites.load_items("lcb", Path("nowhere"), {"lcb": tmp_path})[2]["data_sha256"] == about["data_sha256"]
