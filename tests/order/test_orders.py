"""Tokens in another order: the same results, fewer tiles."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attncc
from attncc.errors import ArgumentError
from attncc.order import Choice, Orders, permuted, residues
from attncc.order.permuted import grid_order, inverse
from attncc.passes import analyze
from attncc.tiles import BoundPlan

DILATED = """
attention dilated(
        window: int = 40, step: int = 4, slope: float[heads] grad, keep: bool[batch, kv_len]
):
    let distance = q_idx - kv_idx
    mask = q_idx >= kv_idx and distance < window and distance % step == 0 and keep[b, kv_idx]
    score = score + slope[h] * distance
    sink = 0.1 * h
"""


def inputs(batch: int, q_len: int, kv_len: int, kv_heads: int = 1) -> list[Tensor]:
    random = torch.Generator().manual_seed(q_len)
    shapes = (batch, 2, q_len, 8), (batch, kv_heads, kv_len, 8), (batch, kv_heads, kv_len, 12)
    made = [torch.randn(s, dtype=torch.float64, generator=random) for s in shapes]
    return [x.requires_grad_() for x in made]


def equal(attn: Any, qkv: list[Tensor], leaves: list[Tensor], **given: Any) -> None:
    """Results and gradients in an order against the interpreter's."""
    order = given.pop("order")
    mine = attn(*qkv, return_lse=True, order=order, **given)
    wanted = attn.reference(*qkv, return_lse=True, **given)
    grads = []
    for out, lse in (mine, wanted):
        finite = lse.masked_fill(lse == -torch.inf, 0)
        total = (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() + finite.sum()
        grads.append(torch.autograd.grad(total, [*qkv, *leaves], allow_unused=True))
    for one, other in zip((*mine, *grads[0]), (*wanted, *grads[1]), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("batch", "step", "lengths"),
    [(1, 4, (64, 64)), (2, 4, (64, 64)), (5, 3, (60, 60)), (2, 3, (61, 50)), (6, 5, (33, 77))],
)
@pytest.mark.parametrize("rows_first", [False, True])
def test_residues_equal_dense(
    batch: int, step: int, lengths: tuple[int, int], rows_first: bool
) -> None:
    attn = attncc.compile(DILATED)
    qkv = inputs(batch, *lengths)
    if rows_first:
        qkv = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]
        qkv = [x.requires_grad_() for x in qkv]
    slope = torch.rand(2, dtype=torch.float64, requires_grad=True)
    keep = torch.rand(batch, lengths[1]) < 0.7
    equal(attn, qkv, [slope], order="residues", step=step, slope=slope, keep=keep)


def test_one_sequence_is_views_alone() -> None:
    attn = attncc.compile("attention a(step: int):\n    mask = (kv_idx - q_idx) % step == 0\n")
    q, k, v = (x.detach() for x in inputs(1, 64, 64))
    seen = []

    def start(program: Any, *given: Any) -> Any:
        seen.extend(given[:3])
        return lambda q, k, v: (torch.empty_like(q), None)

    found = residues.find(attn.program, attn.static.mask)
    assert found is not None
    out, _ = found.ready(start, 4, 0, {})(q, k, v)
    assert [x.data_ptr() for x in seen] == [x.data_ptr() for x in (q, k, v)]
    assert out.is_contiguous() and out.shape == q.shape


@pytest.mark.parametrize(
    "mask",
    [
        "(q_idx - kv_idx) % step == 0",
        "(kv_idx - q_idx) % 4 == 0 and q_idx >= kv_idx",
        "q_idx % step == kv_idx % step",
        "not (q_idx - kv_idx) % step != 0 and kv_idx < 7",
    ],
)
def test_masks_of_residues_are_found(mask: str) -> None:
    attn = attncc.compile(f"attention a(step: int = 4):\n    mask = {mask}\n")
    found = residues.find(attn.program, attn.static.mask)
    assert found is not None
    plan = analyze(found.ordered(4, 0, True, False))
    assert plan.key_ranges is not None and plan.key_ranges.complete
    qkv = inputs(2, 40, 40)
    equal(attn, qkv, [], order="residues")


