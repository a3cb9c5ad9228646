"""The answer in a response to a benchmark: code, the last box, CRUXEval's assert.

What it does: finds text that a judge can read. Tags and fences are read in policy/dialogue.py alone; what a task type
asks is read by the type itself (`Kind.parse_answer`).
What it leaves out: any guess at an answer that a response does not mark (no "last number in the text").
Sources: EvalPlus's sanitiser (same verdicts, without tree-sitter), LiveCodeBench's and CRUXEval's formats.

    extract_math("so it is \\boxed{\\frac{1}{2}}.")            # -> "\\frac{1}{2}"
"""

import ast
import re

from executor import BadLiteral, parse_arguments, parse_literal
from policy.dialogue import TAGS, Tags, arguments, bare, fenced_blocks, split_response, visible


def extract_code(response: str, tags: Tags = TAGS) -> str | None:
    """The last python fence of the answer, or of the response where no tag marks one; else the last fence; without
    fences the whole text."""
    text = split_response(response, tags=tags).answer or response
    blocks = fenced_blocks(text)
    code = [content for label, content in blocks if label == "python"] or [content for _, content in blocks] or [text]
    return code[-1].strip("\n") or None


def sanitize(code: str) -> str:
    """The longest prefix of lines that parses, reduced to imports, functions, classes and assignments.

    Drops what a model appends to a solution: prose, self-tests, prints. A text of which no line parses is returned as
    it is.
    """
    lines = code.replace("\t", "    ").split("\n")
    keep = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign
    for end in range(len(lines), 0, -1):
        try:
            tree = ast.parse("\n".join(lines[:end]))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        kept = []
        for node in tree.body:
            if isinstance(node, keep | ast.AnnAssign):
                start = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
                kept += lines[start - 1 : node.end_lineno]
        if kept:
            return "\n".join(kept)
    return code


def last_box(text: str) -> str | None:
    """Content of the last complete `\\boxed{...}` with balanced braces; None without one."""
    for start in reversed([match.end() for match in re.finditer(r"\\f?boxed\s*\{", text)]):
        depth = 1
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0) if text[end - 1] != "\\" else 0
            if depth == 0:
                return text[start:end].strip()
    return None


PHRASE = re.compile(r"(?:final\s+)?answer\s*(?:is|:)\s*:?\s*", re.IGNORECASE)


def extract_math(response: str, tags: Tags = TAGS) -> str | None:
    """The answer between the tags, in it the last box or else all of it; without tags the last box, the last display
    formula, or what follows the last "answer is". None: nothing to judge (counted apart from a wrong answer)."""
    answer = split_response(response, tags=tags).answer
    found = last_box(answer or response)
    if found is None and not answer:
        display = re.findall(r"\\\[(.*?)\\\]", response, re.DOTALL)
        phrases = list(PHRASE.finditer(response))
        found = display[-1] if display else response[phrases[-1].end() :].split("\n")[0] if phrases else ""
    elif found is None:
        found = PHRASE.split(answer)[-1]
    found = re.sub(r"(?<!\.)\.$", "", found.strip()).strip()
    for left, right in ((r"\[", r"\]"), (r"\(", r"\)"), ("$$", "$$"), ("$", "$")):
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
        try:
            [statement] = ast.parse(part, "<literal>").body
            test = getattr(statement, "test", None) or statement.value
            call, output = test.left, test.comparators[-1]
        except (SyntaxError, ValueError, RecursionError, MemoryError, AttributeError):
            continue
        if side == "output" and isinstance(test.ops[-1], ast.Eq):
            return ast.get_source_segment(part, output)
        if side == "input" and isinstance(call, ast.Call):
            return ast.get_source_segment(part, call).partition("(")[2][:-1].strip()
    for part in (text, lines[0], lines[-1]):
        value = bare(part, side) if side == "output" else arguments(part)
        try:
            (parse_literal if side == "output" else parse_arguments)(value)
            return value
        except BadLiteral:
            continue
    return text if tag else None
