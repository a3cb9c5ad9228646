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

The files: `executor.py` is the interface and follows a batch from texts to verdicts; `executor_lanes.py` talks to the
fork servers; `executor_child.py` is a fork server and its children; `executor_layers.py` is the kernel's part;
`executor_literals.py` turns values into text and back. Only the standard library is used.

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
import marshal
import os
import selectors
import signal
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

if sys.platform == "win32":
    raise ImportError("the executor cannot contain programs on Windows: use Linux, macOS or WSL")

from executor_child import CPU, FLOOD, GATE, REPLY, WALL, words
from executor_lanes import Lane, close_lanes
from executor_literals import (
    MAX_LITERAL_DEPTH,
    BadLiteral,
    Refused,
    canonical,
    parse_arguments,
    parse_literal,
    same_value,
    serialise,
)

__all__ = ["Executor", "Judgement", "Result", "Verdict", "BadLiteral", "canonical", "parse_arguments", "parse_literal"]
__all__ += ["same_value", "ALLOWED_MODULES"]

ALLOWED_MODULES = sorted(
    words(
        "__future__ abc array bisect cmath collections collections.abc copy dataclasses datetime decimal enum "
        "fractions functools heapq itertools json math numbers operator re statistics string textwrap typing "
        "unicodedata"
    )
)


class Verdict(StrEnum):
    """Everything that can become of a program and one input."""

    OK = "ok"
    SYNTAX_ERROR = "syntax_error"
    UNSAFE = "unsafe"
    NONDETERMINISTIC = "nondeterministic"
    TIMEOUT = "timeout"
    MEMORY = "memory"
    OUTPUT_TOO_LARGE = "output_too_large"
    RUNTIME_ERROR = "runtime_error"
    NO_FUNCTION = "no_function"
    UNSERIALISABLE = "unserialisable"
    BAD_INPUT = "bad_input"
    SOURCE_TOO_LARGE = "source_too_large"


@dataclass(frozen=True)
class Result:
    """What became of one call. `output`: literal text; `error`: class of the exception, or the offending name."""

    verdict: Verdict
    output: str = ""
    error: str = ""
    cpu_s: float = 0.0  # this call's share of its child's CPU time
    wall_s: float = 0.0

    @property
    def ok(self) -> bool:
        return self.verdict is Verdict.OK


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
        self.lanes[0].hello()
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
# One batch, from texts to results


@dataclass(eq=False)
class Cell:
    """One distinct (program, input) of a batch, and everyone who asked for it."""

    call: bytes  # marshalled (arguments, keyword arguments)
    places: list[tuple[int, int]] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)  # one per call that went well, over all processes so far
    cpu_s: float = 0.0
    wall_s: float = 0.0


@dataclass(eq=False)
class Unit:
    """One fork: a program and some of its cells."""

    program: str
    cells: list[Cell]
    stage: int  # index into the hash seeds
    cpu_s: float
    attempts: int = 0


