"""Tier 3: the pairs of partial tiles, evaluated one by one to say what intervals lost."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attncc.ir.evaluate import evaluate_unchecked
from attncc.ir.expr import Axis
from attncc.tiles.classes import CHUNK, FULL, PARTIAL, of_verdicts
from attncc.tiles.grid import TileGrid

AFFORDABLE = 2**25
"""Pairs that `density` evaluates where it must; about a second on 2 cores."""


def refined(grid: TileGrid, classes: Tensor) -> Tensor:
    """The exact class of every tile."""
    result = classes.clone()
    for at, keep, valid in _partial_tiles(grid, classes):
        result[at] = of_verdicts((keep | ~valid).all((1, 2)), keep.any((1, 2)))
    return result


def kept(grid: TileGrid, classes: Tensor) -> int:
    """Pairs in full tiles, and those kept in partial ones."""
    rows, keys = (_lengths(grid, axis) for axis in (Axis.Q, Axis.KV))
    full = (classes == FULL) * rows[:, None] * keys
    return int(full.sum()) + sum(int(keep.sum()) for _, keep, _ in _partial_tiles(grid, classes))


def _lengths(grid: TileGrid, axis: Axis) -> Tensor:
    name, ends = grid.name(axis), grid.ends(axis)
    return ends[f"{name}_last"] - ends[f"{name}_lo"] + 1


def _partial_tiles(
    grid: TileGrid, classes: Tensor
) -> Iterator[tuple[tuple[Tensor, ...], Tensor, Tensor]]:
    """(b, h, query tile, key tile) of some partial tiles [n], which of their pairs
    [n, BLOCK_M, BLOCK_N] are kept, and which lie within the lengths."""
    block_m, block_n = grid.tile
    binding = grid.binding
    where = (classes == PARTIAL).nonzero()
    rows = torch.arange(block_m, device=where.device).view(1, -1, 1)
    keys = torch.arange(block_n, device=where.device).view(1, 1, -1)
    for part in torch.split(where, max(1, CHUNK // (4 * block_m * block_n))):
        b, h, q_tile, kv_tile = part.unbind(1)
        q_idx = q_tile.view(-1, 1, 1) * block_m + rows
        kv_idx = kv_tile.view(-1, 1, 1) * block_n + keys
        valid = (q_idx < binding.q_len) & (kv_idx < binding.kv_len)
        positions = {
            **grid.heads(b.view(-1, 1, 1), h.view(-1, 1, 1)),
            "q_idx": q_idx.clamp(max=binding.q_len - 1),
            "kv_idx": kv_idx.clamp(max=binding.kv_len - 1),
        }
        keep = evaluate_unchecked(grid.mask, grid.env(positions)) & valid
        yield (b, h, q_tile, kv_tile), keep, valid
