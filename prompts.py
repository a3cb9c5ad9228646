"""Six prompts (propose and solve, for three task types) and the parsers of their answers.

What it does: turns tasks into prompt text and response text back into programs, inputs, outputs and messages.
A parser is the inverse of its prompt: both name the same fences, and the tests build a response and parse it back.
What it leaves out: judging. Nothing here runs a program or decides whether an answer is right (`executor.py` does).
Paper: section 3.2 (tasks and prompts) and its appendix; the wording is this project's own. Two deliberate differences:
the difficulty criteria of abduction and deduction stand with the task they belong to (the official prompts have them
swapped), and a prompt promises only what the code enforces.

    text = wrap(solve_prompt(task), tokenizer)                 # what the model reads
    parts = split_response(response)                           # think, answer, formatted
    answer = parse_answer("deduction", parts.answer)           # what the executor judges
"""

import ast
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, field

from buffers import Task

# ---------------------------------------------------------------------------------------------------------------------
# The wrapper around all six prompts (paper: R1-style tags, plain text).

PREAMBLE = (
    "A user poses a task and an assistant solves it. The assistant first reasons step by step and then answers. "
    "The reasoning stands between <think> and </think>, the final answer between <answer> and </answer>, "
    "and the reply has exactly these two parts:\n<think>\nreasoning\n</think>\n<answer>\nfinal answer\n</answer>"
)
USER, ASSISTANT = "\nUser: ", "\nAssistant: "  # the plain-text dialogue; a chat template has its own marks

# ---------------------------------------------------------------------------------------------------------------------
# Pieces that several prompts share. A reference and a pair show exactly the fences that an answer must have.

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

# Every prompt is a dialogue: what is asked, a demonstration as the assistant's first answer, the case at hand. To
# propose there are two demonstrations with different arguments, and calls instead of bare arguments: inputs fit the
# program more often.
PROPOSE = {
    "abduction": (
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
    ),
    "deduction": (
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
    ),
    # Two calls more than the parser needs, because small models stop early or repeat themselves.
    "induction": (
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
    ),
}
CALL = "```input {number}\nf({input})\n```\n"
LISTS = ("[3, 1, 2]", "[]", "[7]", "[4, 4, 1]", "[-2, 5, 0, 9]", "[10, 20]", "[8, 6]", "[0, 0]", "[1, 2, 3, 4]")
LISTS += ("[-5, -6]", "[30, 10, 20]", "[2.5, 1]")
TEXTS = ("'hello', 2", "'', 3", "'ab cd', 4", "'x', 5", "'Banana', 3", "'12345', 1", "'a-b', 3", "'zz', 2")
TEXTS += ("'The end', 6", "'tiny', 7", "'One two', 4", "'no', 1")

SOLVE = {
    "abduction": (
        "Find an input for which a Python program returns the given output. Any input that gives exactly this output "
        "counts. Reason step by step, then answer with one fenced `input` block. It holds only the arguments of `f`, "
        "as they would stand between the parentheses of the call: separated by commas, strings in quotes.\n"
        "```python\ndef f(word):\n    return word.upper() + '!'\n```\n```output\n'HELLO!'\n```\n",
        "<think>\nf takes one argument, word. It writes word in capitals and adds '!'. Without the '!' the output is "
        "'HELLO', so word can be 'hello'. Check: f('hello') returns 'HELLO!'.\n</think>\n"
        "<answer>\n```input\n'hello'\n```\n</answer>",
        NEXT + "```output\n{output}\n```\n",
    ),
    "deduction": (
        "Predict what a Python program returns for the given input. Reason step by step, then answer with one fenced "
        "`output` block. It holds only the returned value as a Python literal, strings in quotes.\n"
        "```python\ndef f(word):\n    return word[1:] + word[0]\n```\n```input\n'apple'\n```\n",
        "<think>\nword is 'apple'. word[1:] is 'pple' and word[0] is 'a'. So f returns 'pplea'.\n</think>\n"
        "<answer>\n```output\n'pplea'\n```\n</answer>",
        NEXT + "```input\n{input}\n```\n",
    ),
    "induction": (
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
    ),
}
PAIR = "```input\n{input}\n```\n```output\n{output}\n```\n"
PAIRS = PAIR.format(input="'hello', 2", output="'hehe'") + PAIR.format(input="'x', 5", output="'xx'")


