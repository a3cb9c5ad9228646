"""The judge: runs programs that a model wrote, validates proposals and verifies answers by execution.

What is covered. A verdict is never computed in a process that has run model code: a child only claims the literal text
of what a call returned, and gold outputs and equality live here, in the trusted process. Answers are parsed as
literals, never evaluated. Programs run in throw-away children without files, network, new processes or other
descriptors (Linux with seccomp; Landlock and namespaces where the kernel grants them), with limits on CPU, wall time,
memory and output. Proposals must run, be safe and be deterministic (two calls in each of two processes with different,
fixed hash seeds). A lane that dies is started again and the batch completes.

What is not covered. This is defence in depth for model-written code, not a multi-tenant sandbox: a kernel or CPython
bug can break it, the static filter can be fooled and is not relied upon, side channels are not addressed. A program can
make its own child claim a false output of its own call, which helps nobody: to earn a reward the claim would have to
equal outputs that no such process has ever seen. Two hash seeds do not find all dependence on set order (a list made of
a set of two strings slips through about half the time); later runs always use the first seed, so such a task stays
consistent. On macOS, or where the kernel has no seccomp, only the filter, resource limits and process separation
remain: use a container or a virtual machine there. Windows is refused.

The files, in the order of a program's way: `executor.py` is the interface and the judge; `sandbox/batch.py` follows a
batch from texts to results; `sandbox/lanes.py` talks to the fork servers; `sandbox/child.py` is a fork server and its
children; `sandbox/layers.py` is the kernel's part; `sandbox/literals.py` turns values into text and back. Only the
standard library is used.

Rules worth knowing. Values are equal when Python's == says so (True == 1 == 1.0, -0.0 == 0.0, order of sets and dicts
ignored, a list is no tuple), except that nan equals nan. Every call gets a fresh namespace and fresh arguments, so a
program may change its argument. An output over the cap is refused, never cut. Paper: arXiv 2505.03335, section 3.3.3
(validation: runs, safe, deterministic) and section 3.3.4 with equation 10 (verification).

Usage:
    from executor import Executor

    with Executor() as executor:
        [[result]] = executor.validate([("def f(x):\n    return x + 1", ["41"])])      # result.output == "42"
        [judgement] = executor.verify_deduction([("42", "42.0")])                     # judgement.correct
    python executor.py FILE INPUT      one program by hand: verdict, output, CPU and wall time
    python executor.py --doctor        which layers this machine grants, tried out
"""

import argparse
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

if sys.platform == "win32":
    raise ImportError("the executor cannot contain programs on Windows: use Linux, macOS or WSL")

from sandbox.batch import Batch, Result, Verdict
from sandbox.child import words
from sandbox.lanes import Lane, close_lanes
from sandbox.literals import BadLiteral, canonical, parse_arguments, parse_literal, same_value

__all__ = ["Executor", "Judgement", "Result", "Verdict", "BadLiteral", "canonical", "parse_arguments", "parse_literal"]
__all__ += ["same_value", "ALLOWED_MODULES"]

ALLOWED_MODULES = sorted(
    words(
        "__future__ abc array bisect cmath collections collections.abc copy dataclasses datetime decimal enum "
        "fractions functools heapq itertools json math numbers operator re statistics string textwrap typing "
        "unicodedata"
    )
)


@dataclass(frozen=True)
class Judgement:
    """Whether an answer earns its reward. `score`: share of the hidden pairs that are right (1.0 or 0.0 elsewhere)."""

    correct: bool
    score: float
    verdict: Verdict
    error: str = ""


# ----------------------------------------------------------------------------------------------------------------------
# The judge


