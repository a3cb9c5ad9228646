"""The task types: what a model is asked, how its reply is read, and what is asked of the judge.

What it does: one object per task type (`Kind`) holds everything that depends on the type: two prompts (propose, solve),
the parsers of their replies, and the two questions to the executor (is this proposal a task? is this answer right?).
A parser is the inverse of its prompt: both name the same fences. `load_kinds` adds the kinds of a file (`examples/`).
What it leaves out: judging. Nothing here runs a program; the executor comes in as an argument. And guessing: a value in
a sentence, two values, typographic quotes, an array are no answers (docs/reading.md: what is read, what is not).
Paper: section 3.2 (tasks and prompts) and its appendix; the wording is this project's own. Two deliberate differences:
the difficulty criteria of abduction and deduction stand with the task they belong to (the official prompts have them
swapped), and a prompt promises only what the code enforces.

    kind = KINDS["deduction"]
    turns = kind.solve(task)                                   # what the model reads, see policy/dialogue.py
    answer = kind.parse_answer(answer)                         # what it wrote between the answer tags
    [judgement] = kind.verify(executor, [(task, answer)])
"""

import random
import re
import runpy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from buffers import Buffer, Task, draw_references, hash_texts, program_digest
from policy.dialogue import ASSISTANT, PREAMBLE, USER, arguments, bare, fenced_blocks, find_program, input_key

# ---------------------------------------------------------------------------------------------------------------------
# What a task type is


@dataclass(frozen=True)
class Draft:
    """What a proposer wrote, not yet run."""

    program: str
    inputs: list[str] = field(default_factory=list)
    message: str = ""


class Kind(ABC):
    """One task type. A subclass that lacks an abstract part cannot be made. The loop asks, in this order:

    references -> propose -> (the model) -> parse_proposal -> run -> check, output -> a Task in the buffer
    solve -> (the model) -> parse_answer -> verify -> right or wrong
    """

    name: str
    pool = ""  # kinds with the same pool share their seeds; empty: seeds of its own
    sources: tuple[str, ...] = ()  # other kinds, from whose buffers `references` draws
    writes_program = True  # False: the program of a proposal was given, not invented

    @abstractmethod
    def zero(self) -> Task:
        """The one task that is given; seeding starts from it."""

    def references(self, buffers: Mapping[str, Buffer], count: int, rng: random.Random) -> list[Task]:
        """What one propose prompt shows: up to `count` tasks."""
        return draw_references([buffers[self.name]], count, rng)

    @abstractmethod
    def propose(self, references: Sequence[Task], n_inputs: int) -> list[str]:
        """The turns of the proposer's dialogue: user, assistant (a demonstration), ..., user (paper section 3.2).
        `n_inputs`: N, for kinds whose tasks have several inputs."""

    @abstractmethod
    def parse_proposal(self, answer: str, references: Sequence[Task], n_inputs: int) -> tuple[Draft | None, str]:
        """Inverse of `propose`: (draft, "") or (None, cause), say no_answer, no_program, no_input."""

    def run(self, executor, drafts: Sequence[Draft], progress: Callable[[int], None] | None = None) -> list[list]:
        """Results of each draft's inputs. Here: the executor's check that a program runs, is safe and is deterministic
        (paper section 3.3.3, equation 7)."""
        return executor.validate([(draft.program, draft.inputs) for draft in drafts], progress)

    def check(self, draft: Draft, results: Sequence) -> str:
        """ "ok", or the first reason why a draft with these results is no task."""
        for result in results:
            if not result.ok:
                return str(result.verdict)
            if result.output == "None":
                return "returns_none"
        return "ok"

    def output(self, result) -> str:
        """The gold output that a result of `run` stands for."""
        return result.output

    @abstractmethod
    def solve(self, task: Task) -> list[str]:
        """The turns of the solver's dialogue. The gold answer never appears in them."""

    @abstractmethod
    def parse_answer(self, answer: str) -> str | None:
        """Inverse of `solve`: the text to be judged, None when there is none."""

    @abstractmethod
    def verify(self, executor, pairs: Sequence[tuple[Task, str]], progress=None) -> list:
        """A Judgement for each (task, answer) (paper equation 10)."""

    @abstractmethod
    def gold(self, task: Task) -> str:
        """A right answer, in the form that `parse_answer` reads."""

    def key(self, task: Task) -> str:
        """Equal for tasks that are the same. The part before the first colon speaks of the program alone."""
        return program_digest(task.program)

    def made(self, task: Task) -> str:
        """Equal for tasks in which the proposer wrote the same."""
        return self.key(task)

    def inspect(self, task: Task) -> None:
        """Raise ValueError or SyntaxError for a task of a file that would stop a run later."""
        self.key(task)


