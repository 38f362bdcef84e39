"""Ranges from comparisons with sorted tensors, and what searches find."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attncc.binding import Binding, bind_lengths
from attncc.frontend import parse
from attncc.ir import ops
from attncc.ir.expr import KV_IDX, Q_IDX, Axis, B, Const, H, Load, Scalar, TensorParam, apply
from attncc.ir.ops import Kind
from attncc.ir.plan import FAR, Blocks
from attncc.ir.program import Program
from attncc.passes import analyze
from attncc.plans import PlanCache
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


def indices(position, safe):
    plain = st.just(position)
    inside = st.one_of(plain, plain, _of(ops.FLOORDIV, plain, st.sampled_from((2, 3)).map(Const)))
    if safe:
        return inside
    return st.one_of(inside, _of(ops.ADD, plain, small), _of(ops.SUB, small, plain))


def loads(position, safe):
    inside = indices(position, True).map(lambda at: Load(DOC, (B, at)))
    if safe:
        return inside
    return st.one_of(
        inside,
        indices(position, safe).map(lambda at: Load(DOC, (B, at))),
        indices(position, safe).map(lambda at: Load(END, (H, at))),
        indices(position, safe).map(lambda at: Load(STEP, (at,))),
        indices(position, safe).map(lambda at: Load(END, (H, Load(DOC, (B, at))))),
    )


def sums(position, safe):
    read = loads(position, safe)
    return st.one_of(
        read,
        read,
        _of(ops.ADD, read, small),
        _of(ops.MUL, read, st.sampled_from((2, -1, -3)).map(Const)),
        _of(ops.FLOORDIV, read, st.sampled_from((Const(2), Const(3) if safe else Scalar(WINDOW)))),
        _of(ops.MIN, read, small),
    )


def others(position, safe):
    return st.one_of(sums(position, safe), st.just(position), small, st.just(Scalar(WINDOW)))


def comparisons(safe):
    pairs = st.sampled_from(((Q_IDX, KV_IDX), (KV_IDX, Q_IDX)))
    return st.tuples(pairs, st.sampled_from(ORDERS)).flatmap(
        lambda drawn: _of(drawn[1], sums(drawn[0][0], safe), others(drawn[0][1], safe))
    )


def masks(safe=False):
    """safe: no read leaves its tensor where q_len <= kv_len; else some do, and are clamped here."""
    conjuncts = st.one_of(
        comparisons(safe), comparisons(safe), st.just(apply(ops.GE, Q_IDX, KV_IDX))
    )
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


SAME = """
attention same(doc: int[batch, kv_len] sorted, bias: float[heads]):
    mask = doc[b, q_idx] == doc[b, kv_idx]
    score = score + bias[h]
"""


def bound_of(text: str, q_len: int, kv_len: int, **arguments: object) -> BoundPlan:
    plan = analyze(parse(text)[0])
    sizes = {"q_len": q_len, "kv_len": kv_len, "heads": 2}
    return PlanCache(plan)(bind_lengths(plan.program, **sizes, arguments=arguments), (4, 4))


def test_what_is_found() -> None:
    doc = torch.tensor([[1, 1, 1, 4, 4, 7]])
    bound = bound_of(SAME, 5, 6, doc=doc, bias=torch.zeros(2))
    assert bound.plan.blocks is Blocks.RANGES
    found = {name: x.tolist() for name, x in bound.found.items()}
    assert found == {
        "first_key_0": [[-FAR, -FAR, -FAR, 3, 3]],  # whoever read before the start would see a 1
        "past_key_0": [[3, 3, 3, 5, 5]],
        "first_query_0": [[-FAR, -FAR, -FAR, 3, 3, 5]],
        "past_query_0": [[3, 3, 3, 5, 5, FAR]],
    }
    assert all(x.dtype == torch.int32 for x in bound.found.values())


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 5), (5, 0), (0, 0)])
def test_no_queries_or_no_keys(q_len: int, kv_len: int) -> None:
    doc = torch.zeros((1, kv_len), dtype=torch.int64)
    bound = bound_of(SAME, q_len, kv_len, doc=doc, bias=torch.zeros(2))
    shapes = {name: tuple(x.shape) for name, x in bound.found.items()}
    assert shapes["first_key_0"] == (1, q_len) and shapes["past_query_0"] == (1, kv_len)
    assert bound.counts.total == 0


def test_a_search_without_a_position_is_one_number() -> None:
    text = "attention t(doc: int[kv_len] sorted, least: int):\n    mask = doc[kv_idx] >= least\n"
    doc = torch.tensor([2, 3, 5, 5, 8])
    for least, first in ((4, 2), (2, -FAR), (9, FAR)):
        (at,) = bound_of(text, 3, 5, doc=doc, least=least).found.values()
        assert at.shape == () and at.item() == first


def test_calls_of_one_mask_and_all_tiles_share_what_is_found() -> None:
    plan = analyze(parse(SAME)[0])
    cache, doc = PlanCache(plan), torch.arange(40)[None] // 7
    made = []
    for bias in (torch.zeros(2), torch.ones(2)):
        sizes = {"q_len": 40, "kv_len": 40, "heads": 2}
        binding = bind_lengths(plan.program, **sizes, arguments={"doc": doc, "bias": bias})
        bound = cache(binding, (128, 128))
        made += [bound.found, bound.retiled((16, 16)).found]
    assert all(one is made[0] for one in made)


def test_tiles_that_visit_most_come_first() -> None:
    (program,) = parse(
        "attention t(doc: int[batch, kv_len] sorted):\n"
        "    mask = q_idx >= kv_idx and doc[b, q_idx] == doc[b, kv_idx]\n"
    )
    cuts = torch.rand(2, 500, generator=torch.Generator().manual_seed(0)) < 0.02
    arguments = {"doc": cuts.long().cumsum(1)}
    lengths = {"q_len": 500, "kv_len": 500, "batch": 2, "heads": 3, "kv_heads": 1, "head_dim": 4}
    bound = BoundPlan(
        analyze(program), bind_lengths(program, **lengths, arguments=arguments), (16, 8)
    )
    visited = bound.classify() != 0
    order, work = bound.query_order, visited.sum(3)
    assert order.dtype == torch.int32
    assert order.shape == work.shape == (2, 1, work.shape[2])
    assert torch.equal(order.sort(-1).values[0, 0], torch.arange(work.shape[2]).int())
    assert (work.gather(-1, order.long()).diff() <= 0).all()
    assert work.unique().numel() > 2