def fragments() -> list[str]:
    """Every fixed stretch of text in the prompts above, longest first: a tokenizer can make each a single token."""
    templates = [PREAMBLE, USER, ASSISTANT, REFERENCE, REFERENCES, CALL, PAIR]
    templates += [turn for turns in (*PROPOSE.values(), *SOLVE.values()) for turn in turns]
    pieces = {literal for text in templates for literal, *_ in string.Formatter().parse(text) if literal}
    pieces |= {CALL.format(number=number, input=text) for some in (LISTS, TEXTS) for number, text in enumerate(some, 1)}
    return sorted(pieces | {PAIRS}, key=len, reverse=True)


# ---------------------------------------------------------------------------------------------------------------------
# Tasks to prompts.


def propose_prompt(kind: str, references: Sequence[Task], n_inputs: int = 10) -> list[str]:
    """The turns of the proposer's dialogue (paper section 3.2, "Proposing Tasks"): user, assistant (a
    demonstration), user, assistant (another one), user.

    `references`: up to K earlier tasks to differ from; for induction exactly one task, whose program is to be
    described. `n_inputs`: N of the paper. Raises ValueError for an induction prompt without a program.
    """
    if kind == "induction":
        if not references:
            raise ValueError("an induction proposal needs one task whose program it describes")
        fields = {"count": n_inputs + 2, "program": references[0].program, "input": references[0].inputs[0]}
        for name, inputs in (("lists", LISTS), ("texts", TEXTS)):
            numbered = enumerate(inputs[: n_inputs + 2], 1)
            fields[name] = "".join(CALL.format(number=number, input=text) for number, text in numbered)
    else:
        shown = [
            REFERENCE.format(number=number, program=task.program, input=task.inputs[0], output=task.outputs[0])
            for number, task in enumerate(references, 1)
        ]
        fields = {"references": REFERENCES + "".join(shown) if shown else ""}
    return [turn.format(**fields) for turn in PROPOSE[kind]]


def solve_prompt(task: Task) -> list[str]:
    """The turns of the solver's dialogue: it never shows the output (deduction), the input (abduction) or the program
    and the hidden pairs (induction)."""
    if task.kind == "induction":
        visible = zip(task.inputs[: task.visible], task.outputs[: task.visible], strict=True)
        pairs = "".join(PAIR.format(input=i, output=o) for i, o in visible)
        fields = {"demonstration": PAIRS, "pairs": pairs, "message": task.message}
    else:
        fields = {"program": task.program, "input": task.inputs[0], "output": task.outputs[0]}
    return [turn.format(**fields) for turn in SOLVE[task.kind]]


