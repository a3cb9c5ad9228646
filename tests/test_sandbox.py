"""The executor, alone and under attack: every claim of its docstring, tried with real processes.

Each program below runs in three modes: as in training (static gate on), with the gate off, and with the gate off and all
builtins, when only the process boundary and the kernel layers are left. In every mode an attack must leave no trace,
earn no reward and harm no later program. `../shared/executor_cases.json` (or $AZR_SHARED) is run too where it exists;
its fields are explained in its own `meta`. Nothing here asserts a time.
"""

# ruff: noqa: E501 (the tables below hold one program per line)

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import fields
from pathlib import Path

import pytest

from executor import (
    BadLiteral,
    Executor,
    Judgement,
    Limits,
    Verdict,
    canonical,
    main,
    parse_arguments,
    parse_literal,
    same_value,
)

HERE = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("AZR_SHARED", HERE.parent / "shared"))
MARKER = Path(tempfile.gettempdir()) / "azr_executor_was_here"
MODES = {"gate": {}, "no_gate": {"gate": False}, "full_builtins": {"gate": False, "full_builtins": True}}
LIMITS = {"cpu_s": 0.3, "validate_cpu_s": 0.3, "still_s": 2.0, "compile_cpu_s": 0.5}


def program(*lines: str) -> str:
    return "\n".join(lines) + "\n"


def body(expression: str, *before: str) -> str:
    return program(*before, "def f(x):", f"    return {expression}")


# ----------------------------------------------------------------------------------------------------------------------
# Honest programs: name -> (program, input, output), the same in all three modes

HONEST = {
    "acceptance: pure function, input 3": (body("x + 1"), "3", "4"),
    "acceptance: string with input( in it": (body("'input(' + x"), "'a'", "'input(a'"),
    "acceptance: helper, nested function, class": (
        program(
            "class Stack:",
            "    def __init__(self): self.items = []",
            "    def push(self, item): self.items.append(item); return self",
            "    def __len__(self): return len(self.items)",
            "def helper(n):",
            "    def inner(k): return k * 2",
            "    return inner(n)",
            "def f(x): return len(Stack().push(helper(x)).push(0))",
        ),
        "5",
        "2",
    ),
    "acceptance: returns None": (body("None"), "1", "None"),
    "acceptance: set of strings": (body("{w.upper() for w in x}"), "['b', 'a', 'c']", "{'A', 'B', 'C'}"),
    "acceptance: returns nan": (body("[float('inf') - x]"), "float('inf')", "[nan]"),
    "words that matter to nobody": (
        program("# import os; eval(open('x'))", "def f(exec):", "    'os.system subprocess __globals__'", "    return exec"),
        "'__import__'",
        "'__import__'",
    ),
    "a parameter called input": (program("def f(input, open=2):", "    return input + open"), "1", "3"),
    "methods called eval and open": (
        program("class A:", "    def eval(self): return 1", "    open = eval", "def f(x): return A().eval() + A().open()"),
        "0",
        "2",
    ),
    "changes its argument": (program("def f(x):", "    x.append(len(x))", "    return x"), "[5]", "[5, 1]"),
    "no arguments": (program("def f():", "    return 'nothing'"), "", "'nothing'"),
    "keyword arguments": (program("def f(a, *, b):", "    return a - b"), "1, b=3", "-2"),
    "minus zero": (body("-x"), "0.0", "-0.0"),
    "counter, default dict, named tuple": (
        program(
            "from collections import Counter, OrderedDict, defaultdict, namedtuple",
            "P = namedtuple('P', 'a b')",
            "def f(x):",
            "    d = defaultdict(list)",
            "    d[x].append(1)",
            "    return Counter('aab'), d, P(1, x), OrderedDict(z=1)",
        ),
        "7",
        "({'a': 2, 'b': 1}, {7: [1]}, (1, 7), {'z': 1})",
    ),
    "ordered dict after a move": (
        program("from collections import OrderedDict", "def f(x):", "    d = OrderedDict(a=1, b=2)", "    d.move_to_end('a')", "    return d"),
        "0",
        "{'b': 2, 'a': 1}",
    ),
    "dataclass and enum": (
        program(
            "from __future__ import annotations",
            "from dataclasses import dataclass, field",
            "from enum import Enum, auto",
            "class C(Enum):",
            "    RED = auto()",
            "@dataclass(order=True)",
            "class D:",
            "    n: int",
            "    l: list = field(default_factory=list)",
            "def f(x): return repr(D(x)), D(1) < D(2), C.RED.value",
        ),
        "3",
        "('D(n=3, l=[])', True, 1)",
    ),
    "generic class with a guard": (
        program(
            "from typing import *",
            "T = TypeVar('T')",
            "class Q(Generic[T]):",
            "    def __init__(self) -> None: self.all: List[T] = []",
            "def f(x: Optional[int]) -> int: return len(Q[int]().all)",
            "if __name__ == '__main__':",
            "    print(f(1))",
        ),
        "1",
        "0",
    ),
    "dates": (
        program("import datetime", "def f(x):", "    return datetime.datetime.strptime(x, '%Y-%m-%d').strftime('%d.%m.%y')"),
        "'2024-02-29'",
        "'29.02.24'",
    ),
    "sub-modules": (
        program("import collections.abc as c", "import collections", "def f(x):", "    return isinstance(x, c.Sized), isinstance(x, collections.abc.Mapping)"),
        "[1]",
        "(True, False)",
    ),
    "lazy imports of the library": (
        program("import functools, json, statistics", "from collections import Counter", "@functools.singledispatch", "def g(v): return 'any'", "@g.register(int)", "def _(v): return 'int'",
                "def f(x): return g(x), Counter('aab').most_common(1), statistics.median([3, 1]), json.loads('[1]')"),
        "1",
        "('int', [('a', 2)], 2.0, [1])",
    ),
    "an awaited coroutine and a forgotten one": (
        program("async def g(v): return v", "def f(x):", "    g(0)", "    try:", "        g(x).send(None)", "    except StopIteration as stop:", "        return stop.value"),
        "9",
        "9",
    ),
    "state that does not show": (program("memo = {}", "def f(x):", "    return memo.setdefault(x, x * x)"), "4", "16"),
    "prints a lot": (program("def f(x):", "    print('line ' * 100000)", "    return x"), "1", "1"),
    "survives its own MemoryError": (
        program("def f(x):", "    try:", "        return len(bytearray(1 << 40))", "    except MemoryError:", "        return 'small'"),
        "1",
        "'small'",
    ),
    "text of every kind": (body("x + chr(0xd800) + '\\t\\n\\0' + 'é'"), "'日本'", "'日本\\ud800\\t\\n\\x00é'"),
    "windows line ends": ("def f(x):\r\n    return x\r\n", "1", "1"),
    "a cookie in a text is no encoding": (program("# -*- coding: latin-1 -*-", "def f(x):", "    return len('é')"), "1", "1"),
    "matches a class": (program("def f(x):", "    match x:", "        case complex(real=r): return r", "        case _: return 0"), "1+2j", "1.0"),
}  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# Programs that fail without malice: name -> (program, input, verdicts), the same in all three modes

