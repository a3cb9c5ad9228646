"""The executor's untrusting half: a fork server, and the child that runs one program and claims what it returned.

`lanes.py` starts this file as a small process of its own (a "lane") and sends it jobs: one program and the
arguments of some calls. For each job the server compiles the program, filters it (`gate`), forks, and relays whatever
the child wrote, unread. It never runs model code itself and never learns what the right answer would have been.

One program, from text to claim, in the order of this file:
    gate          source text -> code object, or a verdict; nothing is executed
    namespaces    what the program can see: builtins without the dangerous ones, stand-ins instead of modules
    claims        run the program in a fresh namespace, call it, one line of text per call
    serve         the loop: receive, gate, fork, watch the child's CPU clock, kill, reply

The kernel's part is in `layers.py`, the text of values in `literals.py`. What this file deliberately
leaves out: equality, gold outputs and anything else that could decide a reward. Paper: arXiv 2505.03335, section 3.3.3.

Usage: none by hand; see `executor.py`.
"""

import ast
import builtins
import gc
import io
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
from contextlib import suppress
from functools import lru_cache

from sandbox.layers import Layers, cpu_clock
from sandbox.literals import Refused, serialise

FRAME = struct.Struct("<I")  # length of the message that follows
REPLY = struct.Struct("<Biff")  # why the child ended (below), its wait status, CPU seconds, wall seconds
EXITED, CPU, WALL, FLOOD, GATE = range(5)

# ----------------------------------------------------------------------------------------------------------------------
# The static gate: a first filter and the source of clear verdicts. It can be fooled and nothing relies on it.


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


DENIED_NAMES = words(
    "open eval exec compile input globals locals vars dir breakpoint help exit quit memoryview __import__"
)
ATTRIBUTE_READERS = words("getattr setattr delattr hasattr")  # fine as a direct call with a constant name
FRAMES = words(
    "gi_frame gi_code gi_yieldfrom cr_frame cr_code cr_await ag_frame ag_code ag_await tb_frame tb_next f_back f_code "
    "f_globals f_locals f_builtins func_globals func_code co_code co_consts co_names mro"
)
CLOCKS = words("now utcnow today")
HONEST = words(  # the dunder names that honest classes define or read; every other one is refused
    "init new del post_init repr str bytes format hash bool eq ne lt le gt ge len length_hint getitem setitem delitem "
    "missing iter next reversed contains call enter exit aenter aexit aiter anext await add sub mul matmul truediv "
    "floordiv mod divmod pow lshift rshift and xor or radd rsub rmul rmatmul rtruediv rfloordiv rmod rdivmod rpow "
    "rlshift rrshift rand rxor ror iadd isub imul imatmul itruediv ifloordiv imod ipow ilshift irshift iand ixor ior "
    "neg pos abs invert complex int float index round trunc floor ceil get set delete set_name getattr setattr delattr "
    "init_subclass class_getitem instancecheck subclasscheck prepare copy deepcopy slots name qualname doc module "
    "class cause context notes debug future all version author"
)
DUNDERS = frozenset(f"__{name}__" for name in HONEST)


@lru_cache(maxsize=32)  # a program often comes again with other inputs; refusals are not kept
def gate(source: str, modules: frozenset[str] | None) -> types.CodeType:
    """Parse, filter and compile `source`. `modules`: the import allow-list; None switches the filter off.

    Raises Refused("syntax_error" or "unsafe"). Words in strings and comments never matter, and a denied builtin is fine
    where the program binds that name itself (say a parameter called `input`).
    """
    try:
        tree = ast.parse(source) if modules is not None else None
        code = compile(source, "<program>", "exec", dont_inherit=True)  # also finds `return` outside a function
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        raise Refused("syntax_error", type(error).__name__) from None
    if tree is not None:
        check(tree, modules)
    return code


