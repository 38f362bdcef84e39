"""Symbolic intervals: bounds of an expression over a tile, as expressions over the tile's ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

from attncc.ir import expr as ir
from attncc.ir import ops
from attncc.ir.expr import FALSE, TRUE, Apply, Axis, Const, Expr, Index, Load, Scalar, Score, kind
from attncc.ir.ops import Kind, Op
from attncc.ir.rewrite import Rewriter
from attncc.passes.facts import FACTS, Facts
from attncc.passes.precision import same_in_any_dtype


@dataclass(frozen=True, slots=True)
class Interval:
    """lo <= value <= hi on the whole tile, None where nothing is known.

    Of a bool, lo is `must` (true at every pair) and hi is `may` (true at some pair, or unknown).
    A float bound that is nan at run time bounds nothing: comparisons below are written so.
    """

    lo: Expr | None
    hi: Expr | None

    @property
    def exact(self) -> bool:
        """The value is one number on the tile, known as an expression."""
        return self.lo is not None and self.lo is self.hi


WHOLE = Interval(None, None)
UNSURE = Interval(FALSE, TRUE)

RELATIVE = 1e-5
"""Widens float results: float32 kernels (ex2.approx: 2**-22) and float64 analysis then agree."""
TINY = 1e-30
"""Widens floats around 0, where the relative margin is nothing."""

NAN = Const(float("nan"))
INFINITY = Const(float("inf"))
ZERO = Const(0)
ONE = Const(1)

MAX_DEPTH = 90
"""Bounds nested deeper are given up, since evaluating and printing them recurses."""

TILE_ENDS: dict[Expr, Interval] = {
    ir.Q_IDX: Interval(ir.Q_LO, ir.Q_LAST),
    ir.KV_IDX: Interval(ir.KV_LO, ir.KV_LAST),
}

Leaf = Callable[[Expr], Interval | None]
"""Bounds that the caller knows better than the table, or None."""


class Bounder:
    """Bounds of expressions over a tile; results are simplified and share nodes.

    leaf: asked first at every node, parents before children.
    """

    def __init__(self, simplify: Rewriter, leaf: Leaf | None = None, facts: Facts = FACTS) -> None:
        self.simplify = simplify
        self.leaf = leaf
        self.facts = facts
        self.done: dict[int, tuple[Expr, Interval]] = {}
        self.depths: dict[int, int] = {}

    def __call__(self, expr: Expr) -> Interval:
        """The interval of a well-kinded expression; total, at worst `WHOLE` or `UNSURE`."""
        stack = [expr]
        while stack:
            node = stack[-1]
            waiting = [] if self._leaf(node) else self._waiting(node)
            if waiting:
                stack.extend(waiting)
            else:
                self._finish(stack.pop())
        return self.done[id(expr)][1]

    def _leaf(self, node: Expr) -> bool:
        """Whether the node is done, asking the caller first."""
        if id(node) not in self.done and self.leaf is not None:
            known = self.leaf(node)
            if known is not None:
                self.done[id(node)] = (node, known)
        return id(node) in self.done

    def _waiting(self, node: Expr) -> list[Expr]:
        inner = node.args if isinstance(node, Apply) else ()
        return [child for child in inner if id(child) not in self.done]

    def _finish(self, node: Expr) -> None:
        if id(node) not in self.done:
            result = self._node(node)
            known = self.unknown(node) if self._too_deep(result) else result
            self.done[id(node)] = (node, known)

    def make(self, op: Op, *args: Expr) -> Expr:
        return self.simplify.make(op, *args)

    def unknown(self, expr: Expr) -> Interval:
        return UNSURE if kind(expr) is Kind.BOOL else WHOLE

    def _too_deep(self, result: Interval) -> bool:
        return any(
            end is not None and self._depth(end) > MAX_DEPTH for end in (result.lo, result.hi)
        )

    def _depth(self, expr: Expr) -> int:
        if id(expr) not in self.depths:
            inner = [self._depth(child) for child in ir.children(expr)]
            self.depths[id(expr)] = 1 + max(inner, default=0)
        return self.depths[id(expr)]

    def _node(self, expr: Expr) -> Interval:
        match expr:
            case Const() | Scalar():
                return self._widened(expr, point(expr))
            case Index():
                return TILE_ENDS.get(expr, point(expr))
            case Score():
                return WHOLE
            case Load():
                on_tile = expr.axes & (Axis.Q | Axis.KV)
                return self.unknown(expr) if on_tile else point(expr)
            case Apply():
                return self._apply(expr)
            case _:
                assert_never(expr)

    def _apply(self, expr: Apply) -> Interval:
        args = [self.done[id(arg)][1] for arg in expr.args]
        if all(arg.exact for arg in args) and same_in_any_dtype(expr, own=True):
            return point(self.make(expr.op, *(arg.lo for arg in args if arg.lo is not None)))
        result = RULES[expr.op](self, expr, args)
        return self._widened(expr, result)

    def _widened(self, expr: Expr, interval: Interval) -> Interval:
        if kind(expr) is not Kind.FLOAT or same_in_any_dtype(expr, own=True):
            return interval
        return Interval(self._moved(ops.SUB, interval.lo), self._moved(ops.ADD, interval.hi))

    def _moved(self, op: Op, end: Expr | None) -> Expr | None:
        if end is None:
            return None
        margin = self.make(ops.MUL, self.make(ops.ABS, end), Const(RELATIVE))
        return self.make(op, end, self.make(ops.ADD, margin, Const(TINY)))

    def lowest(self, *ends: Expr | None) -> Expr | None:
        return self._combined(ops.MIN, ends)

    def highest(self, *ends: Expr | None) -> Expr | None:
        return self._combined(ops.MAX, ends)

    def _combined(self, op: Op, ends: tuple[Expr | None, ...]) -> Expr | None:
        result: Expr | None = None
        for end in ends:
            if end is None:
                return None
            result = end if result is None else self.make(op, result, end)
        return result


def point(expr: Expr) -> Interval:
    return Interval(expr, expr)


Rule = Callable[[Bounder, Apply, list[Interval]], Interval]


# -- logic: (must, may)


def _and(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    return _each(on, ops.AND, args)


def _or(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    return _each(on, ops.OR, args)


def _not(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    must, may = _bool(args[0])
    return Interval(on.make(ops.NOT, may), on.make(ops.NOT, must))


def _bool(interval: Interval) -> tuple[Expr, Expr]:
    assert interval.lo is not None and interval.hi is not None, "bools have both"
    return interval.lo, interval.hi


def _same(on: Bounder, x: Interval, y: Interval) -> Interval:
    """x == y over bools."""
    (x_must, x_may), (y_must, y_may) = _bool(x), _bool(y)
    x_never, y_never = on.make(ops.NOT, x_may), on.make(ops.NOT, y_may)
    must = on.make(ops.OR, on.make(ops.AND, x_must, y_must), on.make(ops.AND, x_never, y_never))
    differ = on.make(ops.OR, on.make(ops.AND, x_must, y_never), on.make(ops.AND, x_never, y_must))
    return Interval(must, on.make(ops.NOT, differ))


# -- comparisons: `may` is said as "not surely false", so that nan bounds leave it true


def _less(op: Op, opposite: Op) -> Rule:
    """x < y: surely where x.hi < y.lo, never where x.lo >= y.hi."""

    def rule(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
        x, y = args
        must: Expr = FALSE
        if x.hi is not None and y.lo is not None:
            must = on.make(op, x.hi, y.lo)
        may: Expr = TRUE
        if x.lo is not None and y.hi is not None:
            may = on.make(ops.NOT, on.make(opposite, x.lo, y.hi))
        return Interval(must, may)

    return rule


def _greater(rule: Rule) -> Rule:
    return lambda on, node, args: rule(on, node, args[::-1])


def _equal(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    x, y = args
    if kind(node.args[0]) is Kind.BOOL:
        return _same(on, x, y)
    must: Expr = FALSE
    if x.lo is not None and x.hi is not None and y.lo is not None and y.hi is not None:
        must = on.make(ops.AND, on.make(ops.EQ, x.lo, y.hi), on.make(ops.EQ, x.hi, y.lo))
    may: Expr = TRUE
    for small, large in ((x.lo, y.hi), (y.lo, x.hi)):
        if small is not None and large is not None:
            apart = on.make(ops.GT, small, large)
            may = on.make(ops.AND, may, on.make(ops.NOT, apart))
    return Interval(must, may)


def _not_equal(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    return _not(on, node, [_equal(on, node, args)])


# -- arithmetic


def _both(on: Bounder, op: Op, x: Expr | None, y: Expr | None) -> Expr | None:
    return None if x is None or y is None else on.make(op, x, y)


def _each(on: Bounder, op: Op, args: list[Interval]) -> Interval:
    """An operator that is nondecreasing in both arguments."""
    x, y = args
    return Interval(_both(on, op, x.lo, y.lo), _both(on, op, x.hi, y.hi))


def _add(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    return _each(on, ops.ADD, args)


def _sub(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    x, y = args
    return Interval(_both(on, ops.SUB, x.lo, y.hi), _both(on, ops.SUB, x.hi, y.lo))


def _falling(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    """-x, ~x."""
    (x,) = args
    low = None if x.hi is None else on.make(node.op, x.hi)
    high = None if x.lo is None else on.make(node.op, x.lo)
    return Interval(low, high)


def _rising(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    """Functions of one argument that never fall."""
    (x,) = args
    low = None if x.lo is None else on.make(node.op, x.lo)
    high = None if x.hi is None else on.make(node.op, x.hi)
    return Interval(low, high)


def _corners(on: Bounder, op: Op, x: Interval, y: Interval) -> Interval:
    """An operator that is monotone in each argument while the other stands still."""
    if x.lo is None or x.hi is None or y.lo is None or y.hi is None:
        return WHOLE
    xs = (x.lo,) if x.exact else (x.lo, x.hi)
    ys = (y.lo,) if y.exact else (y.lo, y.hi)
    ends = [on.make(op, one, two) for one in xs for two in ys]
    return Interval(on.lowest(*ends), on.highest(*ends))


def _mul(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    x, y = args
    if node.args[0] == node.args[1]:
        return _square(on, node, x)
    for one, two, factor in ((x, y, y.lo), (y, x, x.lo)):
        if two.exact and factor is not None and _never_negative(on, factor):
            return Interval(_both(on, ops.MUL, one.lo, factor), _both(on, ops.MUL, one.hi, factor))
    if x.lo and y.lo and _never_negative(on, x.lo) and _never_negative(on, y.lo):
        return _each(on, ops.MUL, args)
    return _corners(on, ops.MUL, x, y)


def _never_negative(on: Bounder, expr: Expr) -> bool:
    if isinstance(expr, Const):
        return bool(expr.value >= 0)
    return on.facts.nonnegative(expr)


def _square(on: Bounder, node: Apply, x: Interval) -> Interval:
    inside = _abs(on, node, [x])
    return _each(on, ops.MUL, [inside, inside])


def _abs(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    (x,) = args
    if node.kind is Kind.FLOAT and (x.lo is None or x.hi is None):
        return WHOLE  # it may be nan, which is not even at least 0
    return _magnitude(on, x)


def _magnitude(on: Bounder, x: Interval) -> Interval:
    """abs(x): at least 0, x.lo and -x.hi; at most the larger of -x.lo and x.hi."""
    low: Expr = Const(0.0) if x.lo is not None and kind(x.lo) is Kind.FLOAT else ZERO
    below = None if x.hi is None else on.make(ops.NEG, x.hi)
    above = None if x.lo is None else on.make(ops.NEG, x.lo)
    for end in (x.lo, below):
        if end is not None:
            low = on.make(ops.MAX, low, end)
    return Interval(low, on.highest(above, x.hi))


def _nonzero(on: Bounder, x: Interval) -> Expr:
    """That x has no zero on the tile."""
    above = FALSE if x.lo is None else on.make(ops.GT, x.lo, ZERO)
    below = FALSE if x.hi is None else on.make(ops.LT, x.hi, ZERO)
    return on.make(ops.OR, above, below)


def _choose(on: Bounder, condition: Expr, x: Interval, y: Interval) -> Interval:
    """x where the condition holds at run time, else y; one that is not known bounds nothing."""
    if condition == TRUE:
        return x
    if condition == FALSE:
        return y
    low = None if x.lo is None or y.lo is None else on.make(ops.WHERE, condition, x.lo, y.lo)
    high = None if x.hi is None or y.hi is None else on.make(ops.WHERE, condition, x.hi, y.hi)
    return Interval(low, high)


def _div(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    x, y = args
    safe = _nonzero(on, y)
    return _choose(on, safe, _corners(on, ops.DIV, x, y), point(NAN))


def _floordiv(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    x, y = args
    if node.kind is Kind.FLOAT:
        return _float_floordiv(on, x, y)
    if y.exact and y.lo is not None and on.facts.is_positive(y.lo):
        return Interval(_both(on, ops.FLOORDIV, x.lo, y.lo), _both(on, ops.FLOORDIV, x.hi, y.lo))
    corners = _corners(on, ops.FLOORDIV, x, y)
    if y.exact:
        return corners
    largest = _magnitude(on, x).hi
    if largest is None:
        return WHOLE
    return _choose(on, _nonzero(on, y), corners, Interval(on.make(ops.NEG, largest), largest))


def _float_floordiv(on: Bounder, x: Interval, y: Interval) -> Interval:
    """One is given on each side, since x // y jumps where the last bit of x / y decides."""
    corners = _corners(on, ops.FLOORDIV, x, y)
    if corners.lo is None or corners.hi is None:
        return WHOLE
    wider = Interval(on.make(ops.SUB, corners.lo, ONE), on.make(ops.ADD, corners.hi, ONE))
    safe = on.make(ops.AND, bounded(on, corners.lo, corners.hi), _nonzero(on, y))
    return _choose(on, safe, wider, point(NAN))


