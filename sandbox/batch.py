"""One batch of programs on its way through the lanes: from texts to results.

`Batch` parses the inputs, finds identical (program, input) pairs (they run once), groups what is left into forks (one
program, up to 32 inputs), keeps every lane busy, turns the lines that come back into results and follows up: inputs
that a death left without a line, the second hash seed of a validation, the units of a lane that died.

What it deliberately leaves out: gold outputs and rewards (`executor.py`), anything that touches a program itself
(`child.py`). Paper: arXiv 2505.03335, section 3.3.3. Usage: through `executor.Executor`.
"""

import marshal
import os
import selectors
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from sandbox.child import CPU, FLOOD, GATE, REPLY, WALL
from sandbox.lanes import Lane
from sandbox.literals import (
    MAX_LITERAL_DEPTH,
    BadLiteral,
    Refused,
    canonical,
    parse_arguments,
    parse_literal,
    serialise,
)

if TYPE_CHECKING:
    from executor import Executor


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
    """One batch on its way through the lanes; `results` holds one list per job when the constructor returns.

    checked      validation: every hash seed, several calls in each process, all outputs equal
    persistent   go on with a program's other inputs after one of them timed out
    """

    def __init__(
        self,
        executor: "Executor",
        jobs: Sequence[tuple[str, Sequence[str]]],
        progress: Callable[[int], None] | None,
        cpu_s: float | Sequence[float],
        checked: bool = False,
        persistent: bool = True,
    ) -> None:
        if not executor.close.alive:
            raise RuntimeError("this executor is closed: make a new one")
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
            self.executor.restarts += lane.ready()
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
