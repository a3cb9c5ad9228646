"""The executor's untrusting half: a fork server, and the child that runs one program and claims what it returned.

`lanes.py` starts this file as a small process of its own (a "lane") and sends it jobs. The server never runs model code
itself and never learns what the right answer would have been. In the order of this file:
    gate, check   source text -> code object, or a clear verdict; nothing is executed. Nothing relies on this filter
    namespaces    what the program can see: builtins without the dangerous ones, stand-ins instead of modules. Fresh for
                  every call: what reaches the next one in this child, which is of the same job, are changes to
                  objects of the library
    claims        run the program in a fresh namespace, call it, one line of text per call
    Server        receive, gate, fork, watch the child's CPU clock, kill, reply

What it deliberately leaves out: the kernel's part (`layers.py`), the text of values (`literals.py`), equality, gold
outputs and anything else that could decide a reward. Paper: arXiv 2505.03335, section 3.3.3. Usage: see `executor.py`.
"""

import ast
import builtins
import codecs
import gc
import json
import marshal
import os
import resource
import select
import signal
import struct
import sys
import time
import types
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial

from sandbox.layers import Layers, cpu_clock
from sandbox.literals import Refused, serialise

FRAME = struct.Struct("<I")  # length of the message that follows


def receive(read: Callable[[int], bytes]) -> bytes:
    """The next message; nothing follows it, since each side waits for the other. EOFError: the other side is gone."""
    data = bytearray()
    while len(data) < FRAME.size or len(data) < FRAME.size + FRAME.unpack_from(data)[0]:
        piece = read(1 << 16)
        if not piece:
            raise EOFError("a server of the executor ended or did not start: run `python executor.py --doctor`")
        data += piece
    return bytes(data[FRAME.size :])


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


DENIED_NAMES = words(
    "open eval exec compile input globals locals vars dir breakpoint help exit quit memoryview __import__"
)
READERS = words("getattr setattr delattr hasattr")  # fine as a direct call with a constant name
FRAMES = words(
    "gi_frame gi_code gi_yieldfrom cr_frame cr_code cr_await ag_frame ag_code ag_await tb_frame tb_next f_back f_code "
    "f_globals f_locals f_builtins func_globals func_code co_code co_consts co_names mro"
)
CLOCKS = words("now utcnow today")
HONEST_DUNDERS = words(  # what honest classes define or read; every other one is refused
    "init new del post_init repr str bytes format hash bool eq ne lt le gt ge len length_hint getitem setitem delitem "
    "missing iter next reversed contains call enter exit aenter aexit aiter anext await add sub mul matmul truediv "
    "floordiv mod divmod pow lshift rshift and xor or radd rsub rmul rmatmul rtruediv rfloordiv rmod rdivmod rpow "
    "rlshift rrshift rand rxor ror iadd isub imul imatmul itruediv ifloordiv imod ipow ilshift irshift iand ixor ior "
    "neg pos abs invert complex int float index round trunc floor ceil get set delete set_name getattr setattr delattr "
    "init_subclass class_getitem instancecheck subclasscheck prepare copy deepcopy slots name qualname doc module "
    "class cause context notes debug future all version author"
)
DUNDERS = frozenset(f"__{name}__" for name in HONEST_DUNDERS)


@lru_cache(maxsize=32)  # a program often comes again with other inputs; refusals are not kept
def gate(source: str, modules: frozenset[str] | None) -> types.CodeType:
    """Parse, filter and compile `source`. `modules`: the import allow-list; None switches the filter off.

    Raises Refused("syntax_error" or "unsafe"). Words in strings and comments never matter, and a denied builtin is fine
    where the program binds that name itself (say a parameter called `input`).
    """
    try:
        code = compile(source, "<program>", "exec", dont_inherit=True)  # also finds `return` outside a function
        if modules is not None:
            check(ast.parse(source), modules)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        raise Refused("syntax_error", type(error).__name__) from None
    return code


