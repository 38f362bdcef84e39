"""Random well-kinded expressions and programs that every interpretation must agree on.

They can be evaluated wherever 1 <= q_len <= kv_len: loads are in range, integer divisors are not
zero, floats stay finite. `exact` ones decide nothing by comparing floats, so that a last-bit
difference between two machines cannot flip a mask.
"""

from __future__ import annotations

from functools import cache

from hypothesis import strategies as st

from attncc.ir import ops
from attncc.ir.expr import (
    BATCH,
    HEADS,
    KV_HEAD,
    KV_IDX,
    KV_LEN,
    LSE,
    MEAN_VALUE,
    OUT,
    Q_IDX,
    Q_LEN,
    TRUE,
    Apply,
    B,
    Const,
    Expr,
    H,
    Load,
    Scalar,
    ScalarParam,
    Score,
    TensorParam,
    apply,
    walk,
)
from attncc.ir.grid import coordinate
from attncc.ir.ops import Kind
from attncc.ir.program import GridAxis, Normalize, Program, TokenOrder

WINDOW = ScalarParam("window", Kind.INT, 5)
OFFSET = ScalarParam("offset", Kind.INT)
"""May be negative."""
CAP = ScalarParam("cap", Kind.FLOAT, 2.5)
ENABLED = ScalarParam("enabled", Kind.BOOL, True)
DOC = TensorParam("doc", Kind.INT, ("batch", "kv_len"), sorted=True)
TABLE = TensorParam("table", Kind.INT, (7,))
KEEP = TensorParam("keep", Kind.BOOL, ("kv_len",))
BIAS = TensorParam("bias", Kind.FLOAT, ("heads", 5), grad=True)
SLOPE = TensorParam("slope", Kind.FLOAT, ("heads",), grad=True)
PARAMS = (WINDOW, OFFSET, CAP, ENABLED, DOC, TABLE, KEEP, BIAS, SLOPE)

GRID = (GridAxis("y", Const(3)), GridAxis("x", Const(4)))

small = st.integers(-9, 70).map(Const)
factor = st.integers(-4, 4).map(Const)
divisor = st.sampled_from((1, 2, 3, 4, 7, 16, 64, -1, -3)).map(Const)
shift = st.integers(0, 3).map(Const)
fraction = st.floats(-4, 4, width=16).map(Const)

_positions = st.sampled_from((B, H, KV_HEAD, Q_IDX, KV_IDX, Q_IDX, KV_IDX))
_int_scalars = st.sampled_from((WINDOW, OFFSET, BATCH, HEADS, Q_LEN, KV_LEN)).map(Scalar)
_safe_q = apply(ops.MIN, Q_IDX, apply(ops.SUB, Scalar(KV_LEN), Const(1)))
_docs = st.sampled_from((Load(DOC, (B, Q_IDX)), Load(DOC, (B, KV_IDX)), Load(DOC, (B, _safe_q))))
_keeps = st.sampled_from((Load(KEEP, (KV_IDX,)), Load(KEEP, (Q_IDX,))))
_distance = apply(ops.SUB, Q_IDX, KV_IDX)


