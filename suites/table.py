"""The benchmarks: a class for each protocol, a line for each benchmark in the table SUITES, the reader of their data.

What it does: a suite turns a line of a data file into an item, an item into the text that the model continues, and a
response into the answer; `score` is the way from answers to scores.
What it leaves out: the data themselves (nothing is bundled), and leaderboards' prompts other than EvalPlus's.
Paper: section 4.1 and appendix C (suites and protocol), Table 1 (groups and averages).

    suite, items, about = load_items("cruxeval-o", Path("data"), {})
    scores = suite.score([(item.gold, suite.extract(item, response)) for item, response in ...])
"""

import gzip
import hashlib
import itertools
import json
import sys
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path

from buffers import Task, load_tasks
from executor import Executor
from policy.dialogue import STOP, TAGS, Tags, split_response, wrap
from prompts import KINDS, Kind
from suites.extract import extract_assert, extract_code, extract_math, last_box, sanitize
from suites.judge_code import code_executor, judge_evalplus, judge_lcb, lcb_tests
from suites.judge_math import judge_math, require_math_verify


@dataclass(frozen=True)
class Item:
    """One question: `gold` is whatever its judge needs, `text` one turn or the turns of a dialogue."""

    id: str
    text: str | list[str]
    gold: object


TEMPLATES = {"plain": "plain", "chat": "chat", "boxed": "chat"}  # what --template means; boxed is for mathematics


@dataclass(frozen=True)
class Suite:
    """One benchmark. Its protocol, a subclass, says what is asked and judged: `item(row, index)` makes line `index` of
    the data a question, `extract(item, response)` finds the answer or None, `judge(executor, pairs, progress)` gives a
    verdict on each (gold, answer)."""

    file: str  # in the data folder, as it is or with .gz
    source: str  # hub id and split, or the address to get the file from
    tags: Tags = TAGS  # around thought and answer, in prompts and responses
    group = ""  # whose average it belongs to: code, math, or reasoning (in distribution, in no average)
    templates, without_chat = TEMPLATES, "plain"  # `without_chat`: where the tokenizer has no chat template
    stop = STOP
    max_tokens = 8096
    make_executor = nullcontext  # what runs programs for the judge

    def template(self, wanted: str, tokenizer) -> str:
        """The template that is used; says so where a tokenizer without chat template forces another one."""
        chosen = self.templates[wanted]
        if chosen == "plain" or tokenizer.chat_template:
            return chosen
        print(f"note: no chat template; {self.file} is asked with template {self.without_chat}", file=sys.stderr)
        return self.without_chat

    def prompt(self, text: str | list[str], tokenizer, template: str) -> str:
        """What the model continues."""
        return wrap(text, tokenizer, template, tags=self.tags)

    def require(self, items: Sequence[Item]) -> None:
        """Raise ValueError where something is missing that scoring these items needs."""

    def completion(self, item: Item, text: str) -> str | None:
        """The answer in the `completion` of somebody else's samples file."""
        return self.extract(item, text)

    def score(self, pairs: Sequence[tuple], executor: Executor | None = None, progress=None) -> list[float]:
        """1.0 or 0.0 for each (gold, answer or None). `executor`: a running one, made here where None."""
        with nullcontext(executor) if executor else self.make_executor() as runner:
            verdicts = iter(self.judge(runner, [pair for pair in pairs if pair[1]], progress))
            return [float(bool(answer) and next(verdicts)) for _, answer in pairs]


# ---------------------------------------------------------------------------------------------------------------------
# The protocols


