"""One call of a program for everybody to compute: its inputs, its mods, and its work."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attncc.inputs import Lengths, qkv
from attncc.ir.evaluate import Env, evaluate_unchecked
from attncc.ir.expr import TRUE, Axis, Expr, Score, axes
from attncc.ir.program import Program

BLOCK = 128
"""FlexAttention's blocks of a mask."""

Mod = Callable[..., Tensor]
Mods = tuple[Mod | None, Mod | None]
"""(mask_mod, score_mod); None keeps every pair, and every score."""
Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """A program with its arguments on `device`; q, k, v and dout are normal, of a seed."""

    program: Program
    lengths: Lengths
    arguments: Mapping[str, Any]
    device: torch.device
    dtype: torch.dtype = torch.float32
    written: Mods | None = None
    """The mods as FlexAttention's users write them; without them they are the program's own."""
    seed: int = 0

    @cached_property
    def inputs(self) -> Inputs:
        """q [B, H, Q, D], k and v [B, Hkv, KV, D]."""
        return qkv(self.lengths, self.dtype, self.device, self.seed)

    @cached_property
    def dout(self) -> Tensor:
        """The gradient of the output, of q's shape."""
        return qkv(self.lengths, self.dtype, self.device, self.seed + 1)[0]

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.lengths.heads // self.lengths.kv_heads

    @property
    def scale(self) -> float:
        """Of q . k."""
        if self.program.scale is None:
            return 1 / math.sqrt(self.lengths.head_dim)
        zero = torch.zeros((), dtype=torch.int64, device=self.device)
        return float(self.value(self.program.scale, {"h": zero}))

    # -- what the program says of a pair

    def value(
        self,
        expr: Expr,
        positions: Mapping[str, Tensor],
        score: Tensor | None = None,
        results: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """An expression of the program at some pairs, or rows with results, unchecked.

        In float64 with results, or if the score is.
        """
        defaults = {p.name: p.default for p in self.program.scalars if p.default is not None}
        names = {tensor.name for tensor in self.program.tensors}
        scalars = {n: x for n, x in self.arguments.items() if n not in names}
        tensors = {n: x for n, x in self.arguments.items() if n in names}
        double = bool(results) or (score is not None and score.dtype is torch.float64)
        env = _Traced(
            positions={**positions, "kv_head": positions["h"] // self.group},
            scalars={**defaults, **scalars, **self.lengths.sizes()},
            tensors=tensors,
            score=score,
            dtype=torch.float64 if double else torch.float32,
            device=self.device,
            results=results or {},
        )
        return evaluate_unchecked(expr, env)

    @cached_property
    def mods(self) -> Mods:
        """As FlexAttention calls them."""
        if self.written is not None:
            return self.written
        mask, score = self.program.mask, self.program.score

        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return self.value(mask, {"b": b, "h": h, "q_idx": q_idx, "kv_idx": kv_idx})

        def score_mod(s: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return self.value(score, {"b": b, "h": h, "q_idx": q_idx, "kv_idx": kv_idx}, s)

        return None if mask == TRUE else mask_mod, None if score == Score() else score_mod

    # -- how much is kept

    @property
    def copies(self) -> tuple[int, int]:
        """Sequences and heads over which the mask varies, 1 where it does not."""
        varies = axes(self.program.mask)
        batch = self.lengths.batch if varies & Axis.B else 1
        return batch, self.lengths.heads if varies & Axis.H else 1

    @cached_property
    def tiles(self) -> Tensor | None:
        """int64 [*copies, q tiles, kv tiles]: the pairs kept in each; None where all are."""
        mask = self.mods[0]
        if mask is None:
            return None
        batch, heads = self.copies
        parts = [self._tiles(mask, b, h) for b in range(batch) for h in range(heads)]
        return torch.stack(parts).view(batch, heads, *parts[0].shape)

    def _tiles(self, mask: Mod, b: int, h: int) -> Tensor:
        n, parts = self.lengths, []
        at = [torch.tensor(x, device=self.device) for x in (b, h)]
        keys = torch.arange(n.kv_len, device=self.device)[None, :]
        for start in range(0, n.q_len, 8 * BLOCK):
            rows = torch.arange(start, min(start + 8 * BLOCK, n.q_len), device=self.device)
            kept = mask(*at, rows[:, None], keys).expand(len(rows), n.kv_len)
            kept = torch.nn.functional.pad(kept, (0, -n.kv_len % BLOCK, 0, -len(rows) % BLOCK))
            tiles = len(kept) // BLOCK, BLOCK, kept.shape[1] // BLOCK, BLOCK
            parts.append(kept.view(tiles).sum((1, 3)))
        return torch.cat(parts)

    @property
    def pairs(self) -> int:
        """Kept (query, key) pairs of all heads."""
        n = self.lengths
        if self.tiles is None:
            return n.batch * n.heads * n.q_len * n.kv_len
        batch, heads = self.copies
        return int(self.tiles.sum()) * (n.batch // batch) * (n.heads // heads)

    @property
    def density(self) -> float:
        """Kept pairs over all."""
        n = self.lengths
        return self.pairs / max(1, n.batch * n.heads * n.q_len * n.kv_len)

    @property
    def flops(self) -> float:
        """Of a forward: two products a kept pair. A backward has five."""
        return 4.0 * self.pairs * self.lengths.head_dim


class _Traced(Env):
    """Constants as operations: torch.compile cannot lower tensors that a mod makes of numbers."""

    def number(self, value: bool | int | float) -> Tensor:
        kinds = {bool: torch.bool, int: torch.int64, float: self.dtype}
        return torch.full((), value, dtype=kinds[type(value)], device=self.device)
