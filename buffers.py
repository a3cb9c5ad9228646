"""Tasks and the buffers that self-play fills (one per task type).

What it does: holds validated tasks in a ring that drops the oldest, refuses duplicates (programs that are the same up
to names, layout and comments), draws references uniformly or by learnability, reads and writes JSONL.
What it leaves out: weighting by age (the paper reports collapse with recency weighting) and anything that needs a
model or runs a program.
Paper: section 3.3.1 (buffer initialisation) and 3.3.2 (inputs from the buffers). The official code keeps the *oldest*
entries once a buffer is full, which freezes what the solver trains on; here the newest stay, unless `drops` says so.

    buffer = Buffer(capacity=16384); buffer.add(KINDS["deduction"].zero()); buffer.sample(6, random.Random(0))
"""

import ast
import hashlib
import json
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from itertools import takewhile
from pathlib import Path

warnings.filterwarnings("ignore", category=SyntaxWarning, module="<unknown>")  # the parser on what a model wrote


@dataclass
class Task:
    """One validated triplet (program, input, output); for induction one program with N pairs and a message.

    All values are text: an input is what stands between the parentheses of `f(...)`, an output is the canonical
    literal that the executor reported. The first `visible` pairs of an induction task are shown to the solver, the
    others are hidden (paper: half and half).
    """

    kind: str
    program: str
    inputs: list[str]
    outputs: list[str]
    message: str = ""
    visible: int = 1
    step: int = 0  # when it was added; 0 = seed
    id: str = ""
    references: list[str] = field(default_factory=list)  # ids of the tasks its proposer was shown
    solve_rate: float | None = None
    depth: int | None = None  # difficulty label of a held-out task, if it has one

    @property
    def hidden_inputs(self) -> list[str]:
        return self.inputs[self.visible :]

    @property
    def hidden_outputs(self) -> list[str]:
        return self.outputs[self.visible :]


def has_docstring(node: ast.AST) -> bool:
    """Whether a module, class or function starts with a docstring that can go without leaving it empty."""
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) or len(node.body) < 2:
        return False
    first = node.body[0]
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)


DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def binding(node: ast.AST) -> str | None:
    """The name that a node binds, if any."""
    match node:
        case (
            ast.Name(id=name, ctx=ast.Store())
            | ast.arg(arg=name)
            | ast.alias(asname=name)
            | ast.MatchMapping(rest=name)
        ):
            return name
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return node.name
        case ast.ExceptHandler(name=name) | ast.MatchAs(name=name) | ast.MatchStar(name=name):
            return name
    return None


@lru_cache(maxsize=4096)  # a program comes back as reference, as key and in the metrics
def program_digest(program: str) -> str:
    """A digest that is equal for programs that differ only in layout, comments, docstrings and the names they bind.

    The tree is walked breadth first without recursion, so that a deeply nested program cannot exhaust the stack; one
    that the parser itself finds too deep is its own normal form. Raises SyntaxError if the text is not Python.
    The held-out tasks of tiny/ were split by these digests: other digests need a new embedded model.
    """
    try:
        tree = ast.parse(program)
    except (RecursionError, MemoryError):
        return hash_texts([program])
    bound: dict[str, str] = {}
    members: set[str | None] = set()  # what classes define keeps its name: attributes read it
    for node in ast.walk(tree):
        if has_docstring(node):
            del node.body[0]
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                members.update(map(binding, [part] if isinstance(part, DEFINITIONS) else ast.walk(part)))
        elif isinstance(node, ast.alias) and not node.asname:
            members.add(node.name.partition(".")[0])  # what it names is not the program's to choose
        if name := binding(node):
            bound.setdefault(name, f"name{len(bound)}")
    for name in members & bound.keys():
        del bound[name]
    digest = hashlib.sha256()
    for node in ast.walk(tree):
        parts = [type(node).__name__]
        for name, value in ast.iter_fields(node):
            if isinstance(value, list):
                parts.append(f"{name}[{len(value)}]")
                # Names after global and nonlocal, None for a missing default or key: they are no nodes of their own.
                parts += [f"{i}={bound.get(v, v)}" for i, v in enumerate(value) if not isinstance(v, ast.AST)]
            elif isinstance(value, str) and name in ("id", "arg", "name", "asname", "rest"):
                parts.append(value if isinstance(node, ast.alias) and name == "name" else bound.get(value, value))
            elif isinstance(value, int) and value.bit_length() > 10_000:  # Python may refuse to write it in decimal
                parts.append(f"{name}={value:x}")
            elif not isinstance(value, ast.AST):
                value = None if name == "kind" else value  # the u of u'' says nothing
                parts.append(f"{name}={type(value).__name__}:{value!r}")
            else:
                parts.append(name)
        digest.update("|".join(parts).encode("utf-8", "backslashreplace") + b"\n")
    return digest.hexdigest()[:32]


def program_key(task: Task) -> str:
    return program_digest(task.program)


def hash_texts(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "backslashreplace")).hexdigest()[:16]