def check(tree: ast.AST, modules: frozenset[str]) -> None:
    """Raise Refused("unsafe", what) for a construct that honest programs do not need.

    Identifiers are collected by the kind of their node, and from nodes of every other kind as names that are bound, so
    that a class pattern (`case object(__globals__=g)`) or an alias (`import math as __builtins__`) is seen as well.
    """
    loads, bound, attributes, words, imports, readers = (set() for _ in range(6))
    for node in ast.walk(tree):  # a node comes before those below it
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                loads.update(() if node in readers else (name,))
            case ast.Constant() | ast.Attribute(value=ast.Name(id="self"), attr="__dict__"):
                pass
            case ast.Call(func=ast.Name(id=reader), args=[_, ast.Constant(value=str(name)), *_]) if reader in READERS:
                readers.add(node.func)  # the same as `x.name`, and judged as such
                attributes.add(name)
            case ast.Attribute(attr=name):
                attributes.add(name)
            case ast.MatchClass(kwd_attrs=names):
                attributes.update(names)
            case ast.Import(names=aliases):
                imports.update(alias.name for alias in aliases)
            case ast.ImportFrom(module=name, names=aliases, level=level):
                imports.add("." * level + (name or ""))
                words.update(alias.name for alias in aliases)
                imports.update(alias.name for alias in aliases if alias.name.startswith("_"))
            case ast.alias(name=name, asname=alias):
                bound.add(alias or name.partition(".")[0])
            case ast.keyword(arg=name):
                words.add(name or "")
            case _:
                for _, value in ast.iter_fields(node):
                    bound.update(item for item in (value if type(value) is list else [value]) if type(item) is str)
    names = loads | bound | attributes | words
    bad = {name for name in names if name.startswith("__") and name.endswith("__")} - DUNDERS
    bad |= (loads - bound) & (DENIED_NAMES | READERS) | attributes & FRAMES | imports - modules
    if "datetime" in imports:  # the only allowed module with a clock
        bad |= attributes & CLOCKS
    if "statistics" in imports and names & {"NormalDist", "*"}:  # and the only one with chance
        bad |= attributes & {"samples"}
    if bad:
        raise Refused("unsafe", min(bad))


HIDDEN = words("attrgetter methodcaller Formatter get_type_hints ForwardRef")  # read attributes by text or evaluate it


class Forbidden(ImportError):
    """An import outside the allow-list that got past (or around) the gate."""


def make_importer(table: dict, module_type: type, forbidden: type) -> tuple:
    """An __import__ over stand-in modules, and the dict of those in use. Programs can reach the function, so its code
    must not have the globals of this file (see `namespace_maker`)."""
    loaded = {}

    def stand_in(name):
        if name not in loaded:
            module = loaded[name] = module_type(name)
            module.__dict__.update(table[name])
            for inner in table:
                if inner.startswith(name + "."):
                    setattr(module, inner[len(name) + 1 :], stand_in(inner))
        return loaded[name]

    def __import__(name, globals=None, locals=None, fromlist=(), level=0):
        if name in ("time", "_strptime") and type(fromlist) is list:  # datetime's C code, which reads nothing of them
            return module_type(name)  # an import statement passes None or a tuple
        if level or name not in table:
            raise forbidden(name)
        return stand_in(name if fromlist else name.partition(".")[0])

    return __import__, loaded


def namespace_maker(modules: list[str], full_builtins: bool) -> Callable[[], dict]:
    """A function that returns the globals of one fresh program."""
    if full_builtins:
        builtins.exit = builtins.quit = sys.exit  # what the site module would have added
        return lambda: {"__builtins__": builtins, "__name__": "__main__"}
    table = {}
    for module in sys.modules.keys() & modules:  # public names, and no modules: `dataclasses.sys` leads out
        items = vars(sys.modules[module]).items()
        table[module] = {k: v for k, v in items if k[0] != "_" and k not in HIDDEN and type(v) is not types.ModuleType}
    safe = {name: value for name, value in vars(builtins).items() if name not in DENIED_NAMES}
    lonely = types.FunctionType(make_importer.__code__, {"__builtins__": safe})
    safe["__import__"], loaded = lonely(table, types.ModuleType, Forbidden)

    def fresh() -> dict:
        loaded.clear()
        return {"__builtins__": safe, "__name__": "__main__"}  # shared: a copy costs 100 page faults in the child

    return fresh


