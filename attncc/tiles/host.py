"""What ranges say without a look at any tensor: on the host, without a synchronisation."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from attncc.binding import Binding, Number
from attncc.ir.evaluate import Env, evaluate_unchecked
from attncc.ir.expr import Axis, Expr, Load, walk
from attncc.ir.plan import Segment


def reads_nothing(segments: tuple[Segment, ...]) -> bool:
    """Whether their ends are known from lengths and scalars."""
    ends = (end for s in segments for end in (s.lo, s.hi))
    return not any(isinstance(node, Load) for end in ends for node in walk(end))


def visited(
    segments: tuple[Segment, ...], axis: Axis, binding: Binding, tile: tuple[int, int]
) -> Tensor:
    """int64 [B, H, rows]: how many tiles each row of tiles visits; segments may overlap.

    axis: the rows'; tile: (BLOCK_M, BLOCK_N). Kept for each set of lengths and scalars.
    """
    length, other = binding.q_len, binding.kv_len
    if axis is Axis.KV:
        length, other, tile = other, length, tile[::-1]
    heads = binding.batch, binding.heads, binding.kv_heads
    return _visited(segments, axis, (length, *tile), heads, tuple(binding.scalars.items()))


@lru_cache(maxsize=256)
def _visited(
    segments: tuple[Segment, ...],
    axis: Axis,
    sizes: tuple[int, int, int],
    heads: tuple[int, int, int],
    scalars: tuple[tuple[str, Number], ...],
) -> Tensor:
    length, rows, columns = sizes
    batch, all_heads, kv_heads = heads
    name = "q" if axis is Axis.Q else "kv"
    lo = torch.arange(0, length, rows)
    h = torch.arange(all_heads).view(-1, 1)
    positions = {
        "b": torch.arange(batch).view(-1, 1, 1),
        "h": h,
        "kv_head": h // max(1, all_heads // max(1, kv_heads)),
        f"{name}_lo": lo,
        f"{name}_last": (lo + rows).clamp(max=length) - 1,
    }
    env = Env(positions, dict(scalars), dtype=torch.float64)

    def end(expr: Expr) -> Tensor:
        return evaluate_unchecked(expr, env)

    total = torch.zeros(batch, all_heads, lo.numel(), dtype=torch.int64)
    for segment in segments:
        first, past = end(segment.lo), end(segment.hi)
        total += torch.where(first < past, -(-past // columns) - first // columns, 0)
    return total
