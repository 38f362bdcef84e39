"""Kernels started again: compiled for one layout of tensors, so that only addresses are new.

Triton's own launch looks at every argument, to see which compiled kernel is meant; for dozens of
arguments that takes longer than a short kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from triton import knobs
from triton.runtime import driver

from attncc.backends.triton.arguments import Values
from attncc.backends.triton.configs import Config
from attncc.backends.triton.kernels import Kernel
from attncc.backends.triton.versions import OPTIONS

ALIGNMENT = 16
"""Bytes; what Triton compiles for, and a descriptor's rows need."""

LAYOUTS = 64
"""Kernels kept ready for one plan."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A compiled kernel with its grid and arguments, tensors that come and go left out."""

    compiled: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    pointers: tuple[tuple[int, str], ...]
    """Positions of addresses, and the names of their tensors."""
    descriptors: tuple[tuple[int, str], ...]
    """Positions of tensor descriptors, whose base alone is new."""
    kept: tuple[Tensor, ...]
    """The other tensors, which are arguments by address."""

    def start(self, tensors: Mapping[str, Tensor], stream: int) -> None:
        filled = list(self.arguments)
        for at, name in self.pointers:
            filled[at] = tensors[name].data_ptr()
        for at, name in self.descriptors:
            filled[at] = _moved(filled[at], tensors[name])
        kernel = self.compiled
        kernel.run(
            *self.grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *filled
        )


def start(
    kernel: Kernel,
    grid: tuple[int, ...],
    values: Values,
    tensors: Mapping[str, Tensor],
    config: Config | None,
) -> Prepared | None:
    """Starts a kernel by Triton's own way, with the arguments it names.

    tensors: what `values` holds as <name>_ptr or <name>_desc and later calls bring anew. Returns
    what starts it for those; None where there is nothing to start, or no compiled kernel.
    """
    if 0 in grid:
        return None
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages} if config else {}
    given = {name: values[name] for name in kernel.arguments}
    compiled = kernel.function[grid](**given, **options, **OPTIONS)
    if not hasattr(compiled, "packed_metadata"):
        return None
    places = {name: at for at, name in enumerate(given)}

    def found(suffix: str) -> tuple[tuple[int, str], ...]:
        names = ((f"{name}{suffix}", name) for name in tensors)
        return tuple((places[full], name) for full, name in names if full in places)

    pointers, descriptors = found("_ptr"), found("_desc")
    arguments = list(given.values())
    for at, _ in pointers:
        arguments[at] = None
    for at, _ in descriptors:
        arguments[at] = _moved(arguments[at], None)
    kept = tuple(x for x in arguments if isinstance(x, Tensor))
    arguments = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    x, y, z = (*grid, 1, 1)[:3]
    return Prepared(compiled, (x, y, z), tuple(arguments), pointers, descriptors, kept)


def _watched() -> bool:
    """Whether a profiler wants to hear of launches, which Triton's own way tells it."""
    runtime: Any = knobs.runtime
    hooks = runtime.launch_enter_hook, runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)


def _moved(descriptor: Any, base: Tensor | None) -> Any:
    """The descriptor of another tensor of the same layout; what made it checked that."""
    moved = object.__new__(type(descriptor))
    moved.__dict__.update(descriptor.__dict__)
    moved.base = base
    return moved


def layout(*tensors: Tensor) -> tuple[Hashable, ...]:
    """Equal where kernels compiled for some tensors serve others of the same shapes."""
    return tuple((x.dtype, x.shape[-1], x.stride(), x.data_ptr() % ALIGNMENT) for x in tensors)


def again(
    ready: dict[Hashable, Prepared | None],
    key: Hashable,
    tensors: Mapping[str, Tensor],
    stream: int | None,
    first: Callable[[], Prepared | None],
) -> None:
    """Starts what `key` stands for, on a stream of the GPU; `first` does so when none is ready."""
    known = ready.get(key)
    if known is not None and stream is not None and not _watched():
        known.start(tensors, stream)
        return
    if len(ready) >= LAYOUTS:
        ready.clear()
    ready[key] = first()


def stream_of(x: Tensor) -> int | None:
    """The current stream of the tensor's GPU, as the driver knows it."""
    return driver.active.get_current_stream(x.device.index) if x.is_cuda else None
