"""A dialogue as the text that a model continues, and its reply taken apart: think and answer tags, fenced blocks.

What it does: `wrap` puts turns into the paper's plain text or a chat template, `encode` and `response_text` lead from
text to ids and back; `split_response` finds reasoning and answer and makes the format test F of the reward;
`fenced_blocks` reads the fences, `bare`, `arguments` and `find_program` what stands in them. Training, evaluation and
samples files share this reader, so all see the same answer in the same text; docs/reading.md lists what it reads.
What it leaves out: what the turns say and what an answer must hold (prompts.py).
Paper: R1-style tags (Figure 8 and appendix); equation 6 for the format.

    ids = encode(wrap(["What is 1 + 1?"], tokenizer), tokenizer)
    parts = split_response(response_text(completion.token_ids, tokenizer, engine.eos))     # think, answer, formatted
"""

import ast
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from sandbox.literals import BadLiteral, Refused, canonical, parse_arguments

# ---------------------------------------------------------------------------------------------------------------------
# The wrapper around every prompt (paper: R1-style tags, plain text).

PREAMBLE = (
    "A user poses a task and an assistant solves it. The assistant first reasons step by step and then answers. "
    "The reasoning stands between <think> and </think>, the final answer between <answer> and </answer>, "
    "and the reply has exactly these two parts:\n<think>\nreasoning\n</think>\n<answer>\nfinal answer\n</answer>"
)
USER, ASSISTANT = "\nUser: ", "\nAssistant: "  # the plain-text dialogue; a chat template has its own marks
# Where a response ends, in training as in evaluation: a base model that goes on writes the next user turn.
STOP = ("</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>", USER.rstrip())


class Tags(NamedTuple):
    """The names in the tags. Prompts are written with the paper's; `spell` gives a text these instead."""

    think: str = "think"
    answer: str = "answer"

    def spell(self, text: str) -> str:
        return re.sub(r"(</?)(think|answer)>", lambda tag: f"{tag[1]}{getattr(self, tag[2])}>", text)


TAGS = Tags()
OTHERS = (("think", "thought", "reasoning"), ("answer", "result", "solution"))  # by preference


def read_tags(spec: str) -> Tags:
    """The tags that `--tags` names, the paper's for "auto"; raises ValueError for anything but two names."""
    names = spec.split(",") if spec != "auto" else TAGS
    if len(set(names)) != 2 or len(names) != 2 or not all(re.fullmatch(r"[A-Za-z][\w-]*", name) for name in names):
        raise ValueError(f"--tags {spec!r}: give auto, or the names of the think and the answer tag, as thought,result")
    return Tags(*names)


def choose_tags(spec: str, tokenizer, template: str) -> Tags:
    """What `--tags` means here, and a line where a tag is one token of the tokenizer: a base model (plain template) may
    never have seen that token and gets another tag for it, an instruct model knows it and keeps it."""
    tags, vocabulary = read_tags(spec), tokenizer.get_vocab()
    tokens = [name for name in {*tags, *sum(OTHERS, ())} if f"<{name}>" in vocabulary or f"</{name}>" in vocabulary]
    if own := [f"<{name}>" for name in tags if name in tokens]:
        if spec == "auto" and (template == "plain" or not tokenizer.chat_template):
            tags = Tags(*(next((name for name in names if name not in tokens), names[0]) for names in OTHERS))
        used = f"the tags are <{tags.think}> and <{tags.answer}>"
        print(f"note: this tokenizer has a token of its own for {' and '.join(own)}; {used} (--tags chooses others)")
    return tags


def wrap(turns: str | Sequence[str], tokenizer, template="plain", prefill_think=True, tags: Tags = TAGS) -> str:
    """The text the model continues: the preamble about think and answer tags, then the dialogue (user first, turn by
    turn). `template`: "plain" (the paper) or "chat" (the tokenizer's own chat template, for instruct models). With
    `prefill_think` the prompt ends with the opening think tag. Where a chat template drops the reasoning of earlier
    turns, the whole dialogue stands in the first user turn, as plain text."""
    turns = [turns] if isinstance(turns, str) else list(turns)
    turns[1::2] = map(tags.spell, turns[1::2])  # demonstrations
    preamble = tags.spell(PREAMBLE)
    dialogue = "".join((ASSISTANT if number % 2 else USER) + turn for number, turn in enumerate(turns))
    if template == "chat":
        text = render(tokenizer, [f"{preamble}\n\n{turns[0]}", *turns[1:]])
        if not all(turn.strip() in text for turn in turns[1::2]):
            text = render(tokenizer, [f"{preamble}\n\n{dialogue.removeprefix(USER)}"])
        text = re.sub(rf"<(think|{tags.think})>\s*(</\1>\s*)?\Z", "", text)  # some open it, some close it at once
    else:
        text = preamble + dialogue + ASSISTANT
    return text + (f"<{tags.think}>\n" if prefill_think else "")


