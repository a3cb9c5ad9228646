"""The judge: runs programs that a model wrote, validates proposals and verifies answers by execution.

What is covered. A verdict is never computed in a process that has run model code: a child only claims the literal text
of what a call returned, and gold outputs and equality live here, in the trusted process. Answers are parsed as
literals, never evaluated. Programs run in throw-away children without files, network, new processes or other
descriptors (Linux with seccomp; Landlock and namespaces where the kernel grants them), within `Limits`. Proposals must
run, be safe and be deterministic (`agree`). A server that dies is started again and the batch completes.

What is not covered. This is defence in depth for model-written code, not a multi-tenant sandbox: a kernel or CPython
bug can break it, the static filter can be fooled and is not relied upon, side channels are not addressed. A program can
make its own child claim a false output of its own call. As an answer that helps nobody: to earn a reward the claim
would have to equal outputs that no such process has ever seen. A proposal that finds out, past the filter, that it is
being validated can behave otherwise later. Two hash seeds do not find all dependence on set order (a list made of a set
of two strings slips through about half the time); later runs always use the first seed, so such a task stays
consistent. On macOS, or where the kernel has no seccomp, only the filter, resource limits and process separation
remain: use a container or a virtual machine there. Windows is refused.

How a program runs: `sandbox/__init__.py`. Paper: arXiv 2505.03335, sections 3.3.3 and 3.3.4. Usage:
    with Executor() as executor:
        [[result]] = executor.validate([("def f(x):\n    return x + 1", ["41"])])      # result.output == "42"
        [judgement] = executor.compare([("42", "42.0")])                              # judgement.correct
    python executor.py FILE INPUT      one program by hand: verdict, output, CPU time
    python executor.py --doctor        all limits, and which layers this machine grants, tried out
"""

import argparse
import marshal
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from functools import cache, partial
from itertools import chain
from pathlib import Path

if sys.platform == "win32":
    raise ImportError("the executor cannot contain programs on Windows: use Linux, macOS or WSL")

from sandbox import literals
from sandbox.lanes import Pool
from sandbox.literals import BadLiteral, Refused, canonical, parse_arguments, parse_literal, serialise

ALLOWED_MODULES = tuple(
    "__future__ abc array bisect cmath collections collections.abc copy dataclasses datetime decimal enum "  # noqa: SIM905
    "fractions functools heapq itertools json math numbers operator re statistics string textwrap typing "
    "unicodedata".split()
)
Jobs = Sequence[tuple[str, Sequence[str]]]  # (program, argument texts of each call)
Pairs = Sequence[tuple[str, Sequence[str], Sequence[str]]]  # (program, hidden inputs, gold outputs)
Results = list[list["Result"]]  # of each job, of each of its calls
Seconds = float | Sequence[float] | None
Progress = Callable[[int], None] | None  # called, in the caller's thread, with the number of jobs newly done


def limit(value: object, unit: str, guards: str, fixed: bool = False):
    return field(default=value, init=not fixed, metadata={"unit": unit, "guards": guards})


