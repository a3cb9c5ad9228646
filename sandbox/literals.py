"""Values as text: a value to literal text (in the child), literal text to a value (in the trusted parent).

What a program returns crosses the border as text and only as text. `serialise` writes it: types are compared with `is`
and walked with unbound methods, since a program's own classes may lie in __class__, __eq__, __iter__ or __repr__.
`parse_literal` reads it, and every answer of a solver, without evaluating anything.

What it deliberately leaves out: arithmetic and calls in answers (an expression could forge the wanted value), instances
of user classes, ranges, deques, generators. Paper: arXiv 2505.03335, equation 10 (equality by execution).
Usage: parse_literal("{1: [2.0, nan]}")
"""

import ast
import warnings
from _thread import allocate_lock  # the module threading would be loaded into every server
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from math import isfinite, isnan

OUTPUT_DEPTH, LITERAL_DEPTH = 40, 50  # levels of nesting: of what a program returns, of what is read
INT_BITS = 14_000  # repr() of an int refuses more than 4,300 digits
NAN = float("nan")  # the only one that is read: Python's == takes an object for equal to itself, also in containers
CONTAINERS = {"set": set, "frozenset": frozenset, "list": list, "tuple": tuple, "dict": dict}
NUMPY = {"int": int, "uint": int, "float": float, "bool": bool, "str": str}  # np.int64(3), as numpy prints it
warnings.filterwarnings("ignore", module="<literal>")  # "invalid escape sequence" in an answer is nobody's concern


class Refused(BaseException):
    """A verdict other than "ok", with the class name of the error behind it."""

    def __init__(self, verdict: str, error: str = "") -> None:
        self.verdict, self.error = verdict, error


class BadLiteral(ValueError):
    """The text is not one plain Python literal within the caps."""


def is_namedtuple(kind: type) -> bool:
    if type(kind) is not type or kind.__mro__ != (kind, tuple, object):  # a metaclass could answer the rest with lies
        return False
    own = vars(kind)
    return "_fields" in own and not {"__eq__", "__iter__", "__len__", "__getitem__"} & own.keys()


def serialise(value: object, limit: int, order_free: bool = False, max_depth: int = OUTPUT_DEPTH) -> str:
    """The literal text of a plain value; sets sorted, dicts in their own order (sorted too if `order_free`).

    Counter, defaultdict and OrderedDict become dict, a namedtuple a tuple (their == agrees). Raises Refused: any other
    type or more than `max_depth` levels is "unserialisable", more than `limit` characters "output_too_large". They are
    counted while walking: a few shared lists can stand for 10**13 elements.
    """
    left = limit

    def walk(value: object, depth: int) -> str:
        nonlocal left
        kind = type(value)
        is_text = kind is str or kind is bytes
        if (kind is int and int.bit_length(value) > INT_BITS) or (is_text and len(value) > left):
            raise Refused("output_too_large")
        finite = kind is complex and isfinite(value.real) and isfinite(value.imag)
        is_plain = value is None or is_text or finite or kind is int or kind is bool or kind is float
        text = repr(value) if is_plain else "[]"
        left -= len(text)
        if left < 0:
            raise Refused("output_too_large")
        if is_plain:
            return text
        if depth >= max_depth:
            raise Refused("unserialisable")
        if kind is list:
            return "[" + ", ".join([walk(item, depth + 1) for item in list.__iter__(value)]) + "]"
        if kind is tuple or is_namedtuple(kind):
            parts = [walk(item, depth + 1) for item in tuple.__iter__(value)]
            return "(" + ", ".join(parts) + (",)" if len(parts) == 1 else ")")
        if kind is dict or kind is Counter or kind is defaultdict or kind is OrderedDict:
            items = (OrderedDict if kind is OrderedDict else dict).items(value)  # move_to_end is unknown to dict.items
            parts = [walk(k, depth + 1) + ": " + walk(v, depth + 1) for k, v in items]
            return "{" + ", ".join(sorted(parts) if order_free else parts) + "}"
        if kind is set or kind is frozenset:
            parts = sorted([walk(item, depth + 1) for item in kind.__iter__(value)])
            text = "{" + ", ".join(parts) + "}" if parts else ""
            return (text or "set()") if kind is set else f"frozenset({text})"
        raise Refused("unserialisable")

    text = walk(value, 1)
    if len(text) > limit:
        raise Refused("output_too_large")
    return text