class Executor:
    """Runs batches of programs and judges answers. A context manager; start it before the process grows.

    lanes             fork servers, spread over the hash seeds; default: two per core, at most 32
    cpu_s             CPU seconds of one call in `run` and the verify functions; `validate_cpu_s` for each of its calls
    memory_mb         memory a validated call may use; later runs get a quarter more, so that no task sits on the edge
    hash_seeds        a proposal is run in one process for each; everything else uses the first
    repeats           calls of a proposal in each of these processes
    gate, full_builtins, modules, entry
                      the static filter; all builtins and real modules (for benchmark solutions); what can be imported;
                      the function to call, or None for scripts that read stdin and print (inputs are then stdin texts)
    isolation         "auto": what the machine grants; "require": refuse to start without seccomp; "minimal": none
    """

    def __init__(
        self,
        lanes: int | None = None,
        *,
        cpu_s: float = 2.0,
        validate_cpu_s: float = 1.0,
        memory_mb: int = 256,
        hash_seeds: Sequence[int] = (0, 1),
        repeats: int = 2,
        inputs_per_fork: int = 32,
        gate: bool = True,
        full_builtins: bool = False,
        modules: Sequence[str] = ALLOWED_MODULES,
        entry: str | None = "f",
        isolation: str = "auto",
        max_output_chars: int = 10_000,
        max_source_chars: int = 20_000,
        max_literal_chars: int = 20_000,
    ) -> None:
        if isolation not in ("auto", "require", "minimal"):
            raise ValueError(f"isolation must be auto, require or minimal, not {isolation!r}")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = max(len(hash_seeds), lanes or min(32, 2 * cores))
        self.cpu_s, self.validate_cpu_s, self.memory = cpu_s, validate_cpu_s, memory_mb << 20
        self.hash_seeds, self.repeats, self.inputs_per_fork = tuple(hash_seeds), repeats, inputs_per_fork
        self.entry, self.max_source_chars, self.max_output_chars = entry, max_source_chars, max_output_chars
        self.max_literal_chars = max(max_literal_chars, max_output_chars)
        self.restarts = 0  # lanes that had to be started again
        config = {"modules": list(modules), "gate": gate, "full_builtins": full_builtins, "entry": entry}
        config |= {"isolation": isolation, "max_output_chars": max_output_chars}
        self.lanes = [Lane(self.hash_seeds[i % len(self.hash_seeds)], config) for i in range(count)]
        self.close = weakref.finalize(self, close_lanes, self.lanes)  # also when forgotten, also at exit
        self.lanes[0].ready()
        self.layers: dict = self.lanes[0].layers | {"gate": gate, "full_builtins": full_builtins}
        if isolation == "require" and not self.layers["seccomp"]:
            self.close()
            raise RuntimeError("this system has no seccomp filter: use a Linux container or a VM, or isolation='auto'")
        missing = [name for name in ("seccomp", "landlock", "namespaces", "cpu_clock") if not self.layers[name]]
        if "seccomp" in missing and isolation == "auto":
            print(f"executor: running without {', '.join(missing)}; prefer a Linux container or a VM", file=sys.stderr)

    def __enter__(self) -> "Executor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Five questions, each for a batch. `progress` is called with the number of jobs newly done.

    def run(
        self,
        jobs: Sequence[tuple[str, Sequence[str]]],
        progress: Callable[[int], None] | None = None,
        cpu_s: float | Sequence[float] | None = None,
    ) -> list[list[Result]]:
        """Call each (program, [argument texts]) once per input. `cpu_s`: CPU seconds per call, for all or per job."""
        return Batch(self, jobs, progress, cpu_s or self.cpu_s).results

    def validate(
        self, jobs: Sequence[tuple[str, Sequence[str]]], progress: Callable[[int], None] | None = None
    ) -> list[list[Result]]:
        """As `run`, but OK only if the program runs, is safe and is deterministic. After a timeout the program's other
        inputs are not tried: they count as timeouts too."""
        return Batch(self, jobs, progress, self.validate_cpu_s, checked=True, persistent=False).results

    def verify_deduction(self, jobs: Sequence[tuple[str, str]]) -> list[Judgement]:
        """Compare each (gold output, answer) as values. Nothing is run."""
        return [self._compare(gold, answer) for gold, answer in jobs]

    def verify_abduction(
        self, jobs: Sequence[tuple[str, str, str]], progress: Callable[[int], None] | None = None
    ) -> list[Judgement]:
        """Each (program, gold output, answered arguments) is right if the program returns the gold output for them."""
        results = self.run([(program, [answer]) for program, _, answer in jobs], progress)
        pairs = zip(jobs, results, strict=True)
        return [self._compare(gold, result.output, result) for (_, gold, _), [result] in pairs]

    def verify_induction(
        self, jobs: Sequence[tuple[str, Sequence[str], Sequence[str]]], progress: Callable[[int], None] | None = None
    ) -> list[Judgement]:
        """Each (answered program, hidden inputs, hidden outputs) is right if it returns every hidden output. Outputs
        stay here: the process that runs the program only gets the inputs."""
        for _, inputs, outputs in jobs:
            if not inputs or len(inputs) != len(outputs):
                raise ValueError("an induction job needs at least one hidden pair, and as many outputs as inputs")
        batch = Batch(self, [(program, inputs) for program, inputs, _ in jobs], progress, self.cpu_s, persistent=False)
        judgements = []
        for (_, _, golds), results in zip(jobs, batch.results, strict=True):
            pairs = [self._compare(gold, r.output, r) for gold, r in zip(golds, results, strict=True)]
            first = next((pair for pair in pairs if pair.verdict is not Verdict.OK), pairs[0])
            score = sum(pair.correct for pair in pairs) / len(pairs)
            judgements.append(Judgement(score == 1.0, score, first.verdict, first.error))
        return judgements

    def _compare(self, gold: str, claim: str, result: Result = Result(Verdict.OK)) -> Judgement:  # noqa: B008
        if not result.ok:
            return Judgement(False, 0.0, result.verdict, result.error)
        try:
            wanted = parse_literal(gold, self.max_literal_chars)
            correct = same_value(wanted, parse_literal(claim, self.max_literal_chars))
        except BadLiteral:
            return Judgement(False, 0.0, Verdict.OK, "BadLiteral")
        return Judgement(correct, float(correct), Verdict.OK)