class Batch:
    """One batch on its way through the lanes: identical (program, input) pairs are found and run once."""

    def __init__(self, executor, jobs, progress, cpu_s, checked: bool = False, persistent: bool = True) -> None:
        self.executor, self.progress, self.persistent = executor, progress or (lambda n: None), persistent
        self.seeds = executor.hash_seeds if checked else executor.hash_seeds[:1]
        self.repeats = executor.repeats if checked else 1
        self.memory = executor.memory if checked else executor.memory * 5 // 4
        self.results: list[list] = [[None] * len(inputs) for _, inputs in jobs]
        self.left = [len(inputs) for _, inputs in jobs]
        self.deaths = 0  # of lanes, in a row
        self.queues: dict[int, deque[Unit]] = {seed: deque() for seed in self.seeds}
        limits = [cpu_s] * len(jobs) if isinstance(cpu_s, (int, float)) else list(cpu_s)
        self.progress(self.left.count(0))
        self.collect(jobs, limits)
        self.drive()

    def collect(self, jobs: Sequence, limits: Sequence[float]) -> None:
        """Parse the inputs and group them by program."""
        executor, parsed, programs = self.executor, {}, {}
        for j, ((program, inputs), limit) in enumerate(zip(jobs, limits, strict=True)):
            for i, text in enumerate(inputs):
                if len(program) > executor.max_source_chars:
                    self.settle([(j, i)], Result(Verdict.SOURCE_TOO_LARGE))
                    continue
                if text not in parsed:
                    parsed[text] = executor_input(text, executor.entry, executor.max_literal_chars)
                if parsed[text] is None:
                    self.settle([(j, i)], Result(Verdict.BAD_INPUT))
                    continue
                cells = programs.setdefault((program, limit), {})
                cells.setdefault(parsed[text], Cell(parsed[text])).places.append((j, i))
        for (program, limit), cells in programs.items():
            self.enqueue(program, list(cells.values()), 0, limit)

    def enqueue(self, program: str, cells: list[Cell], stage: int, cpu_s: float) -> None:
        size = self.executor.inputs_per_fork
        queue = self.queues[self.seeds[stage]]
        queue.extend(Unit(program, cells[i : i + size], stage, cpu_s) for i in range(0, len(cells), size))

    def settle(self, places: Iterable[tuple[int, int]], result: Result) -> None:
        for j, i in places:
            self.results[j][i] = result
            self.left[j] -= 1
            if self.left[j] == 0:
                self.progress(1)

    def drive(self) -> None:
        """Keep every lane busy until all queues are empty. Any exception, Ctrl-C too, ends the lanes that were busy."""
        lanes = [lane for lane in self.executor.lanes if lane.seed in self.queues]
        try:
            with selectors.DefaultSelector() as selector:
                while any(self.queues.values()) or any(lane.busy for lane in lanes):
                    for lane in lanes:
                        self.feed(lane, selector)
                    for key, _ in selector.select(1.0):
                        self.serve(key.data, selector)
                    for lane in lanes:
                        if lane.busy and time.monotonic() > lane.deadline:
                            lane.process.kill()
        finally:
            for lane in lanes:
                if lane.busy:
                    lane.close()

    def feed(self, lane: Lane, selector: selectors.BaseSelector) -> None:
        """Give a lane its next unit: a second one only while more wait than there are lanes, so that none is stuck."""
        queue = self.queues[lane.seed]
        depth = 2 if len(queue) > len(self.executor.lanes) else 1
        while queue and len(lane.busy) < depth:
            if lane.process is None:
                lane.start()
            if not lane.layers:
                lane.hello()
            lane.submit(queue.popleft(), self.repeats, self.memory)
        if lane.busy:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if lane.outbox else 0)
            known = selector.get_map().get(lane.socket)
            if known is None:
                selector.register(lane.socket, events, lane)
            elif known.events != events:
                selector.modify(lane.socket, events, lane)

    def serve(self, lane: Lane, selector: selectors.BaseSelector) -> None:
        """Move bytes; handle what came back; start a lane again that died."""
        alive = lane.transfer()
        while lane.busy and (message := lane.message()) is not None:
            self.deaths = 0
            self.receive(lane.busy.popleft(), message)
            lane.expect()
        if alive:
            return
        selector.unregister(lane.socket)
        units, status = list(lane.busy), lane.close()
        lane.busy.clear()
        self.executor.restarts += 1
        self.deaths += status != -signal.SIGPROF
        if self.deaths > 3 * len(self.executor.lanes):  # a defect or a broken machine must not pass for wrong programs
            raise RuntimeError("the executor's servers keep dying: run `python executor.py --doctor`")
        if units and status != 0:  # 0: it retired because it had grown; otherwise the first unit may be the cause
            units[0].attempts += 1
            if status == -signal.SIGPROF:  # the source takes for ever to compile
                self.settle_all(units.pop(0).cells, Result(Verdict.TIMEOUT, error="compile"))
            elif units[0].attempts == 2:
                self.settle_all(units.pop(0).cells, Result(Verdict.RUNTIME_ERROR, error="server_died"))
        self.queues[lane.seed].extendleft(reversed(units))

    def settle_all(self, cells: Iterable[Cell], result: Result) -> None:
        for cell in cells:
            self.settle(cell.places, result)

    def receive(self, unit: Unit, message: bytes) -> None:
        """From the bytes of one fork to results: claims that hold, calls that are missing, what is still to run."""
        reason, status, cpu_s, wall_s = REPLY.unpack_from(message)
        lines = message[REPLY.size :].decode("utf-8", "replace").split("\n")
        if reason == GATE:
            verdict, _, error = lines[0].partition("\t")
            return self.settle_all(unit.cells, Result(Verdict(verdict), error=error))
        lines.pop()  # what follows the last line end is unfinished
        passed = []
        for place, cell in enumerate(unit.cells):
            cell.cpu_s += cpu_s / len(unit.cells)
            cell.wall_s += wall_s / len(unit.cells)
            claims = lines[place * self.repeats : (place + 1) * self.repeats]
            if len(claims) < self.repeats:
                failure, rest = cause_of_death(reason, status), unit.cells[place + 1 :]
                self.settle(cell.places, replace(failure, cpu_s=cell.cpu_s, wall_s=cell.wall_s))
                if failure.verdict is Verdict.TIMEOUT and not self.persistent:
                    self.settle_all(rest, Result(Verdict.TIMEOUT, error="not tried"))
                elif rest:
                    self.enqueue(unit.program, rest, unit.stage, unit.cpu_s)
                break
            result = self.agree(cell, [self.read(claim) for claim in claims])
            if result.ok and unit.stage + 1 < len(self.seeds):
                passed.append(cell)
            else:
                self.settle(cell.places, replace(result, cpu_s=cell.cpu_s, wall_s=cell.wall_s))
        if passed:
            self.enqueue(unit.program, passed, unit.stage + 1, unit.cpu_s)

    def read(self, claim: str) -> Result:
        """One line of a child, believed only as far as its form allows; its text is parsed and written anew."""
        verdict, _, text = claim.partition("\t")
        limit = self.executor.max_output_chars
        if verdict == "ok":
            try:
                value = parse_literal(text, self.executor.max_literal_chars)
                return Result(Verdict.OK, serialise(value, limit, max_depth=MAX_LITERAL_DEPTH))
            except BadLiteral:
                return Result(Verdict.RUNTIME_ERROR, error="protocol")
            except Refused as refusal:
                return Result(Verdict(refusal.verdict))
        known = ("memory", "output_too_large", "runtime_error", "no_function", "unserialisable", "unsafe")
        if verdict not in known:
            return Result(Verdict.RUNTIME_ERROR, error="protocol")
        return Result(Verdict(verdict), error=text if text.isidentifier() and len(text) <= 64 else "")

    def agree(self, cell: Cell, claims: list[Result]) -> Result:
        """One result from the calls of this process and those of the processes before it."""
        for claim in claims:
            if claim.ok and all(
                claim.output == known or unordered(claim.output) == unordered(known) for known in cell.outputs
            ):
                cell.outputs.append(claim.output)
            elif claim.ok or (cell.outputs and claim.verdict is Verdict.RUNTIME_ERROR):
                return Result(Verdict.NONDETERMINISTIC)
            else:
                return claim
        return Result(Verdict.OK, cell.outputs[0])