@pytest.mark.parametrize(
    "mask",
    [
        "(q_idx + kv_idx) % 4 == 0",
        "(q_idx - kv_idx + kv_idx // 8) % 4 == 1",
        "(q_idx - kv_idx) % 4 == 0 or q_idx == 3",
        "(q_idx - kv_idx) % (kv_idx + 1) == 0",
        "(2 * q_idx - kv_idx) % 4 == 0",
        "kv_idx % 4 == 0",
    ],
)
def test_other_masks_have_none(mask: str) -> None:
    attn = attncc.compile(f"attention a():\n    mask = {mask}\n")
    assert residues.find(attn.program, attn.static.mask) is None
    with pytest.raises(ArgumentError, match="keeps no such residues apart"):
        attn(*inputs(1, 8, 8), order="residues")


# -- permutations


GRID = """
attention near(width: int = 8, reach: int = 2, bias: float[side, side] grad):
    axes (y: q_len // width, x: width)
    mask = abs(q.y - kv.y) <= reach and abs(q.x - kv.x) <= reach
    score = score + bias[q.y - kv.y + reach, q.x - kv.x + reach]
"""


@pytest.mark.parametrize("tile", [(2, 4), (3, 5), (1, 1), (16, 16)])
@pytest.mark.parametrize("length", [64, 60])
def test_grids_in_tiles_equal_dense(tile: tuple[int, int], length: int) -> None:
    attn = attncc.compile(GRID)
    bias = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    equal(attn, inputs(2, length, length), [bias], order=tile, bias=bias)


def test_tokens_may_be_handed_in_in_order() -> None:
    attn = attncc.compile(GRID)
    bias = torch.randn(5, 5)
    q, k, v = (x.detach().float() for x in inputs(1, 64, 64))
    order = grid_order((8, 8), (2, 4), 64, torch.device("cpu"))
    out = attn(*(x[:, :, order] for x in (q, k, v)), order=(2, 4), ordered=True, bias=bias)
    torch.testing.assert_close(out[:, :, inverse(order)], attn.reference(q, k, v, bias=bias))
    with pytest.raises(ArgumentError, match="natural order"):
        attn(q, k, v, ordered=True, order="natural", bias=bias)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.lists(st.integers(1, 5), min_size=3, max_size=3),
    st.integers(0, 20),
)
@settings(max_examples=100)
def test_grid_orders_go_tile_by_tile(sizes: list[int], tile: list[int], more: int) -> None:
    tile = tile[: len(sizes)]
    tokens = int(np.prod(sizes)) + more
    order = grid_order(tuple(sizes), tuple(tile), tokens, torch.device("cpu"))
    assert order.sort().values.equal(torch.arange(tokens))
    at = order.numpy()
    coordinates = []
    for size in reversed(sizes[1:]):
        coordinates.insert(0, at % size)
        at = at // size
    coordinates.insert(0, at)
    keys = [(c // t, c % t) for c, t in zip(coordinates, tile, strict=True)]
    listed = list(zip(*(k[0] for k in keys), *(k[1] for k in keys), strict=True))
    assert listed == sorted(listed)


def counts(text: str, tile: tuple[int, ...], grid: tuple[int, ...], **scalars: Any) -> Any:
    attn = attncc.compile(text)
    program, names = permuted.permuted(attn.program, attn.static.mask)
    n = int(np.prod(grid))
    order = grid_order(grid, tile, n, torch.device("cpu"))
    return (
        attncc.compile(program)
        .plan(q_len=n, kv_len=n, **scalars, **dict.fromkeys(names, order))
        .counts
    )


NEIGHBORS = """
from std import neighborhood_strided
attention near(size_y: int, size_x: int, stride_y: int, stride_x: int):
    axes (y: 64, x: 64)
    mask = neighborhood_strided(q.y, kv.y, 64, size_y, stride_y) \
        and neighborhood_strided(q.x, kv.x, 64, size_x, stride_x)
"""


@pytest.mark.parametrize(
    ("window", "stride", "expected"),
    [
        ((24, 48), (8, 16), (288, 0, 736)),
        ((24, 48), (1, 1), (140, 336, 548)),
        ((13, 13), (1, 1), (0, 220, 804)),
    ],
)
def test_counts_of_tiles_are_exact(window: Any, stride: Any, expected: Any) -> None:
    sizes = dict(zip(("size_y", "size_x"), window, strict=True))
    strides = dict(zip(("stride_y", "stride_x"), stride, strict=True))
    found = counts(NEIGHBORS.replace("\\\n", " "), (8, 16), (64, 64), **sizes, **strides)
    assert (found.full, found.partial, found.empty) == expected


def test_output_clauses_are_of_all_tokens() -> None:
    text = """
attention a(gate: float[q_len]):
    axes (y: q_len // 8, x: 8)
    mask = (q_idx - kv_idx) % 2 == 0 and abs(q.x - kv.x) < 3
    output = gate[q_idx] * out + value - 0.5 * mean_value
"""
    attn = attncc.compile(text)
    assert residues.find(attn.program, attn.static.mask) is None
    qkv = [x.detach() for x in inputs(2, 64, 64)]
    gate = torch.rand(64, dtype=torch.float64)
    out = attn(*qkv, gate=gate, order=(2, 4))
    torch.testing.assert_close(out, attn.reference(*qkv, gate=gate))


# -- the choice


def chosen(attn: Any, device: str = "cuda", n: int = 4096, **scalars: Any) -> Choice | None:
    lengths = {"batch": 2, "heads": 16, "q_len": n, "kv_len": n, "head_dim": 128}
    found: Orders = attn._compiled.orders
    return found.choose(attn.plan(**lengths, **scalars).binding, "auto", device)


def test_dilation_is_taken_by_residue() -> None:
    attn = attncc.compile("examples/dilated_window.attn")
    choice = chosen(attn, n=8192)
    assert choice is not None and choice.step == 4
    assert chosen(attn, n=256) is None, "a class has half a tile"
    assert chosen(attn, n=8192, step=1) is None
    assert chosen(attn, n=8192, step=100) is None


def test_copies_must_pay() -> None:
    attn = attncc.compile(NEIGHBORS.replace("\\\n", " ").replace("64", "128"))
    common = {"stride_y": 1, "stride_x": 1}
    assert chosen(attn, n=128**2, size_y=13, size_x=13, **common) is None
    choice = chosen(attn, n=128**2, size_y=24, size_x=48, stride_y=8, stride_x=16)
    assert choice is not None and choice.tile == (8, 16)
    assert "1152 tiles" in choice.why
    begun = time.perf_counter()
    assert chosen(attn, n=2**20, size_y=24, size_x=48, stride_y=8, stride_x=16) is None
    assert time.perf_counter() - begun < 2, "an order is chosen without all pairs of tiles"


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("residue", "order is 'residue'"),
        ((4,), "tiles of 1 axes"),
        ((4, 0), "ints above 0"),
        (torch.arange(3), "order has 3 positions"),
        (torch.rand(64), "torch.float32 tensor"),
    ],
)
def test_orders_that_do_not_fit(order: Any, message: str) -> None:
    attn = attncc.compile(GRID)
    with pytest.raises(ArgumentError, match=message):
        attn(*inputs(1, 64, 64), order=order, bias=torch.zeros(5, 5, dtype=torch.float64))


