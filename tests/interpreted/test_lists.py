from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from triton.runtime.errors import InterpreterError

from attncc.backends.triton.classify import KEYS, QUERIES
from attncc.backends.triton.lists import ListMaker, key_lists
from attncc.binding import Binding, bind_lengths
from attncc.frontend import parse
from attncc.ir.plan import Blocks, Plan
from attncc.ir.program import Program
from attncc.passes import analyze
from attncc.plans import PlanCache
from attncc.tiles import EMPTY, FULL, PARTIAL, BoundPlan
from tests import strategies
from tests.cases import bindings, dense_mask, dense_tiles

TILES = st.tuples(st.sampled_from((1, 4, 8)), st.sampled_from((2, 4, 16)))
CHUNKS = st.sampled_from((2, 4, 16))
FEWER = settings(max_examples=max(15, settings.default.max_examples // 4))
"""The interpreter takes a second for a program."""


def plan_of(mask) -> Plan:
    """With lists, even where ranges would do."""
    plan = analyze(Program("random", strategies.PARAMS, mask=mask))
    return replace(plan, blocks=Blocks.LISTS)


def classes_of(lists, bound: BoundPlan, *, transposed: bool) -> torch.Tensor:
    """The classes that the lists spell out, each checked to be ascending and in its own room."""
    rows = lists.start.shape[2]
    columns = bound.q_tiles if transposed else bound.kv_tiles
    found = torch.full((*lists.start.shape, columns), EMPTY, dtype=torch.int8)
    taken = torch.zeros(lists.index.numel(), dtype=torch.bool)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in lists.start.shape)).tolist():
        at = tuple(at)
        start = int(lists.start[at])
        for count, value in ((lists.full_count, FULL), (lists.partial_count, PARTIAL)):
            end = start + int(count[at])
            tiles = lists.index[start:end].long()
            assert not taken[start:end].any()
            taken[start:end] = True
            assert (tiles.diff() > 0).all()
            found[at][tiles] = value
            start = end
    if transposed:
        assert lists.order is None
        return found.transpose(2, 3)
    assert lists.order.sort(-1).values.equal(torch.arange(rows).expand(lists.order.shape).int())
    return found


def check(bound: BoundPlan, chunk: int) -> None:
    maker = ListMaker(bound, chunk, width=8)
    classes = bound.classify()
    demoted = classes.clone()
    if bound.binding.kv_len % bound.tile[1]:
        demoted[..., -1].clamp_(max=PARTIAL)
    keys = classes_of(maker.lists(QUERIES, KEYS), bound, transposed=False)
    assert keys.equal(demoted)
    queries = classes_of(maker.lists(KEYS, QUERIES), bound, transposed=True)
    left_out = queries.eq(EMPTY) & classes.ne(EMPTY)
    assert torch.where(left_out, classes, queries).equal(classes)
    if left_out.any():  # the ranges of queries may know more than the test does
        dense = dense_tiles(dense_mask(bound.plan.mask, bound.binding), bound.tile)
        assert not (dense.some & left_out).any()


@contextmanager
def reject_what_the_interpreter_lacks() -> Iterator[None]:
    """It spreads a scalar comparison of floats over a tile as floats (Triton 3.7.1)."""
    try:
        yield
    except InterpreterError as error:
        if "ufunc 'bitwise" not in str(error).replace("\\", ""):
            raise
        reject()


@pytest.mark.fuzz
@FEWER
@given(strategies.bools(3), bindings(shortest=1), TILES, CHUNKS)
def test_lists_are_those_of_the_bound_plan(mask, binding: Binding, tile, chunk) -> None:
    check(BoundPlan(plan_of(mask), binding, tile), chunk)


@pytest.mark.fuzz
@FEWER
@given(strategies.bools(3, exact=False), bindings(shortest=1), TILES, CHUNKS)
def test_no_tile_is_misjudged(mask, binding: Binding, tile, chunk) -> None:
    bound = BoundPlan(plan_of(mask), binding, tile)
    dense = dense_tiles(dense_mask(mask, binding, torch.float32), tile)
    maker = ListMaker(bound, chunk, width=8)
    for transposed, sides in ((False, (QUERIES, KEYS)), (True, (KEYS, QUERIES))):
        with reject_what_the_interpreter_lacks():
            lists = maker.lists(*sides)
        classes = classes_of(lists, bound, transposed=transposed)
        classes = classes.expand(dense.some.shape)
        assert not (dense.some & (classes == EMPTY)).any()
        assert not (~dense.every & (classes == FULL)).any()


def bound_of(text: str, tile=(8, 4), *, tensors=None, q_len=61, kv_len=61, **scalars) -> BoundPlan:
    program = parse(text)[0]
    sizes = {"batch": 1, "heads": 2, "kv_heads": 1, "q_len": q_len, "kv_len": kv_len}
    sizes["head_dim"] = 16
    binding = Binding(**sizes, scalars={**sizes, **scalars}, tensors=tensors or {})
    return BoundPlan(analyze(program), binding, tile)


DOCUMENTS = """
attention documents(doc: int[batch, kv_len]):
    mask = q_idx >= kv_idx and doc[b, q_idx] == doc[b, kv_idx]
"""


def documents(*lengths: int) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


def test_documents() -> None:
    bound = bound_of(DOCUMENTS, tensors={"doc": documents(20, 5, 30, 6)})
    assert bound.plan.blocks is Blocks.LISTS
    check(bound, 2)


