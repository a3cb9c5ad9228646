"""The domain of the embedded tiny model: programs, values, inverses, and the frozen held-out tasks.

What it does: draws chains of statements over integers, short lists and short strings, runs them, keeps every program on
one side (corpus, dev or test) by its digest, and turns problems into `buffers.Task`.
What it leaves out: text for a model (`make.py`) and any program that is not such a chain.

    item = problem(random.Random(0), "corpus", depth=3); task = as_task(random.Random(0), "deduction", item)
"""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from buffers import Task, program_digest
from prompts import KINDS

HELD_OUT_PER_DEPTH = 40
N_INPUTS, VISIBLE = 4, 2  # pairs of an induction task
BIGGEST, LONGEST = 15, 5  # |integer| and length of every value on the way, in the corpus
LETTERS = "abcde"

# ---------------------------------------------------------------------------------------------------------------------
# The operations. A program is a chain of statements `x = <code>`.


@dataclass(frozen=True)
class Op:
    """One statement: `code` and its description in `words`, with an optional constant {c} from `constants`; from
    type `takes` to type `gives`; `undo(y, c)` gives an input that leads to y, if a simple rule has one."""

    code: str
    words: str
    takes: str
    gives: str
    constants: tuple
    undo: Callable


def ops_on_sequences(kind: str) -> list[Op]:
    one = [1] if kind == "list" else "a"
    return [
        Op("x[::-1]", "reverse", kind, kind, (), lambda y, c: y[::-1]),
        Op("x[1:]", "drop the first", kind, kind, (), lambda y, c: y[:1] + y or one),
        Op("x[:-1]", "drop the last", kind, kind, (), lambda y, c: y + y[-1:] or one),
        Op("x[:2]", "keep the first two", kind, kind, (), lambda y, c: y),
        Op("x[1:] + x[:1]", "rotate left", kind, kind, (), lambda y, c: y[-1:] + y[:-1]),
        Op("x[-1:] + x[:-1]", "rotate right", kind, kind, (), lambda y, c: y[1:] + y[:1]),
        Op("x + x[:1]", "append the first again", kind, kind, (), lambda y, c: y[:-1]),
        Op("len(x)", "count all", kind, "int", (), lambda y, c: one * y),
    ]


