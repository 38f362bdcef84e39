"""attncc.flex against torch's own flex_attention."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as theirs

from attncc import flex
from attncc.errors import ArgumentError, AttnccError, UnsupportedError

B, H, HKV, N, D = 2, 4, 2, 200, 32

torch.manual_seed(0)
DOC = torch.randint(0, 4, (B, N)).sort(-1).values
SLOPE = torch.rand(H, requires_grad=True)
BIAS = torch.randn(H, 2 * N, requires_grad=True)


def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


def window(size: int) -> Any:
    return lambda b, h, q, k: (q - k).abs() < size


def same_document(b: Any, h: Any, q: Any, k: Any) -> Any:
    return DOC[b, q] == DOC[b, k]


def by_head(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (q >= k) & ((h < 2) | (q - k < 16))


def empty_rows(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q > k + 50


def alibi(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return s + SLOPE[h] * (k - q)


def softcap(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return 5.0 * torch.tanh(s / 5.0)


def relative(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return s + BIAS[h, q - k + N]


CASES = {
    "plain": (None, None, {}),
    "scale": (None, causal, {"scale": 0.3}),
    "causal": (None, causal, {}),
    "window": (softcap, window(30), {}),
    "documents": (alibi, flex.and_masks(causal, same_document), {}),
    "or": (None, flex.or_masks(causal, window(5)), {}),
    "heads": (relative, by_head, {}),
    "empty": (None, empty_rows, {}),
    "backend": (None, causal, {"kernel_options": {"BACKEND": "AUTO", "PRESCALE_QK": True}}),
}


def inputs(q_len: int = N, kv_heads: int = H, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = (B, H, q_len, D), (B, kv_heads, N, D), (B, kv_heads, N, D)
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


def dense(score_mod: Any, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Any:
    """(out, lse) by definition."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    score = q @ k.mT * scale
    at = torch.meshgrid(*(torch.arange(n) for n in score.shape), indexing="ij")
    score = score if score_mod is None else score_mod(score, *at)
    score = score.masked_fill(~mask, -torch.inf)
    lse = score.logsumexp(-1)
    weights = (score - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    return weights @ v, lse


def check_gradients(mine: Tensor, wanted: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(mine, wanted, atol=2e-5, rtol=2e-5)
    dout = torch.randn_like(mine)
    got, expected = (
        torch.autograd.grad(x, leaves, dout, allow_unused=True) for x in (mine, wanted)
    )
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kv_heads", [H, HKV])
def test_calls_equal_the_definition(name: str, kv_heads: int) -> None:
    score_mod, mask_mod, options = CASES[name]
    q, k, v = inputs(kv_heads=kv_heads)
    mask = torch.ones(B, H, N, N, dtype=torch.bool)
    block_mask = None
    if mask_mod is not None:
        mask = flex.create_mask(mask_mod, B, H, N, N, "cpu").bool()
        block_mask = flex.create_block_mask(mask_mod, B, H, N, N, "cpu")
    options = {"enable_gqa": kv_heads != H, **options}
    out = flex.flex_attention(q, k, v, score_mod, block_mask, **options)
    wanted, lse = dense(score_mod, mask, q, k, v, options.get("scale", D**-0.5))
    check_gradients(out, wanted, [q, k, v, SLOPE, BIAS])
    again, aux = flex.flex_attention(
        q, k, v, score_mod, block_mask, **options, return_aux=flex.AuxRequest(lse=True)
    )
    assert again.equal(out)
    torch.testing.assert_close(aux.lse, lse.float(), atol=2e-5, rtol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["causal", "documents", "heads"])
def test_calls_equal_torchs_own(name: str) -> None:
    score_mod, mask_mod, _ = CASES[name]
    q, k, v = (x.detach() for x in inputs())
    own = theirs.create_block_mask(mask_mod, B, H, N, N, "cpu")
    wanted = theirs.flex_attention(q, k, v, score_mod, own)
    mine = flex.flex_attention(
        q, k, v, score_mod, flex.create_block_mask(mask_mod, B, H, N, N, "cpu")
    )
    torch.testing.assert_close(mine, wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("batch", [None, B])
@pytest.mark.parametrize("size", [64, (32, 64), (128, 16)])
@pytest.mark.parametrize("separate", [True, False])
def test_blocks_are_torchs(batch: int | None, size: Any, separate: bool) -> None:
    mask_mod = causal if batch is None else flex.and_masks(causal, same_document)
    options = {"BLOCK_SIZE": size, "separate_full_blocks": separate}
    mine = flex.create_block_mask(mask_mod, batch, None, N, N, "cpu", **options)
    other = theirs.create_block_mask(mask_mod, batch, None, N, N, "cpu", **options)
    assert mine.shape == other.shape and mine.numel() == other.numel()
    assert mine.to_dense().equal(other.to_dense())
    assert abs(mine.sparsity() - other.sparsity()) < 1e-4
    for name in ("kv_num_blocks", "q_num_blocks", "full_kv_num_blocks", "full_q_num_blocks"):
        got, wanted = getattr(mine, name), getattr(other, name)
        assert (got is None) == (wanted is None)
        assert got is None or got.equal(wanted), name
    counts = mine.kv_num_blocks
    for at in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
        n = int(counts[tuple(at)])
        assert mine.kv_indices[tuple(at)][:n].equal(other.kv_indices[tuple(at)][:n])
    assert mine.as_torch().to_dense().equal(other.to_dense())


# -- torch's block masks


def listed(counts: Tensor, index: Tensor, mask_mod: Any = None, **more: Any) -> theirs.BlockMask:
    return theirs.BlockMask.from_kv_blocks(
        counts, index, BLOCK_SIZE=32, mask_mod=mask_mod, seq_lengths=(N, N), **more
    )


def pairs_of(mask: theirs.BlockMask) -> Tensor:
    """bool [B, H, N, N] by torch's rule: listed blocks, partial ones by mask_mod."""

    def blocks(counts: Any, index: Any) -> Tensor:
        found = torch.zeros(*index.shape[:-1], 7, dtype=torch.bool)
        for at in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
            found[tuple(at)][index[tuple(at)][: int(counts[tuple(at)])].long()] = True
        every = found.repeat_interleave(32, -1).repeat_interleave(32, -2)[..., :N, :N]
        return every.expand(B, H, N, N)

    kept = theirs.create_mask(mask.mask_mod, B, H, N, N, "cpu").bool()
    pairs = blocks(mask.kv_num_blocks, mask.kv_indices) & kept
    if mask.full_kv_num_blocks is not None:
        pairs = pairs | blocks(mask.full_kv_num_blocks, mask.full_kv_indices)
    return pairs


@pytest.mark.parametrize("heads", [1, H])
@pytest.mark.parametrize("mask_mod", [None, causal])
@pytest.mark.parametrize("full", [False, True])
def test_lists_made_elsewhere(heads: int, mask_mod: Any, full: bool) -> None:
    torch.manual_seed(3)
    counts = torch.randint(0, 4, (1, heads, 7), dtype=torch.int32)
    index = torch.rand(1, heads, 7, 7).argsort(-1).to(torch.int32)
    more = {}
    if full:
        more = {
            "full_kv_num_blocks": torch.randint(0, 2, (1, heads, 7), dtype=torch.int32),
            "full_kv_indices": index.flip(-1).contiguous(),
        }
    mask = listed(counts, index, mask_mod, **more)
    q, k, v = inputs()
    out = flex.flex_attention(q, k, v, block_mask=mask)
    check_gradients(out, dense(None, pairs_of(mask), q, k, v, D**-0.5)[0], [q, k, v])


def test_lists_may_be_short_and_change() -> None:
    counts = torch.full((1, 1, 7), 2, dtype=torch.int32)
    index = torch.tensor([6, 0]).expand(1, 1, 7, 2).to(torch.int32).contiguous()
    mask = theirs.BlockMask(
        (N, N), counts, index, None, None, None, None, None, None, (32, 32), theirs.noop_mask
    )
    q, k, v = inputs()
    for _ in range(2):
        pairs = torch.zeros(N, dtype=torch.bool)
        for one in index[0, 0, 0].tolist():
            pairs[32 * one : 32 * one + 32] = True
        out = flex.flex_attention(q, k, v, block_mask=mask)
        wanted, _ = dense(None, pairs.expand(B, H, N, N), q, k, v, D**-0.5)
        torch.testing.assert_close(out, wanted, atol=2e-5, rtol=2e-5)
        index[..., 0] = 3


def test_tiles_of_lists_are_skipped() -> None:
    counts = torch.ones(1, 1, 7, dtype=torch.int32)
    index = torch.arange(7, dtype=torch.int32)[:, None].expand(1, 1, 7, 7).contiguous()
    mask_mod = flex._mask_mod(listed(counts, index), *inputs()[:2])
    found = flex.create_block_mask(mask_mod, None, None, N, N, "cpu", BLOCK_SIZE=32)
    assert found.plan.counts.full == 7 and found.plan.counts.empty == 42


# -- cost


@pytest.mark.parametrize("mask_mod", [causal, window(4096), lambda b, h, q, k: (q >= k) | (k < 99)])
def test_a_million_tokens_cost_nothing(mask_mod: Any) -> None:
    begun = time.perf_counter()
    mask = flex.create_block_mask(mask_mod, None, None, 2**20, 2**20, "cpu")
    assert mask.sparsity() < 100
    assert time.perf_counter() - begun < 1.0


def test_new_functions_of_one_kind_are_analysed_once() -> None:
    q, k, v = inputs()

    def step(size: int) -> Tensor:
        mask = flex.create_block_mask(window(size), None, None, N, N, "cpu")
        out: Tensor = flex.flex_attention(q, k, v, block_mask=mask)
        return out

    step(7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attncc.api.analyze", lambda *_: pytest.fail("analysed again"))
        assert not step(9).equal(step(8))


# -- errors


def call(**changed: Any) -> Any:
    q, k, v = inputs()
    return flex.flex_attention(q, k, v, **changed)


def test_mistakes_are_told() -> None:
    mask = flex.create_block_mask(causal, None, None, N, N, "cpu")
    q, k, v = inputs(kv_heads=HKV)
    with pytest.raises(ArgumentError, match="enable_gqa=True"):
        flex.flex_attention(q, k, v)
    with pytest.raises(ArgumentError, match="100"):
        call(block_mask=flex.create_block_mask(causal, None, None, 100, 100, "cpu"))
    with pytest.raises(ArgumentError, match="block_mask has 3"):
        call(block_mask=flex.create_block_mask(causal, 3, None, N, N, "cpu"))
    with pytest.raises(ArgumentError, match="expected a BlockMask"):
        call(block_mask=causal)
    with pytest.raises(UnsupportedError, match="BLOCK_M"):
        call(block_mask=mask, kernel_options={"BLOCK_M": 64})
    with pytest.raises(UnsupportedError, match="FLASH"):
        call(block_mask=mask, kernel_options={"BACKEND": "FLASH"})
    with pytest.raises(UnsupportedError, match="max_scores"):
        call(return_aux=flex.AuxRequest(max_scores=True))
    with pytest.raises(AttnccError, match=r"test_flex\.py"):
        flex.create_block_mask(lambda b, h, q, k: bool(q > k), 1, 1, N, N, "cpu")


def test_shorter_inputs_than_the_mask() -> None:
    mask = flex.create_block_mask(causal, None, None, 512, 512, "cpu")
    q, k, v = inputs()
    whole = flex.create_mask(causal, B, H, N, N, "cpu").bool()
    out = flex.flex_attention(q, k, v, block_mask=mask)
    torch.testing.assert_close(out, dense(None, whole, q, k, v, D**-0.5)[0], atol=2e-5, rtol=2e-5)