# ---------------------------------------------------------------------------------------------------------------------
# Pieces that several prompts share. Every prompt is a dialogue: what is asked, a demonstration, the case at hand. To
# propose there are two demonstrations and calls instead of bare arguments: inputs fit the program more often.

MODULES = "math, re, collections, itertools, functools, heapq, string, bisect, operator, copy"
RULES = (
    "Rules for the program:\n"
    "- Its entry point is a function named `f` that takes at least one argument and returns a value other than None. "
    "Helper functions, nested functions and classes are allowed.\n"
    "- It may import only these modules: " + MODULES + ".\n"
    "- It is deterministic: no randomness, no clock, no files, no network, no keyboard input, and no state kept from "
    "one call to the next.\n"
    "- Arguments and the returned value are plain Python literals (numbers, strings, booleans, lists, tuples, dicts, "
    "sets). A call takes at most one second and its result stays short.\n"
)
REFERENCE = "\nTask {number}:\n```python\n{program}\n```\n```input\nf({input})\n```\nIt returns {output}\n"
REFERENCES = "\nThese tasks exist already. Yours must be clearly different from all of them.\n"
ONE_CALL = "holds one call of `f` with plain Python literals, strings in quotes.\n"
GOOD_TASK = "The best task is one that a good solver gets right in some attempts and wrong in others.\n"
TASK_FORM = GOOD_TASK + RULES + "{references}\nDescribe your idea first. Then write the program in a `python` block "
TASK_FORM += "and an input for it in an `input` block, which " + ONE_CALL
NEXT_TASK = (
    "Invent another task in the same form, with a new idea: a program that runs without errors, and an input that fits "
    "its arguments.\n"
)
CALLS = "The call f({input}) works. Write {count} calls like it with other values, and a message.\n"
NEXT = "The next program, in the same form:\n```python\n{program}\n```\n"
PAIR = "```input\n{input}\n```\n```output\n{output}\n```\n"


def input_blocks(blocks: Sequence[tuple[str, str]]) -> list[str]:
    """The arguments in every input block that is not empty."""
    return [found for label, content in blocks if label == "input" and (found := arguments(content))]


def answer_block(answer: str, label: str) -> str:
    """The last block with the label that the prompt names, else the last block, else the whole answer."""
    blocks = fenced_blocks(answer)
    named = [content for found, content in blocks if found == label]
    return bare(named[-1] if named else blocks[-1][1] if blocks else answer, label)


class OneInput(Kind):
    """Kinds whose task is a program with one input. A subclass gives both dialogues and says how answers are read and
    judged; `proposal` may use {references}; `solution` {program} and {input} or {output}."""

    proposal: tuple[str, ...]
    solution: tuple[str, ...]

    def zero(self) -> Task:
        """The zero triplet (paper Figure 5): the identity program."""
        return Task(self.name, IDENTITY, ["'Hello world'"], ["'Hello world'"], id=f"zero-{self.name}")

    def propose(self, references: Sequence[Task], n_inputs: int) -> list[str]:
        shown = [
            REFERENCE.format(number=number, program=task.program, input=task.inputs[0], output=task.outputs[0])
            for number, task in enumerate(references, 1)
        ]
        text = REFERENCES + "".join(shown) if shown else ""
        return [turn.format(references=text) for turn in self.proposal]

    def parse_proposal(self, answer: str, references: Sequence[Task], n_inputs: int) -> tuple[Draft | None, str]:
        if not answer.strip():
            return None, "no_answer"
        blocks = fenced_blocks(answer)
        program, inputs = find_program(blocks), input_blocks(blocks)
        if not program:
            return None, "no_program"
        return (Draft(program, [inputs[-1]]), "") if inputs else (None, "no_input")

    def solve(self, task: Task) -> list[str]:
        fields = {"program": task.program, "input": task.inputs[0], "output": task.outputs[0]}
        return [turn.format(**fields) for turn in self.solution]


IDENTITY = "def f(x):\n    return x"

# ---------------------------------------------------------------------------------------------------------------------
# The three kinds of the paper