def claims(code: types.CodeType, call: bytes, repeats: int, fresh: Callable, entry: str, most: int):
    """Yield one line per repeat of one call: verdict TAB text LF. `call`: marshalled (arguments, keyword arguments).

    The program is executed once in a fresh namespace and called `repeats` times there with fresh arguments, so that
    state kept between calls shows. "load" or "call" for a verdict: where it raised the exception that the text names.
    """
    namespace, failure = fresh(), ""
    try:
        exec(code, namespace)
        if not callable(namespace.get(entry)):
            raise Refused("no_function")
    except BaseException as error:
        failure = explain(error, "load")
    for _ in range(repeats):
        try:
            args, kwargs = marshal.loads(call)
            line = failure or "ok\t" + serialise(namespace[entry](*args, **kwargs), most)
        except BaseException as error:
            line = explain(error, "call")
        yield line.encode("utf-8", "backslashreplace") + b"\n"


def explain(error: BaseException, where: str) -> str:
    kind = type(error)  # never isinstance: a program's exception may have a __class__ of its own making
    if kind is Refused:
        return f"{error.verdict}\t{error.error}"
    if kind is MemoryError:
        return "memory\tMemoryError"
    if kind is Forbidden:
        return "unsafe\timport"
    return f"{where}\t" + type.__dict__["__name__"].__get__(kind).replace("\n", " ")