FAILING = {
    "acceptance: counter in a module-level list": (program("calls = []", "def f(x):", "    calls.append(x)", "    return len(calls)"), "1", "nondeterministic"),
    "acceptance: instance of a local class": (program("class A:", "    pass", "def f(x):", "    return A()"), "1", "unserialisable"),
    "acceptance: raises Exception": (program("def f(x):", "    raise Exception('bad')"), "1", "runtime_error"),
    "acceptance: raises StopIteration": (program("def f(x):", "    raise StopIteration(1)"), "1", "runtime_error"),
    "acceptance: raises SystemExit": (program("def f(x):", "    raise SystemExit(0)"), "1", "runtime_error"),
    "acceptance: raises ValueError": (body("int('x')"), "1", "runtime_error"),
    "acceptance: output over the cap": (body("list(range(x))"), "9999", "output_too_large"),
    "acceptance: infinite loop": (program("def f(x):", "    while x: pass"), "1", "timeout"),
    "raises KeyboardInterrupt": (program("def f(x):", "    raise KeyboardInterrupt"), "1", "runtime_error"),
    "raises its own BaseException": (program("class Z(BaseException): pass", "def f(x):", "    raise Z"), "1", "runtime_error"),
    "fails while it loads": (program("[][0]", "def f(x):", "    return x"), "1", "runtime_error"),
    "fails on the second call": (program("left = [1]", "def f(x):", "    return left.pop()"), "1", "nondeterministic"),
    "alternates two exceptions": (program("n = []", "def f(x):", "    n.append(x)", "    raise (KeyError, ValueError)[len(n) % 2]"), "1", "nondeterministic"),
    "the exception depends on the hash seed": (program("def f(x):", "    raise type(''.join(set(x)), (Exception,), {})"), "'abcdefghijkl'", "nondeterministic"),
    "the exception while it loads does": (program("raise type(''.join(set('abcdefghijkl')), (Exception,), {})"), "1", "nondeterministic"),
    "no f": (program("def g(x):", "    return x"), "1", "no_function"),
    "f is no function": ("f = 3\n", "1", "no_function"),
    "empty": ("", "1", "no_function"),
    "no Python": ("def f(x) return x", "1", "syntax_error"),
    "return outside": ("return 1", "1", "syntax_error"),
    "NUL": ("def f(x):\0\n    return x", "1", "syntax_error"),
    "lone surrogate in the source": (body("'\ud800'"), "1", "syntax_error"),
    "nested too deeply": (body("(" * 300 + "x" + ")" * 300), "1", "syntax_error"),
    "an endless chain of signs": (body("-" * 9000 + "x"), "1", "syntax_error runtime_error"),
    "too long": (body("x") + "#" * 20_000, "1", "source_too_large"),
    "input is an expression": (body("x"), "2 + 2", "bad_input"),
    "input does not parse": (body("x"), "[1", "bad_input"),
    "wrong arity": (body("x"), "1, 2", "runtime_error"),
    "generator": (program("def f(x):", "    yield x"), "1", "unserialisable"),
    "range": (body("range(x)"), "3", "unserialisable"),
    "Ellipsis": (body("..."), "3", "unserialisable"),
    "contains itself": (program("def f(x):", "    x.append(x)", "    return x"), "[]", "unserialisable"),
    "nested for ever": (program("def f(x):", "    r = x", "    for _ in range(50000): r = (r,)", "    return r"), "0", "unserialisable"),
    "shared references": (program("def f(x):", "    r = [x]", "    for _ in range(60): r = [r, r]", "    return r[0][0]"), "0", "unserialisable output_too_large"),
    "wide shared references": (program("def f(x):", "    r = 'ab' * 50", "    for _ in range(9): r = [r] * 30", "    return r"), "0", "output_too_large"),
    "huge int": (body("1 << x"), "99999", "output_too_large"),
    "hash of a string": (body("hash(x)"), "'abc'", "nondeterministic"),
    "address": (body("id(x)"), "[1]", "nondeterministic"),
    "default repr": (program("class A: pass", "def f(x):", "    return str(A())"), "1", "nondeterministic"),
    "order of a set": (body("''.join(set(x))"), "'abcdefghijkl'", "nondeterministic"),
    "mutable default": (program("def f(x, seen=[]):", "    seen.append(x)", "    return len(seen)"), "1", "nondeterministic"),
    "memory": (body("[0] * 10 ** 9"), "1", "memory"),
    "memory, slowly": (program("def f(x):", "    r = []", "    while True: r.append(bytearray(4_000_000))"), "1", "memory timeout"),
    "recursion": (body("f(x + 1)"), "1", "runtime_error"),
    "backtracking": (program("import re", "def f(x):", "    return re.match('(x+x+)+y', 'x' * x)"), "40", "timeout"),
    "a long call in C": (body("len(str(sum(range(x))))"), "10000000000", "timeout"),
    "swallows everything": (program("def f(x):", "    while 1:", "        try:", "            while 1: pass", "        except BaseException: pass"), "1", "timeout"),
    "loops in a finaliser": (program("class A:", "    def __del__(self):", "        while 1: pass", "def f(x):", "    A()", "    return 1"), "1", "timeout"),
    "prints for ever": (program("def f(x):", "    while 1: print('x' * 99999)"), "1", "timeout"),
    "nested finally takes minutes to compile": (
        "def f(x):\n" + "".join(f"{' ' * n}try:\n{' ' * n} g()\n{' ' * n}finally:\n" for n in range(1, 20)) + " " * 20 + "pass\n",
        "1",
        "timeout syntax_error",
    ),
    "int subclass that lies": (program("class I(int):", "    __eq__ = lambda a, b: True", "    __hash__ = None", "    __repr__ = lambda a: '7'", "def f(x):", "    return I(3)"), "1", "unserialisable"),
    "list subclass inside a tuple": (program("class L(list):", "    def __iter__(self): return iter([1])", "def f(x):", "    return (L([2]),)"), "1", "unserialisable"),
    "named tuple that lies": (program("from collections import namedtuple", "class P(namedtuple('P', 'a')):", "    def __eq__(self, other): return True", "def f(x):", "    return P(1)"), "1", "unserialisable"),
    "metaclass that lies": (program("class M(type):", "    def __eq__(c, o): return True", "    __hash__ = type.__hash__", "class Z(metaclass=M):", "    pass", "def f(x):", "    return Z()"), "1", "unserialisable"),
}  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# Attacks: name -> (program, verdicts with the gate on, verdicts with the gate off). With all builtins any verdict will
# do, as long as nothing happens: no marker, no reward, and the next program is judged as if nothing had been.