def test_any_order_of_tokens_may_be_given() -> None:
    text = "attention a(doc: int[batch, kv_len]):\n    mask = doc[b, q_idx] == doc[b, kv_idx]\n"
    attn = attncc.compile(text)
    doc = torch.randint(0, 4, (1, 64), generator=torch.Generator().manual_seed(0))
    order = doc[0].argsort(stable=True)
    equal(attn, inputs(1, 64, 64), [], order=order, doc=doc)
    program, names = permuted.permuted(attn.program, attn.static.mask)
    given_ = {"doc": doc, **dict.fromkeys(names, order)}
    sorted_counts = attncc.compile(program).plan(q_len=64, kv_len=64, tile=(8, 8), **given_).counts
    natural = attn.plan(q_len=64, kv_len=64, tile=(8, 8), doc=doc).counts
    assert sorted_counts.empty > natural.empty


def test_plans_keep_their_arguments() -> None:
    attn = attncc.compile("examples/dilated_window.attn")
    q, k, v = (x.detach() for x in inputs(1, 600, 600))
    plan = attn.plan(q, k, v, step=3)
    assert isinstance(plan.retiled((64, 64)), BoundPlan)
    torch.testing.assert_close(
        attn(q, k, v, plan=plan, order="residues"), attn.reference(q, k, v, step=3)
    )


def test_explain_tells_the_order() -> None:
    attn = attncc.compile("examples/dilated_window.attn")
    plan = attn.plan(q_len=8192, kv_len=8192, heads=2)
    lines = Orders(plan.plan).described(plan.binding)
    assert "4 classes of every 4th token" in lines[0]
    one = attncc.compile("attention a():\n    mask = q_idx >= kv_idx and q_idx - kv_idx < 256\n")
    dense = one.plan(q_len=2048, kv_len=2048, heads=2).counts
    assert lines[1].endswith(
        f"{4 * dense.full} full, {4 * dense.partial} partial, {4 * dense.empty} empty"
    )
