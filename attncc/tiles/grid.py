"""The grid of tiles of one call: where each lies, and what expressions read there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attncc.binding import Binding
from attncc.ir.evaluate import Env
from attncc.ir.expr import Axis, Expr, axes


@dataclass(frozen=True)
class TileGrid:
    """Tiles of (BLOCK_M, BLOCK_N) over the lengths of a call.

    Sequences share a row of the grid where nothing in the mask varies with b; so do heads.
    """

    binding: Binding
    tile: tuple[int, int]
    mask: Expr

    @property
    def outer(self) -> tuple[int, int]:
        """(B|1, H|1), the first two dims of every table."""
        varies = axes(self.mask)
        return (
            self.binding.batch if varies & Axis.B else 1,
            self.binding.heads if varies & Axis.H else 1,
        )

    @property
    def copies(self) -> int:
        """How many (b, h) share one row."""
        batch, heads = self.outer
        return (self.binding.batch // max(batch, 1)) * (self.binding.heads // max(heads, 1))

    @property
    def pairs(self) -> int:
        """Those of tokens, copies apart."""
        batch, heads = self.outer
        return batch * heads * self.binding.q_len * self.binding.kv_len

    # -- along one axis

    def name(self, axis: Axis) -> str:
        return "q" if axis is Axis.Q else "kv"

    def length(self, axis: Axis) -> int:
        return self.binding.q_len if axis is Axis.Q else self.binding.kv_len

    def block(self, axis: Axis) -> int:
        return self.tile[0] if axis is Axis.Q else self.tile[1]

    def tiles(self, axis: Axis) -> int:
        return -(-self.length(axis) // self.block(axis))

    def ends(self, axis: Axis) -> dict[str, Tensor]:
        """First and last position, and number, of each tile along an axis."""
        name = self.name(axis)
        number = self.arange(self.tiles(axis))
        low = number * self.block(axis)
        last = (low + self.block(axis)).clamp(max=self.length(axis)) - 1
        return {f"{name}_lo": low, f"{name}_last": last, f"{name}_tile": number}

    def arange(self, count: int) -> Tensor:
        return torch.arange(count, device=self.binding.device)

    # -- environments

    def env(self, positions: Mapping[str, Tensor], more: Mapping[str, Tensor] | None = None) -> Env:
        """These positions, the call's scalars and tensors, and `more` tensors; in float64."""
        return Env(
            positions,
            self.binding.scalars,
            {**self.binding.tensors, **(more or {})},
            dtype=torch.float64,
            device=self.binding.device,
        )

    def over(self, rows: slice, more: Mapping[str, Tensor]) -> Env:
        """Every tile of some rows of tiles: [B|1, H|1, rows, kv_tiles]."""
        positions = self.sequences_and_heads(4)
        for axis, shape in ((Axis.Q, (1, 1, -1, 1)), (Axis.KV, (1, 1, 1, -1))):
            for name, value in self.ends(axis).items():
                part = value[rows] if axis is Axis.Q else value
                positions[name] = part.view(shape)
        return self.env(positions, more)

    def sequences_and_heads(self, rank: int) -> dict[str, Tensor]:
        """b along the first of `rank` axes, h and kv_head along the second."""
        batch, heads = self.outer
        ones = [1] * (rank - 2)
        return self.heads(
            self.arange(batch).view(-1, 1, *ones), self.arange(heads).view(1, -1, *ones)
        )

    def heads(self, b: Tensor, h: Tensor) -> dict[str, Tensor]:
        group = max(1, self.binding.heads // max(1, self.binding.kv_heads))
        return {"b": b, "h": h, "kv_head": h // group}