def _mod(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    """x % y is in [0, y) or (y, 0]; it is x - y * q while the quotient q stands still."""
    x, y = args
    if y.lo is None or y.hi is None:
        return WHOLE
    if node.kind is Kind.FLOAT:
        return _float_mod(on, x, y)
    positive = y.exact and on.facts.is_positive(y.lo)
    low = ZERO if positive else on.make(ops.MIN, on.make(ops.ADD, y.lo, ONE), ZERO)
    top = on.make(ops.SUB, y.hi, ONE)
    loose = Interval(low, top if positive else on.make(ops.MAX, top, ZERO))
    if x.lo is None or x.hi is None:
        return loose
    quotients = [on.make(ops.FLOORDIV, end, y.lo) for end in (x.lo, x.hi)]
    steady = on.make(ops.EQ, *quotients)
    if not y.exact:
        steady = on.make(ops.AND, on.make(ops.EQ, y.lo, y.hi), steady)
    inside = Interval(on.make(ops.MOD, x.lo, y.lo), on.make(ops.MOD, x.hi, y.lo))
    return _choose(on, steady, inside, loose)


def _float_mod(on: Bounder, x: Interval, y: Interval) -> Interval:
    """Rounding may reach y itself; of inf, of nan and by 0 it is nan."""
    if x.lo is None or x.hi is None or y.lo is None or y.hi is None:
        return WHOLE
    zero = Const(0.0)
    inside = Interval(on.make(ops.MIN, y.lo, zero), on.make(ops.MAX, y.hi, zero))
    safe = on.make(ops.AND, bounded(on, x.lo, x.hi), _nonzero(on, y))
    return _choose(on, safe, inside, point(NAN))


def bounded(on: Bounder, low: Expr, high: Expr) -> Expr:
    """That two float bounds are finite; false where one is nan."""
    return on.make(ops.LT, on.make(ops.SUB, high, low), INFINITY)


def _min(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    x, y = args
    return Interval(_both(on, ops.MIN, x.lo, y.lo), _either(on, ops.MIN, node, x.hi, y.hi))


def _max(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    x, y = args
    return Interval(_either(on, ops.MAX, node, x.lo, y.lo), _both(on, ops.MAX, x.hi, y.hi))


def _either(on: Bounder, op: Op, node: Apply, x: Expr | None, y: Expr | None) -> Expr | None:
    """The limit that is known; of floats both must be, since the other may be nan."""
    if x is None or y is None:
        return (y if x is None else x) if node.kind is Kind.INT else None
    return on.make(op, x, y)


def _where(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    condition, x, y = args
    must, may = _bool(condition)
    if node.kind is Kind.BOOL:
        return _where_bool(on, must, may, x, y)
    if condition.exact:
        return _choose(on, must, x, y)
    either = Interval(on.lowest(x.lo, y.lo), on.highest(x.hi, y.hi))
    return _choose(on, must, x, _choose(on, may, either, y))


def _where_bool(on: Bounder, must: Expr, may: Expr, x: Interval, y: Interval) -> Interval:
    (x_must, x_may), (y_must, y_may) = _bool(x), _bool(y)
    never = on.make(ops.NOT, may)
    surely = on.make(ops.OR, on.make(ops.AND, must, x_must), on.make(ops.AND, never, y_must))
    surely = on.make(ops.OR, surely, on.make(ops.AND, x_must, y_must))
    perhaps = on.make(
        ops.OR,
        on.make(ops.AND, may, x_may),
        on.make(ops.AND, on.make(ops.NOT, must), y_may),
    )
    return Interval(surely, perhaps)


# -- bits


def _bits(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    """Exact where both arguments are one number; else by size, tighter where none is negative."""
    x, y = args
    if x.lo is None or x.hi is None or y.lo is None or y.hi is None:
        return WHOLE
    single = on.make(ops.AND, on.make(ops.EQ, x.lo, x.hi), on.make(ops.EQ, y.lo, y.hi))
    exact = on.make(node.op, x.lo, y.lo)
    natural = on.make(ops.AND, on.make(ops.GE, x.lo, ZERO), on.make(ops.GE, y.lo, ZERO))
    loose = _choose(
        on, natural, _natural_bits(on, node.op, x.lo, x.hi, y.lo, y.hi), _any_bits(on, x, y)
    )
    return _choose(on, single, point(exact), loose)


def _natural_bits(on: Bounder, op: Op, x_lo: Expr, x_hi: Expr, y_lo: Expr, y_hi: Expr) -> Interval:
    """x & y <= both, both <= x | y <= x + y, x ^ y <= x + y."""
    if op is ops.BITAND:
        return Interval(ZERO, on.make(ops.MIN, x_hi, y_hi))
    low = on.make(ops.MAX, x_lo, y_lo) if op is ops.BITOR else ZERO
    return Interval(low, on.make(ops.ADD, x_hi, y_hi))


def _any_bits(on: Bounder, x: Interval, y: Interval) -> Interval:
    """No result needs more bits than the longer argument."""
    largest = on.highest(_magnitude(on, x).hi, _magnitude(on, y).hi)
    assert largest is not None, "both are known here"
    high = on.make(ops.MUL, largest, Const(2))
    return Interval(on.make(ops.SUB, on.make(ops.NEG, high), ONE), high)


MAX_SHIFT = Const(31)
MAX_SHIFTED = Const(2**31)


def _shl(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    """x << n by corners, while those cannot leave int64; nothing is known beyond."""
    x, n = args
    corners = _corners(on, ops.SHL, x, n)
    size = _magnitude(on, x).hi
    if corners.lo is None or n.hi is None or size is None:
        return WHOLE
    fits = on.make(ops.AND, on.make(ops.LE, n.hi, MAX_SHIFT), on.make(ops.LE, size, MAX_SHIFTED))
    return _choose(on, fits, corners, Interval(Const(-(2**62)), Const(2**62)))


def _shr(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    return _corners(on, ops.SHR, *args)


def _bit_length(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    return _rising(on, node, [_magnitude(on, args[0])])


# -- floats


def _of_nonnegative(rule: Rule) -> Rule:
    """Functions that are nan below 0: bounds nothing where the argument may be negative."""

    def guarded(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
        (x,) = args
        if x.lo is None:
            return WHOLE
        return _choose(on, on.make(ops.GE, x.lo, ZERO), rule(on, node, args), point(NAN))

    return guarded


def _wave(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    """sin and cos of anything finite."""
    return Interval(Const(-1.0), Const(1.0)) if _finite(node.args[0]) else WHOLE


def _to_int(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    """int(x), floor(x): of a float only where it must be finite, since int(nan) is anything."""
    (x,) = args
    source = node.args[0]
    if kind(source) is Kind.BOOL:
        must, may = _bool(x)
        return Interval(on.make(node.op, must), on.make(node.op, may))
    if kind(source) is Kind.FLOAT and not _finite(source):
        return WHOLE
    return _rising(on, node, args)


def _finite(expr: Expr) -> bool:
    """Proved that a float is neither nan nor inf, for arguments of any reasonable size."""
    match expr:
        case Const() | Index():
            return True
        case Scalar(param):
            return param.kind is not Kind.FLOAT
        case Load(tensor):
            return tensor.kind is not Kind.FLOAT
        case Apply(op, args) if op in _FINITE:
            return all(map(_finite, args))
        case Apply(ops.DIV | ops.FLOORDIV | ops.MOD, (x, Const(value))):
            return value != 0 and _finite(x)
        case Score() | Apply():
            return kind(expr) is not Kind.FLOAT
        case _:
            assert_never(expr)


_FINITE = frozenset((ops.ADD, ops.SUB, ops.MUL, ops.NEG, ops.ABS, ops.MIN, ops.MAX, ops.FLOAT))


RULES: dict[Op, Rule] = {
    ops.ADD: _add,
    ops.SUB: _sub,
    ops.MUL: _mul,
    ops.DIV: _div,
    ops.FLOORDIV: _floordiv,
    ops.MOD: _mod,
    ops.LT: _less(ops.LT, ops.GE),
    ops.LE: _less(ops.LE, ops.GT),
    ops.GT: _greater(_less(ops.LT, ops.GE)),
    ops.GE: _greater(_less(ops.LE, ops.GT)),
    ops.EQ: _equal,
    ops.NE: _not_equal,
    ops.AND: _and,
    ops.OR: _or,
    ops.BITAND: _bits,
    ops.BITOR: _bits,
    ops.BITXOR: _bits,
    ops.SHL: _shl,
    ops.SHR: _shr,
    ops.NEG: _falling,
    ops.INVERT: _falling,
    ops.NOT: _not,
    ops.MIN: _min,
    ops.MAX: _max,
    ops.ABS: _abs,
    ops.WHERE: _where,
    ops.EXP: _rising,
    ops.EXP2: _rising,
    ops.LOG: _of_nonnegative(_rising),
    ops.LOG2: _of_nonnegative(_rising),
    ops.SQRT: _of_nonnegative(_rising),
    ops.RSQRT: _of_nonnegative(_falling),
    ops.TANH: _rising,
    ops.SIGMOID: _rising,
    ops.SOFTPLUS: _rising,
    ops.SIN: _wave,
    ops.COS: _wave,
    ops.FLOOR: _to_int,
    ops.BIT_LENGTH: _bit_length,
    ops.INT: _to_int,
    ops.FLOAT: _to_int,
}
"""Total over the operators: a test holds it to OPS."""
