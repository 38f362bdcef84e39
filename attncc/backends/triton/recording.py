"""The kernels of one call with all their arguments, each to be compiled or started alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attncc.backends.triton import launch
from attncc.backends.triton.configs import Config, Shape, Traits
from attncc.backends.triton.kernels import Kernel
from attncc.backends.triton.launch import Run
from attncc.backends.triton.sections import Spec
from attncc.numeric import index_bits
from attncc.tiles import BoundPlan

WRITTEN = {
    "forward": ("out_ptr", "lse_ptr", "lse2_ptr"),
    "backward_kv": ("dk_ptr", "dv_ptr"),
    "backward_q": ("dq_ptr",),
}
"""What a kernel stores every element of."""

SUMMED = re.compile(r"grad_\d+_ptr")
"""What it adds to: gradients of captured tensors."""


@dataclass(frozen=True)
class Launch:
    """What a call was about to start."""

    name: str
    function: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]

    def start(self) -> None:
        self.function[self.grid](**self.arguments)

    def compile(self) -> None:
        """Into Triton's caches, without running."""
        self.function.warmup(grid=self.grid, **self.arguments)

    @property
    def results(self) -> dict[str, Tensor]:
        """The tensors it writes, by name."""
        names = [name for name in WRITTEN.get(self.name, ()) if name in self.arguments]
        names += [name for name in self.arguments if SUMMED.fullmatch(name)]
        return {name: self.arguments[name] for name in names}

    def computed(self) -> dict[str, Tensor]:
        """Copies of what one run writes over NaNs, and adds to zeros."""
        for name, result in self.results.items():
            result.fill_(0 if SUMMED.fullmatch(name) else math.nan)
        self.start()
        return {name: result.clone() for name, result in self.results.items()}


@dataclass(frozen=True)
class Recorder:
    """Stands for a jitted function: its launches are kept, and not started."""

    name: str
    function: Any
    launches: list[Launch]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._keep, grid)

    def _keep(self, grid: tuple[int, ...], **arguments: Any) -> None:
        self.launches.append(Launch(self.name, self.function, grid, arguments))


@dataclass(frozen=True)
class Recording(Run):
    """A Run whose launches are kept, and not started."""

    launches: list[Launch] = field(default_factory=list, compare=False, repr=False)

    def kernels(self, spec: Spec, load: Callable[[Spec], dict[str, Kernel]]) -> dict[str, Kernel]:
        return {
            name: Kernel(Recorder(name, kernel.function, self.launches), kernel.arguments)
            for name, kernel in load(spec).items()
        }


class Bench:
    """One call's inputs, and its kernels under any schedule.

    All launches of a kernel write to the same tensors, so that many can be held at once.
    """

    def __init__(self, bound: BoundPlan, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.bound = bound
        self.q, self.k, self.v = q.detach(), k.detach(), v.detach()
        run = Run(**self._settings)
        self.out, _, self.lse2 = launch.forward(run, self.q, self.k, self.v)
        self.dout = torch.randn_like(self.out)
        self._shared: dict[str, dict[str, Any]] = {}

    @property
    def shape(self) -> Shape:
        return launch.shape_of(self.q, self.v)

    @property
    def traits(self) -> Traits:
        return launch.traits(self.bound.plan)

    def launch(self, kernel: str, config: Config) -> Launch | None:
        """A kernel under a schedule, what it reads computed; None where there is nothing to do."""
        run = Recording(**self._settings, configs={kernel: config})
        if kernel == "forward":
            launch.forward(run, self.q, self.k, self.v)
        else:
            launch.backward(run, self.q, self.k, self.v, self.out, self.lse2, self.dout, None)
        found = {one.name: one for one in run.launches}
        if kernel not in found:
            return None
        if kernel not in self._shared:
            if "delta" in found:
                found["delta"].start()
            self._shared[kernel] = _outputs(found[kernel])
        shared = self._shared[kernel]
        return replace(found[kernel], arguments={**found[kernel].arguments, **shared})

    @property
    def _settings(self) -> dict[str, Any]:
        plan, binding = self.bound.plan, self.bound.binding
        wide = index_bits(plan, binding) == 64
        return {"bound": self.bound, "scale": launch.scale_of(plan, binding), "wide": wide}


def _outputs(launch: Launch) -> dict[str, Any]:
    """What a call allocates for its kernels."""
    arguments = launch.arguments
    own = [n for n in arguments if n == "delta_ptr" or re.fullmatch(r"grad_\d+_top_ptr", n)]
    return {**launch.results, **{name: arguments[name] for name in own}}