class Abduction(OneInput):
    """Program and output are shown; any input that gives this output is right."""

    name, pool = "abduction", "pairs"
    proposal = (
        "Invent a task about a Python program. Another person will see the program and its output, but not the input, "
        "and must find an input that produces this output. Make it hard to reason backwards: let the program transform "
        "its input in several dependent steps, so that the input cannot simply be read off the output. " + TASK_FORM,
        "<think>\nf takes two arguments, a list of words and a number. It keeps the longer words, sorts them and joins "
        "their last letters. I call it with three words and a number.\n</think>\n<answer>\n```python\n"
        "def f(words, n):\n    kept = sorted(w for w in words if len(w) > n)\n    return ''.join(w[-1] for w in kept)\n"
        "```\n```input\nf(['plum', 'fig', 'apple'], 3)\n```\n</answer>",
        NEXT_TASK,
        "<think>\nf takes one argument, a text. It puts vowels in capitals at the front and all other letters at the "
        "end. I call it with one text.\n</think>\n<answer>\n```python\ndef f(text):\n    result = ''\n"
        "    for c in text:\n        result = c.upper() + result if c in 'aeiou' else result + c\n"
        "    return result\n```\n```input\nf('garden')\n```\n</answer>",
        NEXT_TASK,
    )
    solution = (
        "Find an input for which a Python program returns the given output. Any input that gives exactly this output "
        "counts. Reason step by step, then answer with one fenced `input` block. It holds only the arguments of `f`, "
        "as they would stand between the parentheses of the call: separated by commas, strings in quotes.\n"
        "```python\ndef f(word):\n    return word.upper() + '!'\n```\n```output\n'HELLO!'\n```\n",
        "<think>\nf takes one argument, word. It writes word in capitals and adds '!'. Without the '!' the output is "
        "'HELLO', so word can be 'hello'. Check: f('hello') returns 'HELLO!'.\n</think>\n"
        "<answer>\n```input\n'hello'\n```\n</answer>",
        NEXT + "```output\n{output}\n```\n",
    )

    def parse_answer(self, answer: str) -> str | None:
        return arguments(answer_block(answer, "input")) or None

    def verify(self, executor, pairs, progress=None) -> list:
        return executor.verify([(task.program, [answer], task.outputs) for task, answer in pairs], progress)

    def gold(self, task: Task) -> str:
        return f"```input\n{task.inputs[0]}\n```"


class Deduction(OneInput):
    """Program and input are shown; the returned value is asked."""

    name, pool = "deduction", "pairs"
    proposal = (
        "Invent a task about a Python program. Another person will see the program and an input, and must predict the "
        "exact output without running it. Make it hard to predict: let state change over several dependent steps "
        "(loops, conditions, recursion, data structures), so that the output cannot be guessed from the input. "
        + TASK_FORM,
        "<think>\nf takes two arguments, a list of numbers and a limit. It adds the numbers one by one, but it "
        "subtracts while the total is above the limit. I call it with four numbers and a limit.\n</think>\n<answer>\n"
        "```python\ndef f(numbers, limit):\n    total = 0\n    for x in numbers:\n        total = total - x if total > "
        "limit else total + x\n    return total\n```\n```input\nf([5, 8, 2, 9], 10)\n```\n</answer>",
        NEXT_TASK,
        "<think>\nf takes one argument, a number. It halves even numbers and adds 1 to odd numbers until 1 is left, "
        "and it collects what comes up. I call it with one number.\n</think>\n<answer>\n```python\ndef f(n):\n"
        "    steps = []\n    while n > 1:\n        n = n // 2 if n % 2 == 0 else n + 1\n        steps.append(n)\n"
        "    return steps\n```\n```input\nf(12)\n```\n</answer>",
        NEXT_TASK,
    )
    solution = (
        "Predict what a Python program returns for the given input. Reason step by step, then answer with one fenced "
        "`output` block. It holds only the returned value as a Python literal, strings in quotes.\n"
        "```python\ndef f(word):\n    return word[1:] + word[0]\n```\n```input\n'apple'\n```\n",
        "<think>\nword is 'apple'. word[1:] is 'pple' and word[0] is 'a'. So f returns 'pplea'.\n</think>\n"
        "<answer>\n```output\n'pplea'\n```\n</answer>",
        NEXT + "```input\n{input}\n```\n",
    )

    def parse_answer(self, answer: str) -> str | None:
        return answer_block(answer, "output") or None

    def verify(self, executor, pairs, progress=None) -> list:
        return executor.compare([(task.outputs[0], answer) for task, answer in pairs])

    def gold(self, task: Task) -> str:
        return f"```output\n{task.outputs[0]}\n```"


