"""Generated kernels of FlexAttention's lists of blocks, against the dense interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attncc.binding import bind
from attncc.flex import BlockMask
from attncc.flex.variants import variant
from tests.interpreted.harness import check, inputs

B, H, N = 2, 2, 40


@pytest.mark.parametrize("size", [(16, 16), (8, 16), (32, 8)])
@pytest.mark.parametrize("outer", [(1, H), (B, 1)])
@pytest.mark.parametrize("mask_mod", [None, lambda b, h, q, k: q >= k])
def test_lists_equal_dense(size: tuple[int, int], outer: tuple[int, int], mask_mod: Any) -> None:
    rng = torch.Generator().manual_seed(0)
    rows, columns = (-(-N // block) for block in size)
    order = torch.rand(*outer, rows, columns, generator=rng).argsort(-1).to(torch.int32)
    partial = torch.randint(0, columns, (*outer, rows), generator=rng)
    mask = BlockMask.from_kv_blocks(
        *(partial, order, columns - 1 - partial, order.flip(-1)),
        BLOCK_SIZE=size,
        mask_mod=mask_mod,
        seq_lengths=(N, N),
    )
    of = variant(lambda s, b, h, q, k: s * 1.5, mask.pairs(N, N, B, H)).scaled(0.2)
    binding = bind(of.attention.program, *torch.randn(3, B, H, N, 16), of.arguments)
    check(of.attention.program, binding, inputs(binding, value_dim=16))