class Server:
    """One fork server. `config`: the options and limits of the executor, by name."""

    def __init__(self, channel: int, config: dict) -> None:
        """Import, confine this process, say what holds, then settle its memory: every page a child writes is copied."""
        os.environ.clear()
        self.channel, self.config, self.trainer = channel, config, os.getppid()
        self.allowed = frozenset(config["modules"]) if config["gate"] else None
        os.register_at_fork, real = (lambda **hooks: None), os.register_at_fork  # `random` would re-seed in every child
        for name in [*config["modules"], "_strptime"]:
            with suppress(ImportError):  # a part of the standard library that this Python was built without
                __import__(name)
        os.register_at_fork = real
        names = "ascii latin-1 utf-16 utf-16-le utf-16-be utf-32 utf-8-sig cp1252 unicode_escape rot13 hex base64"
        for name in words(names):
            codecs.lookup(name)  # later the files they live in are out of reach
        warnings.simplefilter("ignore")
        sys.unraisablehook = lambda *_: None
        sys.stdout.reconfigure(errors="backslashreplace")
        sys.modules["__main__"] = types.ModuleType("__main__")  # programs are __main__; dataclasses look it up
        self.layers = Layers(config["isolation"], config["file_bytes"])
        os.dup2(1, 2)  # errors of the start were worth seeing; from here on /dev/null
        self.fresh = namespace_maker(config["modules"], config["full_builtins"])
        self.send(json.dumps(self.layers.active).encode())
        self.warm_up()
        if self.layers.base:  # for the compiler, which a short source can make take gigabytes; children raise it again
            _, most = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (self.layers.base + (config["memory_mb"] << 20), most))
        gc.collect()
        gc.freeze()
        # Fill the holes that the imports left: what a job allocates then lies together, 50 pages fewer per fork.
        self.plugs = [bytes(size) for size in range(8, 473, 16) for _ in range(50)]

    def warm_up(self) -> None:
        """Run a program of ours until the interpreter has finished rewriting the code we run: it specialises
        instructions in place, and in a child every page so written is a page fault (half of a run is page faults)."""
        entry = self.config["entry"]
        source = f"import math\nclass A: pass\ndef {entry}(x): return [x, str(x), {{x: (1.5, None)}}, {{x, 2}}]\n"
        code, call = gate(source, self.allowed), marshal.dumps(((1,), {}))
        for _ in range(100):
            list(claims(code, call, 1, self.fresh, entry, 1000))
        for _ in range(20):
            self.run(source, [call], 1, 1.0, 1 << 28)

    def serve(self) -> None:
        """Run jobs until the trainer is gone, or until this process has grown."""
        limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * self.config["growth"]
        poller = select.poll()
        poller.register(self.channel, select.POLLIN)
        while os.getppid() == self.trainer:  # a forked relative of the trainer may keep the channel open for ever
            if poller.poll(1000):
                self.send(self.run(*marshal.loads(receive(partial(os.read, self.channel)))))
                if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > limit:
                    return  # after a monstrous source every fork would pay: be started again

    def send(self, message: bytes) -> None:
        view = memoryview(FRAME.pack(len(message)) + message)
        while view:
            view = view[os.write(self.channel, view) :]

    def run(self, program: str, calls: list[bytes], repeats: int, cpu_s: float, memory: int) -> bytes:
        """Gate, fork, watch, kill; the lines of the reply are CPU seconds, the child's, why the next one is missing."""
        lines, entry, most = len(calls) * repeats, self.config["entry"], self.config["max_output_chars"]
        try:
            signal.setitimer(signal.ITIMER_PROF, self.config["compile_cpu_s"])  # ends this process: nested finally
            code = gate(program, self.allowed)  # can take minutes to compile
        except Refused as refusal:
            return b"0\n" + f"{refusal.verdict}\t{refusal.error}\n".encode() * lines
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:  # the child; never returns. The pipe is the only descriptor it holds besides /dev/null
            leave = os._exit
            try:
                os.close(self.channel)
                gate.cache_clear()  # whoever reads this process past the filter finds no program but its own
                self.layers.enter_child(cpu_s * lines, memory, self.config["processes"])
                for call in calls:
                    for line in claims(code, call, repeats, self.fresh, entry, most):
                        os.write(writer, line)
            finally:
                leave(0)  # no teardown: __del__ and atexit of the program do not run, and 0 means nothing to anybody
        os.close(writer)
        try:
            cause, out = self.watch(pid, reader, lines, cpu_s)
        finally:
            os.close(reader)
            for kill in (os.kill, os.killpg):  # also after a clean end: it may have closed its pipe and gone on
                with suppress(ProcessLookupError, PermissionError):
                    kill(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
        facts = {-signal.SIGSYS: b"unsafe\tsystem_call", -signal.SIGXCPU: b"timeout"}  # not to be faked in its favour
        cause = facts.get(os.waitstatus_to_exitcode(status), cause)
        end = out.rfind(b"\n") + 1  # what follows is unfinished
        return b"%f\n" % (usage.ru_utime + usage.ru_stime) + out[:end] + cause

    def watch(self, pid: int, reader: int, lines: int, cpu_s: float) -> tuple[bytes, bytes]:
        """Collect what the child writes until it is done, too slow or too talkative. EOFError: the trainer is gone.

        `cpu_s` is for each line, by the child's own CPU clock, so that a busy machine turns no honest program into a
        timeout. Sleepers are ended by the wall, when that clock stands still (a busy machine may well let a program
        wait for its first millisecond, so a share of the wall time would not do).
        """
        still_s = max(self.config["still_s"], 5 * cpu_s)
        wall_s = self.config["wall_s"] + 100 * cpu_s
        most = lines * (4 * self.config["max_output_chars"] + 200)
        poller, out = select.poll(), bytearray()
        poller.register(reader, select.POLLIN)
        poller.register(self.channel, 0)  # only a hang-up is reported
        since = moved = time.monotonic()
        spent, clock, seen = 0.0, 0.0, 0  # CPU seconds at the last line and at the last move; lines so far
        while len(out) <= most:
            events = dict(poller.poll(20))
            if self.channel in events:
                raise EOFError
            cpu, now = cpu_clock(pid), time.monotonic()
            if reader in events:
                data = os.read(reader, 65536)
                out += data
                seen += data.count(b"\n")
                if not data or seen >= lines:
                    return b"runtime_error\tdied", out
                if b"\n" in data:
                    since, spent = now, max(cpu, spent)
            if cpu - clock > 0.001:
                clock, moved = cpu, now
            if cpu - spent > cpu_s or now - moved > still_s or now - since > wall_s:
                return b"timeout", out
        return b"output_too_large", out


def main() -> None:
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        Server(int(sys.argv[1]), json.loads(sys.argv[2])).serve()
    os._exit(0)