SMALL = (1, 2, 3)
OPS = [
    Op("x + {c}", "add {c}", "int", "int", SMALL, lambda y, c: y - c),
    Op("x - {c}", "subtract {c}", "int", "int", SMALL, lambda y, c: y + c),
    Op("x * 2", "double", "int", "int", (), lambda y, c: y // 2),
    Op("-x", "negate", "int", "int", (), lambda y, c: -y),
    Op("abs(x)", "drop the sign", "int", "int", (), lambda y, c: y),
    Op("max(x, {c})", "at least {c}", "int", "int", SMALL, lambda y, c: y),
    Op("[x, {c}]", "pair with {c}", "int", "list", SMALL, lambda y, c: y[0]),
    Op("[x] * {c}", "make {c} copies", "int", "list", (2, 3), lambda y, c: y[0]),
    Op("list(range(x))", "list all below", "int", "list", (), lambda y, c: len(y)),
    *ops_on_sequences("list"),
    Op("sorted(x)", "sort", "list", "list", (), lambda y, c: y),
    Op("x + [{c}]", "append {c}", "list", "list", SMALL, lambda y, c: y[:-1]),
    Op("[{c}] + x", "put {c} first", "list", "list", SMALL, lambda y, c: y[1:]),
    Op("[v + {c} for v in x]", "add {c} to each", "list", "list", SMALL, lambda y, c: [v - c for v in y]),
    Op("[v - {c} for v in x]", "subtract {c} from each", "list", "list", SMALL, lambda y, c: [v + c for v in y]),
    Op("[v * 2 for v in x]", "double each", "list", "list", (), lambda y, c: [v // 2 for v in y]),
    Op("[-v for v in x]", "negate each", "list", "list", (), lambda y, c: [-v for v in y]),
    Op("[v for v in x if v > {c}]", "keep those above {c}", "list", "list", SMALL, lambda y, c: y),
    Op("max(x)", "take the largest", "list", "int", (), lambda y, c: [y]),
    Op("min(x)", "take the smallest", "list", "int", (), lambda y, c: [y]),
    Op("x[0]", "take the first", "list", "int", (), lambda y, c: [y]),
    Op("x[-1]", "take the last", "list", "int", (), lambda y, c: [y]),
    *ops_on_sequences("str"),
    Op("''.join(sorted(x))", "sort the letters", "str", "str", (), lambda y, c: y),
    Op("x.upper()", "to capitals", "str", "str", (), lambda y, c: y.lower()),
    Op("x + '{c}'", "append {c}", "str", "str", tuple(LETTERS), lambda y, c: y[:-1]),
    Op("'{c}' + x", "put {c} first", "str", "str", tuple(LETTERS), lambda y, c: y[1:]),
    Op("x.replace('{c}', '')", "remove all {c}", "str", "str", tuple(LETTERS), lambda y, c: y),
]
# The habit recipe shows these solved much less often than the others: what its model can still learn, not only show.
RARE = {"x[-1:] + x[:-1]", "x[:2]", "[v * 2 for v in x]", "x * 2", "max(x, {c})", "[v for v in x if v > {c}]"}
BY_TYPE = {kind: [op for op in OPS if op.takes == kind] for kind in ("int", "list", "str")}
WEIGHTS = {kind: [0.15 if op.code in RARE else 1.0 for op in ops] for kind, ops in BY_TYPE.items()}
HIDDEN = "one more step"  # stands for the last statement in a message that does not give it away


@dataclass(frozen=True)
class Step:
    """An operation with its constant filled in."""

    op: Op
    constant: object = None

    @property
    def code(self) -> str:
        return self.op.code.replace("{c}", str(self.constant))

    @property
    def words(self) -> str:
        return self.op.words.replace("{c}", str(self.constant))


def program_text(steps: list[Step]) -> str:
    return "def f(x):" + "".join(f"\n    x = {step.code}" for step in steps) + "\n    return x"


COMPILED: dict[str, Callable] = {}


def run(steps: list[Step], value) -> list | None:
    """The states after each statement, by executing each; None if one fails or leaves the small domain."""
    states = []
    for step in steps:
        code = step.code
        if code not in COMPILED:
            COMPILED[code] = eval(f"lambda x: {code}")  # our own text, from the table above
        try:
            value = COMPILED[code](value)
        except (IndexError, ValueError, TypeError):
            return None
        if not small(value):
            return None
        states.append(value)
    return states


def small(value) -> bool:
    if isinstance(value, int):
        return abs(value) <= BIGGEST
    return len(value) <= LONGEST and (isinstance(value, str) or all(abs(v) <= BIGGEST for v in value))


def random_value(rng: random.Random, kind: str):
    if kind == "int":
        return rng.randint(-5, 9)
    if kind == "str":
        return "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 4)))
    return [rng.randint(0, 9) for _ in range(rng.randint(2, 4))]


def random_steps(rng: random.Random, depth: int, uniform: bool) -> tuple[str, list[Step]]:
    """A chain of `depth` operations whose types fit, and the type of its input."""
    start = kind = rng.choices(("list", "int", "str"), (2, 1, 1))[0]
    steps = []
    for _ in range(depth):
        op = rng.choices(BY_TYPE[kind], None if uniform else WEIGHTS[kind])[0]
        steps.append(Step(op, rng.choice(op.constants) if op.constants else None))
        kind = op.gives
    return start, steps


def undo(steps: list[Step], output) -> list | None:
    """Backwards from the output: the value before each statement, last statement first; None if the simple rules do
    not lead to an input that gives this output."""
    values, value = [], output
    for step in reversed(steps):
        try:
            value = step.op.undo(value, step.constant)
        except (IndexError, TypeError, ValueError):
            return None
        if type(value).__name__ != step.op.takes or not small(value):
            return None
        values.append(value)
    states = run(steps, value)
    return values if states and states[-1] == output else None


@dataclass
class Problem:
    """A program with an input that runs, before it becomes a task of one kind."""

    steps: list[Step]
    program: str
    key: str
    values: list
    outputs: list


KEYS: dict[str, str] = {}


def split_of(key: str) -> str:
    """Which side a program belongs to, by its digest: 10 % test, 10 % dev, the rest corpus. Never both."""
    return {0: "test", 1: "dev"}.get(int(key[:8], 16) % 10, "corpus")


def problem(rng: random.Random, split: str, depth: int, count: int = 1, uniform: bool = True) -> Problem:
    """A random program of one split with `count` different inputs; its output differs from its input."""
    while True:
        start, steps = random_steps(rng, depth, uniform)
        program = program_text(steps)
        if program not in KEYS:
            KEYS[program] = program_digest(program)
        if split_of(KEYS[program]) != split:
            continue
        values, outputs = [], []
        for _ in range(3 * count):
            value = random_value(rng, start)
            states = run(steps, value)
            if states and states[-1] != value and value not in values:
                values.append(value)
                outputs.append(states[-1])
            if len(values) == count:
                if count == 1 or len({repr(output) for output in outputs}) > count // 2:
                    return Problem(steps, program, KEYS[program], values, outputs)
                break


def message(rng: random.Random, steps: list[Step]) -> str:
    """What the steps do, in order; two times out of three without the last one."""
    words = [step.words for step in steps]
    if not words:
        return "leave it as it is"
    if rng.random() < 2 / 3:
        words[-1] = HIDDEN
    return ", then ".join(words)


def as_task(rng: random.Random, kind: str, item: Problem) -> Task:
    count = N_INPUTS if kind == "induction" else 1
    inputs, outputs = [repr(v) for v in item.values[:count]], [repr(v) for v in item.outputs[:count]]
    note = message(rng, item.steps) if kind == "induction" else ""
    visible = VISIBLE if kind == "induction" else 1
    return Task(kind, item.program, inputs, outputs, note, visible, depth=len(item.steps))


def held_out(split: str, seed: int, deepest: int) -> list[Task]:
    """The frozen tasks of one split: every kind and depth (statements per program), all different, programs drawn
    uniformly."""
    rng, tasks, seen = random.Random(seed), [], set()
    for kind in KINDS:
        for depth in range(1, deepest + 1):
            count = 0
            while count < HELD_OUT_PER_DEPTH:
                task = as_task(rng, kind, problem(rng, split, depth, N_INPUTS if kind == "induction" else 1))
                prompt = KINDS[kind].solve(task)[-1]
                if prompt not in seen:
                    seen.add(prompt)
                    task.id = f"{split}-{kind}-{depth}-{count}"
                    tasks.append(task)
                    count += 1
    return sorted(tasks, key=lambda task: int(task.id.rpartition("-")[2]))  # so that a prefix of the file is balanced