class Induction(Kind):
    """Half of N input/output pairs and a message are shown; a program is asked and judged on the hidden half. The
    proposer is given a program of the other two buffers and writes the inputs and the message."""

    name, sources, writes_program = "induction", ("abduction", "deduction"), False
    # Two calls more than the parser needs, because small models stop early or repeat themselves.
    proposal = (
        "Write {count} test inputs for a Python program `f` and one message. Another person will see the message and "
        "some of the inputs with their outputs, but never the program, and must write a program that also gives the "
        "right outputs for the other inputs. Choose inputs that differ from each other and together show everything "
        "the program does. The message describes the task or gives a hint; it does not contain the code. "
        + GOOD_TASK
        + "Each input block "
        + ONE_CALL
        + "```python\ndef f(numbers):\n    return sorted(numbers)[1:]\n```\n"
        + CALLS.replace("{input}", "[3, 1, 2]"),
        "<think>\nf takes one argument, a list of numbers. It sorts the list and drops the smallest number. I call it "
        "with {count} lists.\n</think>\n<answer>\n{lists}"
        "```message\nSort the numbers and leave out the smallest.\n```\n</answer>",
        NEXT.replace("{program}", "def f(text, n):\n    return text[:n] * 2") + CALLS.replace("{input}", "'hello', 2"),
        "<think>\nf takes two arguments, a text and a number. It repeats the start of the text. I call it with {count} "
        "texts and numbers.\n</think>\n<answer>\n{texts}"
        "```message\nWrite the beginning of the text twice; the number says how much of it.\n```\n</answer>",
        NEXT + CALLS,
    )
    CALL = "```input {number}\nf({input})\n```\n"
    LISTS = ("[3, 1, 2]", "[]", "[7]", "[4, 4, 1]", "[-2, 5, 0, 9]", "[10, 20]", "[8, 6]", "[0, 0]", "[1, 2, 3, 4]")
    LISTS += ("[-5, -6]", "[30, 10, 20]", "[2.5, 1]")
    TEXTS = ("'hello', 2", "'', 3", "'ab cd', 4", "'x', 5", "'Banana', 3", "'12345', 1", "'a-b', 3", "'zz', 2")
    TEXTS += ("'The end', 6", "'tiny', 7", "'One two', 4", "'no', 1")
    solution = (
        "Write a Python program that turns each input into its output. It is tested on further inputs that are not "
        "shown.\n"
        + RULES
        + "Reason step by step and check your program against every pair, then answer with the whole "
        "program in one fenced `python` block.\n{demonstration}"
        "```message\nWrite the beginning of the text twice; the number says how much of it.\n```\n",
        "<think>\nFor 'hello' and 2 the output is 'he' twice. For 'x' and 5 there is only 'x', twice. So the first n "
        "characters are taken and doubled.\n</think>\n<answer>\n```python\ndef f(text, n):\n"
        "    return text[:n] * 2\n```\n</answer>",
        "The next pairs and message, in the same form:\n{pairs}```message\n{message}\n```\n",
    )
    EMPTY = r"(def .*:)?\s*(#.*)?"  # a line that says nothing about what a program does
    PAIRS = PAIR.format(input="'hello', 2", output="'hehe'") + PAIR.format(input="'x', 5", output="'xx'")

    def zero(self) -> Task:
        """The identity program with six pairs of mixed types and a message, as in the official code."""
        values = ["'Hello world'", "1", "[1, 2, 3]", "{'a': 1}", "(True, False)", "-2.5"]
        message = "f returns its argument unchanged."
        return Task(self.name, IDENTITY, values, list(values), message, visible=3, id="zero-induction")

    def references(self, buffers: Mapping[str, Buffer], count: int, rng: random.Random) -> list[Task]:
        """One program of the other two buffers."""
        return draw_references([buffers[name] for name in self.sources], 1, rng)

    def propose(self, references: Sequence[Task], n_inputs: int) -> list[str]:
        """Raises ValueError without a task whose program is to be described."""
        if not references:
            raise ValueError("an induction proposal needs one task whose program it describes")
        fields = {"count": n_inputs + 2, "program": references[0].program, "input": references[0].inputs[0]}
        for name, inputs in (("lists", self.LISTS), ("texts", self.TEXTS)):
            numbered = enumerate(inputs[: n_inputs + 2], 1)
            fields[name] = "".join(self.CALL.format(number=number, input=text) for number, text in numbered)
        return [turn.format(**fields) for turn in self.proposal]

    def parse_proposal(self, answer: str, references: Sequence[Task], n_inputs: int) -> tuple[Draft | None, str]:
        if not answer.strip():
            return None, "no_answer"
        blocks = fenced_blocks(answer)
        messages = [content.strip() for label, content in blocks if label == "message" and content.strip()]
        distinct: dict[str, str] = {}
        for text in input_blocks(blocks):
            distinct.setdefault(input_key(text), text)
        if len(distinct) < n_inputs:
            return None, "too_few_inputs" if distinct else "no_input"
        if not messages:
            return None, "no_message"
        return Draft(references[0].program, list(distinct.values())[:n_inputs], messages[-1]), ""

    def check(self, draft: Draft, results: Sequence) -> str:
        """Beside what holds for all kinds: the message must not hold the program."""
        lines = [line.strip() for line in draft.program.splitlines() if not re.fullmatch(self.EMPTY, line)]
        tells = "def f" in draft.message or all(line in draft.message for line in lines)
        cause = super().check(draft, results)
        return "message_has_code" if cause == "ok" and tells else cause

    def solve(self, task: Task) -> list[str]:
        visible = zip(task.inputs[: task.visible], task.outputs[: task.visible], strict=True)
        pairs = "".join(PAIR.format(input=i, output=o) for i, o in visible)
        return [turn.format(demonstration=self.PAIRS, pairs=pairs, message=task.message) for turn in self.solution]

    def parse_answer(self, answer: str) -> str | None:
        blocks = fenced_blocks(answer)
        plain = [content for label, content in blocks if label not in ("input", "output", "message")]
        return find_program(blocks or [("", answer)]) or (plain[-1].strip("\n") or None if plain else None)

    def verify(self, executor, pairs, progress=None) -> list:
        jobs = [(answer, task.hidden_inputs, task.hidden_outputs) for task, answer in pairs]
        return executor.verify(jobs, progress)

    def gold(self, task: Task) -> str:
        return f"```python\n{task.program}\n```"

    def key(self, task: Task) -> str:
        return f"{program_digest(task.program)}:{hash_texts(sorted(map(input_key, task.inputs)))}"

    def made(self, task: Task) -> str:
        return "\0".join([task.message.strip().lower(), *task.inputs])

    def inspect(self, task: Task) -> None:
        super().inspect(task)
        if not 0 < task.visible < len(task.inputs):
            raise ValueError(f"visible is {task.visible}: of {len(task.inputs)} pairs some must be shown, some hidden")