def parse_literal(text: str, max_chars: int = 20_000) -> object:
    """The value of a literal as Python prints it: numbers, strings, bytes, None, bool, list, tuple, dict, set, nan,
    inf, float('inf'), np.int64(3) and its like, and calls of set, frozenset, list, tuple and dict; no operators but
    signs and `1+2j`. Raises BadLiteral."""
    return parse(text.strip(), max_chars, build)


def parse_arguments(text: str, max_chars: int = 20_000) -> tuple[tuple, dict]:
    """The arguments of a call written as `1, [2], key='x'`: (positional, keyword), literals only. Raises BadLiteral."""
    return parse(f"f({text}\n)", max_chars + 4, build_arguments)


PARSER = allocate_lock()  # CPython counts the depth of its parser for all threads together and raises SystemError


def parse(text: str, max_chars: int, make: Callable) -> object:
    if len(text) > max_chars:  # first: the parser is only safe on small texts
        raise BadLiteral(f"the literal has {len(text)} characters, more than {max_chars}")
    try:
        with PARSER:
            body = ast.parse(text, "<literal>", "eval").body
        return make(body)
    except BadLiteral:
        raise
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError, OverflowError) as error:
        raise BadLiteral(f"the literal cannot be read ({type(error).__name__})") from None


def build_arguments(call: ast.expr) -> tuple[tuple, dict]:
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):  # `1) or (1` ends up here
        raise BadLiteral("the input is not a list of arguments")
    kwargs = {keyword.arg: build(keyword.value) for keyword in call.keywords}
    if None in kwargs or len(kwargs) != len(call.keywords):
        raise BadLiteral("the input unpacks a mapping or repeats a keyword")
    return tuple(build(node) for node in call.args), kwargs


def build(node: ast.expr, depth: int = 1) -> object:
    """The value of a syntax tree of plain data. Raises BadLiteral for others, TypeError if an element has no hash."""
    if depth > LITERAL_DEPTH:
        raise BadLiteral(f"the literal is nested deeper than {LITERAL_DEPTH} levels")
    match node:
        case ast.Constant(value=value) if value is not ...:
            if type(value) is int and value.bit_length() > INT_BITS:
                raise BadLiteral("the literal holds a number with more digits than Python prints")
            return value
        case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
            kind = {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)]
            return kind([build(item, depth + 1) for item in items])
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {build(k, depth + 1): build(v, depth + 1) for k, v in zip(keys, values, strict=True)}
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            number = build(operand, depth + 1)
            if type(number) in (int, float, complex):
                return -number if isinstance(sign, ast.USub) and number is not NAN else number
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as sign, right=ast.Constant(value=complex() as imaginary)):
            real = build(left, depth + 1)
            if type(real) in (int, float):
                return real - imaginary if isinstance(sign, ast.Sub) else real + imaginary
        case ast.Name("nan" | "inf" as word) | ast.Call(ast.Name("float"), [ast.Constant(str() as word)], []):
            if word.strip().lower().lstrip("+-") in ("nan", "inf", "infinity"):
                return NAN if isnan(float(word)) else float(word)
        case ast.Attribute(ast.Name("np" | "numpy"), "True_" | "False_" as name):
            return name == "True_"
        case ast.Call(ast.Attribute(ast.Name("np" | "numpy"), name), [argument], []):
            value, kind = build(argument, depth + 1), NUMPY.get(name.rstrip("_0123456789"))
            if type(value) is kind or (kind is float and type(value) is int):
                return kind(value)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in CONTAINERS and len(arguments) < 2:
            items = [build(argument, depth + 1) for argument in arguments]
            unpacked = {type(item) for item in items if name in ("list", "tuple", "dict")}
            if name == "dict":
                unpacked |= {type(pair) for item in items if type(item) in (list, tuple) for pair in item}
            unordered = unpacked & {set, frozenset}  # in each process of the trainer it would come in another order
            if all(type(item) in CONTAINERS.values() for item in items) and not unordered:
                return CONTAINERS[name](*items)
    raise BadLiteral("the text is not a plain literal")


def canonical(value: object) -> str:
    """One text per value: type-sensitive, sets and dicts sorted. For values that `parse_literal` returns."""
    return serialise(value, 1 << 30, order_free=True, max_depth=2 * LITERAL_DEPTH)