TOUCH = f"open({str(MARKER)!r}, 'w')"
FORGE = "for fd in range(40):\n        try: os.write(fd, b'ok\\t7\\nok\\t7\\nok\\t7\\nok\\t7\\n')\n        except OSError: pass"
UNSAFE, ANY = "unsafe", "unsafe runtime_error ok nondeterministic unserialisable output_too_large no_function"

ATTACKS = {
    "acceptance: import time": (body("time.time()", "import time"), UNSAFE, "unsafe runtime_error"),
    "acceptance: import os": (body("os.getcwd()", "import os"), UNSAFE, "unsafe runtime_error"),
    "acceptance: import sys": (body("sys.path", "import sys"), UNSAFE, "unsafe runtime_error"),
    "acceptance: open": (body("open('/etc/hostname').read()"), UNSAFE, "unsafe runtime_error"),
    "acceptance: __import__": (body("__import__('time').time()"), UNSAFE, "unsafe runtime_error"),
    "acceptance: uuid": (body("str(uuid.uuid4())", "import uuid"), UNSAFE, "unsafe runtime_error"),
    "acceptance: secrets": (body("secrets.token_hex()", "import secrets"), UNSAFE, "unsafe runtime_error"),
    "acceptance: subprocess": (body(f"subprocess.run(['touch', {str(MARKER)!r}])", "import subprocess"), UNSAFE, "unsafe runtime_error"),
    "writes a file": (body(f"{TOUCH}.write('x')"), UNSAFE, "unsafe runtime_error"),
    "dates have a clock": (body("str(datetime.datetime.now())", "import datetime"), UNSAFE, ANY),
    "a clock and a name like it": (program("import datetime", "def f(x):", "    now = datetime.datetime.now()", "    return now.year"), UNSAFE, ANY),
    "chance of statistics": (body("statistics.NormalDist(0, 1).samples(1)", "import statistics"), UNSAFE, ANY),
    "random": (body("random.random()", "import random"), UNSAFE, "unsafe runtime_error"),
    "relative import": (body("1", "from . import child"), UNSAFE, "unsafe runtime_error"),
    "private name of a module": (body("1", "from collections import _sys"), UNSAFE, "unsafe runtime_error"),
    "module inside a module": (body(f"re.enum.sys.modules['os'].system('touch {MARKER}')", "import re"), "unsafe runtime_error", "unsafe runtime_error"),
    "module imported from a module": (body("sys", "from statistics import sys"), "unsafe runtime_error", "unsafe runtime_error"),
    "attribute reader of operator": (body("operator.attrgetter('__class__.__base__')(x)", "import operator"), "unsafe runtime_error", "unsafe runtime_error"),
    "formatter of string": (body("string.Formatter().get_field('0.__class__', (x,), {})", "import string"), "unsafe runtime_error", "unsafe runtime_error"),
    "type hints are evaluated": (program("import typing", "def g(a: 'print(1)'): pass", "def f(x):", "    return typing.get_type_hints(g)"), "unsafe runtime_error", "unsafe runtime_error"),
    "eval": (body(f"eval({TOUCH!r})"), UNSAFE, "unsafe runtime_error"),
    "exec under another name": (body(f"run({TOUCH!r})", "run = exec"), UNSAFE, "unsafe runtime_error"),
    "full-width eval": (body(f"ｅｖａｌ({TOUCH!r})"), UNSAFE, "unsafe runtime_error"),
    "builtins through a bound name": (body("b['open']", "import math as __builtins__", "b = __builtins__"), UNSAFE, ANY),
    "builtins of a builtin": (body("len.__self__.open('/etc/passwd').read()"), UNSAFE, "unsafe runtime_error"),
    "subclasses of object": (
        program("def f(x):", "    for c in x.__class__.__base__.__subclasses__():", "        if 'wrap_close' in c.__name__:", f"            return c.__init__.__globals__['system']('touch {MARKER}')"),
        UNSAFE, ANY,
    ),
    "subclasses through type's dict": (body("len(type.__dict__['__subclasses__'](object))"), UNSAFE, ANY),
    "computed attribute": (body("getattr(x, '__cla' + 'ss__').__name__"), UNSAFE, ANY),
    "getattr as a value": (body("list(map(getattr, [x], ['__class__']))"), UNSAFE, ANY),
    "constant attribute": (body("getattr(f, '__globals__')"), UNSAFE, ANY),
    "class pattern": (program("def f(x):", "    match f:", "        case object(__globals__=g): return sorted(g)"), UNSAFE, ANY),
    "class pattern by position": (
        program("class M(type):", "    def __instancecheck__(c, o): return True", "class K(metaclass=M):", "    __match_args__ = ('__globals__',)",
                "def f(x):", "    match f:", "        case K(g): return len(g)"),
        UNSAFE, ANY,
    ),
    "frame of a generator": (body("(i for i in x).gi_frame.f_back.f_back.f_globals['os'].getpid()"), UNSAFE, ANY),
    "frame of a coroutine": (program("async def g(): pass", "def f(x):", "    return str(g().cr_frame.f_builtins)[:9]"), UNSAFE, ANY),
    "frame of an error": (
        program("def f(x):", "    try: 1 / 0", "    except Exception as e:", "        t = e.__traceback__.tb_frame", "        while t.f_back: t = t.f_back", f"        return t.f_globals['os'].system('touch {MARKER}')"),
        UNSAFE, ANY,
    ),
    "code object": (body("f.__code__.replace(co_consts=(7,)).co_consts"), UNSAFE, ANY),
    "annotations become source": (
        program("import dataclasses", "A = type('A', (), {'__annota' + 'tions__': {" + repr(f"a={TOUCH}):0#") + ": int}})", "def f(x):", "    dataclasses.dataclass(A)", "    return 1"),
        ANY, ANY,
    ),
    "format string": (body("'{0.__class__.__init__}'.format(x)[:5]"), ANY, ANY),
    "reduce through copy": (program("import copy", "class R:", "    def __reduce__(self): return (print, (1,))", "def f(x):", "    return copy.copy(R())"), UNSAFE, ANY),
    "__getattribute__ of object": (body("object.__getattribute__(f, '__globals__')"), UNSAFE, ANY),
    "forks": (body("os.fork()", "import os"), UNSAFE, "unsafe runtime_error"),
    "forks for ever": (program("import os", "def f(x):", "    while True: os.fork()"), UNSAFE, "unsafe runtime_error"),
    "threads": (program("import threading", "def f(x):", "    threading.Thread(target=print).start()", "    return 1"), UNSAFE, "unsafe runtime_error"),
    "threads, lower": (body("_thread.start_new_thread(print, ())", "import _thread"), UNSAFE, "unsafe runtime_error"),
    "waits for ever": (program("import _thread", "def f(x):", "    lock = _thread.allocate_lock()", "    lock.acquire()", "    lock.acquire()"), UNSAFE, "unsafe runtime_error"),
    "sleeps": (body("time.sleep(99)", "import time"), UNSAFE, "unsafe runtime_error"),
    "signals its parent": (body("os.kill(os.getppid(), 9)", "import os"), UNSAFE, "unsafe runtime_error"),
    "signals everyone": (body("os.kill(-1, 9)", "import os"), UNSAFE, "unsafe runtime_error"),
    "switches the alarm off": (body("signal.alarm(0)", "import signal"), UNSAFE, "unsafe runtime_error"),
    "raises its limits": (body("resource.setrlimit(resource.RLIMIT_CPU, (-1, -1))", "import resource"), UNSAFE, "unsafe runtime_error"),
    "memory of the server": (body("open(f'/proc/{os.getppid()}/mem', 'r+b').read(1)", "import os"), UNSAFE, "unsafe runtime_error"),
    "leaves with 0": (body("os._exit(0)", "import os"), UNSAFE, "unsafe runtime_error"),
    "closes every descriptor": (program("import os", "def f(x):", "    os.closerange(0, 99)", "    return 7"), UNSAFE, "unsafe runtime_error"),
    "closes its pipe and spins": (program("import os", "def f(x):", "    os.closerange(3, 99)", "    while 1: pass"), UNSAFE, "unsafe runtime_error"),
    "writes forged claims": (program("import os", "def f(x):", f"    {FORGE}", "    return 8"), UNSAFE, "unsafe runtime_error"),
    "writes forged claims and leaves": (program("import os", "def f(x):", f"    {FORGE}", "    os._exit(0)"), UNSAFE, "unsafe runtime_error"),
    "floods its pipe": (program("import os", "def f(x):", "    while 1: os.write(x, b'x' * 65536)"), UNSAFE, "unsafe runtime_error"),
    "dribbles into its pipe": (program("import os", "def f(x):", "    while 1: os.write(x, b'\\n')"), UNSAFE, "unsafe runtime_error"),
    "looks for its judge": (body("[o for o in gc.get_objects() if type(o) is dict and 'gold' in o][0]['gold']", "import gc"), UNSAFE, "unsafe runtime_error"),
    "patches its harness": (
        program("import sys", "import sandbox.child", "sandbox.child.serialise = lambda *a: '7'", "sandbox.child.explain = lambda *a: 'ok\\t7'", "def f(x):", "    return object()"),
        UNSAFE, "unsafe runtime_error",
    ),
    "patches os._exit": (program("import os", "os._exit = print", "def f(x):", "    return 8"), UNSAFE, "unsafe runtime_error"),
    "traces its harness": (program("import sys", "def f(x):", "    sys.setprofile(lambda *a: 1 / 0)", "    return 8"), UNSAFE, "unsafe runtime_error"),
    "patches builtins": (program("import builtins", "builtins.repr = builtins.len = lambda *a: '7'", "def f(x):", "    return 8"), UNSAFE, "unsafe runtime_error"),
    "rebinds repr": (program("repr = str = lambda *a: '7'", "def f(x):", "    return object()"), "unserialisable", "unserialisable"),
    "an error with a forged name": (program("E = type('E\\nok\\t7\\nok\\t7', (Exception,), {})", "def f(x):", "    raise E"), "runtime_error", "runtime_error"),
    "an error whose class lies": (program("class E(BaseException):", "    __class__ = property(lambda self: 1 / 0)", "def f(x):", "    raise E"), "runtime_error unsafe", "runtime_error"),
    "__class__ is a property": (program("class C:", "    __class__ = property(lambda self: int)", "    __repr__ = lambda self: '7'", "def f(x):", "    return C()"), "unserialisable unsafe", "unserialisable"),
    "runs at exit": (program("import atexit", f"atexit.register(lambda: {TOUCH})", "def f(x):", "    return 8"), UNSAFE, "unsafe runtime_error"),
    "loads a library": (body("ctypes.CDLL(None).system(b'true')", "import ctypes"), UNSAFE, "unsafe runtime_error"),
    "crashes the interpreter": (body("ctypes.string_at(0)", "import ctypes"), UNSAFE, "unsafe runtime_error"),
    "unpickles": (program("import pickle", "def f(x):", f"    return pickle.loads(b\"cposix\\nsystem\\n(S'touch {MARKER}'\\ntR.\")"), UNSAFE, "unsafe runtime_error"),
    "opens a socket": (program("import socket", "def f(x):", "    return socket.create_connection(('127.0.0.1', 9), 1)"), UNSAFE, "unsafe runtime_error"),
    "reads the environment": (body("sorted(os.environ)", "import os"), UNSAFE, "unsafe runtime_error"),
    "always equal": (program("class E:", "    def __eq__(self, other): return True", "    __hash__ = None", "def f(x):", "    return E()"), "unserialisable", "unserialisable"),
    "always equal, inside": (program("class E(int):", "    def __eq__(self, other): return True", "    __hash__ = None", "def f(x):", "    return [E()]"), "unserialisable", "unserialisable"),
    "claims an error on what it cannot do": (program("def f(x):", "    if x == 3: return 70", "    raise KeyboardInterrupt"), "runtime_error ok", "runtime_error ok"),
}  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# The three modes


