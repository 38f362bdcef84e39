"""Tensors read once a block of both positions: what the tile test knows of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attncc.binding import bind_lengths
from attncc.frontend import parse
from attncc.passes import analyze
from attncc.tiles import EMPTY, FULL, PARTIAL, BoundPlan
from tests.cases import dense_mask, dense_tiles

AT = "table[b, h, q_idx // {q}, kv_idx // {kv}]"

EXACT = {
    "listed": "{at} > 0",
    "kinds": "{at} > 0 and ({at} > 1 or q_idx >= kv_idx)",
    "one of": "{at} == 2 or {at} == 0",
    "bits": "({at} >> 1) & 1 == 1",
    "not": "not ({at} != 1)",
    "looked up": "wanted[{at}]",
    "of many": "table[b, {at} % 2, q_idx // {q}, kv_idx // {kv}] > 0",
}
"""Exact where a tile lies in one block and causality does not cut it."""

SOUND = {
    **EXACT,
    "reach": "q_idx - kv_idx < 4 * {at} and kv_idx <= q_idx + {at}",
    "float": "weight[h, q_idx // {q}, kv_idx // {kv}] * 2.0 > 0.5",
    "chosen": "where({at} == 1, kv_idx % 3 == 0, {at} == 2)",
    "counted": "float({at}) + weight[h, q_idx // {q}, kv_idx // {kv}] >= 1.0",
    "remainder": "{at} % 2 == (q_idx - kv_idx) % 2",
    "shifted": "table[b, h, min((q_idx + 5) // {q}, {rows}), max(kv_idx - 3, 0) // {kv}] >= 1",
    "diagonals": "table[b, h, 0, abs(q_idx - kv_idx) // {kv}] > 0",
    "diagonal blocks": "table[b, h, q_idx // {q}, abs(q_idx // {kv} - kv_idx // {kv})] > 0",
}


def bound_of(
    mask: str, block: tuple[int, int], tile: tuple[int, int], lengths: tuple[int, int], seed: int
) -> BoundPlan:
    rng = torch.Generator().manual_seed(seed)
    rows, columns = (-(-length // size) for length, size in zip(lengths, block, strict=True))
    at = AT.format(q=block[0], kv=block[1])
    text = mask.format(at=at, q=block[0], kv=block[1], rows=rows - 1)
    params = {
        "table": "int[batch, heads, rows, columns]",
        "weight": "float[heads, rows, columns]",
        "wanted": "bool[3]",
    }
    weight = torch.rand(2, rows, columns, generator=rng, dtype=torch.float64)
    weight[:, 0, 0] = torch.nan
    tensors = {
        # of three rows and columns each, so that blocks of a kind have neighbours of it
        "table": torch.randint(0, 3, (2, 2, 3, 3), generator=rng)
        .repeat_interleave(-(-rows // 3), 2)[:, :, :rows]
        .repeat_interleave(-(-columns // 3), 3)[..., :columns]
        .to(torch.int8),
        "weight": weight,
        "wanted": torch.tensor([False, True, True]),
    }
    read = [name for name in params if f"{name}[" in text]
    declared = ", ".join(f"{name}: {params[name]}" for name in read)
    (program,) = parse(f"attention t({declared}):\n    mask = {text}\n")
    binding = bind_lengths(
        program,
        q_len=lengths[0],
        kv_len=lengths[1],
        batch=2,
        heads=2,
        arguments={name: tensors[name] for name in read},
    )
    return BoundPlan(analyze(program), binding, tile)


SIZES = st.sampled_from((1, 2, 3, 4, 8, 16))
PAIRS = st.tuples(SIZES, SIZES)


@pytest.mark.fuzz
@given(
    st.sampled_from(sorted(SOUND)),
    PAIRS,
    PAIRS,
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.integers(0, 99),
)
def test_no_tile_is_misjudged(name, block, tile, lengths, seed) -> None:
    if name == "diagonals":  # one row has all that are needed
        lengths = (min(lengths), max(lengths))
    if name == "diagonal blocks":
        block, lengths = (block[1], block[1]), (min(lengths), max(lengths))
    bound = bound_of(SOUND[name], block, tile, lengths, seed)
    for dtype in (torch.float64, torch.float32):
        dense = dense_tiles(dense_mask(bound.plan.mask, bound.binding, dtype), tile)
        classes = bound.classify().expand(dense.some.shape)
        assert not (dense.some & (classes == EMPTY)).any()
        assert not (~dense.every & (classes == FULL)).any()


@pytest.mark.fuzz
@given(
    st.sampled_from(sorted(EXACT)),
    PAIRS,
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.integers(0, 99),
)
def test_tiles_within_a_block_are_known_exactly(name, tile, times, lengths, seed) -> None:
    block = tile[0] * times[0], tile[1] * times[1]
    bound = bound_of(EXACT[name], block, tile, lengths, seed)
    assert bound.counts == bound.exact_counts()


@pytest.mark.parametrize("tile", [(16, 16), (16, 8), (8, 16)])
def test_tiles_of_two_by_two_blocks_are_known_by_all_of_them(tile) -> None:
    bound = bound_of(SOUND["listed"], (8, 8), tile, (120, 117), 3)
    assert bound.counts == bound.exact_counts()
    assert set(bound.classify().flatten().tolist()) == {EMPTY, PARTIAL, FULL}


def test_tiles_of_more_blocks_are_partial() -> None:
    bound = bound_of(SOUND["listed"], (4, 4), (16, 16), (64, 64), 0)
    assert bound.counts.partial == bound.counts.total
    assert any("two values in a row" in note.text for note in bound.plan.notes)
