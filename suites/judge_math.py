"""The judge of mathematics: math-verify's verdict on rewritten texts, in child processes.

What it does: rewrites gold and answer alike and asks math-verify. What math-verify reads as something else (`3e8` as
8 times 3e, `2 1/3` as 1) is always rewritten. Where more can be (a full stop, degrees, a percent sign) it is asked a
second time, so that these rules can only find an answer right. Small numbers compare relatively.
What it leaves out: rules that drop letters or digits; what docs/evaluation.md lists.
Source: math-verify 0.9.0.

    judge_math([("3e8", "3 \\times 10^{8}")])               # -> [True]; pairs are (gold, answer)
"""

import importlib.util
import os
import re
import resource
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from unicodedata import normalize

SPACES = "\u00a0\u2009\u202f"  # no-break and thin
MISREAD: Sequence[tuple[re.Pattern, str | Callable]] = (
    (re.compile(rf"(?<!\\)\\!|(?<=\d)(?:\\,|\{{,\}}|[{SPACES}])(?=\d{{3}})"), ""),  # negative space; thousands
    (re.compile(rf"(?<!\\)\\[,;: ]|[{SPACES}]"), " "),
    (re.compile(r"(?<![\d.])\d{1,3}(?: \d{3})+(?!\d)"), lambda match: match[0].replace(" ", "")),
    (re.compile(r"(?<![\w.\\])(\d+\.?\d*|\.\d+)[eE]([+-]?\d+)(?![\w.])"), r"\1 \\times 10^{\2}"),
    (re.compile(r"(?<![\w.\\/^}])(\d+)\s+(\d+)/(\d+)(?![\w.])"), r"\1\\frac{\2}{\3}"),
)
SIGNS = {"°": r"^\circ", "∞": r"\infty ", "·": r"\cdot ", "⁄": "/"}
UNREAD: Sequence[tuple[re.Pattern, str | Callable]] = (
    (re.compile(r"(?<!\.)\.\s*$"), ""),
    (re.compile("[°∞·⁄]"), lambda match: SIGNS[match[0]]),
    (re.compile(r"(?<=\d)\s+i(?![A-Za-z])"), "i"),
    (re.compile("[¼-¾⅐-⅞]"), lambda match: r"\frac{" + normalize("NFKC", match[0]).replace("⁄", "}{") + "}"),
    (re.compile(r"(?<=\^)-\d+"), r"{\g<0>}"),
    (re.compile("⁻?[²³¹⁰⁴-⁹]+"), lambda match: f"^{{{normalize('NFKC', match[0])}}}"),
    (re.compile(r"√(\d+|\w)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<=\d)(?:\s|\\[,;: ])*(?:\\?%|percent)\s*$"), ""),  # math-verify: 35 is 35 %, 33.3 is not 33.3 %
)
LIMIT_S = 30  # wall clock, for math-verify knows no other; short limits fail easy pairs on a busy machine
MEMORY = 4 << 30  # bytes of a process


def normalise_math(text: str, rules: Sequence[tuple[re.Pattern, str | Callable]] = (*UNREAD, *MISREAD)) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text.strip())
    return text


def math_equal(prediction: str, gold: str, normalise: bool = True, call: str = "boxed") -> bool:
    """Whether math-verify finds the texts equal; `normalise`: rewritten, and small numbers also to six digits. `call`:
    "boxed" wraps the prediction in a box, "text" lets math-verify search it. Main thread only (it sets an alarm)."""
    from math_verify import parse, verify

    frame = "\\boxed{%s}" if call == "boxed" else "%s"
    texts = (prediction, gold)
    asked = [tuple(normalise_math(text, rules) for text in texts) for rules in (MISREAD, (*UNREAD, *MISREAD))]
    for answer, wanted in dict.fromkeys(asked if normalise else [texts]):  # once where both are the same
        want = parse(f"\\boxed{{{wanted}}}", parsing_timeout=LIMIT_S)
        got = parse(frame % answer, parsing_timeout=LIMIT_S)
        sets = normalise and re.search(r"\\infty|\\cup|\\setminus", wanted) is not None  # x > 3 is (3, \infty)
        if verify(want, got, timeout_seconds=LIMIT_S, allow_set_relation_comp=sets):
            places = decimals([*want, *got]) if normalise and answer != wanted else 6
            precise = {"float_rounding": places, "numeric_precision": places + 6, "timeout_seconds": LIMIT_S}
            return places == 6 or verify(want, got, allow_set_relation_comp=sets, **precise)
    return False


def decimals(expressions: Sequence) -> int:
    """Decimals to compare parsed expressions by: math-verify's 6, or, where they hold a number below 0.001, those that
    show six digits of the smallest."""
    from sympy import log, preorder_traversal

    least, walk = 0.0, preorder_traversal(tuple(expressions))  # log10
    for node in walk:
        if getattr(node, "is_comparable", False):
            walk.skip()
            size = abs(node.evalf(5))
            least = min(least, float(log(size, 10).evalf(5))) if size > 0 else least
    return 6 - int(least) if least < -3 else 6


def require_math_verify() -> None:
    """Raise ValueError in one sentence where a package of the judge is missing."""
    if not all(map(importlib.util.find_spec, ("math_verify", "pebble"))):
        raise ValueError("Math suites need math-verify and pebble: pip install -r requirements-eval.txt")


def judge_math(pairs: Sequence[tuple[str, str]], progress: Callable[[int], None] | None = None) -> list[bool]:
    """Verdicts on (gold, answer) pairs, from a pool of processes. A pair that hangs, raises (whatever sympy raises on a
    model's text, the answer is not right) or ends its process is wrong and costs the others nothing."""
    from pebble import ProcessPool

    pool = ProcessPool((os.cpu_count() or 2) // 2 or 1, initializer=prepare, context=get_context("spawn"))
    try:
        pool.schedule(math_equal, ("1", "1")).result()  # raises where no process can judge anything
        verdicts = []
        for future in [pool.schedule(math_equal, (answer, gold), timeout=4 * LIMIT_S) for gold, answer in pairs]:
            verdicts.append(future.exception() is None and future.result())
            if progress:
                progress(1)
        return verdicts
    finally:
        pool.stop()
        pool.join()


def prepare() -> None:
    """What a process of the pool does first: load math-verify, whose logs nobody needs, and limit its own memory."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    math_equal("1", "1")
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