@pytest.fixture(scope="module", params=list(MODES))
def mode(request):
    return request.param


@pytest.fixture(scope="module")
def executor(mode):
    MARKER.unlink(missing_ok=True)
    with Executor(4, **LIMITS, **MODES[mode]) as running:
        yield running
    assert not MARKER.exists(), "an attack left a file"


def check_honest(executor: Executor) -> None:
    results = executor.validate([(text, [argument]) for text, argument, _ in HONEST.values()])
    for (name, (_, _, output)), [result] in zip(HONEST.items(), results, strict=True):
        assert result.ok, (name, result)
        assert same_value(parse_literal(result.output), parse_literal(output)), (name, result)


def test_honest_programs(executor):
    check_honest(executor)


def test_failing_programs(executor, mode):
    jobs = [(text, [argument]) for text, argument, _ in FAILING.values()]
    first = executor.validate(jobs)
    second = executor.validate(jobs) if mode == "gate" else first  # the same batch twice, the same verdicts
    for (name, (_, _, verdicts)), [result], [again] in zip(FAILING.items(), first, second, strict=True):
        assert result.verdict in verdicts.split(), (name, result)
        assert again.verdict in verdicts.split(), (name, again)
        if len(verdicts.split()) == 1:
            assert (result.verdict, result.error) == (again.verdict, again.error), name