def unordered(output: str) -> str:
    return canonical(parse_literal(output, len(output)))


def executor_input(text: str, entry: str | None, max_chars: int) -> bytes | None:
    """The marshalled arguments of a call (trusted data on its way down), or None if the text is no argument list."""
    try:
        arguments = ((text,), {}) if entry is None else parse_arguments(text, max_chars)
        return marshal.dumps(arguments, 2)  # version 2: equal values give equal bytes
    except BadLiteral:
        return None


def cause_of_death(reason: int, status: int) -> Result:
    """Why a call left no line, from facts that a program cannot fake in its favour."""
    if reason in (CPU, WALL):
        return Result(Verdict.TIMEOUT)
    if reason == FLOOD:
        return Result(Verdict.OUTPUT_TOO_LARGE)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSYS:
        return Result(Verdict.UNSAFE, error="system_call")
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return Result(Verdict.TIMEOUT)
    return Result(Verdict.RUNTIME_ERROR, error="died")


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
    with Executor(2) as executor:
        [[result]] = executor.validate([(Path(arguments.file).read_text(encoding="utf-8"), [arguments.input])])
    print(f"verdict  {result.verdict} {result.error}\noutput   {result.output}")
    print(f"cpu      {result.cpu_s * 1000:.1f} ms\nwall     {result.wall_s * 1000:.1f} ms")
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main())
