"""Merged branches are attention over all their keys."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import attncc
from attncc.errors import ArgumentError
from attncc.ir.plan import Blocks

INF = math.inf
PART = attncc.compile(
    "attention part(part: int[q_len, kv_len], own: int):\n    mask = part[q_idx, kv_idx] == own\n"
)
WHOLE = attncc.compile(
    "attention whole(part: int[q_len, kv_len], count: int):\n"
    "    mask = part[q_idx, kv_idx] < count\n"
)


def inputs(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    made = [torch.randn(2, n, 6, 5, generator=rng, dtype=torch.float64) for n in (4, 2, 2)]
    return [x.to(dtype).requires_grad_() for x in made]


def gradients(out: Tensor, lse: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a random combination of both; rows without keys have a constant lse."""
    rng = torch.Generator().manual_seed(3)
    loss = (out * torch.randn(out.shape, generator=rng, dtype=torch.float64)).sum()
    factors = torch.randn(lse.shape, generator=rng, dtype=torch.float64)
    loss = loss + (torch.where(lse == -INF, 0, lse) * factors).sum()
    return torch.autograd.grad(loss, leaves)


@given(st.integers(1, 5), st.integers(0, 9), st.sampled_from(["cpu", "dense"]))
def test_keys_split_at_random_are_the_whole(count: int, seed: int, backend: str) -> None:
    """Some pairs are in no branch, and some rows have keys in none."""
    rng = torch.Generator().manual_seed(seed)
    part = torch.randint(0, count + 1, (6, 6), generator=rng)
    part[seed % 6] = count
    leaves = inputs(seed=seed)
    options = {"part": part, "return_lse": True, "backend": backend}
    branches = [PART(*leaves, own=own, **options) for own in range(count)]
    found = attncc.merge(branches)
    expected = WHOLE(*leaves, count=count, **options)
    torch.testing.assert_close(found, expected)
    assert (found[0][:, :, seed % 6] == 0).all() and (found[1][:, :, seed % 6] == -INF).all()
    torch.testing.assert_close(gradients(*found, leaves), gradients(*expected, leaves))


