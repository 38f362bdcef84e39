"""Kernels started again: compiled for one layout of tensors, so that only addresses are new.

Triton's own launch looks at every argument, to see which compiled kernel is meant; for dozens of
arguments that takes longer than a short kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from attncc.backends.triton.arguments import Values
from attncc.backends.triton.configs import Config
from attncc.backends.triton.direct import Direct, direct
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
    pointers: tuple[tuple[int, int], ...]
    """Positions of addresses, and which of the tensors they are of."""
    descriptors: tuple[tuple[int, int], ...]
    """Positions of tensor descriptors, whose base alone is new."""
    kept: tuple[Tensor, ...]
    """The other tensors, which are arguments by address."""
    direct: Direct | None
    """Starts it without Triton's launcher, where its parameters are known."""

    def start(self, stream: int, tensors: Sequence[Tensor]) -> None:
        """tensors: in the order in which it was prepared with them."""
        if self.direct is not None:
            self.direct.start(stream, tensors)
            return
        filled = list(self.arguments)
        for at, which in self.pointers:
            filled[at] = tensors[which].data_ptr()
        for at, which in self.descriptors:
            filled[at] = _moved(filled[at], tensors[which])
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

    def found(suffix: str) -> tuple[tuple[int, int], ...]:
        names = ((f"{name}{suffix}", which) for which, name in enumerate(tensors))
        return tuple((places[full], which) for full, which in names if full in places)

    pointers, descriptors = found("_ptr"), found("_desc")
    x, y, z = (*grid, 1, 1)[:3]
    names = tuple(given)
    open_at = {names[at]: which for at, which in (*pointers, *descriptors)}
    device = max((t.get_device() for t in tensors.values()), default=-1)
    made = direct(compiled, (x, y, z), given, open_at, device) if device >= 0 else None
    arguments = list(given.values())
    for at, _ in pointers:
        arguments[at] = None
    for at, _ in descriptors:
        arguments[at] = _moved(arguments[at], None)
    kept = tuple(x for x in arguments if isinstance(x, Tensor))
    arguments = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    return Prepared(compiled, (x, y, z), tuple(arguments), pointers, descriptors, kept, made)


def _watched() -> bool:
    """Whether a profiler wants to hear of launches, which Triton's own way tells it."""
    runtime: Any = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _moved(descriptor: Any, base: Tensor | None) -> Any:
    """The descriptor of another tensor of the same layout; what made it checked that."""
    moved = object.__new__(type(descriptor))
    moved.__dict__.update(descriptor.__dict__)
    moved.base = base
    return moved


def layout(*tensors: Tensor) -> tuple[Hashable, ...]:
    """Equal where kernels compiled for some tensors serve others of the same shapes and dtypes."""
    parts: list[Hashable] = []
    for x in tensors:
        parts.append(x.stride())
        if beyond := x.data_ptr() % ALIGNMENT:
            parts.append(beyond)
    return tuple(parts)


def again(
    ready: dict[Hashable, Any],
    key: Hashable,
    tensors: Mapping[str, Tensor],
    stream: int | None,
    first: Callable[[], Prepared | None],
) -> None:
    """Starts what `key` stands for, on a stream of the GPU; `first` does so when none is ready.

    tensors: the same names in the same order for one key.
    """
    known = ready.get(key)
    if known is not None and stream is not None and not _watched():
        known.start(stream, tuple(tensors.values()))
        return
    if len(ready) >= LAYOUTS:
        ready.clear()
    ready[key] = first()


def stream_of(x: Tensor) -> int | None:
    """The current stream of the tensor's GPU, as the driver knows it."""
    if not x.is_cuda:
        return None
    current: Any = torch._C
    return int(current._cuda_getCurrentRawStream(x.get_device()))
