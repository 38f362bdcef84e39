"""Attention of FlexAttention-style functions, traced once for functions that are alike."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from torch import Tensor

from attncc.api import Attention
from attncc.flex.fingerprint import fingerprint
from attncc.frontend.mods import Mods, traced_mods
from attncc.ir.expr import Scalar, ScalarParam
from attncc.ir.ops import Kind
from attncc.ir.program import Program

Mod = Callable[..., Any]

KEPT = 64
"""Functions of different code or numbers that are remembered."""


@dataclass(frozen=True)
class Variant:
    """An Attention, and what its parameters are in this call."""

    attention: Attention
    arguments: Mapping[str, object]

    def scaled(self, scale: float) -> Variant:
        """The same with q . k times a number of the call's in place of 1 / sqrt(head_dim)."""
        attention, name = _scaled(self.attention.program)
        return Variant(attention, {**self.arguments, name: scale})


def variant(score_mod: Mod | None, mask_mod: Mod | None) -> Variant:
    """The Attention of two functions; those alike share one, and with it plans and kernels."""
    found = fingerprint(score_mod, mask_mod)
    if found is None:
        mods = traced_mods(score_mod, mask_mod)
        return Variant(attention_of(mods.program), mods.arguments())
    known = _known.get(found.key)
    if known is None or not known.serves(found.tensors):
        known = _Known(traced_mods(score_mod, mask_mod), found.tensors)
        _known[found.key] = known
        if len(_known) > KEPT:
            _known.popitem(last=False)
    else:
        _known.move_to_end(found.key)
    return Variant(known.attention, known.arguments(found.tensors))


@lru_cache(maxsize=KEPT)
def attention_of(program: Program) -> Attention:
    """One object for equal programs: it has the analysis, and plans of calls."""
    return Attention(program)


@lru_cache(maxsize=KEPT)
def _scaled(program: Program) -> tuple[Attention, str]:
    taken = {param.name for param in program.params}
    name = next(f"qk_scale{'_' * n}" for n in range(KEPT) if f"qk_scale{'_' * n}" not in taken)
    param = ScalarParam(name, Kind.FLOAT)
    params = *program.params, param
    return attention_of(replace(program, params=params, scale=Scalar(param), source="")), name


class _Known:
    """Traced functions whose captured tensors may be others in the next call.

    Parameters that are captured tensors themselves are taken from each call's; where one is
    computed of them, the functions serve again for the same tensor objects only.
    """

    def __init__(self, mods: Mods, tensors: tuple[Tensor, ...]) -> None:
        self.attention = attention_of(mods.program)
        self.fixed: dict[str, object] = {}
        self.places: dict[str, _Place] = {}
        self.mods: Mods | None = None
        self.tensors: tuple[Tensor, ...] = ()
        for name, value in mods.arguments().items():
            place = _place(value, tensors) if isinstance(value, Tensor) else None
            if place is not None:
                self.places[name] = place
            elif isinstance(value, Tensor):
                self.mods, self.tensors = mods, tensors
            else:
                self.fixed[name] = value

    def serves(self, tensors: tuple[Tensor, ...]) -> bool:
        same = (one is other for one, other in zip(self.tensors, tensors, strict=True))
        return self.mods is None or all(same)

    def arguments(self, tensors: tuple[Tensor, ...]) -> Mapping[str, object]:
        if self.mods is not None:
            return self.mods.arguments()
        return {**self.fixed, **{name: place(tensors) for name, place in self.places.items()}}


@dataclass
class _Place:
    """Which of the captured tensors a parameter is; one of no axes is read as one of one."""

    number: int
    last: tuple[weakref.ref[Tensor], Tensor] | None = field(default=None)

    def __call__(self, tensors: tuple[Tensor, ...]) -> Tensor:
        x = tensors[self.number]
        if x.dim():
            return x
        if x.requires_grad or x.is_inference():
            return x.reshape(1)
        if self.last is None or self.last[0]() is not x:
            self.last = weakref.ref(x), x.reshape(1)  # one object, as plans go by that
        return self.last[1]


def _place(value: Tensor, tensors: tuple[Tensor, ...]) -> _Place | None:
    for number, x in enumerate(tensors):
        if value is x:
            return _Place(number)
    alike = [number for number, x in enumerate(tensors) if _is_reshaped(value, x)]
    return _Place(alike[0]) if len(alike) == 1 else None


def _is_reshaped(value: Tensor, x: Tensor) -> bool:
    """Whether a value is a tensor of no axes with one axis added."""
    same = value.dtype is x.dtype and value.requires_grad == x.requires_grad
    return same and x.dim() == 0 and value.shape == (1,) and value.data_ptr() == x.data_ptr()


_known: OrderedDict[Hashable, _Known] = OrderedDict()