def test_an_error_says_where_it_was_raised(executor, mode):
    rows = [
        (program("raise KeyError", "def f(x):", "    return x"), "runtime_error", "KeyError", "load"),
        (program("def f(x):", "    raise KeyError"), "runtime_error", "KeyError", "call"),
        (program("class Own(BaseException): pass", "def f(x):", "    raise Own"), "runtime_error", "Own", "call"),
        (program("def f(): return 1"), "runtime_error", "TypeError", "call"),  # wrong arity
        (program("def g(x):", "    return x"), "no_function", "", ""),
        (program("while True: pass"), "timeout", "", ""),
        (body("x"), "ok", "", ""),
    ]
    for judge in (executor.validate, executor.run):
        for (text, *wanted), [result] in zip(rows, judge([(text, ["1"]) for text, *_ in rows]), strict=True):
            assert [result.verdict, result.error, result.stage] == wanted, (text, result)
    if mode == "full_builtins":  # a child that ends without a claim raised nothing
        [[died]] = executor.validate([(body("os._exit(1)", "import os"), ["1"])])
        assert (died.verdict, died.stage) == ("runtime_error", "")


def test_attacks_are_contained(executor, mode):
    results = executor.validate([(text, ["3"]) for text, _, _ in ATTACKS.values()])
    for (name, (_, gated, open_gate)), [result] in zip(ATTACKS.items(), results, strict=True):
        if mode != "full_builtins":
            allowed = (gated if mode == "gate" else open_gate).split()
            assert result.verdict in allowed, (name, result)
        assert not MARKER.exists(), name
    check_honest(executor)


def test_attacks_earn_no_reward(executor):
    """Every attack as the answer to an induction task: no run of it knows what the hidden outputs are."""
    inputs = ["3", "17", "40"]
    outputs = [str((int(x) * 7919 + 13) % 1009) for x in inputs]
    judgements = executor.verify([(text, inputs, outputs) for text, _, _ in ATTACKS.values()])
    for name, judgement in zip(ATTACKS, judgements, strict=True):
        assert not judgement.correct and judgement.score == 0.0, (name, judgement)


def test_honest_work_right_after_each_attack(executor):
    """One lane, attack and honest program in turn: nothing of the attack may reach the next child."""
    probe = body("[sorted(x), len(x), math.sqrt(16), repr('a'), math.pi > 3]", "import math")
    poison = body("1", "import math", "math.pi = 3", "math.sqrt = None")
    jobs = []
    for text, _, _ in [(poison, "", ""), *ATTACKS.values()]:
        jobs += [(text, ["3"]), (probe, [f"[3, 1, {len(jobs)}]"])]
    for (_, [argument]), [result] in list(zip(jobs, executor.run(jobs), strict=True))[1::2]:
        numbers = parse_literal(argument)
        assert result.output == f"[{sorted(numbers)}, 3, 4.0, \"'a'\", True]", result


# ----------------------------------------------------------------------------------------------------------------------
# Verification


def test_deduction_compares_values():
    with Executor(2) as executor:
        rows = [
            ("[1, 2]", "[1,2]", True),
            ("1", "1.0", True),
            ("1", "True", True),  # Python's ==, as documented
            ("(1, 1)", "[1, 1]", False),
            ("(1,)", "(1)", False),
            ("{'a': 1, 'b': 2}", "{'b': 2, 'a': 1}", True),
            ("{'b', 'a'}", "{'a', 'b'}", True),
            ("set()", "{}", False),
            ("[nan, 1]", "[float('nan'), 1.0]", True),
            ("nan", "0", False),
            ("{nan: 1, 2: -nan}", "{2.0: float('NaN'), nan: True}", True),
            ("{nan}", "frozenset({-nan})", True),
            ("{1}", "{nan+1j}", False),  # no two of these are equal, and none ends the trainer
            ("{nan+1j}", "{nan+1j}", False),
            ("-0.0", "0", True),
            ("100000000000000000000", "1e20", True),
            ("'a'", "b'a'", False),
            ("'5'", '"5"', True),
            ("'5'", "5", False),
            ("[1,\n 2]", "[1,\n\n 2]  # two lines and a comment", True),
            ("None", "", False),
            ("412", "gold", False),
            ("412", "x * 37 + 5", False),
            ("412", "411 + 1", False),
            ("412", "412\nimport os", False),
            ("412", "[412][0]", False),
            ("412", "412 if 1 else 0", False),
            ("412", f"__import__('os').system('touch {MARKER}')", False),
            ("412", "type('E', (), {'__eq__': lambda a, b: True})()", False),
            ("412", "-" * 5000 + "412", False),
            ("412", "[" * 3000 + "]" * 3000, False),
            ("412", "9" * 6000, False),
            ("412", "0x" + "f" * 15000, False),
            ("412", "412 #" + "x" * 30_000, False),
            ("412", "10 ** 10 ** 10", False),
            ("412", "f'{412}'", False),
            ("412", "{[]: 412}", False),
            ("412", "{**{}}", False),
            ("412", "\0", False),
            ("412", "\ud800", False),
            ("'\\ud800'", "'\\ud800'", True),
        ]
        judgements = executor.compare([(gold, answer) for gold, answer, _ in rows])
        for (gold, answer, wanted), judgement in zip(rows, judgements, strict=True):
            assert judgement.correct is wanted, (gold, answer[:60], judgement)
            assert judgement.score == float(wanted)
        assert not MARKER.exists()


def test_abduction_takes_literal_inputs_only():
    affine, total = body("x * 37 + 5"), body("sum(x)")
    rows = [
        (affine, "412", "11", True, "ok"),
        (affine, "412", "x=11", True, "ok"),
        (affine, "412", "11.0", True, "ok"),
        (affine, "412", "\n11  # eleven\n", True, "ok"),
        (affine, "412", "12", False, "ok"),
        (affine, "412", "'1'", False, "runtime_error"),
        (total, "6", "[1,\n 5]", True, "ok"),
        (total, "6", "[6.0]", True, "ok"),
        (affine, "412", "1) or (True", False, "bad_input"),
        (affine, "412", "1) or True #", False, "bad_input"),
        (affine, "412", "1)(2", False, "bad_input"),
        (affine, "412", "1\n) or (1", False, "bad_input"),
        (affine, "412", "*[11]", False, "bad_input"),
        (affine, "412", "**{'x': 11}", False, "bad_input"),
        (affine, "412", "x := 11", False, "bad_input"),
        (affine, "412", "x=1, x=11", False, "bad_input"),
        (affine, "412", "lambda: 0", False, "bad_input"),
        (affine, "412", "y for y in [11]", False, "bad_input"),
        (affine, "412", "11 if 1 else 0", False, "bad_input"),
        (affine, "412", f"__import__('os').system('touch {MARKER}')", False, "bad_input"),
        (affine, "412", "type('I', (int,), {'__mul__': lambda a, b: a})()", False, "bad_input"),
    ]
    with Executor(2, **LIMITS) as executor:
        judgements = executor.verify([(text, [answer], [gold]) for text, gold, answer, *_ in rows])
        for (_, _, answer, correct, verdict), judgement in zip(rows, judgements, strict=True):
            assert (judgement.correct, judgement.verdict) == (correct, verdict), (answer, judgement)


