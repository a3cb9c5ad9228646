"""Values as text: a value to literal text (in the child), literal text to a value (in the trusted parent).

What a program returns crosses the border as text and only as text. `serialise` writes it without calling any method the
program could have defined; `parse_literal` reads it, and every answer of a solver, without evaluating anything.
`same_value` is the one place where answers are compared.

What it deliberately leaves out: arithmetic and calls in answers (an expression could forge the wanted value), instances
of user classes, ranges, deques, generators. Paper: arXiv 2505.03335, equation 10 (equality by execution).

Usage:
    same_value(parse_literal("{1: [2.0, nan]}"), parse_literal("{True: [2, float('nan')]}"))      # True
"""

import ast
import warnings
from collections import Counter, OrderedDict, defaultdict
from math import isfinite


class Refused(BaseException):
    """A verdict other than "ok", with the class name of the error behind it."""

    def __init__(self, verdict: str, error: str = "") -> None:
        self.verdict, self.error = verdict, error


# ----------------------------------------------------------------------------------------------------------------------
# From a value to text. Types are compared with `is` and walked with unbound methods: a program's own classes may lie in
# __class__, __eq__, __iter__ or __repr__, and none of that is ever asked.

MAX_DEPTH = 40
MAX_INT_BITS = 14_000  # repr() of an int refuses more than 4,300 digits
TOO_LARGE, NOT_PLAIN = Refused("output_too_large"), Refused("unserialisable")


def is_namedtuple(kind: type) -> bool:
    if type(kind) is not type or kind.__mro__ != (kind, tuple, object):  # a metaclass could answer the rest with lies
        return False
    own = vars(kind)
    return "_fields" in own and not {"__eq__", "__iter__", "__len__", "__getitem__"} & own.keys()


def serialise(value: object, limit: int, order_free: bool = False, max_depth: int = MAX_DEPTH) -> str:
    """The literal text of a plain value; sets sorted, dicts in their own order (sorted too if `order_free`).

    Counter, defaultdict and OrderedDict become dict, a namedtuple a tuple (their == agrees). Raises Refused: any other
    type or more than 40 levels is "unserialisable", more than `limit` characters "output_too_large". The characters are
    counted while walking: a few shared lists can stand for 10**13 elements.
    """
    left = limit

    def spend(text: str) -> str:
        nonlocal left
        left -= len(text)
        if left < 0:
            raise TOO_LARGE
        return text

    def walk(value: object, depth: int) -> str:
        kind = type(value)
        if value is None or kind is bool or kind is float:
            return spend(repr(value))
        if kind is int:
            if int.bit_length(value) > MAX_INT_BITS:
                raise TOO_LARGE
            return spend(repr(value))
        if kind is str or kind is bytes:
            if len(value) > left:
                raise TOO_LARGE
            return spend(repr(value))
        if kind is complex and isfinite(value.real) and isfinite(value.imag):
            return spend(repr(value))
        if depth >= max_depth:
            raise NOT_PLAIN
        spend("[]")
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
        raise NOT_PLAIN

    text = walk(value, 1)
    if len(text) > limit:
        raise TOO_LARGE
    return text


# ----------------------------------------------------------------------------------------------------------------------
# From text to a value, and equality of values


class BadLiteral(ValueError):
    """The text is not one plain Python literal within the caps."""


MAX_LITERAL_DEPTH = 50
WORDS = {"nan": float("nan"), "inf": float("inf")}
CONTAINERS = {"set": set, "frozenset": frozenset, "list": list, "tuple": tuple, "dict": dict}
PARSE_ERRORS = (SyntaxError, ValueError, TypeError, RecursionError, MemoryError, OverflowError)
warnings.filterwarnings("ignore", module="<literal>")  # "invalid escape sequence" in an answer is nobody's concern


def parse_literal(text: str, max_chars: int = 20_000) -> object:
    """The value of a literal as Python prints it: numbers, strings, bytes, None, bool, list, tuple, dict, set, nan,
    inf, float('inf') and calls of set, frozenset, list, tuple and dict; no operators but signs and `1+2j`. Raises
    BadLiteral."""
    return build(parse(text.strip(), max_chars), 1)