@dataclass(frozen=True)
class EvalPlus(Suite):
    """HumanEval+ and MBPP+ under EvalPlus's own prompt, word for word (Apache-2.0): else scores are not comparable."""

    plus: bool = False  # with the plus tests
    group, make_executor, max_tokens = "code", staticmethod(code_executor), 768
    stop = ("<|endoftext|>", "<|endofmask|>", "</s>", "\nif __name__", "\ndef main(", "\nprint(", "\n```\n")
    templates, without_chat = dict.fromkeys(TEMPLATES, "evalplus"), "raw"
    ASK = "Please provide a self-contained Python script that solves the following problem in a markdown code block:"
    REPLY = "Below is a Python script with a self-contained function that solves the problem and passes corresponding "
    REPLY += "tests:\n```python\n"

    def item(self, row: dict, index: int) -> Item:
        itemgetter("entry_point", "canonical_solution", "base_input", "plus_input", "atol")(row)  # what scoring needs
        return Item(row["task_id"], row["prompt"].strip() + "\n", row)

    def prompt(self, text: str, tokenizer, template: str) -> str:
        """Chat with the reply begun up to the opening code fence; without a chat template the bare prompt."""
        if template == "raw":
            return text
        cut = "-[cut here]-"
        turns = [{"role": "user", "content": f"{self.ASK}\n```\n{text.strip()}\n```\n"},
                 {"role": "assistant", "content": f"{self.REPLY}{cut}\n```\n"}]  # fmt: skip
        return tokenizer.apply_chat_template(turns, tokenize=False).split(cut)[0]

    def extract(self, item: Item, response: str) -> str | None:
        return sanitize(response, item.gold["entry_point"])

    def completion(self, item: Item, text: str) -> str | None:
        return item.gold["prompt"] + text

    def judge(self, executor, pairs: Sequence[tuple], progress) -> list[bool]:
        return judge_evalplus(executor, pairs, progress, plus=self.plus)


class LiveCodeBench(Suite):
    """Contest problems, answered with a program that reads its input or with a completed function."""

    group, make_executor, judge = "code", staticmethod(code_executor), staticmethod(judge_lcb)

    def item(self, row: dict, index: int) -> Item:
        json.loads(row["public_test_cases"])
        rest = "The program reads its input from standard input and prints its result to standard output."
        if code := row["starter_code"]:
            rest = f"Complete this code; it is called with the arguments of the tests.\n```python\n{code}\n```"
        text = f"Solve this programming problem in Python.\n\n{row['question_content'].strip()}\n\n{rest}\n"
        return Item(row["question_id"], text + "Answer with the whole program in one fenced `python` block.\n", row)

    def require(self, items: Sequence[Item]) -> None:
        for item in items:
            lcb_tests(item.gold)

    def extract(self, item: Item, response: str) -> str | None:
        return extract_code(response, self.tags)


class Mathematics(Suite):
    """Questions with one answer, which math-verify compares."""

    group, max_tokens = "math", 16000
    templates = TEMPLATES | {"boxed": "boxed"}

    def item(self, row: dict, index: int) -> Item:
        """The gold answer is `answer`, else the first `final_answer`, else the last box of `solution`."""
        gold = row.get("answer", row.get("final_answer"))
        gold = gold[0] if isinstance(gold, list) else last_box(row["solution"]) if gold is None else gold
        gold = str(int(gold)) if isinstance(gold, float) and gold.is_integer() else str(gold)
        return Item(str(index), row.get("problem") or row["question"], gold)

    def prompt(self, text: str, tokenizer, template: str) -> str:
        """As in the paper: the wrapper without an opened think tag. "boxed": a plain chat turn that asks for a box."""
        if template != "boxed":
            return wrap(text, tokenizer, template, prefill_think=False, tags=self.tags)
        text += "\nReason step by step, and put the final answer within \\boxed{}."
        turns = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def require(self, items: Sequence[Item]) -> None:
        require_math_verify()

    def extract(self, item: Item, response: str) -> str | None:
        return extract_math(response, self.tags)

    def judge(self, executor, pairs: Sequence[tuple], progress) -> list[bool]:
        return judge_math(pairs, progress)


@dataclass(frozen=True)
class Reasoning(Suite):
    """Tasks of the loop's own kinds, with the prompts, answers and judge of training. `kind`: of every row of the data;
    `side`: what a samples file asserts of `f(input) == output`."""

    kind: str = ""
    side: str = ""
    kinds: Mapping[str, Kind] = field(default_factory=lambda: KINDS)
    group, make_executor = "reasoning", Executor

    def item(self, row: dict, index: int) -> Item:
        code, call, name = row["code"], row["input"], row.get("function_name")
        if name:  # LiveCodeBench-Execution: the function has a name of its own, and the input is the whole call
            code, call = f"{code.rstrip()}\n\n\nf = {name}", call.strip().removeprefix(f"{name}(").removesuffix(")")
        return self.ask(Task(self.kind, code, [call], [row["output"]], id=str(row.get("id", index))), index)

    def ask(self, task: Task, index: int) -> Item:
        return Item(task.id or str(index), self.kinds[task.kind].solve(task), task)

    def extract(self, item: Item, response: str) -> str | None:
        return self.kinds[item.gold.kind].parse_answer(split_response(response, tags=self.tags).answer)

    def completion(self, item: Item, text: str) -> str | None:
        return self.extract(item, text) or self.side and extract_assert(text, self.side) or None

    def judge(self, executor, pairs: Sequence[tuple], progress) -> list[bool]:
        by_kind, found = defaultdict(list), {}
        for pair in pairs:
            by_kind[pair[0].kind].append(pair)
        for name, some in by_kind.items():
            found[name] = iter(self.kinds[name].verify(executor, some, progress))
        return [next(found[task.kind]).correct for task, _ in pairs]


