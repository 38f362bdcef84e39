"""One pattern's inputs for single kernels, and what of their work counts as useful."""

from __future__ import annotations

import torch

import attncc
from attncc.backends.triton.configs import Config, default
from attncc.tuning.bench import Bench, Launch
from benchmarks.contest import kept_by_tile
from benchmarks.rows import Pattern, Shape

PRODUCTS = {"forward": 2, "backward_kv": 4, "backward_q": 3}
"""Of a kept pair and head, each as long as the head."""


class Problem:
    """Random inputs of one pattern, and its kernels under any schedule."""

    def __init__(self, pattern: Pattern, shape: Shape, dtype: torch.dtype) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        attention = attncc.compile(pattern.program)
        names = {param.name for param in attention.program.params}
        given = pattern.arguments(shape, device)
        arguments = {name: value for name, value in given.items() if name in names}
        rng = torch.Generator(device).manual_seed(0)
        q, k, v = (
            torch.randn(
                (shape.batch, heads, shape.length, shape.head_dim),
                generator=rng,
                device=device,
                dtype=dtype,
            )
            for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
        )
        self.bench = Bench(attention.plan(q, k, v, **arguments), q, k, v)
        mask, _ = pattern.mods(given)
        pairs = shape.length**2
        if mask is not None:
            pairs = int(kept_by_tile(mask, shape.length, device).sum())
        self.product = 2.0 * shape.batch * shape.heads * pairs * shape.head_dim

    def launch(self, kernel: str, config: Config) -> Launch:
        """One kernel under one schedule; what runs before it has run."""
        launch = self.bench.launch(kernel, config)
        assert launch is not None, "no tokens"
        return launch

    def default(self, kernel: str) -> Config:
        return default(kernel, self.bench.shape, self.bench.traits)

    def flops(self, kernel: str) -> float:
        return PRODUCTS[kernel] * self.product