def _of(op: ops.Op, *args: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    return st.builds(apply, st.just(op), *args)


def _one(choice: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    """The same as one branch: one_of weighs branches alike, nested ones too."""
    return st.tuples(choice).map(lambda pair: pair[0])


@cache
def ints(depth: int = 3, exact: bool = True) -> st.SearchStrategy[Expr]:
    """Over positions, scalars, sizes and tensors; floor division, modulo, nested where, bits."""
    leaves = st.one_of(_positions, _int_scalars, small, _docs, st.just(_distance))
    if depth == 0:
        return leaves
    inner = ints(depth - 1, exact)
    positive = _of(ops.MAX, inner, st.just(Const(1)))
    choices = [
        *(_of(op, inner, inner) for op in (ops.ADD, ops.SUB, ops.MIN, ops.MAX)),
        _of(ops.MUL, inner, factor),
        _of(ops.MUL, factor, inner),
        *(_of(op, inner, st.one_of(divisor, positive)) for op in (ops.FLOORDIV, ops.MOD)),
        *(_of(op, inner) for op in (ops.NEG, ops.ABS, ops.BIT_LENGTH, ops.INVERT)),
        *(_of(op, inner, inner) for op in (ops.BITAND, ops.BITOR, ops.BITXOR)),
        *(_of(op, inner, shift) for op in (ops.SHL, ops.SHR)),
        _of(ops.WHERE, bools(depth - 1, exact), inner, inner),
        _of(ops.INT, bools(depth - 1, exact)),
        inner.map(lambda at: Load(TABLE, (apply(ops.MOD, at, Const(7)),))),
    ]
    if not exact:
        choices += [_of(op, floats(depth - 1, exact)) for op in (ops.FLOOR, ops.INT)]
    return st.one_of(_one(leaves), *choices)


@cache
def bools(depth: int = 3, exact: bool = True) -> st.SearchStrategy[Expr]:
    """Comparisons of ints under unions, negations and where; and what masks are made of."""
    leaves = st.one_of(conjuncts(), _keeps, st.just(Scalar(ENABLED)), st.booleans().map(Const))
    if depth == 0:
        return leaves
    inner = bools(depth - 1, exact)
    numbers = ints(depth - 1, exact)
    orders = (ops.LT, ops.LE, ops.GT, ops.GE, ops.EQ, ops.NE)
    choices = [
        *(_of(op, numbers, numbers) for op in orders),
        *(_of(op, inner, inner) for op in (ops.AND, ops.OR, ops.AND, ops.OR, ops.EQ, ops.NE)),
        _of(ops.NOT, inner),
        _of(ops.WHERE, inner, inner, inner),
    ]
    if not exact:
        choices += [_of(op, floats(depth - 1, exact), numbers) for op in (ops.LT, ops.GE)]
    return st.one_of(_one(leaves), *choices)


@cache
def floats(depth: int = 3, exact: bool = True, score: bool = False) -> st.SearchStrategy[Expr]:
    """Finite for moderate arguments; `score`: may read the score."""
    loads = ints(1).map(lambda at: Load(BIAS, (H, apply(ops.MOD, at, Const(5)))))
    leaves = st.one_of(fraction, loads, st.sampled_from((Scalar(CAP), Load(SLOPE, (H,)))))
    if score:
        leaves = st.one_of(leaves, st.just(Score()), st.just(Score()))
    if depth == 0:
        return leaves
    inner = floats(depth - 1, exact, score)
    mixed = st.one_of(inner, inner, ints(min(depth - 1, 1), exact))
    bounded = inner.map(lambda x: apply(ops.MIN, x, Const(3.0)))
    size = inner.map(lambda x: apply(ops.ADD, apply(ops.ABS, x), Const(0.5)))
    choices = [
        *(_of(op, inner, mixed) for op in (ops.ADD, ops.SUB, ops.MIN, ops.MAX)),
        _of(ops.MUL, inner, st.one_of(fraction, st.just(Scalar(CAP)))),
        _of(ops.DIV, mixed, size),
        *(_of(op, inner) for op in (ops.NEG, ops.ABS, ops.TANH, ops.SIGMOID, ops.SIN, ops.COS)),
        _of(ops.SOFTPLUS, inner),
        *(_of(op, bounded) for op in (ops.EXP, ops.EXP2)),
        *(_of(op, size) for op in (ops.LOG, ops.LOG2, ops.SQRT, ops.RSQRT)),
        _of(ops.WHERE, bools(depth - 1, exact), inner, mixed),
        _of(ops.FLOAT, st.one_of(ints(depth - 1, exact), bools(depth - 1, exact))),
    ]
    if not exact:
        choices += [_of(op, inner, size) for op in (ops.FLOORDIV, ops.MOD)]
    return st.one_of(_one(leaves), *choices)


@cache
def outputs(depth: int = 3) -> st.SearchStrategy[Expr]:
    """What an output clause may be under a softmax, finite where lse is -inf; no value."""
    rows = st.sampled_from((Load(BIAS, (H, apply(ops.MOD, Q_IDX, Const(5)))), Load(SLOPE, (H,))))
    results = st.sampled_from((Scalar(OUT), Scalar(OUT), Scalar(MEAN_VALUE)))
    lse = apply(ops.SIGMOID, Scalar(LSE))
    leaves = st.one_of(results, rows, fraction, st.sampled_from((Scalar(CAP), lse)))
    if depth == 0:
        return leaves
    inner = outputs(depth - 1)
    row = _of(ops.LT, st.just(Q_IDX), st.one_of(small, st.just(Scalar(WINDOW))))
    condition = st.one_of(row, _of(ops.GT, st.just(Scalar(OUT)), fraction))
    choices = [_of(op, inner, inner) for op in (ops.ADD, ops.SUB, ops.MUL, ops.MIN, ops.MAX)]
    choices += [_of(ops.TANH, inner), _of(ops.WHERE, condition, inner, inner)]
    return st.one_of(_one(leaves), *choices)


@cache
def conjuncts() -> st.SearchStrategy[Expr]:
    """One condition as people write it: causal, window, prefix, documents, blocks, dilation."""
    bound = st.one_of(st.integers(0, 40).map(Const), st.just(Scalar(WINDOW)))
    block = st.sampled_from((1, 3, 4, 16)).map(Const)
    blocks = block.map(
        lambda n: apply(ops.LE, apply(ops.FLOORDIV, KV_IDX, n), apply(ops.FLOORDIV, Q_IDX, n))
    )
    dilated = block.map(lambda n: apply(ops.EQ, apply(ops.MOD, _distance, n), Const(0)))
    same = apply(ops.EQ, Load(DOC, (B, Q_IDX)), Load(DOC, (B, KV_IDX)))
    return st.one_of(
        st.just(apply(ops.GE, Q_IDX, KV_IDX)),
        _of(ops.LT, st.just(_distance), bound),
        _of(ops.LE, st.just(apply(ops.ABS, _distance)), bound),
        _of(ops.LT, st.just(KV_IDX), bound),
        _of(ops.GE, st.just(Q_IDX), bound),
        st.just(same),
        blocks,
        dilated,
    )


def grid_conditions() -> st.SearchStrategy[Expr]:
    """Nearness along an axis of GRID."""

    def near(name: str, reach: int) -> Expr:
        pair = (coordinate(GRID, name, index) for index in (Q_IDX, KV_IDX))
        return apply(ops.LE, apply(ops.ABS, apply(ops.SUB, *pair)), Const(reach))

    return st.builds(near, st.sampled_from(("y", "x")), st.integers(0, 3))


@st.composite
def programs(draw: st.DrawFn, depth: int = 3, exact: bool = True) -> Program:
    """A whole program that declares the parameters it reads, and sometimes one that it does not."""
    mask = draw(st.one_of(st.just(TRUE), bools(depth, exact), bools(depth, exact)))
    grid = draw(st.sampled_from(((), (), GRID)))
    if grid:
        mask = apply(ops.AND, mask, draw(grid_conditions()))
    score = draw(st.one_of(st.just(Score()), floats(depth, exact, score=True)))
    normalize = draw(st.sampled_from((*[Normalize.SOFTMAX] * 4, *Normalize)))
    sinks = (None, None, Load(SLOPE, (H,)), apply(ops.MUL, Scalar(CAP), Const(0.5)))
    sink = draw(st.sampled_from(sinks)) if normalize is Normalize.SOFTMAX else None
    scale = draw(st.sampled_from((None, None, Const(0.25), apply(ops.DIV, Scalar(CAP), Const(8)))))
    read = _params_of((mask, score, *(e for e in (sink, scale) if e is not None)))
    spare = draw(st.sampled_from((None, None, WINDOW, KEEP)))
    params = tuple(param for param in PARAMS if param in read or param is spare)
    orders = (None, None, TokenOrder("natural"), *[TokenOrder("tiles", tile=(2, 3))] * bool(grid))
    order = draw(st.sampled_from(orders))
    return Program("random", params, mask, score, scale, sink, normalize, grid, order=order)


def _params_of(exprs: tuple[Expr, ...]) -> set[ScalarParam | TensorParam]:
    found: set[ScalarParam | TensorParam] = set()
    for expr in exprs:
        for node in walk(expr):
            match node:
                case Scalar(param):
                    found.add(param)
                case Load(tensor):
                    found.add(tensor)
                case _:
                    pass
    return found


def ops_of(expr: Expr) -> set[ops.Op]:
    """The operators in an expression, for tests that a strategy reaches them."""
    return {node.op for node in walk(expr) if isinstance(node, Apply)}