def check(tree: ast.AST, modules: frozenset[str]) -> None:
    """Raise Refused("unsafe", what) for a construct that honest programs do not need.

    Identifiers are collected by the kind of their node and not by a list of known constructs, so that a class pattern
    (`case object(__globals__=g)`) or an alias (`import math as __builtins__`) is seen like any plain attribute.
    """
    loads, bound, attributes, words, imports = set(), set(), set(), set(), set()
    stack = [tree]
    while stack:
        node = stack.pop()
        kind = type(node)
        if kind is ast.Name:
            (loads if type(node.ctx) is ast.Load else bound).add(node.id)
            continue
        if kind is ast.Constant:
            continue
        if kind is ast.Import or kind is ast.ImportFrom:
            if kind is ast.Import:
                imports.update(alias.name for alias in node.names)
            else:
                imports.add("." * node.level + (node.module or ""))
                words.update(alias.name for alias in node.names)
                if node.module != "__future__" and any(alias.name.startswith("_") for alias in node.names):
                    raise Refused("unsafe", "import")
            bound.update(alias.asname or alias.name.partition(".")[0] for alias in node.names)
            continue
        if kind is ast.Call and reads_constant_name(node):
            stack += [node.args[0], *node.args[2:]]
            attributes.add(node.args[1].value)
            continue
        if kind is ast.Attribute and node.attr == "__dict__" and getattr(node.value, "id", "") == "self":
            continue
        target = attributes if kind in (ast.Attribute, ast.MatchClass) else words if kind is ast.keyword else bound
        for field in node._fields:
            value = getattr(node, field, None)
            for item in value if type(value) is list else (value,):
                if isinstance(item, ast.AST):
                    stack.append(item)
                elif type(item) is str:
                    target.add(item)
    bad = {name for name in loads | bound | attributes | words if is_dunder(name)} - DUNDERS
    bad |= (loads - bound) & (DENIED_NAMES | ATTRIBUTE_READERS) | attributes & FRAMES | imports - modules
    if "datetime" in imports:  # the only allowed module with a clock
        bad |= attributes & CLOCKS - bound
    if bad:
        raise Refused("unsafe", min(bad))


def reads_constant_name(call: ast.Call) -> bool:
    """True for `getattr(x, "name")` and its like: the same as writing `x.name`, and judged as such."""
    direct = type(call.func) is ast.Name and call.func.id in ATTRIBUTE_READERS and len(call.args) >= 2
    return direct and type(call.args[1]) is ast.Constant and type(call.args[1].value) is str


def is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


# ----------------------------------------------------------------------------------------------------------------------
# What the program can see. Fresh for every call, so that state and patches never reach the next one.

HIDDEN = {  # public names that read attributes by text or evaluate it
    "operator": {"attrgetter", "methodcaller"},
    "string": {"Formatter"},
    "typing": {"get_type_hints", "ForwardRef"},
}
# What the C code of datetime imports through the *program's* __import__ (it then reads sys.modules).
FOR_C_CODE = ("time", "_strptime")


class Forbidden(ImportError):
    """An import outside the allow-list that got past (or around) the gate."""


def public_names(name: str) -> dict:
    """The names a program may use of an allowed module: no private ones, no modules (`dataclasses.sys` leads out)."""
    items = vars(sys.modules[name]).items()
    hidden = HIDDEN.get(name, ())
    return {k: v for k, v in items if not k.startswith("_") and k not in hidden and type(v) is not types.ModuleType}


def make_importer(table: dict, for_c_code: tuple, module_type: type, forbidden: type) -> tuple:
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
        if name in for_c_code and type(fromlist) is list:  # an import statement passes None or a tuple
            return module_type(name)
        if level or name not in table:
            raise forbidden(name)
        return stand_in(name if fromlist else name.partition(".")[0])

    return __import__, loaded


def namespace_maker(modules: list[str], full_builtins: bool):
    """A function that returns the globals of one fresh program."""
    if full_builtins:
        builtins.exit = builtins.quit = sys.exit  # what the site module would have added
        return lambda: {"__builtins__": builtins, "__name__": "__main__"}
    table = {name: public_names(name) for name in modules}
    safe = {name: value for name, value in vars(builtins).items() if name not in DENIED_NAMES}
    lonely = types.FunctionType(make_importer.__code__, {"__builtins__": safe})
    safe["__import__"], loaded = lonely(table, FOR_C_CODE, types.ModuleType, Forbidden)

    def fresh() -> dict:
        loaded.clear()
        return {"__builtins__": safe, "__name__": "__main__"}  # shared: a copy costs 100 page faults in the child

    return fresh


# ----------------------------------------------------------------------------------------------------------------------
# In the child: run, call, claim


