"""Ranges from comparisons with sorted tensors, and what searches find."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attncc.binding import Binding
from attncc.ir import ops
from attncc.ir.expr import KV_IDX, Q_IDX, Axis, B, Const, H, Load, Scalar, TensorParam, apply
from attncc.ir.ops import Kind
from attncc.ir.program import Program
from attncc.passes import analyze
from attncc.searches import Found
from attncc.tiles import BoundPlan
from attncc.tiles.grid import TileGrid
from attncc.tiles.segments import evaluated
from tests.cases import dense_mask
from tests.strategies import WINDOW
from tests.test_tiles import TILES, check_segments, union

DOC = TensorParam("doc", Kind.INT, ("batch", "kv_len"), sorted=True)
END = TensorParam("end", Kind.INT, ("heads", "n"), sorted=True)
STEP = TensorParam("step", Kind.INT, (5,), sorted=True)
PARAMS = (WINDOW, DOC, END, STEP)

small = st.integers(-3, 7).map(Const)
ORDERS = (ops.LT, ops.LE, ops.GT, ops.GE, ops.EQ, ops.NE)


def _of(op, *args):
    return st.builds(apply, st.just(op), *args)


def indices(position):
    """Where sorted tensors are read: in range or not, since reads are clamped here."""
    plain = st.just(position)
    return st.one_of(
        plain,
        plain,
        _of(ops.ADD, plain, small),
        _of(ops.FLOORDIV, plain, st.sampled_from((2, 3)).map(Const)),
        _of(ops.SUB, small, plain),
    )


def loads(position):
    return st.one_of(
        indices(position).map(lambda at: Load(DOC, (B, at))),
        indices(position).map(lambda at: Load(END, (H, at))),
        indices(position).map(lambda at: Load(STEP, (at,))),
        indices(position).map(lambda at: Load(END, (H, Load(DOC, (B, at))))),
    )


def sums(position):
    read = loads(position)
    return st.one_of(
        read,
        read,
        _of(ops.ADD, read, small),
        _of(ops.MUL, read, st.sampled_from((2, -1, -3)).map(Const)),
        _of(ops.FLOORDIV, read, st.sampled_from((Const(2), Scalar(WINDOW)))),
        _of(ops.MIN, read, small),
    )


def others(position):
    return st.one_of(sums(position), st.just(position), small, st.just(Scalar(WINDOW)))


def comparisons():
    pairs = st.sampled_from(((Q_IDX, KV_IDX), (KV_IDX, Q_IDX)))
    return st.tuples(pairs, st.sampled_from(ORDERS)).flatmap(
        lambda drawn: _of(drawn[1], sums(drawn[0][0]), others(drawn[0][1]))
    )


def masks():
    conjuncts = st.one_of(comparisons(), comparisons(), st.just(apply(ops.GE, Q_IDX, KV_IDX)))
    either = st.one_of(conjuncts, _of(ops.OR, conjuncts, conjuncts), _of(ops.NOT, conjuncts))
    return st.one_of(conjuncts, _of(ops.AND, either, either))


@st.composite
def bindings(draw):
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    q_len, kv_len, n = (draw(st.integers(1, 20)) for _ in range(3))
    sizes = {"batch": batch, "heads": heads, "kv_heads": heads, "head_dim": 16}
    sizes |= {"q_len": q_len, "kv_len": kv_len}
    rng = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def ordered(*shape):
        most = draw(st.sampled_from((2, 6, 25)))
        return torch.randint(-2, most, shape, generator=rng).sort(-1).values

    tensors = {
        "doc": ordered(batch, kv_len).to(draw(st.sampled_from((torch.int8, torch.int64)))),
        "end": ordered(heads, n),
        "step": ordered(5).int(),
    }
    return Binding(**sizes, scalars={**sizes, "window": draw(st.integers(-2, 9))}, tensors=tensors)


@pytest.mark.fuzz
@given(masks(), bindings(), TILES)
def test_ranges_hold(mask, binding, tile) -> None:
    plan = analyze(Program("random", PARAMS, mask=mask))
    keep = dense_mask(mask, binding)
    bound = BoundPlan(plan, binding, tile)
    check_segments(bound.key_segments(), keep, tile[0])
    grid = TileGrid(binding, tile, plan.mask)
    queries = evaluated(grid, plan.query_ranges, Axis.KV, bound.found)
    check_segments(queries, keep.transpose(2, 3), tile[1])


@pytest.mark.fuzz
@given(masks(), bindings())
def test_complete_ranges_of_single_rows_are_exact(mask, binding) -> None:
    plan = analyze(Program("random", PARAMS, mask=mask))
    keep = dense_mask(mask, binding)
    grid = TileGrid(binding, (1, 1), plan.mask)
    found = Found(plan, binding).tensors
    for ranges, axis, rows in (
        (plan.key_ranges, Axis.Q, keep),
        (plan.query_ranges, Axis.KV, keep.transpose(2, 3)),
    ):
        if not ranges.complete:
            continue
        table = evaluated(grid, ranges, axis, found)
        for number in range(rows.shape[2]):
            for lo, hi in (
                (table.visit_lo, table.visit_hi),
                (table.unmasked_lo, table.unmasked_hi),
            ):
                known = union(lo, hi, number, rows.shape[3])
                assert known.expand(rows[:, :, number].shape).equal(rows[:, :, number])
