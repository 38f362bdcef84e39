"""attncc.flex is torch.nn.attention.flex_attention by other means."""

from __future__ import annotations

import functools
import math
import time
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention as theirs

from attncc import flex
from attncc.errors import ArgumentError, AttnccError, BoundsError, UnsupportedError
from attncc.flex import variants

B, H, N, D = 2, 4, 80, 16

DOC = torch.tensor([[0] * 30 + [1] * 27 + [2] * 23, [5] * 50 + [3] * 30], dtype=torch.int32)
LENGTH = torch.tensor([70, 13])
OFFSET = torch.tensor(7)
RNG = torch.Generator().manual_seed(0)
KEEP = torch.rand(B, H, N, N, generator=RNG) < 0.6
SLOPE = torch.rand(H, generator=RNG)
BIAS = torch.randn(H, 2 * N, generator=RNG)
GAIN = torch.tensor(0.7)
SINKS = 4


def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


def window(size: int) -> Any:
    return lambda b, h, q, k: (q >= k) & (q - k < size)


def documents(b: Any, h: Any, q: Any, k: Any) -> Any:
    return DOC[b, q] == DOC[b, k]


def padded(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (q < LENGTH[b]) & (k < LENGTH[b])


def alibi(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return s + SLOPE[h] * (k - q)


def softcap(cap: float) -> Any:
    return lambda s, b, h, q, k: cap * torch.tanh(s / cap)


MASKS: dict[str, Any] = {
    "noop": flex.noop_mask,
    "causal": causal,
    "window": window(19),
    "sinks": lambda b, h, q, k: (q >= k) & ((q - k < 9) | (k < SINKS)),
    "prefix": lambda b, h, q, k: (q >= k) | (k < LENGTH[b]),
    "documents": flex.and_masks(causal, documents),
    "share question": flex.or_masks(
        flex.and_masks(causal, documents), lambda b, h, q, k: (DOC[b, q] != 0) & (DOC[b, k] == 0)
    ),
    "padded": padded,
    "by head": lambda b, h, q, k: (q - k < (h + 1) * 8) & (q >= k),
    "dilated": functools.partial(
        lambda step, b, h, q, k: ((q - k) % step == 0) & (q >= k - step), 3
    ),
    "offset": lambda b, h, q, k: q + OFFSET >= k,
    "table": lambda b, h, q, k: KEEP[b, h, q, k],
    "nothing": lambda b, h, q, k: q < 0,
}

SCORES: dict[str, Any] = {
    "none": None,
    "alibi": alibi,
    "softcap": softcap(4.0),
    "relative": lambda s, b, h, q, k: s + BIAS[h, q - k + N],
    "gain": lambda s, b, h, q, k: s * GAIN + torch.sigmoid(SLOPE)[h],
    "causal": lambda s, b, h, q, k: torch.where(q >= k, s, -float("inf")),
    "soft and alibi": lambda s, b, h, q, k: alibi(softcap(2.0)(s, b, h, q, k), b, h, q, k),
}


def inputs(
    *, dtype: torch.dtype = torch.float32, kv_heads: int = H, lengths: tuple[int, int] = (N, N)
) -> list[Tensor]:
    rng = torch.Generator().manual_seed(3)
    heads = (H, lengths[0]), (kv_heads, lengths[1]), (kv_heads, lengths[1])
    return [torch.randn(B, *shape, D, generator=rng, dtype=dtype) for shape in heads]


def torch_eager(*args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return theirs.flex_attention(*args, **kwargs)


def dense(
    q: Tensor, k: Tensor, v: Tensor, score_mod: Any, keep: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) over every pair, by autograd."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.mT) * (1 / math.sqrt(q.shape[3]) if scale is None else scale)
    if score_mod is not None:
        at = torch.meshgrid(*(torch.arange(n) for n in scores.shape), indexing="ij")
        scores = score_mod(scores, *at)
    scores = scores.masked_fill(~keep, -math.inf)
    none = scores.isneginf().all(-1, keepdim=True)
    weights = scores.masked_fill(none, 0).softmax(-1).masked_fill(none, 0)
    return weights @ v, scores.logsumexp(-1)


# -- against torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, dtype: torch.dtype) -> None:
    q, k, v = inputs(dtype=dtype)
    mine = flex.create_block_mask(MASKS[name], B, H, N, N, "cpu", BLOCK_SIZE=16)
    other = theirs.create_block_mask(MASKS[name], B, H, N, N, "cpu", BLOCK_SIZE=16)
    wanted = torch_eager(q, k, v, block_mask=other)
    torch.testing.assert_close(flex.flex_attention(q, k, v, block_mask=mine), wanted)
    torch.testing.assert_close(flex.flex_attention(q, k, v, block_mask=other), wanted)
    converted = flex.from_block_mask(other)
    assert flex.from_block_mask(other) is converted and flex.from_block_mask(mine) is mine
    torch.testing.assert_close(flex.flex_attention(q, k, v, block_mask=converted), wanted)


@pytest.mark.parametrize("mask", [None, "causal", "documents"])
@pytest.mark.parametrize("name", SCORES)
def test_scores(name: str, mask: str | None) -> None:
    q, k, v = inputs(dtype=torch.float64)
    mod = None if mask is None else MASKS[mask]
    mine = None if mod is None else flex.create_block_mask(mod, B, H, N, N, "cpu")
    other = None if mod is None else theirs.create_block_mask(mod, B, H, N, N, "cpu")
    wanted = torch_eager(q, k, v, SCORES[name], other, scale=0.3)
    found = flex.flex_attention(q, k, v, SCORES[name], mine, scale=0.3)
    # torch rounds the product of a float32 and an int to float32
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("mask", ["window", "nothing", "padded"])
def test_lse_and_gradients(name: str, mask: str) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(kv_heads=2))
    captured = SLOPE, BIAS, GAIN
    leaves = [q, k, v, *(x.requires_grad_() for x in captured)]
    try:
        block_mask = flex.create_block_mask(MASKS[mask], B, None, N, N, "cpu")
        out, aux = flex.flex_attention(
            q, k, v, SCORES[name], block_mask, enable_gqa=True, return_aux=flex.AuxRequest(lse=True)
        )
        keep = theirs.create_mask(MASKS[mask], B, H, N, N, "cpu")
        wanted, lse = dense(q, k, v, SCORES[name], keep)
        torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(aux.lse, lse, atol=1e-5, rtol=1e-5)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        mine = torch.autograd.grad(out, leaves, dout, allow_unused=True)
        other = torch.autograd.grad(wanted, leaves, dout, allow_unused=True)
    finally:
        for x in captured:
            x.requires_grad_(False)
    for one, two in zip(mine, other, strict=True):
        if two is not None and bool(two.any()):
            torch.testing.assert_close(one, two, atol=5e-5, rtol=5e-5)
        else:
            assert one is None or not one.any()


@pytest.mark.parametrize("lengths", [(33, 80), (80, 33), (1, 80)])
def test_ragged_lengths(lengths: tuple[int, int]) -> None:
    q, k, v = inputs(lengths=lengths)
    mask = flex.create_block_mask(MASKS["window"], None, None, *lengths, "cpu", BLOCK_SIZE=(16, 32))
    other = theirs.create_block_mask(
        MASKS["window"], None, None, *lengths, "cpu", BLOCK_SIZE=(16, 32)
    )
    wanted = torch_eager(q, k, v, block_mask=other)
    torch.testing.assert_close(flex.flex_attention(q, k, v, block_mask=mask), wanted)
    torch.testing.assert_close(flex.flex_attention(q, k, v, block_mask=other), wanted)


def test_one_sequence_of_keys_serves_all_of_queries() -> None:
    q, k, v = inputs()
    mask = flex.create_block_mask(MASKS["by head"], B, H, N, N, "cpu")
    found = flex.flex_attention(q, k[:1], v[:1], block_mask=mask)
    keep = theirs.create_mask(MASKS["by head"], B, H, N, N, "cpu")
    torch.testing.assert_close(found, dense(q, k[:1], v[:1], None, keep)[0])
    with pytest.raises(ArgumentError, match="batch"):
        flex.flex_attention(q, k[:1], v[:1])


# -- lists of blocks


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("sizes", [(80, 80, 16), (75, 50, (16, 32)), (30, 80, 128)])
@pytest.mark.parametrize("name", MASKS)
def test_lists_are_torchs(name: str, sizes: Any, split: bool) -> None:
    q_len, kv_len, block = sizes
    given = MASKS[name], B, H, q_len, kv_len, "cpu"
    mine = flex.create_block_mask(*given, BLOCK_SIZE=block, separate_full_blocks=split)
    other = theirs.create_block_mask(*given, BLOCK_SIZE=block, separate_full_blocks=split)
    for attribute in (
        *("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"),
        *("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"),
    ):
        one, two = getattr(mine, attribute), getattr(other, attribute)
        assert one is two is None or (one.equal(two) and one.dtype is two.dtype), attribute
    assert mine.shape == other.shape and mine.numel() == other.numel()
    assert mine.BLOCK_SIZE == other.BLOCK_SIZE and mine.seq_lengths == other.seq_lengths
    assert mine.to_dense().equal(other.to_dense())
    if name != "table":  # whose blocks are known pair by pair alone
        assert mine.sparsity() == pytest.approx(other.sparsity())
    for flatten in (True, False):
        pairs = zip(mine.as_tuple(flatten), other.as_tuple(flatten), strict=True)
        assert all(x is y or (x.equal(y) if isinstance(x, Tensor) else x == y) for x, y in pairs)
    assert f"shape={mine.shape}" in str(mine) and "BLOCK_SIZE" in repr(mine)


def expanded(mask: Any, keep: Tensor) -> Tensor:
    """Pairs that lists keep, block by block; keep: what mask_mod says of every pair."""
    found = torch.zeros_like(keep)
    rows, columns = mask.BLOCK_SIZE
    for counts, indices, whole in (
        (mask.kv_num_blocks, mask.kv_indices, False),
        (mask.full_kv_num_blocks, mask.full_kv_indices, True),
    ):
        if counts is None:
            continue
        outer = found.shape[:2]
        counts = counts.expand(*outer, *counts.shape[2:])
        indices = indices.expand(*outer, *indices.shape[2:])
        for b, h, row in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
            for column in indices[b, h, row, : counts[b, h, row]].tolist():
                at = (
                    *(b, h),
                    slice(row * rows, (row + 1) * rows),
                    slice(column * columns, (column + 1) * columns),
                )
                found[at] |= torch.ones_like(keep[at]) if whole else keep[at]
    return found


def random_lists(
    outer: tuple[int, int], rows: int, columns: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    order = torch.rand(*outer, rows, columns, generator=rng).argsort(-1).to(torch.int32)
    whole = torch.randint(0, columns + 1, (*outer, rows), generator=rng)
    partial = (torch.rand(*outer, rows, generator=rng) * (columns - whole + 1)).to(torch.int32)
    return partial, order, whole.to(torch.int32), order.flip(-1)


@pytest.mark.fuzz
@given(
    st.sampled_from([(1, 1), (B, 1), (1, H), (B, H)]),
    st.tuples(st.sampled_from((8, 16, 40, 128)), st.sampled_from((8, 16, 40, 128))),
    st.tuples(st.integers(1, N), st.integers(1, N)),
    st.sampled_from(sorted(set(MASKS) - {"nothing"})),
    st.booleans(),
    st.integers(0, 99),
)
def test_lists_keep_what_they_list(outer, block, lengths, name, full, seed) -> None:
    rows, columns = (-(-length // size) for length, size in zip(lengths, block, strict=True))
    lists = random_lists(outer, rows, columns, seed)[: 4 if full else 2]
    given = {"BLOCK_SIZE": block, "mask_mod": MASKS[name], "seq_lengths": lengths}
    q, k, v = inputs(lengths=lengths)
    keep = theirs.create_mask(MASKS[name], B, H, *lengths, "cpu")
    other = theirs.BlockMask.from_kv_blocks(*lists, **given)
    keep = expanded(other, keep)
    wanted, lse = dense(q, k, v, None, keep)
    mine = flex.BlockMask.from_kv_blocks(*lists, **given)
    for mask in (mine, other):
        out, found = flex.flex_attention(q, k, v, block_mask=mask, return_lse=True)
        torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found, lse, atol=1e-5, rtol=1e-5)
    assert mine.to_dense().equal(other.to_dense())
    assert mine.q_num_blocks.equal(other.q_num_blocks)
    assert mine.sparsity() == pytest.approx(other.sparsity())


@pytest.mark.parametrize("tile", [(16, 16), (8, 16), (4, 8)])
def test_tiles_of_listed_blocks_are_known(tile: tuple[int, int]) -> None:
    lists = random_lists((B, H), 5, 5, 4)
    for mask_mod in (None, causal):
        mask = flex.BlockMask.from_kv_blocks(
            *lists, BLOCK_SIZE=16, mask_mod=mask_mod, seq_lengths=(75, 70)
        )
        plan = mask._plan(tile)
        assert plan.counts == plan.exact_counts()
        assert plan.counts.empty > 0 < plan.counts.full


def test_lists_that_change_in_place_are_read_again() -> None:
    partial, order, whole, other = random_lists((1, 1), 5, 5, 1)
    mask = theirs.BlockMask.from_kv_blocks(partial, order, whole, other, BLOCK_SIZE=16)
    q, k, v = inputs()
    first = flex.flex_attention(q, k, v, block_mask=mask)
    mask.full_kv_num_blocks.fill_(5)
    torch.testing.assert_close(
        flex.flex_attention(q, k, v, block_mask=mask), flex.flex_attention(q, k, v)
    )
    assert not torch.equal(first, flex.flex_attention(q, k, v))


@pytest.mark.parametrize("position", [0, 21, 79])
def test_a_slice_serves_one_step_of_decoding(position: int) -> None:
    q, k, v = inputs()
    whole = flex.create_block_mask(MASKS["sinks"], 1, 1, N, N, "cpu", BLOCK_SIZE=16)
    part = whole[:, :, torch.tensor([position // 16])]
    with pytest.raises(ArgumentError, match="sliced BlockMask"):
        part.mask_mod(0, 0, 0, 0)
    at = torch.tensor(position)
    part.mask_mod = lambda b, h, q, k: whole.mask_mod(b, h, q + at, k)
    part.seq_lengths = (1, N)
    one = q[:, :, position : position + 1]
    found = flex.flex_attention(one, k, v, block_mask=part)
    wanted = flex.flex_attention(q, k, v, block_mask=whole)[:, :, position : position + 1]
    torch.testing.assert_close(found, wanted)
    assert whole[0].shape == whole[0, -1].shape == (1, 1, N, N)


def test_another_mask_mod_decides_in_partial_blocks_alone() -> None:
    q, k, v = inputs()
    mine = flex.create_block_mask(causal, 1, 1, N, N, "cpu", BLOCK_SIZE=16)
    other = theirs.create_block_mask(causal, 1, 1, N, N, "cpu", BLOCK_SIZE=16)
    for mask in (mine, other):
        mask.mask_mod = MASKS["dilated"]
    keep = expanded(other, theirs.create_mask(MASKS["dilated"], B, H, N, N, "cpu"))
    wanted, _ = dense(q, k, v, None, keep)
    for mask in (mine, other):
        torch.testing.assert_close(flex.flex_attention(q, k, v, block_mask=mask), wanted)


def test_other_lengths_of_a_mask() -> None:
    q, k, v = inputs(lengths=(50, 33))
    for mask in (
        flex.create_block_mask(causal, 1, 1, N, N, "cpu", BLOCK_SIZE=16),
        flex.from_block_mask(theirs.create_block_mask(causal, 1, 1, N, N, "cpu", BLOCK_SIZE=16)),
    ):
        with pytest.raises(ArgumentError, match="80 queries and 80 keys"):
            flex.flex_attention(q, k, v, block_mask=mask)
        found = flex.flex_attention(q, k, v, block_mask=mask._adjust(50, 33).to("cpu"))
        wanted, _ = dense(q, k, v, None, torch.ones(50, 33, dtype=torch.bool).tril())
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["causal", "window", "prefix"])
def test_a_million_tokens_cost_nothing(name: str) -> None:
    length = torch.tensor([5000])
    mods = {"window": window(4096), "prefix": lambda b, h, q, k: (q >= k) | (k < length[b])}
    begun = time.perf_counter()
    mask = flex.create_block_mask(mods.get(name, causal), 1, None, 1 << 20, 1 << 20, "cpu")
    assert time.perf_counter() - begun < 1
    assert mask.shape == (1, 1, 1 << 20, 1 << 20)
    if name != "prefix":
        assert mask.sparsity() > 49
        assert "██" in str(mask) or name == "window"


@pytest.mark.parametrize("name", MASKS)
def test_create_mask(name: str) -> None:
    wanted = theirs.create_mask(MASKS[name], B, H, N, 50, "cpu")
    found = flex.create_mask(MASKS[name], B, H, N, 50, "cpu")
    assert found.equal(wanted) and found.shape == (B, H, N, 50)
    score = flex.create_mask(SCORES["causal"], None, None, 9, 9, "cpu")
    assert score.equal(theirs.create_mask(SCORES["causal"], None, None, 9, 9, "cpu"))


# -- functions made anew in each call


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is traced from now on."""
    found: list[object] = []
    trace = variants.traced_mods
    monkeypatch.setattr(variants, "_known", type(variants._known)())
    monkeypatch.setattr(variants, "traced_mods", lambda *mods: found.append(mods) or trace(*mods))
    return found


def test_functions_alike_are_traced_once(traces: list[object]) -> None:
    q, k, v = inputs()
    for step in range(3):
        doc = torch.randint(0, 3, (B, N), generator=torch.Generator().manual_seed(step))
        start, gain = torch.tensor(step * 7), torch.randn(H)

        def shifted(b: Any, h: Any, q: Any, k: Any) -> Any:
            return (doc[b, q] == doc[b, k]) & (q + start >= k)  # noqa: B023

        def scaled(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
            return s * gain[h]  # noqa: B023

        mask = flex.create_block_mask(shifted, B, None, N, N, "cpu")
        found = flex.flex_attention(q, k, v, scaled, mask)
        keep = theirs.create_mask(shifted, B, H, N, N, "cpu")
        torch.testing.assert_close(found, dense(q, k, v, scaled, keep)[0], atol=1e-5, rtol=1e-5)
    assert len(traces) == 2  # the mask alone, and both


def test_numbers_are_arguments_of_one_program(traces: list[object]) -> None:
    made = {variants.variant(None, window(size)).attention for size in (3, 4, 3)}
    assert len(made) == 1 and len(traces) == 2
    assert variants.variant(None, window(4)).arguments == {"size": 4}


def test_tensors_of_one_object_are_told_from_two(traces: list[object]) -> None:
    def of(one: Tensor, two: Tensor) -> Any:
        return lambda b, h, q, k: one[q] == two[k]

    q, k, v = inputs()
    first, second = torch.arange(N) // 9, torch.arange(N) // 5
    for pair in ((first, first), (first, second), (second, second), (second, first)):
        mask = flex.create_block_mask(of(*pair), None, None, N, N, "cpu")
        wanted, _ = dense(q, k, v, None, pair[0][:, None] == pair[1])
        torch.testing.assert_close(flex.flex_attention(q, k, v, block_mask=mask), wanted)
    assert len(traces) == 2


REACH = 3


def test_what_functions_read_elsewhere_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    class Near:
        def __init__(self) -> None:
            self.reach = 3

        def keeps(self, b: Any, h: Any, q: Any, k: Any) -> Any:
            return (q - k).abs() < self.reach

    near, several, derived = Near(), [3], torch.full((N,), 2)
    mods = [
        near.keeps,
        lambda b, h, q, k: near.keeps(b, h, q, k),
        lambda b, h, q, k: (q - k).abs() < several[0],
        lambda b, h, q, k: (q - k).abs() < REACH,
        lambda b, h, q, k: (q - k).abs() < (derived + 1)[q],
    ]
    wanted = [(torch.arange(N)[:, None] - torch.arange(N)).abs() < n for n in (3, 6)]

    def check(keep: Tensor) -> None:
        for mod in mods:
            mask = flex.create_block_mask(mod, None, None, N, N, "cpu", BLOCK_SIZE=16)
            assert mask.to_dense()[0, 0].equal(
                theirs.create_block_mask(
                    lambda b, h, q, k: keep[q, k], None, None, N, N, "cpu", BLOCK_SIZE=16
                ).to_dense()[0, 0]
            )

    check(wanted[0])
    near.reach, several[0] = 6, 6
    monkeypatch.setitem(globals(), "REACH", 6)
    derived.fill_(5)
    check(wanted[1])


def test_a_repeated_call_is_quick() -> None:
    q = torch.randn(1, 1, 16, 16)

    def step() -> None:
        mask = flex.create_block_mask(window(9), None, None, 16, 16, "cpu")
        flex.flex_attention(q, q, q, softcap(3.0), mask)

    step()
    begun = time.perf_counter()
    for _ in range(20):
        step()
    assert (time.perf_counter() - begun) / 20 < 0.01  # some 0.4 ms; tracing and analysis take 30


def test_compiled_functions_may_call_it() -> None:
    q, k, v = inputs()
    mask = flex.create_block_mask(causal, None, None, N, N, "cpu")

    def layer(x: Tensor) -> Tensor:
        return flex.flex_attention(x * 2, k, v, softcap(5.0), block_mask=mask) + 1

    compiled = torch.compile(layer, backend="eager")
    torch.testing.assert_close(compiled(q), layer(q))


# -- mistakes


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"key": torch.randn(B, 2, N, D), "value": torch.randn(B, 2, N, D)}, ArgumentError, "gqa"),
        ({"key": torch.randn(B, H, N, 8)}, ArgumentError, "head dim"),
        ({"query": torch.randn(H, N, D)}, ArgumentError, "shape"),
        ({"query": torch.randn(3, H, N, D)}, ArgumentError, "batch"),
        ({"return_lse": True, "return_aux": flex.AuxRequest()}, ArgumentError, "return_aux="),
        ({"return_aux": flex.AuxRequest(max_scores=True)}, UnsupportedError, "AuxRequest"),
        ({"kernel_options": {"BLOCK_M": 64}}, UnsupportedError, "leave it out"),
        ({"kernel_options": {"bwd_num_warps": 4}}, UnsupportedError, "leave it out"),
        ({"kernel_options": {"BACKEND": "FLASH"}}, UnsupportedError, "'AUTO' or 'TRITON'"),
        ({"kernel_options": {"BACKEND": "TRITON"}}, UnsupportedError, "GPU"),
        ({"block_mask": causal}, ArgumentError, "create_block_mask"),
        ({"score_mod": lambda s, b, h, q, k: s if q > k else -s}, AttnccError, "torch.where"),
        ({"score_mod": lambda s, b, h, q, k: s + SLOPE[q]}, BoundsError, "SLOPE"),
    ],
)
def test_mistakes(change: dict[str, Any], error: type[Exception], says: str) -> None:
    q, k, v = inputs()
    with pytest.raises(error) as caught:
        flex.flex_attention(**{"query": q, "key": k, "value": v, **change})
    assert says in str(caught.value)


def test_promises_are_taken() -> None:
    q, k, v = inputs()
    options = {"ROWS_GUARANTEED_SAFE": True, "BLOCKS_ARE_CONTIGUOUS": True, "BACKEND": "AUTO"}
    assert flex.flex_attention(q, k, v, kernel_options=options).equal(flex.flex_attention(q, k, v))
    out, aux = flex.flex_attention(q, k, v, return_aux=flex.AuxRequest())
    assert aux == flex.AuxOutput() and out.shape == q.shape


def test_masks_of_other_sequences_and_heads() -> None:
    q, k, v = inputs()
    for outer, says in (((3, None), "B = 3"), ((None, 3), "H = 3")):
        mask = flex.create_block_mask(causal, *outer, N, N, "cpu")
        with pytest.raises(ArgumentError, match=says):
            flex.flex_attention(q, k, v, block_mask=mask)
    for name, outer in (("documents", (None, H)), ("by head", (B, None))):
        mask = flex.create_block_mask(MASKS[name], *outer, N, N, "cpu")
        with pytest.raises(ArgumentError, match="created for one"):
            flex.flex_attention(q, k, v, block_mask=mask)


def test_lists_that_do_not_cover_a_call() -> None:
    lists = random_lists((1, 1), 2, 5, 0)
    mask = flex.BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=16, seq_lengths=(N, N))
    with pytest.raises(ArgumentError, match="do not cover"):
        flex.flex_attention(*inputs(), block_mask=mask)
    with pytest.raises(ArgumentError, match="come together"):
        flex.BlockMask.from_kv_blocks(*lists[:3])
    with pytest.raises(ArgumentError, match="expected"):
        flex.BlockMask.from_kv_blocks(lists[0], lists[1][0])
    with pytest.raises(UnsupportedError, match="deterministic"):
        flex.create_block_mask(causal, 1, 1, N, N, "cpu", compute_dq_write_order=True)