def results(empty: list[tuple[int, int]], count: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """Random outs and lses; rows (branch, query) of `empty` have no keys."""
    rng = torch.Generator().manual_seed(1)
    outs = [torch.randn(1, 2, 4, 3, generator=rng, dtype=torch.float64) for _ in range(count)]
    lses = [3 * torch.randn(1, 2, 4, generator=rng, dtype=torch.float64) for _ in range(count)]
    for branch, row in empty:
        lses[branch][:, :, row] = -INF
        outs[branch][:, :, row] = 0
    return [x.requires_grad_() for x in outs], [x.requires_grad_() for x in lses]


def test_gradients_are_exact() -> None:
    outs, lses = results([(0, 1), (1, 1), (2, 1), (1, 2)])

    def merged(*given: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attncc.merge(zip(given[:3], given[3:], strict=True))
        return out, torch.where(lse == -INF, 0, lse)

    assert torch.autograd.gradcheck(merged, (*outs, *lses))
    assert torch.autograd.gradgradcheck(merged, (*outs, *lses))


def test_a_row_without_keys_is_not_read() -> None:
    outs, lses = results([(0, 1)])
    with torch.no_grad():
        outs[0][:, :, 1] = torch.nan
    out, lse = attncc.merge(zip(outs, lses, strict=True))
    (out.sum() + lse.sum()).backward()
    assert out.isfinite().all() and lse.isfinite().all()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (*outs, *lses))


def test_weights_and_order() -> None:
    """Adding log(2) to a lse counts its keys twice; branches merge in any order and grouping."""
    outs, lses = results([(1, 2)])
    pairs = list(zip(outs, lses, strict=True))
    twice = attncc.merge([(outs[0], lses[0] + math.log(2)), *pairs[1:]])
    torch.testing.assert_close(twice, attncc.merge([pairs[0], *pairs]))
    torch.testing.assert_close(attncc.merge([attncc.merge(pairs[:2]), pairs[2]]), merged(pairs))
    torch.testing.assert_close(attncc.merge(pairs[::-1]), merged(pairs))
    torch.testing.assert_close(attncc.merge(pairs[:1]), pairs[0])


def merged(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Written out, for rows that some branch has keys of."""
    lse = torch.stack([lse for _, lse in pairs]).logsumexp(0)
    out = sum(out * torch.exp(own - lse)[..., None] for out, own in pairs)
    assert isinstance(out, Tensor)
    return out, lse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_round_once_and_lie_as_they_did(dtype: torch.dtype) -> None:
    outs, lses = results([(0, 1), (1, 1)])
    halves = [x.detach().to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in outs]
    singles = [x.detach().float() for x in lses]
    out, lse = attncc.merge(zip(halves, singles, strict=True))
    exact = merged([(x.float(), y) for x, y in zip(halves, singles, strict=True)])
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert all(a >= b for a, b in pairwise(torch.tensor(out.stride())[[0, 2, 1, 3]]))
    near = torch.finfo(dtype).eps / 2 * exact[0].abs().max() + 1e-6
    assert (out.float() - exact[0]).abs().max() <= near


def test_wrong_branches() -> None:
    (a, b, _), (x, y, _) = results([])
    for branches, message in (
        ([], "there is no branch"),
        ([a], "branch 0 is no pair"),
        ([(a, x), (b, None)], "branch 1 is no pair"),
        ([(a, x[..., 0])], r"branch 0 has out \[1, 2, 4, 3\] and lse \[1, 2\]"),
        ([(a, x), (b.float(), y)], r"branch 1 has out float32\[1, 2, 4, 3\] on cpu, but branch 0"),
        ([(a, x), (b[:, :1], y[:, :1])], r"branch 1 has out float64\[1, 1, 4, 3\]"),
    ):
        with pytest.raises(ArgumentError, match=message):
            attncc.merge(branches)


def test_columns_lie_after_the_keys() -> None:
    _, k, v = inputs()
    more = k[:, :, :2].float(), v[:, :, :2].float()
    longer = attncc.append_columns(k, v, *more)
    assert all(x.shape == (2, 2, 8, 5) and x.dtype == torch.float64 for x in longer)
    assert torch.equal(longer[0][:, :, 6:], more[0].double())
    for wrong in ((more[0], more[1][:, :, :1]), (more[0][:1], more[1]), (more[0][0], more[1])):
        with pytest.raises(ArgumentError, match=r"columns for [kv] have shape"):
            attncc.append_columns(k, v, *wrong)


COLUMNS = {
    "weighed": "near or kv_idx >= tokens",
    "pooled": "near or kv_idx >= tokens and (kv_idx - tokens + 1) * 16 <= q_idx - window + 1",
    "sinks": "near or kv_idx < min(4, tokens) and q_idx >= kv_idx or kv_idx >= tokens",
    "some heads": "near and keep[h] or q_idx >= kv_idx and kv_idx < tokens and not keep[h] or "
    "kv_idx >= tokens",
}


def columns(name: str) -> attncc.Attention:
    return attncc.compile(f"""
attention columns(tokens: int, window: int, log_weight: float[batch, kv_heads, n] grad,
                  keep: bool[heads]):
    let near = q_idx >= kv_idx and q_idx - kv_idx < window and kv_idx < tokens
    mask = {COLUMNS[name]}
    score = score + where(kv_idx < tokens, 0.0, log_weight[b, kv_head, kv_idx - tokens])
""")


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_cost_no_other_tile(name: str) -> None:
    attention = columns(name)
    keep = torch.tensor([True, False, True, True])
    for tokens, more in ((1024, 64), (1000, 100)):
        arguments = {"log_weight": torch.zeros(1, 4, more), "keep": keep, "window": 200}
        plan = attention.plan(
            q_len=tokens, kv_len=tokens + more, heads=4, tokens=tokens, tile=(64, 32), **arguments
        )
        assert plan.counts == plan.exact_counts()
    ranges = attention.static.blocks is Blocks.RANGES
    assert ranges == (name in ("weighed", "pooled")), "others have three ranges, or cases of rows"


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_equal_dense(name: str) -> None:
    rng = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 40, 8), *[(2, 2, n, 8) for n in (40, 40, 9, 9)], (2, 2, 9)]
    leaves = [torch.randn(s, generator=rng, dtype=torch.float64).requires_grad_() for s in shapes]
    q, k, v, more_k, more_v, log_weight = leaves
    keep = torch.tensor([True, False, True, True])
    arguments = {"tokens": 40, "window": 7, "keep": keep, "log_weight": log_weight}
    longer = attncc.append_columns(k, v, more_k, more_v)
    found, expected = (
        columns(name)(q, *longer, return_lse=True, backend=backend, **arguments)
        for backend in ("cpu", "dense")
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(*found, leaves), gradients(*expected, leaves))