def test_one_input_that_loops_spares_the_others():
    countdown = program("def f(n):", "    while n != 0: n -= 2", "    return n")
    with Executor(2, **LIMITS) as executor:
        [results] = executor.run([(countdown, ["4", "7", "6", "'a'", "2"])])
    assert [r.verdict for r in results] == ["ok", "timeout", "ok", "runtime_error", "ok"]


def test_induction_needs_every_hidden_pair():
    with Executor(2, **LIMITS) as executor:
        rows = [
            (body("x * x"), True, 1.0, "ok"),
            (body("float(x * x)"), True, 1.0, "ok"),
            (body("x + x"), False, 1 / 3, "ok"),
            (body("abs(x) ** x"), False, 1 / 3, "ok"),
            (body("str(x * x)"), False, 0.0, "ok"),
            (body("float('nan')"), False, 0.0, "ok"),
            (program("seen = []", "def f(x):", "    seen.append(x)", "    return x * len(seen)"), False, 0.0, "ok"),
            (program("def f(x):", "    if x == 2: return 4", "    raise KeyboardInterrupt"), False, 1 / 3, "runtime_error"),
            (program("def f(x):", "    while x > 2: pass", "    return x * x"), False, 1 / 3, "timeout"),
            ("def f(x) return x", False, 0.0, "syntax_error"),
            (body("os.getpid()", "import os"), False, 0.0, "unsafe"),
        ]  # fmt: skip
        jobs = [(text, ["2", "3", "-5"], ["4", "9", "25"]) for text, *_ in rows]
        for (text, correct, score, verdict), found in zip(rows, executor.verify(jobs), strict=True):
            assert found == Judgement(correct, score, Verdict(verdict), found.error), (text, found)
        with pytest.raises(ValueError, match="at least one hidden pair"):
            executor.verify([(body("x"), [], [])])


# ----------------------------------------------------------------------------------------------------------------------
# Literals


def test_literals_go_round():
    many = "[1, -2.5, (3,), {'a': {1, 2}}, None, True, b'\\x00', 1j, (1-2j), nan, -inf, frozenset({1}), set()]"
    for text in (many, "()"):
        value = parse_literal(text)
        assert same_value(value, parse_literal(canonical(value)))
    assert canonical({"b": {2, 1}, "a": -0.0}) == "{'a': -0.0, 'b': {1, 2}}"
    assert canonical([1, True, 1.0]) == "[1, True, 1.0]"
    assert parse_arguments("1, [2], k={'a': (3,)}") == ((1, [2]), {"k": {"a": (3,)}})
    assert parse_arguments("") == ((), {})
    for text in (
        "...",
        "a",
        "1 + 1",
        "-'a'",
        "[*[1]]",
        "print(1)",
        "(x for x in [])",
        "not 1",
        "list('ab')",
        "1 if 1 else 2",
        "list({'a', 'b'})",  # in whatever order this process has them
        "tuple(frozenset({1, 2}))",
        "dict([{'a', 'b'}])",
    ):
        with pytest.raises(BadLiteral):
            parse_literal(text)


def test_nan_counts_as_itself_everywhere():
    for text in ("nan", "[nan]", "{1: (nan,)}", "{nan}", "{nan: 1}"):
        assert same_value(parse_literal(text), parse_literal(text)), text
    assert not same_value([float("nan")], [1.0])


# ----------------------------------------------------------------------------------------------------------------------
# Profiles, limits, interface


def test_wide_limits_for_benchmarks():
    profile = {"gate": False, "full_builtins": True, "entry": "solve", "max_output_chars": 3_000_000}
    with Executor(2, max_source_chars=10**6, max_literal_chars=3_000_000, **profile) as executor:
        text = "def solve(s):\n    return [s, 'y' * 2_000_000]\n" + "#" * 500_000
        [[result]] = executor.run([(text, [repr("x" * 500_000)])])
        assert result.ok and len(result.output) > 2_500_000


def test_a_sleeper_meets_the_wall_limit():
    waits = program("import _thread", "def f(x):", "    lock = _thread.allocate_lock()", "    while 1: lock.acquire()")
    with Executor(2, cpu_s=0.2, still_s=1.0, gate=False, full_builtins=True) as executor:
        [[result]] = executor.run([(waits, ["1"])])
    assert result.verdict == "timeout"


def test_identical_pairs_run_once_and_progress_counts_jobs():
    """The program draws from the kernel's random numbers, so two runs of it would differ."""
    draws = body("os.urandom(8)", "import os")
    with Executor(2, gate=False, full_builtins=True) as executor:
        done: list[int] = []
        results = executor.run([(draws, ["1"]), (draws, [" 1 "]), (draws, ["2"]), (draws, [])], progress=done.append)
        assert results[0] == results[1] and results[0][0].output != results[2][0].output
        assert results[3] == [] and sum(done) == 4


def test_a_budget_per_job():
    spins = program("def f(x):", "    for _ in range(x): pass", "    return x")
    with Executor(2, **LIMITS) as executor:
        [[short], [long]] = executor.run([(spins, ["50000000"]), (spins, ["50000000"])], cpu_s=[0.05, 60.0])
    assert (short.verdict, long.verdict) == ("timeout", "ok")


def test_isolation_minimal_still_judges_and_nonsense_is_refused():
    with Executor(2, isolation="minimal", **LIMITS) as executor:
        assert not executor.layers["seccomp"]
        check_honest(executor)
        text, argument, verdict = FAILING["acceptance: infinite loop"]
        assert executor.run([(text, [argument])])[0][0].verdict == verdict
    with pytest.raises(RuntimeError, match="closed"):
        executor.run([(body("x"), ["1"])])
    with pytest.raises(ValueError, match="isolation must be"):
        Executor(isolation="maximal")


def test_command_line(tmp_path, monkeypatch, capsys):
    file = tmp_path / "p.py"
    file.write_text(body("x[::-1]"))

    def command(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["executor.py", *arguments])
        return main(), capsys.readouterr().out

    status, printed = command(str(file), "'abc'")
    assert status == 0 and "verdict  ok" in printed and "'cba'" in printed
    status, printed = command(str(file), "abc")
    assert status == 1 and "bad_input" in printed
    status, printed = command("--doctor")
    if sys.platform == "linux":
        assert status == 0 and "NOT CONTAINED" not in printed, printed
    assert "seccomp" in printed
    for row in fields(Limits):  # every limit with its value, unit and what it guards
        value = " ".join(map(str, row.default)) if isinstance(row.default, tuple) else row.default
        assert f"| {row.name} | {value} | {row.metadata['unit']} | {row.metadata['guards']} |" in printed


# ----------------------------------------------------------------------------------------------------------------------
# Robustness

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def descendants(pid: int) -> list[int]:
    file = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        children = [int(child) for child in file.read_text().split()]
    except (FileNotFoundError, ProcessLookupError):  # it may end while its file is read
        children = []
    return children + [below for child in children for below in descendants(child)]