@dataclass(frozen=True)
class Limits:
    """Every limit of a program. `Executor(cpu_s=0.5)` changes one; those that are fixed stay."""

    cpu_s: float = limit(2.0, "s", "CPU time of a call in `run` and `verify`, by the child's own clock")
    validate_cpu_s: float = limit(1.0, "s", "CPU time of a call in `validate`: less, so that no task sits on the edge")
    still_s: float = limit(5.0, "s", "wall time (or 5 CPU limits) in which a call uses no CPU: it sleeps")
    wall_s: float = limit(10.0, "s", "wall time of a call, beyond 100 CPU limits: it hardly moves")
    hang_s: float = limit(60.0, "s", "wall time for a server to answer, beyond all of the above: it is killed")
    compile_cpu_s: float = limit(2.0, "s", "CPU time to parse and compile a program")
    memory_mb: int = limit(
        256, "MB", "memory of a call in the first process of `validate`; a quarter more in all others"
    )
    max_source_chars: int = limit(20_000, "chars", "length of a program")
    max_literal_chars: int = limit(20_000, "chars", "length of an input or an answer")
    literal_depth: int = limit(literals.LITERAL_DEPTH, "levels", "nesting of an input or an answer", fixed=True)
    max_output_chars: int = limit(10_000, "chars", "length of an output: one over it is refused, never cut")
    output_depth: int = limit(literals.OUTPUT_DEPTH, "levels", "nesting of an output", fixed=True)
    int_bits: int = limit(literals.INT_BITS, "bits", "size of a whole number in any of them", fixed=True)
    processes: int = limit(0, "", "processes that a program may start", fixed=True)
    file_bytes: int = limit(0, "bytes", "what a program may write to a file", fixed=True)
    inputs_per_fork: int = limit(32, "calls", "calls of a job that share a child, each in a namespace of its own")
    hash_seeds: Sequence[int] = limit((0, 1), "", "a proposal runs in a process for each; all else uses the first")
    repeats: int = limit(2, "calls", "of a proposal in each of these processes, with fresh arguments")
    growth: int = limit(4, "x", "memory of a server, in multiples of that at its start: it is started again")
    deaths: int = limit(6, "", "times in a row that a server may die before the batch is given up")
    gate: bool = limit(True, "", "the static filter: what an honest program does not need is unsafe")
    full_builtins: bool = limit(False, "", "all builtins and whole modules, for the solutions of benchmarks")
    modules: Sequence[str] = limit(ALLOWED_MODULES, "", "what a program may import")
    entry: str = limit("f", "", "the function that is called")
    isolation: str = limit("auto", "", "the kernel's layers: all that the machine grants; minimal: only rlimits")


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
    stage: str = ""  # where the program raised `error`: "load" (before f was called) or "call"; "" if it did not raise
    cpu_s: float = 0.0  # this call's share of its child's CPU time

    @property
    def ok(self) -> bool:
        return self.verdict is Verdict.OK

    @property
    def answered(self) -> bool:
        """The call returned or raised, which other calls can be compared with; nothing ended it from outside."""
        return self.ok or self.stage != ""


@dataclass(frozen=True)
class Judgement:
    """Whether an answer earns its reward. `score`: share of the hidden pairs that are right (1.0 or 0.0 elsewhere)."""

    correct: bool
    score: float
    verdict: Verdict
    error: str = ""


def agree(claims: Sequence[Result]) -> Result:
    """The rule of determinism: one result from all calls of a program with one input, over all processes so far.

    Each of two processes with different, fixed hash seeds calls it twice (`Limits.hash_seeds`, `repeats`). Every call
    must do the same: return an equal output (stricter than `same_value`: 1 is not True; the order of sets and dicts is
    free), or raise an exception of the same class at the same stage. All else, say a limit that is met, decides alone.
    """
    for claim in claims:
        if not claim.answered:
            return claim
    ends = {(claim.verdict, claim.error, claim.stage) for claim in claims}
    outputs = {claim.output for claim in claims}
    if len(ends) == 1 and len(outputs) > 1:  # perhaps only in the order of a dict
        outputs = {canonical(parse_literal(output, len(output))) for output in outputs}
    return claims[0] if len(ends) == len(outputs) == 1 else Result(Verdict.NONDETERMINISTIC)


def same_value(a: object, b: object) -> bool:
    """The rule of equality: Python's == on plain values (True == 1 == 1.0, -0.0 == 0.0, order of sets and dicts
    ignored, a list is no tuple), except that nan equals nan, also inside containers: `parse_literal` knows only one."""
    return a is b or a == b


@dataclass(eq=False)
class Call:
    """One distinct call of a program: the jobs that asked for it, what it has claimed so far, and the verdict on it."""

    arguments: bytes | None  # marshalled (arguments, keyword arguments): trusted data on its way down
    jobs: set[int] = field(default_factory=set)
    claims: list[Result] = field(default_factory=list)
    cpu_s: float = 0.0
    result: Result | None = None


