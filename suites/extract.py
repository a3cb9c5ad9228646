"""The answer in a response to a benchmark: code, the last box, CRUXEval's assert.

What it does: finds text that a judge can read. Tags and fences are read in policy/dialogue.py alone; what a task type
asks is read by the type itself (`Kind.parse_answer`).
What it leaves out: any guess at an answer that a response does not mark (no "last number in the text").
Sources: EvalPlus's sanitiser (same verdicts, without tree-sitter), LiveCodeBench's and CRUXEval's formats.

    extract_math("so it is \\boxed{\\frac{1}{2}}.")            # -> "\\frac{1}{2}"
"""

import ast
import itertools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress

from executor import BadLiteral, parse_arguments, parse_literal
from policy.dialogue import TAGS, Tags, arguments, bare, fenced_blocks, split_response, visible


def extract_code(response: str, tags: Tags = TAGS) -> str | None:
    """The last python fence of the answer, or of the response where no tag marks one; else the last fence; without
    fences the whole text."""
    text = split_response(response, tags=tags).answer or response
    blocks = fenced_blocks(text)
    code = [content for label, content in blocks if label == "python"] or [content for _, content in blocks] or [text]
    return code[-1].strip("\n") or None


UNPARSABLE = (SyntaxError, ValueError, RecursionError, MemoryError)


def sanitize(text: str, entry: str | None = None) -> str:
    """What EvalPlus makes of a response: of the longest range of lines that parses, the imports, and the first thing
    defined under each name that `entry` needs (every name where None). So prose, fences, self-tests and `__main__`
    blocks go. One exception: what has a decorator stays. A text with nothing of that is returned as that range."""
    indented = re.sub(r"(?m)^[ \t]+", lambda indent: indent[0].replace("\t", "    "), text)
    code = max(map(longest_program, dict.fromkeys([text, indented])), key=lambda code: len(code.split()))
    try:
        body = ast.parse(code).body
    except UNPARSABLE:
        return code
    kept, definitions = [], {}
    for node in body:
        match node:
            case ast.Import() | ast.ImportFrom():
                kept.append(node)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                if any(isinstance(part, ast.Return) for part in ast.walk(node)):
                    definitions.setdefault(name, node)
            case ast.ClassDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                definitions.setdefault(name, node)
            case ast.Assign(targets=[ast.Name(id=name), *_]):
                definitions.setdefault(name, node)
    needed, queue = set(), [entry] if entry else list(definitions)
    while queue:
        name = queue.pop()
        if name in definitions and name not in needed:
            needed.add(name)
            queue += identifiers(definitions[name])
    kept += [node for name, node in definitions.items() if name in needed]
    return "\n".join(source_of(code, node) for node in kept) or code


MOST_RANGES = 100_000  # that are tried: all of a text of 440 lines; a model that repeats itself writes thousands


def longest_program(text: str) -> str:
    """The range of two or more lines that parses and has the most lines that are not blank; else the first line."""
    lines = text.split("\n")
    for start, end in itertools.islice(ranges(lines), MOST_RANGES):
        with suppress(*UNPARSABLE):
            ast.parse("\n".join(lines[start:end]))
            return "\n".join(lines[start:end])
    return lines[0].strip()


def ranges(lines: Sequence[str]) -> Iterator[tuple[int, int]]:
    """All ranges (start, end) of two lines or more, those with the most filled lines first, then the earliest."""
    filled = [0, *itertools.accumulate(bool(line.strip()) for line in lines)]  # lines before each place
    for count in range(filled[-1], 0, -1):
        for start in range(bisect_right(filled, filled[-1] - count)):
            first, last = (cut(filled, filled[start] + count) for cut in (bisect_left, bisect_right))
            yield from ((start, end) for end in range(max(first, start + 2), last))


def identifiers(node: ast.AST) -> set[str]:
    """Every name in a piece of syntax: of variables, attributes, parameters, functions."""
    parts = [part for part in ast.walk(node) if not isinstance(part, ast.Constant)]
    return {value for part in parts for _, value in ast.iter_fields(part) if isinstance(value, str)}