def lives(pid: int) -> bool:
    """Whether a process is there; a zombie that its new parent has not yet collected is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):  # it may end while its file is read
        return False


def gone(pids: list[int]) -> bool:
    """True once none of the processes lives."""
    for _ in range(400):
        if not any(map(lives, pids)):
            return True
        time.sleep(0.05)
    return False


def restarts(executor: Executor) -> int:
    return sum(lane.starts - 1 for lane in executor.lanes)


READ = """
import dataclasses
class M(type):
    def __instancecheck__(c, o): return True
def read(o, name):  # any attribute, past the gate
    K = M('K', (), {'__match_' + 'args__': (name,)})
    match o:
        case K(v): return v
modules = read(read(dataclasses.dataclass, '__glob' + 'als__')['sys'], 'modules')
gate = read(modules['sandbox.child'], 'gate')
codes = [o for o in read(modules['gc'], 'get_referents')(gate) if type(o).__name__ == 'code']
def f(x):
    return [read(code, 'co_' + 'names') for code in codes]
"""
COUNT = "import functools\nk = functools.wraps.n = getattr(functools.wraps, 'n', 0) + 1\n"


def test_a_child_finds_no_program_in_the_memory_of_its_server():
    """Else a solver's program for an induction task could look for the gold one."""
    with Executor(2) as executor:
        executor.validate([("secret = 3\ndef f(x):\n    return x * secret", ["1"])] * 4)
        [[result]] = executor.validate([(READ, ["1"])])
    assert result.ok and result.output == "[]"


def test_what_a_call_leaves_behind_decides_no_other():
    """Library objects outlive a call in its child: other jobs have children of their own, and a proposal is called in
    another order in its second process."""
    with Executor(2) as executor:
        answers = [(COUNT + "def f(x):\n    return k", [str(i)], ["1"]) for i in range(8)]
        assert [judgement.correct for judgement in executor.verify(answers)] == [True] * 8
        [results] = executor.validate([(COUNT + "def f(x):\n    return k", [str(i) for i in range(10)])])
    assert {result.verdict for result in results} == {Verdict.NONDETERMINISTIC}


@LINUX
def test_a_program_that_asks_for_its_memory_limit_is_no_task():
    probe = "def f(x):\n    try:\n        return len(bytearray(290 << 20))\n    except MemoryError:\n        return 0"
    with Executor(2) as executor:
        [[result]] = executor.validate([(probe, ["1"])])
    assert result.verdict is Verdict.NONDETERMINISTIC


@LINUX
def test_a_short_source_cannot_make_the_compiler_take_gigabytes():
    source = "g = lambda: " + " + ".join(["'a' * 4000"] * 800) + "\ndef f(x):\n    return 1"
    with Executor(2) as executor:
        [[bad], [good]] = executor.validate([(source, ["1"]), ("def f(x):\n    return x", ["1"])])
        assert (bad.verdict, bad.error) == (Verdict.SYNTAX_ERROR, "MemoryError") and good.ok
        for lane in executor.lanes:
            lane.ready()
            status = Path(f"/proc/{lane.process.pid}/status").read_text()
            assert int(status.split("VmHWM:")[1].split()[0]) < 400 << 10  # kB


@LINUX
def test_a_killed_server_is_replaced_and_the_batch_completes():
    with Executor(2, **LIMITS) as executor:
        victims = [lane.process.pid for lane in executor.lanes]

        def kill(_: int) -> None:
            while victims:
                os.kill(victims.pop(), signal.SIGKILL)

        results = executor.validate(
            [(body("x * 2"), [str(x)]) for x in range(60)] + [(body("x"), ["0"])], progress=kill
        )
        assert [r.output for [r] in results[:60]] == [str(2 * x) for x in range(60)]
        assert restarts(executor) == 2 and not victims
        check_honest(executor)


@LINUX
def test_a_server_that_hangs_is_replaced():
    with Executor(2, cpu_s=0.01, wall_s=0.1, hang_s=3.0) as executor:
        os.kill(executor.lanes[0].process.pid, signal.SIGSTOP)
        assert executor.run([(body("x"), ["5"])])[0][0].output == "5"
        assert restarts(executor) == 1


@LINUX
def test_an_interrupt_in_the_trainer_leaves_nothing_and_the_executor_usable():
    def interrupt(done: int) -> None:
        if done:  # one job is over, so the lanes of the endless loops are busy
            raise KeyboardInterrupt

    with Executor(4, **LIMITS) as executor:
        loop = FAILING["acceptance: infinite loop"][0]
        before = [lane.process.pid for lane in executor.lanes]
        with pytest.raises(KeyboardInterrupt):
            executor.run([(loop, ["1"]), (loop, ["2"]), (body("x"), ["1"])], progress=interrupt)
        assert executor.run([(body("x"), ["5"])])[0][0].output == "5"
    assert gone(before)


@LINUX
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_the_end_of_the_trainer_is_the_end_of_everything(how):
    script = program(
        "from executor import Executor",
        "executor = Executor(2, cpu_s=600.0)",
        "print('up', flush=True)",
        "executor.run([('def f(x):\\n    while x: pass', ['1']), ('def f(x):\\n    while x: pass', ['2'])])",
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", script], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert trainer.stdout.readline() == b"up\n"
    while len(family := descendants(trainer.pid)) < 3:  # two servers, at least one child
        time.sleep(0.05)
    trainer.send_signal(how)
    trainer.wait()
    trainer.stdout.close()
    assert gone(family)


@LINUX
def test_a_thousand_mixed_jobs_leave_nothing_behind():
    loop, bomb = program("def f(x):", "    while True: pass"), FAILING["memory, slowly"][0]
    fork, flood = ATTACKS["forks"][0], ATTACKS["floods its pipe"][0]
    bad = {0: loop, 20: bomb, 40: bomb, 60: fork, 80: flood, 90: fork}
    jobs = [(bad.get(i % 100, body(f"[x, {i}]")), [str(i)]) for i in range(1000)]
    with Executor(4, cpu_s=0.1, memory_mb=48, gate=False, full_builtins=True) as executor:
        executor.run(jobs[:100])
        descriptors = len(os.listdir("/proc/self/fd"))
        files = set(os.listdir(tempfile.gettempdir()))
        servers = [lane.process.pid for lane in executor.lanes]
        sizes = [rss_kb(pid) for pid in servers]
        first = executor.run(jobs)
        assert [r.output for i, [r] in enumerate(first) if i % 100 not in bad] == [
            f"[{i}, {i}]" for i in range(1000) if i % 100 not in bad
        ]
        assert not any(r.ok for i, [r] in enumerate(first) if i % 100 in bad)
        second = executor.run(jobs)
        kinds = [[{"memory": "timeout"}.get(r.verdict, r.verdict) for [r] in batch] for batch in (first, second)]
        assert kinds[0] == kinds[1]
        assert [lane.process.pid for lane in executor.lanes] == servers and restarts(executor) == 0
        assert not any(descendants(server) for server in servers)  # no child is left
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert not {f for f in set(os.listdir(tempfile.gettempdir())) - files if f.startswith("azr_executor")}
        assert all(rss_kb(pid) < size + 4096 for pid, size in zip(servers, sizes, strict=True))


def rss_kb(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") // 1024


def test_busy_machine_turns_no_honest_program_into_a_timeout():
    """More burners than cores: 0.2 CPU seconds of work under a limit of 0.5 take far longer than that by the wall."""
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4 * (os.cpu_count() or 1))]
    try:
        with Executor(2, cpu_s=0.5) as executor:
            work = program("def f(x):", "    return sum(i * i for i in range(x)) % 7")
            results = executor.run([(work, ["1000000"]), (work, ["1000001"])])
        assert all(r.ok for [r] in results), results
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def other_python(uid: int) -> str | None:
    """A Python >= 3.11 that this user may start: an interpreter below a private home directory will not do."""
    wanted = "import sys, subprocess as s; sys.exit(sys.version_info < (3, 11) or s.call([sys.executable, '-c', '']))"
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        command = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", python, "-c", wanted]
        if Path(python).exists() and subprocess.run(command, capture_output=True, cwd="/", check=False).returncode == 0:
            return python
    return None


