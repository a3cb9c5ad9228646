"""A dialogue as the text that a model continues, and its reply taken apart: think and answer tags, fenced blocks.

What it does: `wrap` puts turns into the paper's plain text or a chat template; `split_response` finds reasoning and
answer and makes the format test F of the reward; `fenced_blocks` reads the fences, `arguments` and `find_program` what
stands in them. Training and evaluation share this reader, so both see the same answer in the same text.
What it leaves out: what the turns say and what an answer must hold (prompts.py).
Paper: R1-style tags (Figure 8 and appendix); equation 6 for the format.

    text = wrap(["What is 1 + 1?"], tokenizer)
    parts = split_response(response)                           # think, answer, formatted
"""

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass

# ---------------------------------------------------------------------------------------------------------------------
# The wrapper around every prompt (paper: R1-style tags, plain text).

PREAMBLE = (
    "A user poses a task and an assistant solves it. The assistant first reasons step by step and then answers. "
    "The reasoning stands between <think> and </think>, the final answer between <answer> and </answer>, "
    "and the reply has exactly these two parts:\n<think>\nreasoning\n</think>\n<answer>\nfinal answer\n</answer>"
)
USER, ASSISTANT = "\nUser: ", "\nAssistant: "  # the plain-text dialogue; a chat template has its own marks


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
# Reading a response. Any text may come in; nothing here raises on it.


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


# ---------------------------------------------------------------------------------------------------------------------
# What may stand in a block


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