def parse_arguments(text: str, max_chars: int = 20_000) -> tuple[tuple, dict]:
    """The arguments of a call written as `1, [2], key='x'`: (positional, keyword), literals only. Raises BadLiteral."""
    call = parse(f"f({text}\n)", max_chars + 4)
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):  # `1) or (1` ends up here
        raise BadLiteral("the input is not a list of arguments")
    kwargs = {keyword.arg: build(keyword.value, 1) for keyword in call.keywords}
    if None in kwargs or len(kwargs) != len(call.keywords):
        raise BadLiteral("the input unpacks a mapping or repeats a keyword")
    return tuple(build(node, 1) for node in call.args), kwargs


def parse(text: str, max_chars: int) -> ast.expr:
    if len(text) > max_chars:  # first: the parser is only safe on small texts
        raise BadLiteral(f"the literal has {len(text)} characters, more than {max_chars}")
    try:
        return ast.parse(text, "<literal>", "eval").body
    except PARSE_ERRORS as error:
        raise BadLiteral(f"the literal does not parse ({type(error).__name__})") from None


def build(node: ast.expr, depth: int) -> object:
    """The value of a syntax tree if it is plain data; everything else raises BadLiteral."""
    if depth > MAX_LITERAL_DEPTH:
        raise BadLiteral(f"the literal is nested deeper than {MAX_LITERAL_DEPTH} levels")
    match node:
        case ast.Constant(value=value) if value is not ...:
            if type(value) is int and value.bit_length() > MAX_INT_BITS:
                raise BadLiteral("the literal holds a number with more digits than Python prints")
            return value
        case ast.List(elts=items):
            return [build(item, depth + 1) for item in items]
        case ast.Tuple(elts=items):
            return tuple([build(item, depth + 1) for item in items])
        case ast.Set(elts=items):
            return hashable(set, [build(item, depth + 1) for item in items])
        case ast.Dict(keys=keys, values=values) if None not in keys:
            pairs = zip(keys, values, strict=True)
            return hashable(dict, [(build(key, depth + 1), build(value, depth + 1)) for key, value in pairs])
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            number = build(operand, depth + 1)
            if type(number) in (int, float, complex):
                return -number if isinstance(sign, ast.USub) else number
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as sign, right=ast.Constant(value=complex() as imaginary)):
            real = build(left, depth + 1)
            if type(real) in (int, float):
                return real - imaginary if isinstance(sign, ast.Sub) else real + imaginary
        case ast.Name(id="nan" | "inf" as name):
            return WORDS[name]
        case ast.Call(func=ast.Name(id="float"), args=[ast.Constant(value=str() as word)], keywords=[]):
            if word.strip().lower().lstrip("+-") in ("nan", "inf", "infinity"):
                return float(word)
        case ast.Call(func=ast.Name(id=name), args=[], keywords=[]) if name in CONTAINERS:
            return CONTAINERS[name]()
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in CONTAINERS:
            items = build(argument, depth + 1)
            if type(items) in CONTAINERS.values():
                return hashable(CONTAINERS[name], items)
    raise BadLiteral("the text is not a plain literal")


def hashable(kind: type, items: object) -> object:
    try:
        return kind(items)
    except PARSE_ERRORS:
        raise BadLiteral("the literal cannot be built (an unhashable element?)") from None


def canonical(value: object) -> str:
    """One text per value: type-sensitive, sets and dicts sorted. For values that `parse_literal` returns."""
    return serialise(value, 1 << 30, order_free=True, max_depth=2 * MAX_LITERAL_DEPTH)


def same_value(a: object, b: object) -> bool:
    """Python's == on plain values, except that nan equals nan, also inside containers."""
    if type(a) is float and type(b) is float and a != a and b != b:
        return True
    if type(a) is type(b) and type(a) in (list, tuple):
        return len(a) == len(b) and all(map(same_value, a, b))
    if type(a) is dict and type(b) is dict and a.keys() == b.keys():
        return all(same_value(a[key], b[key]) for key in a)
    return a == b or (type(a) in (dict, set, frozenset) and canonical(a) == canonical(b))  # nan as an element or key