def wrap(turns: str | Sequence[str], tokenizer, template: str = "plain", prefill_think: bool = True) -> str:
    """The text the model continues: the preamble about think and answer tags, then the dialogue (user first, turn by
    turn). `template`: "plain" (the paper) or "chat" (the tokenizer's own chat template, for instruct models). With
    `prefill_think` the prompt ends with the opening think tag."""
    turns = [turns] if isinstance(turns, str) else list(turns)
    if template == "chat":
        roles = ("user", "assistant")
        turns[0] = PREAMBLE + "\n\n" + turns[0]
        messages = [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    else:
        text = PREAMBLE
        for number, turn in enumerate(turns):
            text += (ASSISTANT if number % 2 else USER) + turn
        text += ASSISTANT
    return text + ("<think>\n" if prefill_think else "")


# ---------------------------------------------------------------------------------------------------------------------
# Responses back to tasks and answers. Any text may come in; nothing here raises on it.


@dataclass(frozen=True)
class Parts:
    """A response taken apart. `formatted` is the format test F of the reward: think, then only white space, then
    answer, from the very start; text after the closing answer tag is allowed."""

    think: str
    answer: str
    formatted: bool


FORMAT = re.compile(r"\s*<think>(.*?)</think>\s*<answer>.*?</answer>", re.DOTALL)


def split_response(response: str, prefilled: bool = True) -> Parts:
    """Take a response apart; `prefilled`: the prompt already held the opening think tag. The last answer counts."""
    text = "<think>" + response if prefilled else response
    match = FORMAT.match(text)
    head, opening, tail = text.rpartition("<answer>")
    answer = tail.partition("</answer>")[0] if opening else ""
    think = match.group(1) if match else head.replace("<think>", "").partition("</think>")[0]
    return Parts(think.strip(), answer.strip("\n"), match is not None)


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """All fenced blocks as (label, content), in order; whatever follows the first word of the label is dropped. A
    fence with a label closes a block that was left open, and a closing fence may stand at the end of the last line; an
    unfinished last block does not count."""
    blocks: list[tuple[str, str]] = []
    label: str | None = None
    lines: list[str] = []
    for line in text.split("\n"):
        mark = line.strip()
        if mark.startswith("```"):
            if label is not None:
                blocks.append((label, "\n".join(lines)))
            opens = label is None or mark != "```"
            label, lines = (mark.strip("` ").lower().partition(" ")[0], []) if opens else (None, [])
        elif label is not None and mark.endswith("```"):
            blocks.append((label, "\n".join([*lines, line.rstrip()[:-3].rstrip()])))
            label, lines = None, []
        elif label is not None:
            lines.append(line)
    return blocks


def arguments(text: str) -> str:
    """The arguments in an input block, which may hold them alone or as the whole call `f(...)`."""
    call = re.fullmatch(r"f\((.*)\)", text.strip(), re.DOTALL)
    return (call.group(1) if call else text).strip()


def syntax(text: str) -> str:
    """What two argument lists have in common that differ only in layout and quotes; any other text is its own."""
    try:
        return ast.dump(ast.parse(f"f({text})", mode="eval"))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return text


@dataclass(frozen=True)
class Proposal:
    """What a proposer wrote, not yet run: for induction `program` is empty (it is the one that was shown)."""

    program: str = ""
    inputs: list[str] = field(default_factory=list)
    message: str = ""


def find_program(blocks: Sequence[tuple[str, str]]) -> str:
    """The last python (or unlabelled) block that defines `f`, so that an earlier draft does not count. Without one,
    the last function of the last block that has functions becomes `f` (the official code renames too); "" if none."""
    candidates = [content.strip("\n") for label, content in blocks if label in ("python", "py", "python3", "")]
    for content in reversed(candidates):
        if re.search(r"^def f\b", content, re.MULTILINE):
            return content
    for content in reversed(candidates):
        if names := re.findall(r"^def (\w+)", content, re.MULTILINE):
            return f"{content}\n\n\nf = {names[-1]}"
    return ""


def parse_proposal(kind: str, answer: str, n_inputs: int = 10) -> tuple[Proposal | None, str]:
    """Inverse of the propose prompts. Returns (proposal, "") or (None, cause) with cause one of no_answer,
    no_program, no_input, no_message, too_few_inputs (induction: fewer than `n_inputs` different ones)."""
    if not answer.strip():
        return None, "no_answer"
    blocks = fenced_blocks(answer)
    inputs = [arguments(content) for label, content in blocks if label == "input" and arguments(content)]
    if kind == "induction":
        messages = [content.strip() for label, content in blocks if label == "message" and content.strip()]
        distinct: dict[str, str] = {}
        for text in inputs:
            distinct.setdefault(syntax(text), text)
        if not inputs:
            return None, "no_input"
        if len(distinct) < n_inputs:
            return None, "too_few_inputs"
        if not messages:
            return None, "no_message"
        return Proposal(inputs=list(distinct.values())[:n_inputs], message=messages[-1]), ""
    program = find_program(blocks)
    if not program:
        return None, "no_program"
    if not inputs:
        return None, "no_input"
    return Proposal(program, [inputs[-1]]), ""


def parse_answer(kind: str, answer: str) -> str | None:
    """Inverse of the solve prompts: the text to be judged, None when there is none. The fence named in the prompt
    comes first; without any fence the whole answer counts (induction always needs a fence)."""
    blocks = fenced_blocks(answer)
    if kind == "induction":
        plain = [content for label, content in blocks if label not in ("input", "output", "message")]
        return find_program(blocks) or (plain[-1].strip("\n") or None if plain else None)
    wanted = "input" if kind == "abduction" else "output"
    named = [content for label, content in blocks if label == wanted]
    text = named[-1] if named else blocks[-1][1] if blocks else answer
    return (arguments(text) if kind == "abduction" else text.strip()) or None
