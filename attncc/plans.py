"""Bound plans of calls: kept while what the mask reads stays the same, and printed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from attncc import report
from attncc.binding import Binding
from attncc.capture import capturing
from attncc.ir.expr import Load, Scalar, walk
from attncc.ir.plan import Plan
from attncc.tiles import BoundPlan, Counts, Density, SegmentTable

if TYPE_CHECKING:
    from attncc.order.placed import Placed

T = TypeVar("T")

KEPT = 8
"""Bound plans kept for a program: the lengths and masks that layers of one model take turns in."""


@dataclass(frozen=True)
class CallPlan(BoundPlan):
    """The plan of one call: its own arguments, and tiles shared with calls of the same mask."""

    origin: BoundPlan
    captured: bool = field(default=False, kw_only=True)
    """Made while a CUDA graph was captured: its tensors have values in replays alone."""

    order: Placed | None = field(default=None, kw_only=True, compare=False)
    """How calls with this plan order their tokens; None leaves it to them."""

    def retiled(self, tile: tuple[int, int]) -> BoundPlan:
        if tile == self.tile:
            return self
        if tile not in self._others:
            self._others[tile] = replace(self, tile=tile, origin=self.origin.retiled(tile))
        return self._others[tile]

    def classify(self) -> Tensor:
        return self.origin.classify()

    def key_segments(self) -> SegmentTable | None:
        return self.origin.key_segments()

    @property
    def found(self) -> Mapping[str, Tensor]:
        return self.origin.found

    @property
    def query_order(self) -> Tensor:
        return self.origin.query_order

    @property
    def counts(self) -> Counts:
        return self.origin.counts

    @property
    def density(self) -> Density:
        return self.origin.density

    def exact_counts(self) -> Counts:
        return self.origin.exact_counts()

    def __str__(self) -> str:
        """What was decided and why, the counts, and the tiles of the first sequence and head."""
        parts = [*report.lines(self.plan), "", *report.tiles(self)]
        if self.order is not None and self.order.choice is not None:
            counts = self.order.counts(self.tile)
            found = f"{counts.full} full, {counts.partial} partial, {counts.empty} empty"
            parts.append(f"order of tokens: {self.order}; tiles then: {found}")
        return "\n".join(parts)


class Recent(Generic[T]):
    """What was asked for last, by what makes it serve again."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, key: Hashable) -> T | None:
        """None is the key of what cannot serve again."""
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return found

    def keep(self, key: Hashable, found: T) -> None:
        if key is None:
            return
        self._kept[key] = found  # which keeps the tensors, so that their ids stay theirs
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)


class PlanCache:
    """The bound plans of one program that were asked for last."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.kept: Recent[BoundPlan] = Recent()

    def __call__(self, binding: Binding, tile: tuple[int, int]) -> CallPlan:
        """The plan of a call; its tiles are worked out once for equal lengths and mask arguments.

        Tensors are equal while they are one object at one version. Those without a version
        (inference mode) and those made by autograd (whose graph would be kept) are never kept.
        """
        mask = mask_key(self.plan, binding)
        captured = capturing(binding.device)
        key = None if mask is None or captured else (mask, tile)
        bound = self.kept.find(key)
        if bound is None:
            names = mask_arguments(self.plan)[1]
            tensors = {name: binding.tensors[name] for name in names}
            bound = BoundPlan(self.plan, replace(binding, tensors=tensors), tile)
            self.kept.keep(key, bound)
        return CallPlan(self.plan, binding, tile, bound, captured=captured)


def call_key(
    q: object,
    k: object,
    v: object,
    params: Mapping[str, object],
    how: Hashable,
) -> Hashable:
    """Equal for calls that bind and run alike; None where an argument cannot tell if it changed.

    how: what else such calls share, as the backend that was asked for.
    """
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        return None
    dtypes_and_devices = q.dtype, k.dtype, v.dtype, q.device, k.device, v.device
    own = how, q.shape, k.shape, v.shape, *dtypes_and_devices
    if not params:
        return own
    parts: list[Hashable] = [own]
    for name, value in params.items():
        if isinstance(value, Tensor):
            if value.is_inference() or value.grad_fn is not None:
                return None
            wants = value.requires_grad and torch.is_grad_enabled()  # an error, if undeclared
            parts.append((name, id(value), value._version, value.shape, wants))
        elif isinstance(value, bool | int | float):
            parts.append((name, type(value), value))
        else:
            return None
    return tuple(parts)


@lru_cache(maxsize=256)
def mask_arguments(plan: Plan) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the scalars and of the tensors that the mask reads."""
    nodes = list(walk(plan.mask))
    scalars = {node.param.name for node in nodes if isinstance(node, Scalar)}
    tensors = {node.tensor.name for node in nodes if isinstance(node, Load)}
    return tuple(sorted(scalars)), tuple(sorted(tensors))


def mask_key(plan: Plan, binding: Binding) -> Hashable:
    """Equal for calls that keep the same pairs; None where a tensor cannot tell."""
    scalars, names = mask_arguments(plan)
    tensors = [binding.tensors[name] for name in names]
    if any(x.is_inference() or x.grad_fn is not None for x in tensors):
        return None
    return (
        lengths(binding),
        tuple(binding.scalars[name] for name in scalars),
        tuple((id(x), x._version) for x in tensors),
        binding.device,
    )


def lengths(binding: Binding) -> tuple[int, ...]:
    """Everything about q, k and v that a plan depends on."""
    sizes = binding.batch, binding.heads, binding.kv_heads, binding.q_len, binding.kv_len
    return *sizes, binding.head_dim
