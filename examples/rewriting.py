"""A second domain that runs no Python: string rewriting (Markov algorithms), with an interpreter of its own.

A program is an ordered list of rules `ab -> c`. The first rule that matches anywhere is applied at its leftmost place,
again and again, until none matches. The proposer invents rules and a start; the solver predicts the final text.
What it leaves out: the executor's sandbox, which rules do not need: they can only lengthen and change a text, and both
its length and the number of steps are bounded here.

    python azr.py --tasks examples/rewriting.py
    python evaluate.py --tasks examples/rewriting.py --suites tasks:FILE --model MODEL
"""

import re

from buffers import Task
from executor import Judgement, Result, Verdict
from policy.dialogue import fenced_blocks
from prompts import Draft, Kind

RULE = re.compile(r"([a-z]+) -> ([a-z]+)")
MAX_STEPS, MAX_LENGTH, MAX_RULES = 100, 100, 20
WORKED = "For example, with these rules and this start\n```rules\nab -> ba\nbb -> b\n```\n```start\nabab\n```\n"
RULES = (
    "A rewriting system is a list of rules. In every step the first rule of the list that matches anywhere is applied "
    "at its leftmost match. It ends when no rule matches.\n"
)
REFERENCE = "\nTask {number}:\n```rules\n{program}\n```\n```start\n{input}\n```\nIt ends with {output}\n"


def rewrite(program: str, text: str) -> Result:
    """The final text, or the verdict TIMEOUT or OUTPUT_TOO_LARGE for a system that goes on for too long."""
    rules = [RULE.fullmatch(line).groups() for line in program.split("\n")]
    for _ in range(MAX_STEPS):
        left, right = next(((a, b) for a, b in rules if a in text), ("", ""))
        if not left:
            return Result(Verdict.OK, text)
        text = text.replace(left, right, 1)
        if len(text) > MAX_LENGTH:
            return Result(Verdict.OUTPUT_TOO_LARGE)
    return Result(Verdict.TIMEOUT)


class Rewriting(Kind):
    """Rules and a start are shown; the final text is asked."""

    name = "rewriting"

    def zero(self) -> Task:
        return Task(self.name, "a -> b", ["aba"], ["bbb"], id="zero-rewriting")

    def propose(self, references, n_inputs) -> list[str]:
        shown = [
            REFERENCE.format(number=number, program=task.program, input=task.inputs[0], output=task.outputs[0])
            for number, task in enumerate(references, 1)
        ]
        return [
            f"Invent a task. {RULES}Use lower-case letters only, at most {MAX_RULES} rules, and let it end after some "
            "steps. Another person will see the rules and the start and must predict the final text.\n",
            "<think>\nThe first rule sorts, the second one removes doubles.\n</think>\n<answer>\n"
            "```rules\nba -> ab\naa -> a\n```\n```start\nbaba\n```\n</answer>",
            "Invent another one, in the same form.\n" + "".join(shown),
        ]

    def parse_proposal(self, answer, references, n_inputs) -> tuple[Draft | None, str]:
        found = dict(fenced_blocks(answer))
        lines = [" ".join(line.split()) for line in found.get("rules", "").split("\n") if line.strip()]
        start = found.get("start", "").strip()
        if not lines or len(lines) > MAX_RULES or not all(map(RULE.fullmatch, lines)):
            return None, "no_rules"
        if not re.fullmatch(f"[a-z]{{1,{MAX_LENGTH}}}", start):
            return None, "no_start"
        return Draft("\n".join(lines), [start]), ""

    def run(self, executor, drafts, progress=None) -> list[list[Result]]:
        return [[rewrite(draft.program, text) for text in draft.inputs] for draft in drafts]

    def solve(self, task: Task) -> list[str]:
        return [
            f"Predict the final text of a rewriting system. {RULES}{WORKED}Answer with one fenced `text` block.\n",
            "<think>\nabab: ab -> ba at the left gives baab, then baba, then bbaa. Now bb -> b gives baa.\n</think>\n"
            "<answer>\n```text\nbaa\n```\n</answer>",
            f"The next system:\n```rules\n{task.program}\n```\n```start\n{task.inputs[0]}\n```\n",
        ]

    def parse_answer(self, answer: str) -> str | None:
        blocks = [content.strip() for label, content in fenced_blocks(answer) if label == "text"]
        return blocks[-1] if blocks and blocks[-1] else None

    def verify(self, executor, pairs, progress=None) -> list[Judgement]:
        right = [answer == task.outputs[0] for task, answer in pairs]
        return [Judgement(correct, float(correct), Verdict.OK) for correct in right]

    def gold(self, task: Task) -> str:
        return f"```text\n{task.outputs[0]}\n```"

    def key(self, task: Task) -> str:
        return task.program

    def inspect(self, task: Task) -> None:
        if not all(map(RULE.fullmatch, task.program.split("\n"))):
            raise ValueError(f"its program {task.program!r} is not a list of rules such as ab -> c")


KIND = Rewriting()