# ----------------------------------------------------------------------------------------------------------------------
# By hand

ESCAPES = {  # what the doctor tries, with the filter off and all builtins
    "read a file": "def f():\n    return open('/etc/passwd').read(4)",
    "write a file": "def f():\n    return open('/tmp/azr_doctor', 'w').write('x')",
    "start a process": "import os\ndef f():\n    return os.fork()",
    "open a socket": "import _socket\ndef f():\n    return _socket.socket().fileno()",
    "signal the parent": "import os\ndef f():\n    return os.kill(os.getppid(), 0)",
    "take 4 GB": "def f():\n    return len(bytearray(1 << 32))",
    "loop for ever": "def f():\n    while True:\n        pass",
}


def doctor() -> int:
    """Print the layers and the fate of some escapes; returns the number of escapes that worked."""
    with Executor(2, cpu_s=0.5, gate=False, full_builtins=True) as executor:
        for name, value in executor.layers.items():
            print(f"{name:15} {value}")
        results = executor.run([(program, [""]) for program in ESCAPES.values()])
    for name, [result] in zip(ESCAPES, results, strict=True):
        print(f"{name:18} {'NOT CONTAINED' if result.ok else 'contained'} ({result.verdict} {result.error})")
    return sum(result.ok for [result] in results)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run one program by hand, or see what this machine grants.")
    parser.add_argument("file", nargs="?", help="a Python file that defines f")
    parser.add_argument("input", nargs="?", default="", help='its arguments, say "[1, 2], k=3"')
    parser.add_argument("--doctor", action="store_true", help="print the active layers and try to break out")
    arguments = parser.parse_args()
    if arguments.doctor:
        return doctor()
    if arguments.file is None:
        parser.error("give a FILE and an INPUT, or --doctor")
    try:
        program = Path(arguments.file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"{arguments.file} is no Python file that can be read ({error})")
    with Executor(2) as executor:
        [[result]] = executor.validate([(program, [arguments.input])])
    print(f"verdict  {result.verdict} {result.error}\noutput   {result.output}")
    print(f"cpu      {result.cpu_s * 1000:.1f} ms\nwall     {result.wall_s * 1000:.1f} ms")
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main())