def source_of(code: str, node: ast.stmt) -> str:
    decorators = [f"@{ast.get_source_segment(code, mark)}\n" for mark in getattr(node, "decorator_list", ())]
    return "".join(decorators) + ast.get_source_segment(code, node)


def last_box(text: str) -> str | None:
    """Content of the last complete `\\boxed{...}` with balanced braces; None without one."""
    boxes, opened, last = {match.end() for match in re.finditer(r"\\f?boxed\s*\{", text)}, [], (0, 0)
    for brace in re.finditer(r"(?<!\\)[{}]", text):
        if brace[0] == "{":
            opened.append(brace.end())
        elif opened and (start := opened.pop()) in boxes:
            last = max(last, (start, brace.start()))
    return text[slice(*last)].strip() if last[0] else None


def last_display(text: str) -> str | None:
    """Content of the last `\\[...\\]`; None without one."""
    found, start = None, None
    for mark in re.finditer(r"(?<!\\)\\[][]", text):  # a line break, `\\[4pt]`, opens nothing
        if mark[0] == r"\[":
            start = mark.end() if start is None else start
        elif start is not None:
            found, start = text[start : mark.start()], None
    return found


PHRASE = re.compile(r"(?:final\s+)?answer\s*(?:is|:)\s*:?\s*|^#*[ \t]*(?:final\s+)?answer[ ]*\n\s*", re.I | re.M)
BOLD = re.compile(r"(?<![\w)}\]*^\\])(\*{2,3}|__)(?=\S)(.{1,400}?)(?<=\S)\1(?![\w({*^\\])")  # not the power in 2**3
MARKS = (("*", "*"), ("_", "_"), (r"\[", r"\]"), (r"\(", r"\)"), ("$$", "$$"), ("$", "$"))


def extract_math(response: str, tags: Tags = TAGS) -> str | None:
    """The answer between the tags, in it the last box or else all of it; without tags the last box, the last display
    formula, or what follows the last "answer is". Bold print does not count. None: nothing to judge (counted apart from
    a wrong answer)."""
    answer = split_response(response, tags=tags).answer
    found = last_box(answer or response)
    text = BOLD.sub(r"\2", answer or response)
    if found is None:
        *before, found = PHRASE.split(text)
        if not answer:
            display, dollars = last_display(text), text.split("$$")
            last = dollars[-2] if len(dollars) > 2 and len(dollars) % 2 else ""  # pairs of them only
            found = display if display is not None else found.split("\n")[0] if before else last
    found = re.sub(r"(?<!\.)\.$", "", BOLD.sub(r"\2", found.strip())).strip()
    for left, right in MARKS:
        inner = found[len(left) : -len(right)]
        if found.startswith(left) and found.endswith(right) and inner and left not in inner:
            found = inner.strip()
    return found or None


def extract_assert(text: str, side: str) -> str | None:
    """The answer in a sample of CRUXEval, `[ANSWER] assert f(input) == output [/ANSWER]`: what is around the last `==`,
    or a bare value. The tags, a thought before, `assert`, a fence and text after the first line may be there or not.
    `side`: "input" or "output"."""
    _, tag, answer = text.partition("[/ANSWER]")[0].rpartition("[ANSWER]")
    blocks = fenced_blocks(answer)
    text = visible(blocks[-1][1] if blocks else answer).strip()
    lines = text.split("\n")
    for part in (text, lines[0], *reversed(lines)):
        part = part[max(part.find("assert "), 0) :].strip()
        with suppress(*UNPARSABLE, AttributeError):
            [statement] = ast.parse(part, "<literal>").body
            test = getattr(statement, "test", None) or statement.value
            call, output = test.left, test.comparators[-1]
            if side == "output" and isinstance(test.ops[-1], ast.Eq):
                return ast.get_source_segment(part, output)
            if side == "input" and isinstance(call, ast.Call):
                return ast.get_source_segment(part, call).partition("(")[2][:-1].strip()
    for part in (text, lines[0], lines[-1]):
        value = bare(part, side) if side == "output" else arguments(part)
        with suppress(BadLiteral):
            (parse_literal if side == "output" else parse_arguments)(value)
            return value
    return text if tag else None