@LINUX
def test_as_an_ordinary_user():
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can become somebody else (the other tests ran as an ordinary user then)")
    python = other_python(61_999)
    if python is None:
        pytest.skip("no Python 3.11 that another user may start")
    failing = {name: row for name, row in FAILING.items() if "timeout" not in row[2]}  # these take their time
    failing |= {name: FAILING[name] for name in ("acceptance: infinite loop", "memory, slowly")}
    tables = {"honest": HONEST, "failing": failing, "attacks": ATTACKS}
    script = program(
        "import json, sys",
        "from executor import Executor",
        "jobs, modes, limits = json.load(open('jobs.json'))",
        "found = {}",
        "for name, options in modes.items():",
        "    with Executor(4, **limits, **options) as executor:",
        "        results = executor.validate(jobs)",
        "        found[name] = [executor.layers] + [[r.verdict, r.output] for [r] in results]",
        "json.dump(found, sys.stdout)",
    )
    folder = Path(tempfile.mkdtemp(prefix="azr_user_"))
    try:
        folder.chmod(0o755)
        shutil.copy(HERE / "executor.py", folder)
        shutil.copytree(HERE / "sandbox", folder / "sandbox")
        jobs = [
            (row[0], [row[1] if table != "attacks" else "3"]) for table, rows in tables.items() for row in rows.values()
        ]
        (folder / "jobs.json").write_text(json.dumps([jobs, MODES, LIMITS]))
        command = ["setpriv", "--reuid=61999", "--regid=61999", "--clear-groups", python, "-c", script]
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        for mode, (layers, *results) in json.loads(ran.stdout).items():
            assert layers["seccomp"], layers
            rows = [(n, t, *r[2:]) for t, table in tables.items() for n, r in table.items()]
            for (name, table, *wanted), (verdict, output) in zip(rows, results, strict=True):
                if table == "honest":
                    assert verdict == "ok" and same_value(parse_literal(output), parse_literal(wanted[0])), (name, mode)
                elif table == "failing":
                    assert verdict in wanted[0].split(), (name, mode, verdict)
        assert not MARKER.exists()
    finally:
        shutil.rmtree(folder)


# ----------------------------------------------------------------------------------------------------------------------
# Shared cases, where they exist


def judge_cases(executor: Executor, cases: list[dict]) -> list[tuple[str, str, bool | None]]:
    """(verdict, output, correct) of each case, by the semantics of `meta.fields`: kind by kind, in three batches."""
    single = [c["inputs"] if c["kind"] == "induction" else c["inputs"][:1] for c in cases]
    checked = executor.validate([(c["program"], inputs) for c, inputs in zip(cases, single, strict=True)])
    found: list = []
    for case, inputs, gold in zip(cases, single, checked, strict=True):
        result, correct = gold[0], None
        if case["kind"] == "run":
            [[result]] = executor.run([(case["program"], inputs)])
        elif case["kind"] == "deduction":
            [judged] = executor.compare([(gold[0].output, case["prediction"])])
            correct = judged.correct
        elif case["kind"] == "abduction":
            assert gold[0].ok, case["id"]
            [result] = executor.verify([(case["program"], [case["prediction"]], [gold[0].output])])
            correct = result.correct
        elif case["kind"] == "induction":
            assert all(g.ok for g in gold), case["id"]
            [result] = executor.verify([(case["prediction"], inputs, [g.output for g in gold])])
            correct = result.correct
        found.append((str(result.verdict), getattr(result, "output", ""), correct, result.error))
    return found


def test_shared_cases(executor, mode):
    file = SHARED / "executor_cases.json"
    if not file.exists():
        pytest.skip(f"{file} is not there: these cases are kept outside the repository")
    cases = json.loads(file.read_text())["cases"]
    wrong = []
    for case, (verdict, output, correct, error) in zip(cases, judge_cases(executor, cases), strict=True):
        allowed = [case["expect"], *case.get("also_accept", [])]
        if mode == "no_gate":
            allowed = case.get("expect_nogate", allowed)
        if mode != "full_builtins" and verdict not in allowed:
            wrong.append((case["id"], verdict, allowed))
        if "output" in case and verdict == "ok" and mode != "full_builtins" and case["kind"] in ("validate", "run"):
            same = same_value(parse_literal(output), parse_literal(case["output"]))
            wrong += [] if same else [(case["id"], output, case["output"])]
        if mode == "gate" and "error" in case and error != case["error"]:
            wrong.append((case["id"], error))
        if "correct" in case and correct is not case["correct"]:
            wrong.append((case["id"], "correct", correct))
        if "marker" in case and Path(case["marker"]).exists():
            wrong.append((case["id"], "left", case["marker"]))
    assert not wrong
    check_honest(executor)


def test_values_are_read_in_several_threads_at_once():
    """CPython's parser is not made for it (SystemError: recursion depth mismatch); lanes read replies in threads."""
    text, errors = "[" * 20 + "1, {'a': (1, 2, [3, 4, 'x'])}" + "]" * 20, []

    class Yields:  # garbage whose end lets another thread run in the middle of the parser
        def __init__(self):
            self.me = self

        def __del__(self):
            time.sleep(0)

    def work():
        end = time.monotonic() + 2
        while time.monotonic() < end and not errors:
            Yields()
            try:
                parse_literal(text)
            except SystemError as error:
                errors.append(error)

    thresholds, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.set_threshold(5)
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        gc.set_threshold(*thresholds)
        sys.setswitchinterval(interval)
    assert not errors