class Buffer:
    """A ring of tasks: at most `capacity`, no duplicates (equal `key`), uniform draws. When it is full the oldest
    leaves first, or (`drops="newest"`) nothing enters any more. `draw`: how `draw_references` chooses."""

    def __init__(self, capacity: int = 16384, key: Callable[[Task], str] = program_key, drops="oldest", draw="uniform"):
        self.capacity, self.key, self.drops, self.draw = capacity, key, drops, draw
        self.tasks: OrderedDict[str, Task] = OrderedDict()
        self.listed: list[Task] | None = None  # the same as a list, while nothing was added since it was made

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks.values())

    def __contains__(self, task: Task) -> bool:
        return self.key(task) in self.tasks

    def __getitem__(self, number: int) -> Task:
        """Task `number`, from the oldest on. A step draws for every prompt and adds once: one list serves all draws."""
        if self.listed is None:
            self.listed = list(self.tasks.values())
        return self.listed[number]

    def add(self, task: Task) -> bool:
        """Append a task; False (and no change) if an equal one is already there, or no room is left for new ones."""
        if task in self or (self.drops == "newest" and len(self) >= self.capacity):
            return False
        self.tasks[self.key(task)], self.listed = task, None
        if len(self.tasks) > self.capacity:
            self.tasks.popitem(last=False)
        return True

    def sample(self, count: int, rng: random.Random) -> list[Task]:
        """Up to `count` different tasks, uniformly without replacement."""
        return [self[number] for number in rng.sample(range(len(self)), min(count, len(self)))]

    def added_at(self, step: int) -> list[Task]:
        """The tasks that came in at one step (the "new" slice of the solve batch)."""
        late = takewhile(lambda task: task.step >= step, reversed(self.tasks.values()))  # the newest are at the end
        return [task for task in late if task.step == step][::-1]


def frontier_weight(task: Task) -> float:
    """r(1-r), the share of pairs of attempts that disagree: highest for what the solver can half do. A seed, of which r
    is not known, counts like r = 0.05; what nobody or everybody solves counts next to nothing, but can be drawn."""
    return 0.05 if task.solve_rate is None else max(task.solve_rate * (1 - task.solve_rate), 0.001)


def draw_references(pools: Sequence[Buffer], count: int, rng: random.Random) -> list[Task]:
    """Up to `count` different tasks of some buffers as if they were one (putting them together would cost their size):
    uniformly, or in proportion to `frontier_weight`, as the first buffer's `draw` says."""
    size = sum(map(len, pools))

    def task(number: int) -> Task:
        pool, *others = pools
        while number >= len(pool):
            number -= len(pool)
            pool, *others = others
        return pool[number]

    if pools[0].draw == "uniform":
        return [task(number) for number in rng.sample(range(size), min(count, size))]
    chosen: dict[int, Task] = {}
    while len(chosen) < min(count, size):  # by rejection: no table of weights to keep, and few tries are in vain
        candidate = task(number := rng.randrange(size))
        if rng.random() < 4 * frontier_weight(candidate):  # 4: the largest weight is 1/4
            chosen[number] = candidate
    return list(chosen.values())


def repeated(tasks: Sequence[Task | None], buffers: Mapping[str, Buffer]) -> list[bool]:
    """Whether each task is in the buffer of its kind already, or equals an earlier one of `tasks`; None never is."""
    seen: set[tuple[str, str] | None] = set()
    found = []
    for task in tasks:
        key = (task.kind, buffers[task.kind].key(task)) if task else None
        found.append(task is not None and (key in seen or task in buffers[task.kind]))
        seen.add(key)
    return found


def save_tasks(path: Path, tasks: Iterable[Task]) -> None:
    """Write tasks as JSONL, oldest first."""
    with path.open("w", encoding="utf-8") as file:
        for task in tasks:
            file.write(json.dumps(asdict(task)) + "\n")


def load_tasks(path: Path, kinds: Mapping) -> list[Task]:
    """Read tasks of these kinds (prompts.Kind by name) from JSONL. Raises ValueError naming file and line when a line
    is not a whole task."""
    tasks = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                tasks.append(read_task(line, kinds))
            except (ValueError, TypeError, AttributeError, SyntaxError, RecursionError) as error:
                raise ValueError(
                    f"{path}, line {number}: not a whole task ({error}); delete the line or restore the file"
                ) from None
    return tasks


def load_seeds(path: Path, kinds: Mapping) -> list[Task]:
    """As `load_tasks`, for tasks to begin a run with: step, references and solve rate, which are another run's, are
    dropped; seeds keep their names, all others get one of their own, as a step of this run may give theirs again."""
    tasks = load_tasks(path, kinds)
    names = [
        task.id if task.id and task.step == 0 else f"seed-{hash_texts([task.program, *task.inputs])}" for task in tasks
    ]
    return [
        replace(task, id=name, step=0, references=[], solve_rate=None) for task, name in zip(tasks, names, strict=True)
    ]


def read_task(line: str, kinds: Mapping) -> Task:
    known = {item.name for item in fields(Task)}
    task = Task(**{name: value for name, value in json.loads(line).items() if name in known})
    "".join([task.program, task.message, task.id, *task.inputs, *task.outputs]).encode()  # raises for lone surrogates
    if type(task.step) is not int:
        raise ValueError(f"its step is {task.step!r}")
    if task.kind not in kinds or not isinstance(task.inputs, list) or not isinstance(task.outputs, list):
        raise ValueError(f"it needs a kind of {tuple(kinds)} and lists of inputs and outputs")
    if not task.inputs or len(task.inputs) != len(task.outputs):
        raise ValueError("it needs inputs, and one output for each")
    kinds[task.kind].inspect(task)
    return task


def refill(buffer: Buffer, path: Path, kind) -> None:
    """Bring back a buffer from the file of every task that ever entered it, in order: the last ones are still in it."""
    for task in load_tasks(path, {kind.name: kind})[-buffer.capacity :]:
        buffer.add(task)
