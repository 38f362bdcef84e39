"""The kernels that merge branches, against the operations that do on the CPU."""

import math

import pytest
import torch
from torch import Tensor

import attncc
from attncc.backends.triton import merge as kernels

INF = math.inf


def leaves(count: int, columns: int, rows_first: bool, seed: int) -> tuple[list[Tensor], ...]:
    """Outs and lses of 2 x 3 x 45 rows, of which some have keys in no branch or in some."""
    rng = torch.Generator().manual_seed(seed)
    outs, lses = [], []
    for _ in range(count):
        out = torch.randn(2, 3, 45, columns, generator=rng)
        lse = 4 * torch.randn(2, 3, 45, generator=rng)
        empty = torch.rand(lse.shape, generator=rng) < 0.4
        empty[:, :, 7] = True
        out[empty] = torch.nan
        out = out.transpose(1, 2).contiguous().transpose(1, 2) if rows_first else out
        outs.append(out.requires_grad_())
        lses.append(lse.masked_fill(empty, -INF).requires_grad_())
    return outs, lses


@pytest.mark.parametrize(("count", "columns", "rows_first"), [(1, 16, False), (3, 20, True)])
@pytest.mark.parametrize("wanted", ["out", "lse", "both"])
@pytest.mark.filterwarnings("ignore:divide by zero")  # numpy's log of 0, which is -inf
def test_kernels_merge(count: int, columns: int, rows_first: bool, wanted: str) -> None:
    outs, lses = leaves(count, columns, rows_first, seed=count)
    found, expected = [], []
    for merge, into in ((kernels.merge, found), (_by_torch, expected)):
        out, lse = merge(tuple(outs), tuple(lses))
        assert out.stride() == outs[0].stride()
        loss = (out * torch.linspace(-1, 1, columns)).sum() if wanted != "lse" else 0
        if wanted != "out":
            loss = loss + torch.where(lse == -INF, 0, lse).sin().sum()
        grads = torch.autograd.grad(loss, (*outs, *lses), allow_unused=True)
        into += [out, lse, *(torch.zeros(()) if x is None else x for x in grads)]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs.expand(mine.shape), rtol=1e-5, atol=1e-5)


def _by_torch(outs: tuple[Tensor, ...], lses: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    return attncc.merge(zip(outs, lses, strict=True))


def test_no_rows() -> None:
    empty = torch.zeros(1, 2, 0, 16), torch.zeros(1, 2, 0)
    out, lse = kernels.merge(*((x, x) for x in empty))
    assert out.shape == (1, 2, 0, 16) and lse.shape == (1, 2, 0)