def claims(code: types.CodeType, call: bytes, repeats: int, fresh, config: dict):
    """Yield one line per repeat of one call: verdict TAB text LF. `call`: marshalled (arguments, keyword arguments).

    The program is executed once in a fresh namespace and called `repeats` times there with fresh arguments, so that
    state kept between calls shows. An entry of None means a script: the only argument is its standard input.
    """
    namespace, entry, failure = fresh(), config["entry"], None
    try:
        if entry is not None:
            exec(code, namespace)
            if not callable(namespace.get(entry)):
                raise Refused("no_function")
    except BaseException as error:
        failure = explain(error)
    for _ in range(repeats):
        line = failure
        if line is None:
            try:
                args, kwargs = marshal.loads(call)
                value = run_script(code, fresh(), *args) if entry is None else namespace[entry](*args, **kwargs)
                line = "ok\t" + serialise(value, config["max_output_chars"])
            except BaseException as error:
                line = explain(error)
        yield line.encode("utf-8", "backslashreplace") + b"\n"


def explain(error: BaseException) -> str:
    kind = type(error)  # never isinstance: a program's exception may have a __class__ of its own making
    if kind is Refused:
        return f"{error.verdict}\t{error.error}"
    if kind is MemoryError:
        return "memory\tMemoryError"
    if kind is Forbidden:
        return "unsafe\timport"
    return "runtime_error\t" + type.__dict__["__name__"].__get__(kind).replace("\n", " ")


def run_script(code: types.CodeType, namespace: dict, text: str) -> str:
    """Run a whole program with `text` as its standard input; what it printed is its value."""
    sys.stdin = io.TextIOWrapper(io.BytesIO(text.encode("utf-8", "backslashreplace")), "utf-8")
    sys.stdout = printed = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    buffer = printed.buffer
    try:
        exec(code, namespace)
    except SystemExit as stop:
        if stop.code not in (None, 0):
            raise
    printed.flush()
    return buffer.getvalue().decode("utf-8", "backslashreplace")


def child(code: types.CodeType, job: tuple, fresh, writer: int, channel: int, config: dict, layers: Layers) -> None:
    """The life of a child; never returns. The pipe is the only descriptor it holds besides /dev/null."""
    leave = os._exit
    try:
        _, calls, repeats, cpu_s, memory = job
        os.close(channel)
        layers.enter_child(cpu_s * len(calls) * repeats, memory)
        for call in calls:
            for line in claims(code, call, repeats, fresh, config):
                os.write(writer, line)
    finally:
        leave(0)  # no teardown: __del__ and atexit of the program do not run, and 0 means nothing to anybody


# ----------------------------------------------------------------------------------------------------------------------
# The server