# ---------------------------------------------------------------------------------------------------------------------
# The table of kinds

KINDS: dict[str, Kind] = {kind.name: kind for kind in (Abduction(), Deduction(), Induction())}
PROPOSE, SOLVE = ({name: getattr(kind, part) for name, kind in KINDS.items()} for part in ("proposal", "solution"))
AROUND = (PREAMBLE, USER, ASSISTANT)  # with PROPOSE and SOLVE all fixed text, for who makes a tokenizer


@lru_cache
def load_kinds(spec: str) -> dict[str, Kind]:
    """The kinds named in `--tasks`: those of KINDS in their order, then every Kind at the top level of the Python files
    named. Raises ValueError, in one sentence, for a name or file that gives no whole kind."""
    parts = [part.strip() for part in spec.split(",")]
    found = {name: kind for name, kind in KINDS.items() if name in parts}
    for part in (part for part in parts if part not in KINDS):
        if not Path(part).is_file() or not part.endswith(".py"):
            raise ValueError(f"--tasks {spec!r}: {part!r} is no file and none of {', '.join(KINDS)}; choose from these")
        try:
            made = {value.name: value for value in runpy.run_path(part).values() if isinstance(value, Kind)}
        except (SyntaxError, TypeError, ImportError, AttributeError, NameError) as error:
            raise ValueError(f"--tasks {part} makes no whole kind ({error}); mend the file") from error
        if not made or made.keys() & (found.keys() | KINDS.keys()):
            raise ValueError(f"--tasks {part} must make a Kind with a new name at its top level, as examples/fault.py")
        found |= made
    return found
