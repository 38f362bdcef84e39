"""The operator table: one row per operator says how it is written and what kinds it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What an expression's value is; sizes and dtypes are a backend's business."""

    BOOL = "bool"
    INT = "int"
    FLOAT = "float"


class Form(Enum):
    """How an operator is written in the language."""

    INFIX = "infix"
    PREFIX = "prefix"
    CALL = "call"


Kinds = tuple[Kind, ...]
KindRule = Callable[[Kinds], Kind | None]
"""Kinds of the arguments to the kind of the result, or None where the operator refuses them."""


def _promote(kinds: Kinds) -> Kind | None:
    """Numbers to a number: float if any is float."""
    if Kind.BOOL in kinds:
        return None
    return Kind.FLOAT if Kind.FLOAT in kinds else Kind.INT


def _ratio(kinds: Kinds) -> Kind | None:
    return None if Kind.BOOL in kinds else Kind.FLOAT


def _order(kinds: Kinds) -> Kind | None:
    return None if Kind.BOOL in kinds else Kind.BOOL


def _equality(kinds: Kinds) -> Kind | None:
    left, right = kinds
    return Kind.BOOL if (left is Kind.BOOL) == (right is Kind.BOOL) else None


def _logic(kinds: Kinds) -> Kind | None:
    return Kind.BOOL if all(k is Kind.BOOL for k in kinds) else None


def _bits(kinds: Kinds) -> Kind | None:
    return Kind.INT if all(k is Kind.INT for k in kinds) else None


def _choice(kinds: Kinds) -> Kind | None:
    condition, left, right = kinds
    if condition is not Kind.BOOL:
        return None
    return left if left is right else _promote((left, right))


def _to_int(kinds: Kinds) -> Kind | None:
    return Kind.INT


def _to_float(kinds: Kinds) -> Kind | None:
    return Kind.FLOAT


def _floor(kinds: Kinds) -> Kind | None:
    return None if Kind.BOOL in kinds else Kind.INT


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    """One row of the table. `precedence` is Python's; calls bind tightest."""

    name: str
    symbol: str
    form: Form
    arity: int
    precedence: int
    kind: KindRule
    expects: str
    """The argument kinds in words, for error messages."""

    def __repr__(self) -> str:
        return f"Op({self.name})"

    def __reduce__(self) -> str:
        return self.name.upper()


# Python's precedence levels, loosest first.
P_OR, P_AND, P_NOT, P_COMPARE, P_BITOR, P_BITXOR, P_BITAND, P_SHIFT = range(1, 9)
P_SUM, P_TERM, P_UNARY, P_ATOM = range(9, 13)

_NUMBERS = "numbers"


def _infix(name: str, symbol: str, precedence: int, kind: KindRule, expects: str) -> Op:
    return Op(name, symbol, Form.INFIX, 2, precedence, kind, expects)


def _call(name: str, arity: int, kind: KindRule, expects: str) -> Op:
    return Op(name, name, Form.CALL, arity, P_ATOM, kind, expects)


ADD = _infix("add", "+", P_SUM, _promote, _NUMBERS)
SUB = _infix("sub", "-", P_SUM, _promote, _NUMBERS)
MUL = _infix("mul", "*", P_TERM, _promote, _NUMBERS)
DIV = _infix("div", "/", P_TERM, _ratio, _NUMBERS)
FLOORDIV = _infix("floordiv", "//", P_TERM, _promote, _NUMBERS)
MOD = _infix("mod", "%", P_TERM, _promote, _NUMBERS)
LT = _infix("lt", "<", P_COMPARE, _order, _NUMBERS)
LE = _infix("le", "<=", P_COMPARE, _order, _NUMBERS)
GT = _infix("gt", ">", P_COMPARE, _order, _NUMBERS)
GE = _infix("ge", ">=", P_COMPARE, _order, _NUMBERS)
EQ = _infix("eq", "==", P_COMPARE, _equality, "two numbers or two bools")
NE = _infix("ne", "!=", P_COMPARE, _equality, "two numbers or two bools")
AND = _infix("and", "and", P_AND, _logic, "bools")
OR = _infix("or", "or", P_OR, _logic, "bools")
BITAND = _infix("bitand", "&", P_BITAND, _bits, "ints")
BITOR = _infix("bitor", "|", P_BITOR, _bits, "ints")
BITXOR = _infix("bitxor", "^", P_BITXOR, _bits, "ints")
SHL = _infix("shl", "<<", P_SHIFT, _bits, "ints")
SHR = _infix("shr", ">>", P_SHIFT, _bits, "ints")
NEG = Op("neg", "-", Form.PREFIX, 1, P_UNARY, _promote, "a number")
INVERT = Op("invert", "~", Form.PREFIX, 1, P_UNARY, _bits, "an int")
NOT = Op("not", "not", Form.PREFIX, 1, P_NOT, _logic, "a bool")
MIN = _call("min", 2, _promote, _NUMBERS)
MAX = _call("max", 2, _promote, _NUMBERS)
ABS = _call("abs", 1, _promote, "a number")
WHERE = _call("where", 3, _choice, "a bool and two values of one kind")
EXP = _call("exp", 1, _ratio, "a number")
EXP2 = _call("exp2", 1, _ratio, "a number")
LOG = _call("log", 1, _ratio, "a number")
LOG2 = _call("log2", 1, _ratio, "a number")
SQRT = _call("sqrt", 1, _ratio, "a number")
RSQRT = _call("rsqrt", 1, _ratio, "a number")
TANH = _call("tanh", 1, _ratio, "a number")
SIGMOID = _call("sigmoid", 1, _ratio, "a number")
SOFTPLUS = _call("softplus", 1, _ratio, "a number")
SIN = _call("sin", 1, _ratio, "a number")
COS = _call("cos", 1, _ratio, "a number")
FLOOR = _call("floor", 1, _floor, "a number")
BIT_LENGTH = _call("bit_length", 1, _bits, "an int")
INT = _call("int", 1, _to_int, "any value")
FLOAT = _call("float", 1, _to_float, "any value")

OPS: tuple[Op, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Op))
"""Every operator, in the order of this file."""
