"""The kernels of one call with all their arguments, each to be compiled or started alone."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from attncc.backends.gluon import configs as gluon_configs
from attncc.backends.gluon import launch as gluon_forward
from attncc.backends.gluon import launch_backward as gluon_backward
from attncc.backends.triton import configs, launch
from attncc.backends.triton.configs import Config, Shape, Traits
from attncc.backends.triton.kernels import Kernel
from attncc.backends.triton.launch import Run
from attncc.backends.triton.prepared import Prepared, again, start, stream_of
from attncc.backends.triton.sections import Spec
from attncc.numeric import index_bits
from attncc.tiles import BoundPlan

KERNELS = (*configs.KERNELS, *gluon_configs.KERNELS)

WRITTEN = {
    "forward": ("out", "lse", "lse2"),
    "backward_kv": ("dk", "dv"),
    "backward_q": ("dq",),
    "gluon_forward": ("out", "lse", "lse2"),
    "gluon_backward": ("dq", "dk", "dv"),
}
"""What a kernel stores every element of."""

PARTS = {
    "gluon_forward": ("forward",),
    "gluon_backward": ("delta", "clear", "backward", "round_dq"),
}
"""Kernels of a file that are one to the tuner, in their order; any other is one by itself."""

BEFORE = ("delta",)
"""What makes a kernel's inputs, and is not timed with it."""

SUMMED = re.compile(r"(grad_\d+)_ptr")
"""What it adds to: gradients of captured tensors."""


@dataclass(frozen=True)
class Part:
    """One kernel that a call was about to start; config: its warps and stages, if given."""

    name: str
    kernel: Kernel
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    config: Config | None
    ready: dict[Hashable, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def start(self) -> None:
        """As calls do; Triton's own launch takes longer than a short kernel, so it is the first."""
        tensors = self._tensors
        stream = stream_of(next(iter(tensors.values())))
        again(self.ready, self.name, tensors, stream, lambda: self._first(tensors))

    def _first(self, tensors: Mapping[str, Tensor]) -> Prepared | None:
        return start(self.kernel, self.grid, dict(self.arguments), tensors, self.config)

    def compile(self) -> None:
        """Into Triton's caches, without running."""
        config = self.config
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages} if config else {}
        self.kernel.function.warmup(grid=self.grid, **self.arguments, **options)

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        """All that are arguments, by the names that `prepared.start` knows them by."""
        names = [n.rpartition("_")[0] for n in self.arguments if n.endswith(("_ptr", "_desc"))]
        named = {name: self.tensor(name) for name in names}
        return {name: x for name, x in named.items() if x is not None}

    def tensor(self, name: str) -> Tensor | None:
        """The tensor that is an argument by its address or by a descriptor."""
        if f"{name}_desc" in self.arguments:
            base: Tensor = self.arguments[f"{name}_desc"].base
            return base
        found: Tensor | None = self.arguments.get(f"{name}_ptr")
        return found

    def moved(self, others: Mapping[int, Tensor]) -> Part:
        """The same with other tensors, by the identity of those they replace."""
        return replace(self, arguments={n: _moved(x, others) for n, x in self.arguments.items()})


def _moved(argument: Any, others: Mapping[int, Tensor]) -> Any:
    base = getattr(argument, "base", None)
    if base is not None and id(base) in others:
        argument = copy.copy(argument)
        argument.base = others[id(base)]
    return others.get(id(argument), argument)


@dataclass(frozen=True)
class Launch:
    """What the tuner takes for one kernel: parts that start one after another."""

    parts: tuple[Part, ...]
    results: Mapping[str, Tensor]
    """What it writes, by name."""

    def start(self) -> None:
        for part in self.parts:
            part.start()

    def compile(self) -> None:
        """Into Triton's caches, without running."""
        for part in self.parts:
            part.compile()

    def computed(self) -> dict[str, Tensor]:
        """Copies of what one run writes over NaNs, and adds to zeros."""
        for name, result in self.results.items():
            result.fill_(0 if name.startswith("grad_") else math.nan)
        self.start()
        return {name: result.clone() for name, result in self.results.items()}


@dataclass(frozen=True)
class Recorder:
    """Stands for a jitted function: its launches are kept, and not started."""

    name: str
    kernel: Kernel
    parts: list[Part]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._keep, grid)

    def _keep(self, grid: tuple[int, ...], **arguments: Any) -> None:
        given = {name: arguments[name] for name in self.kernel.arguments}
        options = "num_warps" in arguments
        config = Config(1, 1, arguments["num_warps"], arguments["num_stages"]) if options else None
        self.parts.append(Part(self.name, self.kernel, grid, given, config))


