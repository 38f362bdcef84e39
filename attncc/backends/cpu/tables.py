"""What a plan's calls share on the CPU: the schedule, and masks of strips that fit a budget."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from attncc.backends.cpu.schedule import Group, schedule
from attncc.plans import CallPlan
from attncc.tiles import BoundPlan

T = TypeVar("T")

KEPT = 64 << 20
"""Bytes of masks that one plan keeps; all of 16 heads' documents in 8192 tokens, say."""
STRIPS = 4
"""Masks kept beyond that, for other heads' blocks of the strip that threads are at."""


@dataclass
class Tables:
    """Of one plan, over strips of one height."""

    groups: tuple[Group, ...]
    kept: dict[Hashable, Any] = field(default_factory=dict)
    passing: dict[Hashable, Any] = field(default_factory=dict)
    bytes: int = 0

    def mask(self, key: Hashable, make: Callable[[], T]) -> T:
        """What was made under that key, if it is still there."""
        for known in (self.kept, self.passing):
            if key in known:
                found = known.get(key)
                if found is not None:
                    return cast(T, found)
        made = make()
        size = sum(x.numel() * x.element_size() for x in _tensors(made))
        if self.bytes + size <= KEPT:
            self.bytes += size
            self.kept[key] = made
        else:
            self.passing[key] = made
            if len(self.passing) > STRIPS:
                self.passing.pop(next(iter(self.passing)), None)
        return made


def _tensors(made: object) -> Iterator[Tensor]:
    """All tensors in a nest of tuples."""
    if isinstance(made, Tensor):
        yield made
    elif isinstance(made, tuple):
        for part in made:
            yield from _tensors(part)


_tables = WeakIdKeyDictionary()
"""By the plan that calls of one mask share, for as long as that lives."""


def tables(bound: BoundPlan) -> Tables:
    """The tables of a plan, made when first asked for."""
    home = bound.origin if isinstance(bound, CallPlan) else bound
    found: Tables | None = _tables.get(home)  # type: ignore[no-untyped-call]
    if found is None:
        found = _tables[home] = Tables(schedule(bound))
    return found