def read_exactly(channel: int, n: int) -> bytes:
    data = bytearray()
    while len(data) < n:
        piece = os.read(channel, n - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def reply(channel: int, reason: int, status: int, cpu_s: float, wall_s: float, text: bytes) -> None:
    message = REPLY.pack(reason, status, cpu_s, wall_s) + text
    view = memoryview(FRAME.pack(len(message)) + message)
    while view:
        view = view[os.write(channel, view) :]


def watch(pid: int, reader: int, channel: int, lines: int, cpu_s: float, most: int) -> tuple[int, bytes]:
    """Collect what the child writes until it is done, too slow or too talkative; raise EOFError if the trainer is gone.

    `cpu_s` is for each line, by the child's own CPU clock, so that a busy machine turns no honest program into a
    timeout. Sleepers are ended by the wall: after 5 s (or 5 times the limit) in which that clock stood still. A share
    of the wall time would not do: on a busy machine a program may well wait for its first millisecond.
    """
    poller, out = select.poll(), bytearray()
    poller.register(reader, select.POLLIN)
    poller.register(channel, 0)  # only a hang-up is reported
    since = moved = time.monotonic()
    spent, clock, seen = 0.0, 0.0, 0  # CPU seconds at the last line and at the last move; lines so far
    while True:
        events = dict(poller.poll(20))
        if channel in events:
            raise EOFError
        cpu = cpu_clock(pid)
        if reader in events:
            data = os.read(reader, 65536)
            if not data:
                return EXITED, bytes(out)
            out += data
            if b"\n" in data:
                seen += data.count(b"\n")
                if seen >= lines:
                    return EXITED, bytes(out)
                since, spent = time.monotonic(), cpu or spent
        if len(out) > most:
            return FLOOD, bytes(out[:most])
        now = time.monotonic()
        if cpu is not None and cpu - clock > 0.001:
            clock, moved = cpu, now
        if cpu is not None and cpu - spent > cpu_s:
            return CPU, bytes(out)
        if now - moved > max(5.0, 5 * cpu_s) or now - since > 10 + 100 * cpu_s:
            return WALL, bytes(out)


def run_job(job: tuple, fresh, channel: int, config: dict, layers: Layers) -> tuple[int, int, float, float, bytes]:
    """Gate, fork, watch, kill: returns (reason, wait status, CPU seconds, wall seconds, the child's lines)."""
    program, calls, repeats, cpu_s, _ = job
    started = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_PROF, 2.0)  # nested finally can take minutes to compile: end the lane then
        code = gate(program, config["allowed"])
    except Refused as refusal:
        return GATE, 0, 0.0, time.monotonic() - started, f"{refusal.verdict}\t{refusal.error}".encode()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(code, job, fresh, writer, channel, config, layers)
    os.close(writer)
    try:
        lines = len(calls) * repeats
        reason, out = watch(pid, reader, channel, lines, cpu_s, lines * (4 * config["max_output_chars"] + 200))
    finally:
        os.close(reader)
        for kill in (os.kill, os.killpg):  # always, also after a clean end: it may have closed its pipe and gone on
            with suppress(ProcessLookupError, PermissionError):
                kill(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
    return reason, status, usage.ru_utime + usage.ru_stime, time.monotonic() - started, out


def warm_up(fresh, channel: int, config: dict, layers: Layers) -> None:
    """Run a program of ours often enough that the interpreter has finished rewriting the code we run: it specialises
    instructions in place, and in a child every page so written is a page fault (and half of a run is page faults)."""
    entry = config["entry"] or "f"
    source = f"import math\nclass A:\n    pass\ndef {entry}(x):\n    return [x, str(x), {{x: (1.5, None)}}, {{x, 2}}]\n"
    job = (source, [marshal.dumps(((1,), {}))], 1, 1.0, 1 << 28)
    trusted = config | {"entry": entry}
    code = gate(source, config["allowed"])
    for _ in range(100):
        for _ in claims(code, job[1][0], 1, fresh, trusted):
            pass
    for _ in range(20):
        run_job(job, fresh, channel, trusted, layers)


def serve(channel: int, config: dict) -> None:
    """Prepare and confine this process, say what holds, then run jobs until the trainer is gone."""
    import codecs
    import warnings

    os.environ.clear()
    config["allowed"] = frozenset(config["modules"]) if config["gate"] else None
    trainer, layers = os.getppid(), Layers(config["isolation"])
    os.register_at_fork, real = (lambda **hooks: None), os.register_at_fork  # `random` would re-seed in every child
    for name in [*config["modules"], "_strptime"]:
        __import__(name)
    os.register_at_fork = real
    codec_names = "ascii latin-1 utf-16 utf-16-le utf-16-be utf-32 utf-8-sig cp1252 unicode_escape rot13 hex base64"
    for codec in words(codec_names):
        codecs.lookup(codec)  # later the files they live in are out of reach
    warnings.simplefilter("ignore")
    sys.unraisablehook = lambda *_: None
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.modules["__main__"] = types.ModuleType("__main__")  # programs are __main__; dataclasses look their module up
    layers.confine()
    os.dup2(1, 2)  # errors of the start were worth seeing; from here on /dev/null
    fresh = namespace_maker(config["modules"], config["full_builtins"])
    message = json.dumps(layers.active).encode()
    os.write(channel, FRAME.pack(len(message)) + message)
    warm_up(fresh, channel, config, layers)
    gc.collect()
    gc.freeze()
    # Fill the holes that the imports left in memory: what a job allocates then lies together, and 50 pages fewer are
    # written, so copied, for every fork.
    plugs = [bytes(size) for size in range(8, 473, 16) for _ in range(50)]
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 4
    poller = select.poll()
    poller.register(channel, select.POLLIN)
    while os.getppid() == trainer:  # a forked relative of the trainer may keep the channel open for ever
        if not poller.poll(1000):
            continue
        job = marshal.loads(read_exactly(channel, FRAME.unpack(read_exactly(channel, FRAME.size))[0]))
        reply(channel, *run_job(job, fresh, channel, config, layers))
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > limit:
            return  # a monstrous source has made this process grow, and every fork would pay: be started again
    del plugs


def main() -> None:
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        serve(int(sys.argv[1]), json.loads(sys.argv[2]))
    os._exit(0)