def most_lanes() -> int:
    """Fork servers that a machine keeps busy: two per core, at most 32."""
    return min(32, 2 * (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


class Executor(AbstractContextManager):
    """Runs batches of programs and judges answers. A context manager; start it before the process grows.

    `lanes`: fork servers, spread over the hash seeds; by default `most_lanes()`. `limits`: any field of
    `Limits`, say memory_mb=512. `close()` ends the servers.
    """

    def __init__(self, lanes: int | None = None, **limits: object) -> None:
        self.limits = Limits(**limits)
        if self.limits.isolation not in ("auto", "minimal"):
            raise ValueError(f"isolation must be auto or minimal, not {self.limits.isolation!r}")
        self.pool = Pool(lanes or most_lanes(), asdict(self.limits))
        self.close = weakref.finalize(self, self.pool.close)  # also when forgotten, also at exit
        self.lanes = self.pool.lanes
        self.layers = self.lanes[0].ready()
        if not self.layers["seccomp"] and self.limits.isolation == "auto":
            print("executor: running without seccomp; prefer a Linux container or a VM", file=sys.stderr)

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, jobs: Jobs, progress: Progress = None, cpu_s: Seconds = None) -> Results:
        """Call each (program, [argument texts]) once per input. `cpu_s`: CPU seconds per call, for all or per job."""
        return self._execute(jobs, progress, cpu_s or self.limits.cpu_s)

    def validate(self, jobs: Jobs, progress: Progress = None) -> Results:
        """As `run`, but OK only if the program runs, is safe and is deterministic (`agree`). After a timeout a job's
        other inputs are not tried: they count as timeouts too."""
        return self._execute(jobs, progress, self.limits.validate_cpu_s, checked=True, patient=False)

    def verify(self, jobs: Pairs, progress: Progress = None) -> list[Judgement]:
        """Each (program, inputs, gold outputs) is right if the program returns every gold output. Gold outputs stay
        here: the process that runs the program only gets the inputs. After a timeout as in `validate`."""
        if not all(inputs and len(inputs) == len(golds) for _, inputs, golds in jobs):
            raise ValueError("verify needs at least one hidden pair for each program, and as many outputs as inputs")
        calls, judgements = [(program, inputs) for program, inputs, _ in jobs], []
        found = self._execute(calls, progress, self.limits.cpu_s, patient=False)
        for (_, _, golds), results in zip(jobs, found, strict=True):
            pairs = [self._judge(gold, result) for gold, result in zip(golds, results, strict=True)]
            first = next((pair for pair in pairs if pair.verdict is not Verdict.OK), pairs[0])
            score = sum(pair.correct for pair in pairs) / len(pairs)
            judgements.append(Judgement(score == 1.0, score, first.verdict, first.error))
        return judgements

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[Judgement]:
        """Each (gold output, answer) is right if they are equal as values (`same_value`). Nothing is run."""
        return [self._judge(gold, Result(Verdict.OK, answer)) for gold, answer in pairs]

    def _judge(self, gold: str, result: Result) -> Judgement:
        if not result.ok:
            return Judgement(False, 0.0, result.verdict, result.error)
        try:
            values = [parse_literal(text, self.limits.max_literal_chars) for text in (gold, result.output)]
            correct = same_value(*values)
        except BadLiteral:
            return Judgement(False, 0.0, Verdict.OK, "BadLiteral")
        return Judgement(correct, float(correct), Verdict.OK)

    def _execute(self, jobs: Jobs, progress: Progress, cpu_s: Seconds, checked=False, patient=True) -> Results:
        """A list of results per job; identical (program, input) pairs run once. `checked`: every hash seed, several
        calls in each process. `patient`: go on with a job's other inputs after one of them timed out."""
        if not self.close.alive:
            raise RuntimeError("this executor is closed: make a new one")
        programs: dict[tuple[str, float], dict[bytes | None, Call]] = {}
        rows: list[list[Call]] = [[] for _ in jobs]
        marshalled, most = cache(self._marshalled), self.limits.inputs_per_fork
        seconds = cpu_s if isinstance(cpu_s, Sequence) else [cpu_s] * len(jobs)
        for job, ((program, inputs), limit) in enumerate(zip(jobs, seconds, strict=True)):
            calls = programs.setdefault((program, limit), {})
            for text in inputs:
                call = calls.setdefault(marshalled(text), Call(marshalled(text)))
                call.jobs.add(job)
                rows[job].append(call)
        parts = []
        for (program, limit), calls in programs.items():
            owners: dict[int, list[Call]] = {}  # calls of different jobs never share a child: what one of them leaves
            for call in calls.values():  # behind in a module could decide the other
                owners.setdefault(min(call.jobs), []).append(call)
            for own in owners.values():
                parts += [(program, limit, own[i : i + most]) for i in range(0, len(own), most)]
        progress = progress or (lambda n: None)
        progress(rows.count([]))
        with closing(self.pool.each(partial(self._examine, checked, patient), parts)) as examined:
            for call in chain.from_iterable(examined):
                call.result = replace(agree(call.claims), cpu_s=call.cpu_s)
                progress(sum(all(other.result for other in rows[job]) for job in call.jobs))
        return [[call.result for call in row] for row in rows]

    def _marshalled(self, text: str) -> bytes | None:
        try:  # version 2: equal values give equal bytes
            return marshal.dumps(parse_arguments(text, self.limits.max_literal_chars), 2)
        except BadLiteral:
            return None

    def _examine(self, checked: bool, patient: bool, part: tuple[str, float, list[Call]]) -> list[Call]:
        """Collect the claims of a program's calls, seed by seed, in a thread. Behind a death another child goes on."""
        program, cpu_s, calls = part
        seeds, repeats = (self.limits.hash_seeds, self.limits.repeats) if checked else (self.limits.hash_seeds[:1], 1)
        for call in calls:
            if len(program) > self.limits.max_source_chars:
                call.claims.append(Result(Verdict.SOURCE_TOO_LARGE))
            elif call.arguments is None:
                call.claims.append(Result(Verdict.BAD_INPUT))
        for seed in seeds:
            left = [call for call in calls if not call.claims or agree(call.claims).answered]
            first = seed == seeds[0]
            left = left if first else left[::-1]  # in another order, and with more memory: neither may show
            memory = (self.limits.memory_mb << 20) * (4 if checked and first else 5) // 4
            while left:
                arguments = [call.arguments for call in left]
                claims, spent = self.pool.ask(seed, program, arguments, repeats, cpu_s, memory)
                for call, lines in zip(left, claims, strict=False):
                    call.cpu_s += spent / len(claims)
                    call.claims += map(self._read, lines)
                left = left[len(claims) :]
                if call.claims[-1].verdict is Verdict.TIMEOUT and not patient:
                    late = [other for other in left if other.jobs <= call.jobs]
                    for other in late:
                        other.claims.append(Result(Verdict.TIMEOUT, error="not tried"))
                    left = [other for other in left if other not in late]
        return calls

    def _read(self, line: str) -> Result:
        """One claim, believed only as far as its form allows; its text is parsed and written anew."""
        (word, _, text), most = line.partition("\t"), self.limits.max_output_chars
        error = text if len(text) <= 64 and text.replace(".", "_").isidentifier() else ""
        try:
            if word == "ok":
                value = parse_literal(text, most)
                return Result(Verdict.OK, serialise(value, most, max_depth=literals.LITERAL_DEPTH))
            if word in ("load", "call"):
                return Result(Verdict.RUNTIME_ERROR, error=error, stage=word)
            return Result(Verdict(word), error=error)
        except Refused as refusal:
            return Result(Verdict(refusal.verdict))
        except ValueError:  # a BadLiteral, or no verdict at all
            return Result(Verdict.RUNTIME_ERROR, error="protocol")


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
    """Print the limits, the layers and the fate of some escapes; returns the number of escapes that worked."""
    print("| limit | value | unit | what it guards |\n|---|---|---|---|")
    for line in fields(Limits):
        value = " ".join(map(str, line.default)) if isinstance(line.default, tuple) else line.default
        print(f"| {line.name} | {value} | {line.metadata['unit']} | {line.metadata['guards']} |")
    with Executor(2, cpu_s=0.5, gate=False, full_builtins=True) as executor:
        print(*(f"{name:18} {value}" for name, value in executor.layers.items()), sep="\n")
        results = executor.run([(program, [""]) for program in ESCAPES.values()])
    for name, [result] in zip(ESCAPES, results, strict=True):
        print(f"{name:18} {'NOT CONTAINED' if result.ok else 'contained'} ({result.verdict} {result.error})")
    return sum(result.ok for [result] in results)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run one program by hand, or see what this machine grants.")
    parser.add_argument("file", nargs="?", help="a Python file that defines f")
    parser.add_argument("input", nargs="?", default="", help='its arguments, say "[1, 2], k=3"')
    parser.add_argument("--doctor", action="store_true", help="print all limits and layers, and try to break out")
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
    print(f"verdict  {result.verdict} {result.error} {result.stage}\noutput   {result.output}")
    print(f"cpu      {result.cpu_s * 1000:.1f} ms")
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main())
