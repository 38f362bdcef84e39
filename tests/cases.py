"""Random bindings for the programs of tests/strategies.py, and their dense masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from attncc.binding import Binding
from attncc.ir.evaluate import Env, evaluate, evaluate_unchecked
from attncc.ir.expr import Expr


@st.composite
def bindings(
    draw: st.DrawFn, shortest: int = 0, longest: int = 40, poison: bool = False
) -> Binding:
    """Values for strategies.PARAMS; 1 <= q_len <= kv_len where `shortest` is 1.

    poison: floats may be nan and inf.
    """
    kv_len = draw(st.integers(shortest, longest))
    q_len = draw(st.integers(shortest, kv_len if shortest else longest))
    batch = draw(st.integers(1, 2))
    kv_heads = draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 2))
    sizes = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "head_dim": 16}
    scalars = {
        "window": draw(st.integers(-3, 45)),
        "offset": draw(st.integers(-20, 20)),
        "cap": draw(st.sampled_from((0.5, 2.5, 3.25))),
        "enabled": draw(st.booleans()),
    }
    rng = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    tensors = {
        "doc": torch.randint(0, 5, (batch, kv_len), generator=rng).sort(-1).values,
        "table": torch.randint(-3, 12, (7,), generator=rng),
        "keep": torch.rand((kv_len,), generator=rng) < draw(st.sampled_from((0.1, 0.5, 0.95))),
        "bias": torch.randn((heads, 5), generator=rng),
        "slope": torch.randn((heads,), generator=rng),
    }
    if poison:
        bad = draw(st.sampled_from((0.0, torch.nan, torch.inf, -torch.inf)))
        tensors["bias"][torch.rand((heads, 5), generator=rng) < 0.3] = bad
    return Binding(
        **sizes,
        q_len=q_len,
        kv_len=kv_len,
        scalars={**scalars, **sizes, "q_len": q_len, "kv_len": kv_len},
        tensors=tensors,
    )


def environment(binding: Binding, dtype: torch.dtype = torch.float64, seed: int = 0) -> Env:
    """Every pair of the binding, as [B, H, Q, KV] broadcasts, with a random score."""
    shape = (binding.batch, binding.heads, binding.q_len, binding.kv_len)
    positions = {}
    for axis, name in enumerate(("b", "h", "q_idx", "kv_idx")):
        view = [1] * 4
        view[axis] = -1
        positions[name] = torch.arange(shape[axis]).view(view)
    positions["kv_head"] = positions["h"] // (binding.heads // binding.kv_heads)
    score = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return Env(positions, binding.scalars, binding.tensors, score, dtype)


def everywhere(expr: Expr, binding: Binding, dtype: torch.dtype = torch.float64) -> Tensor:
    """The checked value at every pair [B, H, Q, KV]."""
    return _grid(evaluate(expr, environment(binding, dtype)), binding)


def dense_mask(expr: Expr, binding: Binding, dtype: torch.dtype = torch.float64) -> Tensor:
    """The mask at every pair [B, H, Q, KV]; reads out of range are clamped."""
    return _grid(evaluate_unchecked(expr, environment(binding, dtype)), binding)


def _grid(value: Tensor, binding: Binding) -> Tensor:
    return value.expand(binding.batch, binding.heads, binding.q_len, binding.kv_len)


@dataclass(frozen=True)
class DenseTiles:
    """What a mask really does on tiles: bool [B, H, q_tiles, kv_tiles]."""

    some: Tensor
    every: Tensor


def dense_tiles(mask: Tensor, tile: tuple[int, int]) -> DenseTiles:
    some = torch.stack([rows.any(2) for rows in mask.split(tile[0], 2)], 2)
    every = torch.stack([rows.all(2) for rows in mask.split(tile[0], 2)], 2)
    return DenseTiles(
        torch.stack([keys.any(3) for keys in some.split(tile[1], 3)], 3),
        torch.stack([keys.all(3) for keys in every.split(tile[1], 3)], 3),
    )
