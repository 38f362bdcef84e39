"""From a Spec to loaded kernels: printed once, cached by content, imported once a process."""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any

from attncc import cache
from attncc.backends.triton.backward import backward_source
from attncc.backends.triton.classify import lists_source
from attncc.backends.triton.configs import Config
from attncc.backends.triton.forward import forward_source
from attncc.backends.triton.lower import lower
from attncc.backends.triton.sections import Spec
from attncc.ir.plan import Plan
from attncc.settings import Debug, tell


@dataclass(frozen=True, slots=True)
class Kernel:
    """A jitted kernel and the names of its arguments, in order."""

    function: Any
    arguments: tuple[str, ...]
    fitted: dict[Hashable, Config] = field(default_factory=dict, compare=False)
    """Schedules too large for the GPU, with the call's shape, and the ones used instead."""


@lru_cache(maxsize=256)
def forward(spec: Spec) -> dict[str, Kernel]:
    """The kernels of the forward file, by name."""
    return load(f"{spec.name}_forward", forward_source(spec), ("forward",))


@lru_cache(maxsize=256)
def backward(spec: Spec) -> dict[str, Kernel]:
    """The kernels of the backward file, by name."""
    delta = ("delta",) if spec.lowering.softmax else ()
    names = (*delta, "backward_kv", "backward_q")
    return load(f"{spec.name}_backward", backward_source(spec), names)


@lru_cache(maxsize=256)
def lists(plan: Plan, doubles: bool) -> dict[str, Kernel]:
    """The kernels that list tiles, by name; doubles: a captured tensor is float64."""
    spec = Spec(lower(plan), half=False, ptx=False, descriptors=False)
    text = lists_source(spec, doubles)
    names = tuple(n for n in ("summarize", "key_lists", "query_lists") if f"def {n}(" in text)
    return load(f"{spec.name}_lists", text, names)


def load(stem: str, text: str, names: tuple[str, ...]) -> dict[str, Kernel]:
    begun = time.perf_counter()
    module: ModuleType = cache.load_module(cache.write_source(stem, text))
    spent = 1e3 * (time.perf_counter() - begun)
    tell(Debug.TIMES, f"{module.__file__}: written and imported in {spent:.1f} ms")
    tell(Debug.SOURCE, text)
    return {n: Kernel(f := getattr(module, n), tuple(f.arg_names)) for n in names}
