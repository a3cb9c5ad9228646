"""The answer in a response to a benchmark: code, the last box, CRUXEval's assert.

What it does: finds text that a judge can read. What a task type asks is read by the type itself (`Kind.parse_answer`).
What it leaves out: any guess at an answer that a response does not mark (no "last number in the text").
Sources: EvalPlus's sanitiser (same verdicts, without tree-sitter), LiveCodeBench's and CRUXEval's formats.

    extract_math("so it is \\boxed{\\frac{1}{2}}.")            # -> "\\frac{1}{2}"
"""

import ast
import itertools
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


UNPARSABLE = (SyntaxError, ValueError, RecursionError, MemoryError)


def sanitize(text: str, entry: str | None = None) -> str:
    """What EvalPlus makes of a response: of the longest range of lines that parses, the imports, and the first thing
    defined under each name that `entry` needs (every name where None). So prose, fences, self-tests and `__main__`
    blocks go. One exception: what has a decorator stays. A text with nothing of that is returned as that range."""
    indented = re.sub(r"(?m)^[ \t]+", lambda indent: indent[0].replace("\t", "    "), text)
    code = max(longest_program(text), longest_program(indented), key=lambda code: len(code.split()))
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


def longest_program(text: str) -> str:
    """The range of two or more lines that parses and has the most lines that are not blank; else the first line."""
    lines = text.split("\n")
    filled = [0, *itertools.accumulate(bool(line.strip()) for line in lines)]
    best, most = [lines[0].strip()], 0
    for start in range(len(lines)):
        end = len(lines)
        while end > start + 1 and filled[end] - filled[start] > most:
            try:
                ast.parse("\n".join(lines[start:end]))
                best, most = lines[start:end], filled[end] - filled[start]
            except SyntaxError as error:  # no range with the line of the error in it parses either
                end = min(end - 1, start + (error.lineno or end) - 1)
            except UNPARSABLE:
                end -= 1
    return "\n".join(best)


def identifiers(node: ast.AST) -> set[str]:
    """Every name in a piece of syntax: of variables, attributes, parameters, functions."""
    parts = [part for part in ast.walk(node) if not isinstance(part, ast.Constant)]
    return {value for part in parts for _, value in ast.iter_fields(part) if isinstance(value, str)}


def source_of(code: str, node: ast.stmt) -> str:
    decorators = [f"@{ast.get_source_segment(code, mark)}\n" for mark in getattr(node, "decorator_list", ())]
    return "".join(decorators) + ast.get_source_segment(code, node)


def last_box(text: str) -> str | None:
    """Content of the last complete `\\boxed{...}` with balanced braces; None without one."""
    for start in reversed([match.end() for match in re.finditer(r"\\f?boxed\s*\{", text)]):
        depth = 1
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0) if text[end - 1] != "\\" else 0
            if depth == 0:
                return text[start:end].strip()
    return None


PHRASE = re.compile(r"(?:final\s+)?answer\s*(?:is|:)\s*:?\s*|^#*\s*(?:final\s+)?answer[ ]*\n\s*", re.I | re.M)
BOLD = re.compile(r"(?<![\w)}\]*^\\])(\*{2,3}|__)(?=\S)(.+?)(?<=\S)\1(?![\w({*^\\])")  # not the power in 2**3
MARKS = (("*", "*"), ("_", "_"), (r"\[", r"\]"), (r"\(", r"\)"), ("$$", "$$"), ("$", "$"))


def extract_math(response: str) -> str | None:
    """Last answer tag, in it the last box or else all of it; without tags the last box, the last display formula, or
    what follows the last "answer is". Bold print does not count. None: nothing to judge (counted apart from a wrong
    answer)."""
    answer = answer_text(response)
    found = last_box(response if answer is None else answer)
    text = BOLD.sub(r"\2", response if answer is None else answer)
    if found is None and answer is None:
        display = re.findall(r"\\\[(.*?)\\\]", text, re.DOTALL)
        phrases = list(PHRASE.finditer(text))
        found = display[-1] if display else text[phrases[-1].end() :].split("\n")[0] if phrases else ""
    elif found is None:
        found = PHRASE.split(text)[-1]
    found = re.sub(r"(?<!\.)\.$", "", BOLD.sub(r"\2", found.strip())).strip()
    for left, right in MARKS:
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
