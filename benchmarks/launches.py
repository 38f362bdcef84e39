"""Single kernels of a call, with all their arguments, to be compiled or timed alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import attncc
from attncc.backends.triton import launch
from attncc.backends.triton.configs import Config, Shape
from attncc.backends.triton.kernels import Kernel
from attncc.backends.triton.launch import Run
from attncc.numeric import index_bits
from attncc.tiles import BoundPlan
from benchmarks.contest import kept_by_tile
from benchmarks.rows import Pattern
from benchmarks.rows import Shape as RowShape

RESULTS = {
    "forward": ("out_ptr", "lse_ptr"),
    "backward_kv": ("dk_ptr", "dv_ptr"),
    "backward_q": ("dq_ptr",),
}


@dataclass(frozen=True)
class Launch:
    """What `launch.launch` was about to start."""

    kernel: Kernel
    grid: tuple[int, ...]
    values: dict[str, Any]
    config: Config | None

    @property
    def name(self) -> str:
        return str(self.kernel.function.__name__)

    def start(self) -> None:
        launch.launch(self.kernel, self.grid, self.values, self.config)

    def compile(self) -> None:
        """Into Triton's cache on disk, without running."""
        assert self.config is not None
        arguments = {name: self.values[name] for name in self.kernel.arguments}
        options = {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages}
        self.kernel.function.warmup(grid=self.grid, **arguments, **options)

    def results(self) -> list[Tensor]:
        return [self.values[name] for name in RESULTS[self.name]]


class Problem:
    """Inputs of one pattern, what the forward made of them, and how long a run may be."""

    def __init__(self, pattern: Pattern, shape: RowShape, dtype: torch.dtype) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        attention = attncc.compile(pattern.program)
        names = {param.name for param in attention.program.params}
        given = pattern.arguments(shape, device)
        self.arguments = {name: value for name, value in given.items() if name in names}
        rng = torch.Generator(device).manual_seed(0)
        make = {"generator": rng, "device": device, "dtype": dtype}
        sizes = [
            (shape.batch, n, shape.length, shape.head_dim) for n in (shape.heads, shape.kv_heads)
        ]
        self.q, self.k, self.v, self.dout = (torch.randn(sizes[n], **make) for n in (0, 1, 1, 0))
        self.bound: BoundPlan = attention.plan(self.q, self.k, self.v, **self.arguments)
        self.out, self.lse = launch.forward(self.run({}), self.q, self.k, self.v)
        mask, _ = pattern.mods(given)
        pairs = shape.length**2
        if mask is not None:
            pairs = int(kept_by_tile(mask, shape.length, device).sum())
        self.product = 2.0 * shape.batch * shape.heads * pairs * shape.head_dim

    @property
    def shape(self) -> Shape:
        return launch.shape_of(self.q, self.v)

    def run(self, configs: dict[str, Config]) -> Run:
        plan, binding = self.bound.plan, self.bound.binding
        wide = index_bits(plan, binding) == 64
        return Run(self.bound, launch.scale_of(plan, binding), wide=wide, configs=configs)

    def default(self, kernel: str) -> Config:
        return self.run({}).config(kernel, self.q, self.v)

    def flops(self, kernel: str) -> float:
        """Two, four and three products of a kept pair and head."""
        return {"forward": 2, "backward_kv": 4, "backward_q": 3}[kernel] * self.product

    def launch(self, kernel: str, config: Config) -> Launch:
        """One kernel under one schedule; what runs before it has run."""
        run = self.run({kernel: config})
        if kernel == "forward":
            found = _recorded(lambda: launch.forward(run, self.q, self.k, self.v))
        else:
            given = self.q, self.k, self.v, self.out, self.lse, self.dout, None
            found = _recorded(lambda: launch.backward(run, *given))
        for other in found:
            if other.name == "delta":
                other.start()
        return next(one for one in found if one.name == kernel)


def _recorded(call: Callable[[], object]) -> list[Launch]:
    """The launches of a call, none of them started."""
    found: list[Launch] = []
    with mock.patch.object(launch, "launch", lambda *args: found.append(Launch(*args))):
        call()
    return found