@dataclass(frozen=True)
class Recording(Run):
    """A Run whose launches are kept, and not started."""

    parts: list[Part] = field(default_factory=list, compare=False, repr=False)

    def kernels(
        self, spec: Spec, load: Callable[..., dict[str, Kernel]], *more: Hashable
    ) -> dict[str, Kernel]:
        return {
            name: Kernel(Recorder(name, kernel, self.parts), kernel.arguments)
            for name, kernel in load(spec, *more).items()
        }


class Bench:
    """One call's inputs, and its kernels under any schedule.

    All launches of a kernel write to the same tensors, so that many can be held at once.
    """

    def __init__(self, bound: BoundPlan, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.bound = bound
        self.q, self.k, self.v = q.detach(), k.detach(), v.detach()
        self._shared: dict[str, dict[str, Tensor]] = {}

    @property
    def shape(self) -> Shape:
        return launch.shape_of(self.q, self.v)

    @property
    def traits(self) -> Traits:
        return launch.traits(self.bound.plan)

    @cached_property
    def forward(self) -> tuple[Tensor, Tensor]:
        """out and lse2 of the call, which backwards read."""
        serves = not gluon_forward.unsupported(self.q, self.v)
        run = Run(**self._settings)
        out, _, lse2 = (gluon_forward if serves else launch).forward(run, self.q, self.k, self.v)
        return out, lse2

    @cached_property
    def dout(self) -> Tensor:
        return torch.randn_like(self.forward[0])

    def launch(self, kernel: str, config: Config) -> Launch | None:
        """A kernel under a schedule, what it reads computed; None where there is nothing to do."""
        found = self._recorded(kernel, config)
        if found is None:
            return None
        before, launch = found
        own = {**launch.results, **_scratch(launch.parts)}
        if kernel not in self._shared:
            for part in before:
                part.start()
            self._shared[kernel] = own
        shared = self._shared[kernel]
        others = {id(x): shared[name] for name, x in own.items()}
        parts = tuple(part.moved(others) for part in launch.parts)
        return Launch(parts, {name: shared[name] for name in launch.results})

    def computed(self, kernel: str, config: Config, dout: Tensor) -> dict[str, Tensor]:
        """What a kernel writes for other gradients of the output, by name; {} without work."""
        found = self._recorded(kernel, config, dout)
        if found is None:
            return {}
        before, launch = found
        for part in before:
            part.start()
        return launch.computed()

    def _recorded(
        self, kernel: str, config: Config, dout: Tensor | None = None
    ) -> tuple[list[Part], Launch] | None:
        """What starts before a kernel, and the kernel."""
        run = Recording(**self._settings, configs={kernel: config})
        own = gluon_configs.KERNELS
        if kernel.endswith("forward"):
            (gluon_forward if kernel in own else launch).forward(run, self.q, self.k, self.v)
        else:
            given = *self.forward, self.dout if dout is None else dout, None
            (gluon_backward if kernel in own else launch).backward(
                run, self.q, self.k, self.v, *given
            )
        by_name = {part.name: part for part in run.parts}
        parts = tuple(by_name[n] for n in PARTS.get(kernel, (kernel,)) if n in by_name)
        if not parts:
            return None
        before = [by_name[n] for n in BEFORE if n in by_name and by_name[n] not in parts]
        return before, Launch(parts, _results(kernel, parts))

    @property
    def _settings(self) -> dict[str, Any]:
        plan, binding = self.bound.plan, self.bound.binding
        wide = index_bits(plan, binding) == 64
        return {"bound": self.bound, "scale": launch.scale_of(plan, binding), "wide": wide}


def _results(kernel: str, parts: Iterable[Part]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for part in parts:
        summed = [match[1] for name in part.arguments if (match := SUMMED.fullmatch(name))]
        named = {name: part.tensor(name) for name in (*WRITTEN[kernel], *summed)}
        found |= {name: x for name, x in named.items() if x is not None}
    return found


def _scratch(parts: Iterable[Part]) -> dict[str, Tensor]:
    """What a call allocates besides."""
    return {
        name: x
        for part in parts
        for name, x in part.arguments.items()
        if name == "delta_ptr" or re.fullmatch(r"grad_\d+_top_ptr", name)
    }