def render(tokenizer, turns: Sequence[str]) -> str:
    messages = [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


# ---------------------------------------------------------------------------------------------------------------------
# From text to ids and back


def encode(text: str, tokenizer) -> list[int]:
    """The ids of a prompt. What the tokenizer puts before any text (BOS) comes first, once: chat templates write it."""
    ids, start = tokenizer.encode(text, add_special_tokens=False), first_ids(tokenizer)
    return ids if ids[: len(start)] == start else start + ids


def first_ids(tokenizer) -> list[int]:
    whole, alone = (tokenizer.encode("a", add_special_tokens=more) for more in (True, False))
    places = [place for place in range(len(whole)) if whole[place : place + len(alone)] == alone]
    return whole[: places[0]] if places else []


def response_text(ids: list[int], tokenizer, eos: Sequence[int], stop: Sequence[str] = STOP) -> str:
    """The text of sampled ids, without the end token and what follows a stop string. Special tokens stay: tags may be
    some. So do the spaces before punctuation, which some tokenizers would tidy away."""
    ids = ids[:-1] if ids and ids[-1] in eos else ids
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text[: min((place for place in map(text.find, stop) if place >= 0), default=len(text))]


def inspect_dialogue(tokenizer, template: str, tags: Tags = TAGS) -> None:
    """Raise ValueError, in one sentence, unless prompts begin as the tokenizer wants, end with exactly one open think
    tag and show demonstrations with their reasoning, and a reply survives encoding and decoding."""
    shown = "<think>\nA thought, a list: [1, 'b'].\n</think>\n<answer>\n```python\ndef f(x):\n    return x != 1\n```\n"
    shown, opening = tags.spell(f"{shown}</answer>"), f"<{tags.think}>"
    text, start = wrap(["One?", shown, "Two?"], tokenizer, template, tags=tags), first_ids(tokenizer)
    ids, other = encode(text, tokenizer), "use another --template or --model"
    if start and ids[len(start) : 2 * len(start)] == start:
        raise ValueError(f"the {template} prompt begins with two BOS tokens; {other}")
    if not text.rstrip().endswith(opening) or text.rstrip().removesuffix(opening).rstrip().endswith(opening):
        raise ValueError(f"the {template} prompt does not end with one open {opening}; {other}")
    if shown not in text:
        raise ValueError(f"the {template} template changes the demonstrations of a prompt; use --template plain")
    reply = response_text(tokenizer.encode(shown, add_special_tokens=False), tokenizer, [])
    if reply.strip() != shown:
        raise ValueError("the tokenizer does not give back a reply as it was; use --tags NAME,NAME or another --model")


# ---------------------------------------------------------------------------------------------------------------------
# Reading a response. Any text may come in; nothing here raises on it.

QUOTED = r"""(?<![\w\\])[bBfFrRuU]{0,2}(['"])(?:\\.|(?!\1)[^\\\n])*\1(?!\w)"""  # a string literal within a line
SPACES, UNSEEN = "\u00a0\u202f", "\ufeff\u200b\u200c\u200d\u200e\u200f\u2060\u00ad"


def visible(text: str) -> str:
    """The text without characters that nobody sees (byte-order mark, zero-width space, ...), \\n for \\r\\n, and odd
    spaces as spaces; what stands in quotes stays."""
    if text.isascii():
        return text.replace("\r\n", "\n")
    keep = re.compile(f"{QUOTED}|[{SPACES}{UNSEEN}]")
    return keep.sub(lambda m: m[0] if m[1] else " " * (m[0] in SPACES), text.replace("\r\n", "\n"))


@dataclass(frozen=True)
class Parts:
    """A response taken apart. `formatted` is the format test F of the reward: think, then only white space, then
    answer, from the very start; text after the closing answer tag is allowed."""

    think: str
    answer: str
    formatted: bool


def split_response(response: str, prefilled: bool = True, tags: Tags = TAGS) -> Parts:
    """Take a response apart; `prefilled`: the prompt already held the opening think tag.

    The answer is that of the pair that makes the format; without it, the first closed pair with something in it after
    the thought, else what follows the last opening tag. A tag within quotes is text, and a thought that begins after a
    closed answer begins an invented turn, which is not read."""
    think, answer = tags
    text = visible((f"<{think}>" if prefilled else "") + response)
    marks = re.sub(QUOTED, lambda quoted: re.sub("[<>]", " ", quoted[0]), text)  # as long as the text
    first, closing, more = marks.partition(f"</{answer}>")
    marks = first + closing + more.partition(f"<{think}>")[0]
    body = rf"<{answer}>((?:(?!<{think}>|<{answer}>).)*?)"
    if whole := re.match(rf"\s*<{think}>(.*?)</{think}>\s*{body}</{answer}>", marks, re.DOTALL):
        first = marks[slice(*whole.span(1))].partition(f"</{think}>")[0]
        thought = text[whole.start(1) : whole.start(1) + len(first)].strip()
        return Parts(thought.removeprefix(f"<{think}>").strip(), text[slice(*whole.span(2))].strip("\n"), True)
    after = max(marks.find(f"</{think}>"), 0)
    pairs = list(re.compile(rf"{body}(</{answer}>|\Z)", re.DOTALL).finditer(marks, after))
    if not pairs:
        return Parts("", "", False)
    pair = next((pair for pair in pairs if pair[1].strip() and pair[2]), pairs[-1])
    thought = text[: pair.start()].replace(f"<{think}>", "").partition(f"</{think}>")[0]
    return Parts(thought.strip(), text[slice(*pair.span(1))].strip("\n"), False)


FENCE = re.compile(r"([ \t]*)(`{3,}+|~{3,}+)(?!.*\2)[ \t]*(.*)|(?:.*[\s:])()(```|~~~)([A-Za-z][\w.+#-]*)[ \t]*")
ONE_LINE = re.compile(r"(?<![`~])(`{3,}+|~{3,}+)\s*(?:([A-Za-z][\w.+#-]*):?\s+)?(\S.*?)\1")


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """All fenced blocks as (label, content), in order: ``` or ~~~, also within one line. The label is the first word
    after the fence, in lower case, "python" for its other names, `input` for `input 1` and `input1`.

    A block ends at a fence as long as its own, at the end of a line too, at a fence with a label, or with the text."""
    blocks: list[tuple[str, list[str]]] = []  # label and lines
    fence, indent = "", 0  # of the open block; no fence: none is open
    for line in visible(text).split("\n"):
        mark, line = line.strip(), line[:indent].lstrip() + line[indent:] if fence else line
        ends = fence and mark.endswith(fence)
        if ends and not mark.strip(fence[0]):
            fence = ""
        elif (opening := FENCE.fullmatch(line)) and (not fence or mark.startswith(fence)):
            space, fence, info = (group for group in opening.groups() if group is not None)
            indent = len(space)
            blocks.append((clean_label(info), []))
        elif ends:
            blocks[-1][1].append(line.rstrip().rstrip(fence[0]).rstrip())
            fence = ""
        elif fence:
            blocks[-1][1].append(line)
        else:
            blocks += [(clean_label(word or ""), [content.rstrip()]) for _, word, content in ONE_LINE.findall(line)]
    return [(label, "\n".join(lines)) for label, lines in blocks]


def clean_label(info: str) -> str:
    word = re.match(r"\W*([\w.+#-]*)", info)[1].lower()
    word = re.sub(r"\A(input|output)[\d_-]+\Z", r"\1", word)
    return "python" if re.fullmatch(r"py(thon)?[\d.]*", word) else word


# ---------------------------------------------------------------------------------------------------------------------
# What may stand in a block


def bare(text: str, label: str) -> str:
    """A value without what may stand around it: `Output:` before it, single or double backticks on both sides."""
    found = re.fullmatch(rf"(?:[*_`]*{label}[*_`]*:[*_`]*\s*)?(`{{0,2}})(.*?)\1", visible(text).strip(), re.I | re.S)
    return found[2].strip()


CALL = r"(?:#.*+\s*+)*+(?:assert\s+)?f\s*\("  # possessive: a rule of `#` would take ages
# Behind a call: an operator, or another call. Prose, an arrow or an equals sign say what it returns.
GOES_ON = r"(?s)\s*(?!->|=>)(?:[-+*/%@|&^,<>\[{!]|\.\w|(?:or|and|if|in|is|not|for)\b)|.*\bf\("


def arguments(text: str) -> str:
    """The arguments in an input block, which may hold them alone or as the whole call: `f(...)`, also with a comment or
    prose after it, or as `f(...) == ...`. Anything else around a call, or a second call, is left for the judge to
    refuse."""
    text = visible(text).strip()
    places = islice((found.end() for found in re.finditer(r"\)", text)), 32 if len(text) < 2000 else 2)
    for end in [len(text), *places] if re.match(CALL, text) else ():
        try:
            body = ast.parse(text[:end], "<literal>").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        match body:
            case [ast.Expr(value=call) | ast.Assert(test=call)]:
                call = call.left if isinstance(call, ast.Compare) and isinstance(call.ops[0], ast.Eq) else call
                named = isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "f"
                if named and not re.match(GOES_ON, text[end:]):
                    return ast.get_source_segment(text[:end], call).partition("(")[2][:-1].strip()
        break
    return text


def input_key(text: str) -> str:
    """What two argument lists have in common that hold the same values in the same places; of one that is no literal,
    what is left without layout, quotes and comments. Any other text is its own."""
    with suppress(BadLiteral, Refused):
        return canonical(parse_arguments(text))
    try:
        return ast.dump(ast.parse(f"f({text}\n)", "<literal>", "eval"))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return text


def find_program(blocks: Sequence[tuple[str, str]]) -> str:
    """The last python (or unlabelled) block that defines `f`, so that an earlier draft does not count. Without one,
    the last function of the last block that has functions becomes `f` (the official code renames too); "" if none."""
    candidates = [content.strip("\n") for label, content in blocks if label in ("python", "")]
    for content in reversed(candidates):
        if re.search(r"^def f\b", content, re.MULTILINE):
            return content
    for content in reversed(candidates):
        if names := re.findall(r"^def (\w+)", content, re.MULTILINE):
            return f"{content}\n\n\nf = {names[-1]}"
    return ""
