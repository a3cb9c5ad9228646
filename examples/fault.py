"""A fourth task type in one file: which exception does this call raise?

The proposer writes a program and an input on which it fails, the solver names the class of the exception. All the rest,
buffers, rewards, metrics, evaluation, needs nothing.

    python azr.py --tasks deduction,examples/fault.py
    python evaluate.py --tasks examples/fault.py --suites tasks:FILE --model MODEL
"""

from buffers import Task
from prompts import NEXT, NEXT_TASK, TASK_FORM, Deduction

FORM = TASK_FORM.replace("returns a value other than None", "raises an exception for the input you give")


class Fault(Deduction):
    """Program and input are shown; the class of the exception that the call raises is asked."""

    name, pool = "fault", "fault"
    proposal = (
        "Invent a task about a Python program that fails. Another person will see the program and an input and must "
        "name the class of the exception that the call raises. " + FORM,
        "<think>\nf takes a list and a number and reads the item at that place. I call it with a place behind the end."
        "\n</think>\n<answer>\n```python\ndef f(items, n):\n    return items[n * 2]\n```\n```input\nf([4, 5], 3)\n```\n"
        "</answer>",
        NEXT_TASK.replace("runs without errors", "raises an exception"),
    )
    solution = (
        "Which exception does a Python program raise for the given input? Reason step by step, then answer with one "
        "fenced `output` block that holds the name of its class alone.\n"
        "```python\ndef f(word):\n    return word.index('z')\n```\n```input\n'apple'\n```\n",
        "<think>\nindex looks for 'z' in 'apple' and does not find it. So it raises ValueError.\n</think>\n<answer>\n"
        "```output\nValueError\n```\n</answer>",
        NEXT + "```input\n{input}\n```\n",
    )

    def zero(self) -> Task:
        return Task(self.name, "def f(x):\n    return 1 // x", ["0"], ["ZeroDivisionError"], id="zero-fault")

    def propose(self, references, n_inputs) -> list[str]:
        return [turn.replace("It returns", "It raises") for turn in super().propose(references, n_inputs)]

    def check(self, draft, results) -> str:
        [result] = results
        return "ok" if result.stage == "call" and result.error else "raises_nothing" if result.ok else result.verdict

    def output(self, result) -> str:
        return result.error

    def verify(self, executor, pairs, progress=None) -> list:
        quoted = [(repr(task.outputs[0]), repr(answer.strip("'\""))) for task, answer in pairs]
        return executor.compare(quoted)


KIND = Fault()
