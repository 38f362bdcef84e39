"""Tiles of tables that are read at blocks, or segments, of both positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attncc
from attncc.tiles import EMPTY, FULL

TABLES = {
    "kinds": "kind[h, q_idx // 8, kv_idx // 8] == 2 "
    "or kind[h, q_idx // 8, kv_idx // 8] == 1 and q_idx >= kv_idx",
    "scaled": "2 * kind[h, q_idx // 8, kv_idx // 8] > 3 and q_idx >= kv_idx",
    "not": "not kind[h, q_idx // 8, kv_idx // 8] < 2",
    "one side": "kind[h, 0, kv_idx // 8] + kind[h, q_idx // 8, 1] == 2",
    "with a position": "kind[h, q_idx // 8, kv_idx // 8] >= kv_idx % 3",
    "shifted": "kind[h, (q_idx + 3) >> 3, (kv_idx + 5) // 8] == 1",
    "segments": "kind[h, seg[q_idx], seg[kv_idx]] != 0",
    "three": "kind[h, q_idx // 8, kv_idx // 8] == kind[h, q_idx // 16, 0]",
}


@pytest.mark.parametrize("name", TABLES)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from((2, 4, 8, 16, 32)),
    st.integers(0, 2**20),
)
def test_verdicts_are_sound(name: str, q_len: int, kv_len: int, tile: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 3, (2, 11, 11), generator=random)
    seg = torch.randint(0, 11, (80,), generator=random)
    seg = seg.sort().values if seed % 2 else seg
    params = "kind: int[heads, m, n]" + ", seg: int[tokens]" * ("seg" in TABLES[name])
    attn = attncc.compile(f"attention a({params}):\n    mask = {TABLES[name]}\n")
    given = {"kind": kind} | ({"seg": seg} if "seg" in params else {})
    lengths = {"q_len": q_len, "kv_len": kv_len, "heads": 2}
    plan = attn.plan(**lengths, **given, tile=(tile, tile))
    classes, exact = plan.classify(), plan.origin._refined
    assert (exact[classes == FULL] == FULL).all()
    assert (exact[classes == EMPTY] == EMPTY).all()


@pytest.mark.parametrize("tile", [(8, 8), (4, 8), (8, 2)])
@pytest.mark.parametrize("name", ["kinds", "scaled", "not"])
def test_tiles_within_blocks_are_known(name: str, tile: tuple[int, int]) -> None:
    torch.manual_seed(0)
    attn = attncc.compile(f"attention a(kind: int[heads, m, n]):\n    mask = {TABLES[name]}\n")
    kind = torch.randint(0, 3, (2, 11, 11), dtype=torch.int8)
    plan = attn.plan(q_len=83, kv_len=75, heads=2, kind=kind, tile=tile)
    assert plan.counts == plan.exact_counts()


@pytest.mark.parametrize("text", ["keep[h, q_idx // 8, kv_idx // 8]", "keep[h, seg[q_idx], 0]"])
def test_empty_blocks_are_skipped_by_tiles_of_two(text: str) -> None:
    torch.manual_seed(1)
    params = "keep: bool[heads, m, n]" + ", seg: int[tokens]" * ("seg" in text)
    attn = attncc.compile(f"attention a({params}):\n    mask = {text}\n")
    given = {"keep": torch.rand(1, 16, 16) < 0.1}
    if "seg" in text:
        given["seg"] = torch.arange(128) // 8
    plan = attn.plan(q_len=128, kv_len=128, **given, tile=(16, 16))
    assert plan.counts.empty == plan.exact_counts().empty > 0


def test_a_table_of_pairs_says_nothing() -> None:
    attn = attncc.compile(
        "attention a(keep: bool[q_len, kv_len]):\n    mask = keep[q_idx, kv_idx]\n"
    )
    plan = attn.plan(q_len=64, kv_len=64, keep=torch.zeros(64, 64, dtype=torch.bool), tile=(16, 16))
    assert plan.counts.partial == 16
    assert "two values in a row" in str(plan)
