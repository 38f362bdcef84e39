"""The expression IR: six frozen node kinds over (b, h, q_idx, kv_idx)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Flag
from typing import assert_never

from attncc.ir import ops
from attncc.ir.ops import Kind, Op


@dataclass(frozen=True, slots=True)
class Span:
    """Where a node stands in its text: 1-based line and column, and its length in characters."""

    line: int
    column: int
    length: int = 1


class Axis(Flag):
    """What an expression's value varies with."""

    NONE = 0
    B = 1
    H = 2
    Q = 4
    KV = 8


@dataclass(frozen=True, slots=True)
class ScalarParam:
    """A run-time number: a parameter of the program, one of SIZES, or one of RESULTS."""

    name: str
    kind: Kind
    default: bool | int | float | None = None
    span: Span | None = field(default=None, compare=False, repr=False)


Dim = int | str
"""A constant, the name of one of SIZES, or a free name bound by the tensor passed in."""


@dataclass(frozen=True, slots=True)
class TensorParam:
    """A captured tensor; `sorted`: nondecreasing on its last axis, `grad`: gradients reach it."""

    name: str
    kind: Kind
    dims: tuple[Dim, ...]
    sorted: bool = False
    grad: bool = False
    span: Span | None = field(default=None, compare=False, repr=False)

    @property
    def orders_tokens(self) -> bool:
        """Whether it holds an int for each token, of all sequences or of each."""
        *batch, tokens = self.dims
        known = tokens in ("q_len", "kv_len") and batch in ([], ["batch"])
        return known and self.kind is Kind.INT


@dataclass(frozen=True, slots=True)
class Const:
    """A literal; its Python type is its kind, and 1, 1.0 and True differ."""

    value: bool | int | float
    span: Span | None = field(default=None, compare=False, repr=False)

    def __eq__(self, other: object) -> bool:
        # repr, so that 1 != 1.0 != True, 0.0 != -0.0 and nan == nan
        return isinstance(other, Const) and repr(self.value) == repr(other.value)

    def __hash__(self) -> int:
        return hash(repr(self.value))


@dataclass(frozen=True, slots=True)
class Index:
    """A position: one of the names below."""

    name: str
    axes: Axis = field(compare=False, repr=False)
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Scalar:
    """The value of a scalar parameter, of a size, or of one of RESULTS."""

    param: ScalarParam
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Score:
    """q . k * scale for this pair, as a float."""

    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """One element of a captured tensor."""

    tensor: TensorParam
    at: tuple[Expr, ...]
    span: Span | None = field(default=None, repr=False)
    axes: Axis = field(init=False, repr=False)
    _hash: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", _union(self.at))
        object.__setattr__(self, "_hash", hash((self.tensor, self.at)))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return (
            isinstance(other, Load)
            and self._hash == other._hash
            and self.tensor == other.tensor
            and self.at == other.at
        )


@dataclass(frozen=True, slots=True, eq=False)
class Apply:
    """An operator applied to arguments; kind, axes and hash are kept: analyses share subtrees."""

    op: Op
    args: tuple[Expr, ...]
    span: Span | None = field(default=None, repr=False)
    kind: Kind = field(init=False, repr=False)
    axes: Axis = field(init=False, repr=False)
    _hash: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        result = self.op.kind(tuple(map(kind, self.args)))
        assert result is not None, f"{self.op.name} got the wrong kinds: {self.args}"
        object.__setattr__(self, "kind", result)
        object.__setattr__(self, "axes", _union(self.args))
        object.__setattr__(self, "_hash", hash((self.op.name, self.args)))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return (
            isinstance(other, Apply)
            and self._hash == other._hash
            and self.op is other.op
            and self.args == other.args
        )


Expr = Const | Index | Scalar | Score | Load | Apply

# Positions of a pair.
B = Index("b", Axis.B)
H = Index("h", Axis.H)
KV_HEAD = Index("kv_head", Axis.H)
Q_IDX = Index("q_idx", Axis.Q)
KV_IDX = Index("kv_idx", Axis.KV)
POSITIONS: tuple[Index, ...] = (B, H, KV_HEAD, Q_IDX, KV_IDX)

