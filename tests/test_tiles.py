from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attncc.binding import Binding
from attncc.ir import ops
from attncc.ir.expr import Apply, Axis, kind, walk
from attncc.ir.ops import Kind
from attncc.ir.program import Program
from attncc.passes import analyze
from attncc.tiles import EMPTY, FULL, PARTIAL, BoundPlan
from attncc.tiles.grid import TileGrid
from attncc.tiles.host import reads_nothing, visited
from attncc.tiles.segments import evaluated
from tests import strategies
from tests.cases import bindings, dense_mask, dense_tiles

TILES = st.tuples(st.sampled_from((1, 3, 4, 8, 16)), st.sampled_from((1, 2, 4, 8, 16)))


def program_of(mask) -> Program:
    return Program("random", strategies.PARAMS, mask=mask)


def defined(mask, binding: Binding) -> Binding:
    """Without nan and inf where the mask makes an int of a float: of nan that is any int."""
    made = any(
        isinstance(node, Apply)
        and node.op in (ops.INT, ops.FLOOR)
        and kind(node.args[0]) is Kind.FLOAT
        for node in walk(mask)
    )
    if not made:
        return binding
    bias = binding.tensors["bias"].nan_to_num(0.5, 0.5, 0.5)
    return replace(binding, tensors={**binding.tensors, "bias": bias})


@pytest.mark.fuzz
@given(strategies.bools(3, exact=False), bindings(poison=True), TILES)
def test_no_tile_is_misjudged(mask, binding: Binding, tile) -> None:
    binding = defined(mask, binding)
    classes = BoundPlan(analyze(program_of(mask)), binding, tile).classify()
    if 0 in (binding.q_len, binding.kv_len):
        assert classes.numel() == 0
        return
    for dtype in (torch.float64, torch.float32):
        dense = dense_tiles(dense_mask(mask, binding, dtype), tile)
        classes = classes.expand(dense.some.shape)
        assert not (dense.some & (classes == EMPTY)).any()
        assert not (~dense.every & (classes == FULL)).any()


@pytest.mark.fuzz
@given(strategies.bools(3, exact=False), bindings(shortest=1, poison=True), TILES)
def test_ranges_hold(mask, binding: Binding, tile) -> None:
    binding = defined(mask, binding)
    plan = analyze(program_of(mask))
    keep = dense_mask(mask, binding)
    bound = BoundPlan(plan, binding, tile)
    check_segments(bound.key_segments(), keep, tile[0])
    grid = TileGrid(binding, tile, plan.mask)
    queries = evaluated(grid, plan.query_ranges, Axis.KV, bound.found)
    check_segments(queries, keep.transpose(2, 3), tile[1])


def check_segments(table, keep, block: int) -> None:
    length = keep.shape[3]
    for number, rows in enumerate(keep.split(block, 2)):
        visit = union(table.visit_lo, table.visit_hi, number, length)
        assert not (rows.any(2) & ~visit).any()
        unmasked = union(table.unmasked_lo, table.unmasked_hi, number, length)
        assert not (~rows.all(2) & unmasked).any()


def union(lo, hi, number: int, length: int):
    """bool [B|1, H|1, length] of positions in a tile's segments, which lie within the length."""
    lo, hi = lo[:, :, number], hi[:, :, number]
    assert ((hi <= lo) | ((lo >= 0) & (hi <= length))).all()
    at = torch.arange(length)[:, None]
    return ((at >= lo[:, :, None]) & (at < hi[:, :, None])).any(-1)


@pytest.mark.fuzz
@given(strategies.bools(2), bindings(), TILES)
def test_counts_follow_the_classes(mask, binding: Binding, tile) -> None:
    bound = BoundPlan(analyze(program_of(mask)), binding, tile)
    classes = bound.classify()
    copies = binding.batch * binding.heads // (classes.shape[0] * classes.shape[1])
    counted = [int((classes == c).sum()) * copies for c in (FULL, PARTIAL, EMPTY)]
    assert [bound.counts.full, bound.counts.partial, bound.counts.empty] == counted


@pytest.mark.fuzz
@given(strategies.bools(2), bindings(shortest=1), TILES)
def test_exact_counts_and_density_are_the_dense_ones(mask, binding: Binding, tile) -> None:
    bound = BoundPlan(analyze(program_of(mask)), binding, tile)
    keep = dense_mask(mask, binding)
    dense = dense_tiles(keep, tile)
    exact = bound.exact_counts()
    assert exact.full == int(dense.every.sum())
    assert exact.partial == int((dense.some & ~dense.every).sum())
    assert bound.density.exact
    assert float(bound.density) == pytest.approx(keep.double().mean().item())


@given(strategies.bools(2), bindings(shortest=1), TILES, st.sampled_from((Axis.Q, Axis.KV)))
def test_the_host_counts_what_ranges_visit(mask, binding: Binding, tile, axis: Axis) -> None:
    plan = analyze(program_of(mask))
    ranges = plan.key_ranges if axis is Axis.Q else plan.query_ranges
    if ranges is None or not reads_nothing(ranges.visit):
        return
    table = evaluated(TileGrid(binding, tile, mask), ranges, axis, {})
    columns = tile[1] if axis is Axis.Q else tile[0]
    lo, hi = table.visit_lo, table.visit_hi
    count = torch.where(hi > lo, -(-hi // columns) - lo // columns, 0).sum(-1)
    found = visited(ranges.visit, axis, binding, tile)
    assert torch.equal(found, count.expand(found.shape))