def test_causal_lists_take_half_the_room() -> None:
    bound = bound_of(DOCUMENTS, (4, 4), tensors={"doc": documents(64)}, q_len=64, kv_len=64)
    lists = ListMaker(bound).lists(QUERIES, KEYS)
    assert lists.index.numel() == 16 * 17 // 2
    assert lists.index.dtype == torch.int16


def test_heavy_rows_come_first() -> None:
    bound = bound_of(DOCUMENTS, tensors={"doc": documents(20, 5, 30, 6)})
    lists = ListMaker(bound).lists(QUERIES, KEYS)
    work = lists.full_count + lists.partial_count
    assert (work.gather(-1, lists.order.long()).diff() <= 0).all()


def test_nan_makes_a_tile_unknown() -> None:
    text = """
attention near(place: float[kv_len]):
    mask = min(place[q_idx], 100.0) <= place[kv_idx]
"""
    place = torch.arange(61.0)
    place[[3, 30]] = torch.nan
    check(bound_of(text, tensors={"place": place}), 2)


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (1, 1)])
def test_short_lengths(lengths) -> None:
    q_len, kv_len = lengths
    doc = torch.zeros((1, max(lengths)), dtype=torch.int64)[:, :kv_len]
    bound = bound_of(DOCUMENTS, tensors={"doc": doc}, q_len=q_len, kv_len=kv_len)
    lists = ListMaker(bound).lists(QUERIES, KEYS)
    assert lists.partial_count.sum() == (1 if lengths == (1, 1) else 0)


def test_parameters_may_be_named_as_summaries_are() -> None:
    text = """
attention taken(q_low_0: int[kv_len], kv_high_1: int[kv_len], kv_low_2: int = 3, q_low_0_: int = 1):
    mask = q_low_0[q_idx] * q_low_0_ <= kv_high_1[kv_idx] and kv_high_1[kv_idx] != kv_low_2
"""
    rng = torch.Generator().manual_seed(0)
    values = torch.randint(0, 6, (2, 61), generator=rng).sort(-1).values
    tensors = dict(zip(("q_low_0", "kv_high_1"), values, strict=True))
    bound = bound_of(text, tensors=tensors, kv_low_2=3, q_low_0_=1)
    names = {n for s in bound.plan.tiles.summaries for n in (s.low.name, s.high.name)}
    assert names and names.isdisjoint(p.name for p in bound.plan.program.params)
    classes = bound.classify()
    assert set(classes.flatten().tolist()) == {EMPTY, PARTIAL, FULL}
    dense = dense_tiles(dense_mask(bound.plan.mask, bound.binding), bound.tile)
    assert (classes.eq(FULL) <= dense.every).all() and (dense.some <= classes.ne(EMPTY)).all()
    check(bound, 2)


BLOCKS = """
attention blocks(kind: int[heads, rows, columns], more: bool[columns, rows], near: float[rows]):
    let own = kind[h, q_idx // 8, kv_idx // 8]
    let tuned = near[abs(q_idx // 8 - kv_idx // 8)] < 1.5
    mask = own > 0 and (own > 1 or q_idx >= kv_idx) and (tuned or more[kv_idx // 8, q_idx // 8])
"""


@pytest.mark.parametrize("tile", [(8, 8), (4, 8), (16, 8), (16, 32)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64])
def test_tables_of_blocks(tile, dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    tensors = {
        "kind": torch.randint(0, 3, (2, 8, 8), generator=rng).to(dtype),
        "more": torch.rand(8, 8, generator=rng) < 0.5,
        "near": torch.arange(8.0).roll(2),
    }
    bound = bound_of(BLOCKS, tile, tensors=tensors)
    check(bound, 2)
    if tile[0] <= 8:
        assert bound.counts == bound.exact_counts()


def test_calls_of_one_mask_share_lists() -> None:
    text = "attention p(doc: int[kv_len], bias: float[heads]):\n"
    text += "    mask = doc[q_idx] == doc[kv_idx]\n    score = score + bias[h]\n"
    plan = analyze(parse(text)[0])
    cache, doc = PlanCache(plan), torch.arange(40) // 7
    made = []
    for bias in (torch.zeros(2), torch.ones(2)):
        sizes = {"q_len": 40, "kv_len": 40, "heads": 2}
        binding = bind_lengths(plan.program, **sizes, arguments={"doc": doc, "bias": bias})
        made.append(key_lists(cache(binding, (128, 128)).retiled((16, 16))))
    assert made[0] is made[1]


@pytest.mark.parametrize("tile", [(8, 4), (16, 8), (2, 16)])
def test_tables_of_blocks_and_segments(tile: tuple[int, int]) -> None:
    text = """
attention kinds(kind: int[heads, m, n], seg: int[tokens], keep: bool[s, s]):
    let block = kind[h, q_idx // 8, kv_idx // 8]
    mask = (block == 2 or block == 1 and q_idx >= kv_idx) and keep[seg[q_idx], seg[kv_idx]]
"""
    rng = torch.Generator().manual_seed(2)
    tensors = {
        "kind": torch.randint(0, 3, (2, 8, 8), generator=rng, dtype=torch.int8),
        "seg": torch.arange(61) // 20,
        "keep": torch.rand(4, 4, generator=rng) < 0.6,
    }
    bound = bound_of(text, tile, tensors=tensors)
    classes = bound.classify()
    assert classes.eq(EMPTY).any() and (tile == (16, 8) or classes.eq(FULL).any())
    dense = dense_tiles(dense_mask(bound.plan.mask, bound.binding), tile)
    assert (classes.eq(FULL) <= dense.every).all() and (dense.some <= classes.ne(EMPTY)).all()
    check(bound, 2)
