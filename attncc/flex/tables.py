"""Lists of blocks, as FlexAttention keeps them, to tables of blocks and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attncc.tiles import FULL, PARTIAL

Lists = tuple[Tensor, Tensor]
"""How many blocks each row has [B, H, rows], and which come first in it [B, H, rows, columns]."""


def kinds(partial: Lists, full: Lists | None, columns: int) -> Tensor:
    """int8 [B, H, rows, columns]: EMPTY, PARTIAL or FULL; entries past the last column are none."""
    table = PARTIAL * _listed(*partial, columns).to(torch.int8)
    if full is not None:
        whole = FULL * _listed(*full, columns).to(torch.int8)
        table = torch.maximum(table, whole.to(table.device))
    return table


def _listed(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    entries = torch.arange(indices.shape[-1], device=indices.device)
    inside = (entries < counts.unsqueeze(-1)) & (indices >= 0) & (indices < columns)
    at = torch.where(inside, indices, columns).to(torch.int64)  # others go to a column too many
    table = torch.zeros(*at.shape[:-1], columns + 1, dtype=torch.bool, device=at.device)
    return table.scatter_(-1, at, True)[..., :columns]


def lists(listed: Tensor) -> Lists:
    """The columns where each row of a bool [B, H, rows, columns] holds, ascending, then others."""
    found = listed.to(torch.int8)
    order = found.argsort(dim=-1, descending=True, stable=True)
    return found.sum(-1, dtype=torch.int32), order.to(torch.int32)


def mask_of(table: Tensor, block_size: tuple[int, int], mask_mod: Callable[..., Any]) -> Any:
    """The mask_mod that keeps full blocks, and of partial ones what another mask_mod keeps."""
    outer, block = table.shape[:2], torch.Size(block_size)  # in a torch.Size, they are constants

    def blocks(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        first, second = b if outer[0] > 1 else 0, h if outer[1] > 1 else 0
        kind = table[first, second, q_idx // block[0], kv_idx // block[1]]
        return (kind > 0) & ((kind > 1) | mask_mod(b, h, q_idx, kv_idx))

    return blocks