# First and last position of a tile, both inclusive; analyses make these, users never write them.
Q_LO = Index("q_lo", Axis.Q)
Q_LAST = Index("q_last", Axis.Q)
KV_LO = Index("kv_lo", Axis.KV)
KV_LAST = Index("kv_last", Axis.KV)
# Numbers of a tile, which index what is kept per tile.
Q_TILE = Index("q_tile", Axis.Q)
KV_TILE = Index("kv_tile", Axis.KV)

# Sizes of the call, all >= 0.
BATCH = ScalarParam("batch", Kind.INT)
HEADS = ScalarParam("heads", Kind.INT)
KV_HEADS = ScalarParam("kv_heads", Kind.INT)
Q_LEN = ScalarParam("q_len", Kind.INT)
KV_LEN = ScalarParam("kv_len", Kind.INT)
HEAD_DIM = ScalarParam("head_dim", Kind.INT)
SIZES: tuple[ScalarParam, ...] = (BATCH, HEADS, KV_HEADS, Q_LEN, KV_LEN, HEAD_DIM)

# What an output clause reads besides: elements of a query's own result, and of values.
OUT = ScalarParam("out", Kind.FLOAT)
LSE = ScalarParam("lse", Kind.FLOAT)
VALUE = ScalarParam("value", Kind.FLOAT)
MEAN_VALUE = ScalarParam("mean_value", Kind.FLOAT)
RESULTS: tuple[ScalarParam, ...] = (OUT, LSE, VALUE, MEAN_VALUE)

TRUE = Const(True)
FALSE = Const(False)


def kind(expr: Expr) -> Kind:
    """The kind of a well-kinded expression."""
    match expr:
        case Const(value):
            return Kind(type(value).__name__)
        case Index():
            return Kind.INT
        case Scalar(param):
            return param.kind
        case Score():
            return Kind.FLOAT
        case Load(tensor):
            return tensor.kind
        case Apply():
            return expr.kind
        case _:
            assert_never(expr)


def axes(expr: Expr) -> Axis:
    """What the value varies with; Score varies with everything."""
    match expr:
        case Const() | Scalar():
            return Axis.NONE
        case Index() | Load() | Apply():
            return expr.axes
        case Score():
            return Axis.B | Axis.H | Axis.Q | Axis.KV
        case _:
            assert_never(expr)


def _union(parts: tuple[Expr, ...]) -> Axis:
    result = Axis.NONE
    for part in parts:
        result |= axes(part)
    return result


def children(expr: Expr) -> tuple[Expr, ...]:
    """The expressions directly inside this one."""
    match expr:
        case Load(_, at):
            return at
        case Apply(_, args):
            return args
        case _:
            return ()


def rebuild(expr: Expr, parts: tuple[Expr, ...]) -> Expr:
    """The same node over other children; the node itself where they are the same objects."""
    if all(new is old for new, old in zip(parts, children(expr), strict=True)):
        return expr
    match expr:
        case Load(tensor, _, span):
            return Load(tensor, parts, span)
        case Apply(op, _, span):
            return Apply(op, parts, span)
        case _:
            return expr


def results(expr: Expr | None) -> frozenset[ScalarParam]:
    """Which of RESULTS the expression reads; of no expression, none."""
    if expr is None:
        return frozenset()
    return frozenset(n.param for n in walk(expr) if isinstance(n, Scalar) and n.param in RESULTS)


def walk(expr: Expr) -> Iterator[Expr]:
    """Every distinct node object, parents first; a shared subtree comes once."""
    seen: set[int] = set()
    stack = [expr]
    while stack:
        node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        stack.extend(reversed(children(node)))


def apply(op: Op, *args: Expr) -> Apply:
    """Shorthand for analyses that build expressions."""
    return Apply(op, args)


def conjunction(parts: tuple[Expr, ...]) -> Expr:
    """All of them; TRUE of none."""
    result: Expr | None = None
    for part in parts:
        result = part if result is None else apply(ops.AND, result, part)
    return TRUE if result is None else result


def disjunction(parts: tuple[Expr, ...]) -> Expr:
    """Any of them; FALSE of none."""
    result: Expr | None = None
    for part in parts:
        result = part if result is None else apply(ops.OR, result, part)
    return FALSE if result is None else result
