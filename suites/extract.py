"""The answer in a response to a benchmark: code, the last box, CRUXEval's assert.

What it does: finds text that a judge can read. What a task type asks is read by the type itself (`Kind.parse_answer`).
What it leaves out: any guess at an answer that a response does not mark (no "last number in the text").
Sources: EvalPlus's sanitiser (same verdicts, without tree-sitter), LiveCodeBench's and CRUXEval's formats.

    extract_math("so it is \\boxed{\\frac{1}{2}}.")            # -> "\\frac{1}{2}"
"""

import ast
import re


def answer_text(response: str) -> str | None:
    """The text of the last `<answer>`, closed or cut off; None without one."""
    head, tag, tail = response.rpartition("<answer>")
    return tail.partition("</answer>")[0].strip() if tag else None


def extract_code(response: str) -> str | None:
    """Last python fence of the last answer; without fences the whole answer, without tags the whole response."""
    answer = answer_text(response)
    text = response if answer is None else answer
    fences = re.findall(r"```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return (fences[-1] if fences else text).strip("\n") or None


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


def extract_math(response: str) -> str | None:
    """Last answer tag, in it the last box or else all of it; without tags the last box, the last display formula, or
    what follows the last "answer is". None: nothing to judge (counted apart from a wrong answer)."""
    answer = answer_text(response)
    found = last_box(response if answer is None else answer)
    if found is None and answer is None:
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
    """The answer in `assert f(input) == output`, the form of CRUXEval's own prompt. `side`: "input" or "output"."""
    for line in (text.strip(), text.strip().split("\n")[0]):
        try:
            test = ast.parse(line).body[0].test
            call, output = test.left, test.comparators[0]
        except (SyntaxError, ValueError, IndexError, AttributeError):
            continue
        if side == "output":
            return ast.get_source_segment(line, output)
        if isinstance(call, ast.Call):
            inner = ast.get_source_segment(line, call)
            return inner[inner.index("(") + 1 : -1].strip()
    return None
