"""The benchmarks, one line each in the table SUITES: data, question, prompt, stop strings, length, answer, judge.

What it does: turns a line of a data file into an item, an item into the text that the model continues, and names what
counts as the answer in a response and who judges it.
What it leaves out: the data themselves (nothing is bundled), and leaderboards' prompts other than EvalPlus's.
It stands apart from `evaluate.py`, which runs the suites, so that protocol and machinery can be read one by one.
Paper: section 4.1 and appendix C (suites and protocol), Table 1 (groups and averages).

    suite, items, about = load_items("math500", Path("data"), {})
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from buffers import Task, load_tasks
from prompts import parse_answer, solve_prompt, split_response, wrap
from suites import judge_code as scoring_code
from suites import scoring

# ---------------------------------------------------------------------------------------------------------------------
# From a line of a data file to an item


@dataclass(frozen=True)
class Item:
    """One question: `gold` is whatever its judge needs."""

    id: str
    text: str | list[str]  # a list: the turns of a dialogue
    gold: object


def evalplus_item(row: dict, index: int) -> Item:
    return Item(row["task_id"], row["prompt"].strip() + "\n", row)


def math_item(row: dict, index: int) -> Item:
    """The gold answer is `answer`, else the first `final_answer`, else the last box of `solution`."""
    gold = row.get("answer", row.get("final_answer"))
    gold = gold[0] if isinstance(gold, list) else scoring.last_box(row["solution"]) if gold is None else gold
    gold = str(int(gold)) if isinstance(gold, float) and gold.is_integer() else str(gold)
    return Item(str(index), row.get("problem") or row["question"], gold)


def cruxeval_item(kind: str, row: dict, index: int) -> Item:
    task = Task(kind, row["code"], [row["input"]], [row["output"]])
    return Item(row["id"], solve_prompt(task), task)


def lcb_item(row: dict, index: int) -> Item:
    if row["starter_code"]:
        rest = (
            f"Complete this code; it is called with the arguments of the tests.\n```python\n{row['starter_code']}\n```"
        )
    else:
        rest = "The program reads its input from standard input and prints its result to standard output."
    text = f"Solve this programming problem in Python.\n\n{row['question_content'].strip()}\n\n{rest}\n"
    return Item(row["question_id"], text + "Answer with the whole program in one fenced `python` block.\n", row)


def lcb_execution_item(row: dict, index: int) -> Item:
    code, arguments = scoring.rename_to_f(row["code"], row["input"], row["function_name"])
    task = Task("deduction", code, [arguments], [row["output"]])
    return Item(str(row.get("id", index)), solve_prompt(task), task)


# ---------------------------------------------------------------------------------------------------------------------
# From an item to the text that the model continues

# EvalPlus's two lines, word for word (Apache-2.0): its scores are only comparable under its own prompt.
EVALPLUS_ASK = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:"
)
EVALPLUS_REPLY = (
    "Below is a Python script with a self-contained function that solves the problem and passes corresponding tests:"
)
BOXED_ASK = "\nReason step by step, and put the final answer within \\boxed{}."
CUT = "-[cut here]-"


def evalplus_prompt(text: str, tokenizer, template: str) -> str:
    """Chat with the reply begun up to the opening code fence; without a chat template the bare prompt."""
    if template == "raw":
        return text
    turns = [
        {"role": "user", "content": f"{EVALPLUS_ASK}\n```\n{text.strip()}\n```\n"},
        {"role": "assistant", "content": f"{EVALPLUS_REPLY}\n```python\n{CUT}\n```\n"},
    ]
    return tokenizer.apply_chat_template(turns, tokenize=False).split(CUT)[0]


def think_prompt(text: str | list[str], tokenizer, template: str) -> str:
    return wrap(text, tokenizer, template)


def math_prompt(text: str, tokenizer, template: str) -> str:
    """As in the paper: the wrapper without an opened think tag. "boxed": a plain chat turn that asks for a box."""
    if template != "boxed":
        return wrap(text, tokenizer, template, prefill_think=False)
    turns = [{"role": "user", "content": text + BOXED_ASK}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


# ---------------------------------------------------------------------------------------------------------------------
# From a response to an answer and from answers to scores


def reasoning_answer(item: Item, response: str) -> str | None:
    return parse_answer(item.gold.kind, split_response(response).answer)


def math_score(pairs: Sequence[tuple[str, str | None]], executor=None, progress=None) -> list[float]:
    asked = [(answer, gold) for gold, answer in pairs if answer is not None]
    verdicts = iter(scoring.judge_math(asked, progress))
    return [float(answer is not None and next(verdicts)) for _, answer in pairs]


@dataclass(frozen=True)
class Suite:
    """One benchmark: what the columns of SUITES mean, in their order."""

    file: str  # in the data folder, as it is or with .gz
    source: str  # hub id and split, or the address to get the file from
    group: str  # whose average it belongs to: code, math, or reasoning (in distribution, in no average)
    item: Callable[[dict, int], Item]
    prompt: Callable[[str, object, str], str]
    stop: tuple[str, ...]
    max_tokens: int
    extract: Callable[[Item, str], str | None]
    score: Callable  # ([(gold, answer)], executor=, progress=) -> [score]


def _code(file, source, plus):
    stop = ("<|endoftext|>", "<|endofmask|>", "</s>", "\nif __name__", "\ndef main(", "\nprint(", "\n```\n")
    score = partial(scoring_code.score_evalplus, plus=plus)
    return Suite(
        file, source, "code", evalplus_item, evalplus_prompt, stop, 768, lambda _, r: scoring.sanitize(r), score
    )


def _math(file, source):
    extract = lambda _, response: scoring.extract_math(response)  # noqa: E731
    return Suite(file, source, "math", math_item, math_prompt, USER, 16000, extract, math_score)


def _reason(file, source, item):
    score = scoring.score_reasoning
    return Suite(file, source, "reasoning", item, think_prompt, USER, 8096, reasoning_answer, score)


USER = ("</s>", "<|im_end|>", "<|endoftext|>", "\nUser:")  # a base model that goes on writes the next user turn
RELEASES = "https://github.com/evalplus/{0}_release/releases/download/{1}.jsonl.gz"
HUMANEVAL, MBPP = (
    RELEASES.format("humanevalplus", "v0.1.10/HumanEvalPlus"),
    RELEASES.format("mbppplus", "v0.2.0/MbppPlus"),
)
LCB = "https://huggingface.co/datasets/livecodebench/code_generation_lite (test.jsonl to test5.jsonl, joined)"

SUITES: dict[str, Suite] = {
    "humaneval": _code("HumanEvalPlus.jsonl", HUMANEVAL, plus=False),
    "humaneval+": _code("HumanEvalPlus.jsonl", HUMANEVAL, plus=True),
    "mbpp": _code("MbppPlus.jsonl", MBPP, plus=False),
    "mbpp+": _code("MbppPlus.jsonl", MBPP, plus=True),
    "lcb": Suite("lcb.jsonl", LCB, "code", lcb_item, think_prompt, USER, 8096,
                 lambda _, response: scoring.extract_code(response), scoring_code.score_lcb),
    "aime24": _math("aime24.jsonl", "HuggingFaceH4/aime_2024:train"),
    "aime25": _math("aime25.jsonl", "math-ai/aime25:test"),
    "amc23": _math("amc23.jsonl", "math-ai/amc23:test"),
    "math500": _math("math500.jsonl", "HuggingFaceH4/MATH-500:test"),
    "minerva": _math("minerva_math.jsonl", "math-ai/minervamath:test"),
    "olympiad": _math("olympiadbench.jsonl", "math-ai/olympiadbench:test"),
    "cruxeval-i": _reason("cruxeval.jsonl", "cruxeval-org/cruxeval:test", partial(cruxeval_item, "abduction")),
    "cruxeval-o": _reason("cruxeval.jsonl", "cruxeval-org/cruxeval:test", partial(cruxeval_item, "deduction")),
    "lcb-execution": _reason("lcb_execution.jsonl", "livecodebench/execution-v2:test", lcb_execution_item),
}  # fmt: skip
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
    for spec in specs:
        head, colon, tail = spec.strip().rpartition(":")
        name, limit = (head, int(tail)) if colon and tail.isdecimal() else (spec.strip(), None)
        if limit == 0:
            raise ValueError(f"{spec} asks for no item: give a limit of at least 1, or none for the whole suite.")
        for one in GROUPS.get(name, (name,)):
            if one not in SUITES and not one.startswith("tasks:"):
                known = ", ".join([*SUITES, *GROUPS])
                raise ValueError(f"There is no suite {one!r}: choose from {known}, or tasks:FILE.")
            found.append((one if name in GROUPS else spec.strip(), one, limit))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Data


def load_items(name: str, data_dir: Path, files: dict[str, Path]) -> tuple[Suite, list[Item], dict]:
    """Suite, items and {"data", "data_sha256"} (of the unpacked bytes). Raises FileNotFoundError with the address."""
    if name.startswith("tasks:"):
        path = Path(name.partition(":")[2])
        if not path.is_file():
            raise FileNotFoundError(f"There is no task file {path}: give the path of a JSONL file of tasks.")
        tasks = load_tasks(path)
        if not tasks:
            raise ValueError(f"{path} has no tasks: give a JSONL file of tasks.")
        items = [Item(task.id or str(i), solve_prompt(task), task) for i, task in enumerate(tasks)]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return _reason(path.name, "", None), items, {"data": str(path), "data_sha256": digest}
    suite = SUITES[name]
    given = files.get(name)
    paths = [given] if given else [data_dir / suite.file, data_dir / f"{suite.file}.gz"]
    if given and given.is_dir():
        paths = sorted(given.glob("*.jsonl*"))
    paths = [path for path in paths if path.is_file()][: None if given else 1]
    if paths:
        data, rows = b"", []
        for path in paths:
            try:
                text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                rows += [json.loads(line) for line in text.split(b"\n") if line.strip()]
            except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{path} is damaged ({error}): get the data of {name} again.") from None
            data += text
    else:
        rows = load_from_hub(name, suite, data_dir)
        data = json.dumps(rows, sort_keys=True, default=str).encode()
    about = {"data": str(paths[0]) if paths else suite.source, "data_sha256": hashlib.sha256(data).hexdigest()}
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{about['data']} has no items of {name}: get its data again.")
    public_only = sum("private_test_cases" not in row for row in rows) if suite.item is lcb_item else 0
    if public_only:
        about["note"] = (
            f"{public_only} of {len(rows)} problems of {name} have public tests only; scores will be too high"
        )
    try:
        return suite, [suite.item(row, index) for index, row in enumerate(rows)], about
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{about['data']} is not the data of {name} ({error!r} in a line): get them again.") from None


def load_from_hub(name: str, suite: Suite, data_dir: Path) -> list[dict]:
    missing = f"The data of {name} are missing: put {suite.file} (or {suite.file}.gz) into {data_dir}"
    if suite.source.startswith("https"):
        raise FileNotFoundError(f"{missing}, from {suite.source}.")
    try:
        import datasets
    except ImportError:
        raise FileNotFoundError(
            f"{missing}, or install datasets (requirements-eval.txt) to load {suite.source} from the hub."
        ) from None
    hub, _, split = suite.source.rpartition(":")
    try:
        return list(datasets.load_dataset(hub, split=split))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{missing}; the hub's {suite.source} could not be loaded ({error}).") from None