# ---------------------------------------------------------------------------------------------------------------------
# The table

GITHUB, CRUXEVAL = "https://github.com/evalplus", ("cruxeval.jsonl", "cruxeval-org/cruxeval:test")
HUMANEVAL = ("HumanEvalPlus.jsonl", f"{GITHUB}/humanevalplus_release/releases/download/v0.1.10/HumanEvalPlus.jsonl.gz")
MBPP = ("MbppPlus.jsonl", f"{GITHUB}/mbppplus_release/releases/download/v0.2.0/MbppPlus.jsonl.gz")
LCB = "https://huggingface.co/datasets/livecodebench/code_generation_lite (test.jsonl to test5.jsonl, joined)"
SUITES: dict[str, Suite] = {
    "humaneval": EvalPlus(*HUMANEVAL),
    "humaneval+": EvalPlus(*HUMANEVAL, plus=True),
    "mbpp": EvalPlus(*MBPP),
    "mbpp+": EvalPlus(*MBPP, plus=True),
    "lcb": LiveCodeBench("lcb.jsonl", LCB),
    "aime24": Mathematics("aime24.jsonl", "HuggingFaceH4/aime_2024:train"),
    "aime25": Mathematics("aime25.jsonl", "math-ai/aime25:test"),
    "amc23": Mathematics("amc23.jsonl", "math-ai/amc23:test"),
    "math500": Mathematics("math500.jsonl", "HuggingFaceH4/MATH-500:test"),
    "minerva": Mathematics("minerva_math.jsonl", "math-ai/minervamath:test"),
    "olympiad": Mathematics("olympiadbench.jsonl", "math-ai/olympiadbench:test"),
    "cruxeval-i": Reasoning(*CRUXEVAL, kind="abduction", side="input"),
    "cruxeval-o": Reasoning(*CRUXEVAL, kind="deduction", side="output"),
    "lcb-execution": Reasoning("lcb_execution.jsonl", "livecodebench/execution-v2:test", kind="deduction"),
}
TABLE1 = {
    "code": ("humaneval+", "mbpp+", "lcb"),
    "math": ("aime24", "aime25", "amc23", "math500", "minerva", "olympiad"),
}
GROUPS = TABLE1 | {
    "reasoning": ("cruxeval-i", "cruxeval-o", "lcb-execution"),
    "all": TABLE1["code"] + TABLE1["math"],
}


def expand(specs: Sequence[str]) -> list[tuple[str, str, int | None]]:
    """Turn `code`, `cruxeval-o:100`, `tasks:FILE:50` into (name as given, suite name or "tasks:FILE", limit).

    Raises ValueError that lists the known suites.
    """
    found = []
    for spec in map(str.strip, specs):
        head, colon, tail = spec.rpartition(":")
        name, limit = (head, int(tail)) if colon and tail.isdecimal() else (spec, None)
        if limit == 0:
            raise ValueError(f"{spec} asks for no item: give a limit of at least 1, or none for the whole suite.")
        for one in GROUPS.get(name, (name,)):
            if one not in SUITES and not one.startswith("tasks:"):
                known = ", ".join([*SUITES, *GROUPS])
                raise ValueError(f"There is no suite {one!r}: choose from {known}, or tasks:FILE.")
            found.append((one if name in GROUPS else spec, one, limit))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Data


def unpack(path: Path) -> bytes:
    """What a file holds, also where it ends in .gz. Raises ValueError where it is damaged."""
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}).") from None


def load_items(
    name: str, data_dir: Path, files: Mapping[str, Path], kinds: Mapping[str, Kind] = KINDS
) -> tuple[Suite, list[Item], dict]:
    """Suite, items and {"data", "data_sha256"} (of the unpacked bytes). `files`: another file or folder by suite.
    `kinds`: task types that a "tasks:FILE" may have beside the paper's. Raises FileNotFoundError with the address."""
    if name.startswith("tasks:"):
        source = Path(name.removeprefix("tasks:"))
        if not source.is_file():
            raise FileNotFoundError(f"There is no task file {source}: give the path of a JSONL file of tasks.")
        suite = Reasoning(source.name, "", kinds=KINDS | kinds)
        rows, data, make = load_tasks(source, suite.kinds), source.read_bytes(), suite.ask
    else:
        suite = SUITES[name]
        rows, data, source = read_data(name, suite, files.get(name, data_dir / suite.file))
        make = suite.item
    about = {"data": str(source), "data_sha256": hashlib.sha256(data).hexdigest()}
    if not rows:
        raise ValueError(f"{source} has no items of {name}: get its data again.")
    try:
        if isinstance(suite, LiveCodeBench) and (public := sum("private_test_cases" not in row for row in rows)):
            about["note"] = (
                f"{public} of {len(rows)} problems of {name} have public tests only; scores will be too high"
            )
        items = [make(row, index) for index, row in enumerate(rows)]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{source} is not the data of {name} ({error!r} in a line): get them again.") from None
    known: set[str] = set()
    for i, item in enumerate(items):  # tasks of two buffers may share an id, since these share their seeds
        names = itertools.chain([item.id], (f"{item.id}#{number}" for number in itertools.count(2)))
        items[i] = replace(item, id=next(name for name in names if name not in known))
        known.add(items[i].id)
    return suite, items, about


def read_data(name: str, suite: Suite, given: Path) -> tuple[list[dict], bytes, object]:
    """The rows of a file, of all .jsonl files of a folder, or else of the hub; what a digest is made of; where they are
    from. Raises ValueError for damaged data, FileNotFoundError that says where to get them."""
    paths = sorted(given.glob("*.jsonl*")) or [path for path in (given, Path(f"{given}.gz")) if path.is_file()][:1]
    rows, data = [], b""
    for path in paths:
        try:
            text = unpack(path)
            rows += [json.loads(line) for line in text.split(b"\n") if line.strip()]
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): get the data of {name} again.") from None
        data += text
    if paths:
        return rows, data, paths[0]
    missing = f"The data of {name} are missing: put {suite.file} (or {suite.file}.gz) into {given.parent}"
    if suite.source.startswith("https"):
        raise FileNotFoundError(f"{missing}, from {suite.source}.")
    hub, _, split = suite.source.rpartition(":")
    try:
        import datasets

        rows = list(datasets.load_dataset(hub, split=split))
    except (ImportError, OSError, ValueError) as error:
        hint = f"or install datasets (requirements-eval.txt) to load {suite.source} from the hub"
        raise FileNotFoundError(f"{missing}, {hint}: that failed now ({error}).") from None
    return rows, json.dumps(rows, sort_keys=True, default=str).encode(), suite.source


def read_samples(path: Path, name: str, suite: Suite, items: Sequence[Item]) -> list[tuple[Item, dict, str | None]]:
    """(item, response, answer) of each line of a samples file: `task_id` and `solution` (the answer as it is) or
    `completion` (after EvalPlus's prompt; for CRUXEval in its own `assert f(...) == ...` form). Raises ValueError."""
    known, samples = {item.id: item for item in items}, []
    for number, line in enumerate(unpack(path).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            sample = dict(json.loads(line))
            item, whole = known[str(sample["task_id"])], sample.get("solution") is not None
            text = sample["solution" if whole else "completion"]
            if not isinstance(text, str):
                raise TypeError(f"{type(text).__name__} instead of text")
        except (ValueError, KeyError, TypeError) as error:
            need = f"a task_id of {name}, and one text as solution or completion"
            raise ValueError(f"{path}, line {number}: each line needs {need} ({error!r}).") from None
        answer = text if whole else suite.completion(item, text)
        samples.append((item, {"response": text, "truncated": False, "tokens": 0}, answer))
    if not samples:
        raise ValueError(f"{path} has no sample of {name}.")
    return samples
