"""What a plan's searches find in the tensors of one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attncc.binding import Binding
from attncc.ir.evaluate import Env, evaluate_unchecked
from attncc.ir.expr import Axis, Expr
from attncc.ir.plan import FAR, Plan, Search


@dataclass(frozen=True)
class Found:
    """Worked out when first asked for, and shared by the plans of a call over any tiles."""

    plan: Plan
    binding: Binding

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """int32, by name, on the binding's device; nothing waits for it."""
        found: dict[str, Tensor] = {}
        for search in self.plan.searches:  # a value may read those before it
            found[search.tensor.name] = _found(search, self.binding, found)
        return found


def _found(search: Search, binding: Binding, before: Mapping[str, Tensor]) -> Tensor:
    """A binary search for each value, in the row of its own b and h."""
    size = binding.tensors[search.of.tensor.name].shape[-1]
    keys = bool(search.of.axes & Axis.KV)
    q_len, kv_len = (binding.q_len, size) if keys else (size, binding.kv_len)
    elements, values = (
        _along(expr, binding, before, q_len, kv_len) for expr in (search.of, search.value)
    )
    batch, heads, _ = (elements[..., :1] + values[..., :1]).shape
    elements, values = (x.expand(batch, heads, -1).contiguous() for x in (elements, values))
    at = torch.searchsorted(elements, values, right=search.past, out_int32=True)
    beyond = at.masked_fill(at == size, FAR).masked_fill(at == 0, -FAR)
    return beyond.reshape([int(binding.scalars[str(dim)]) for dim in search.tensor.dims])


def _along(
    expr: Expr, binding: Binding, found: Mapping[str, Tensor], q_len: int, kv_len: int
) -> Tensor:
    """An int that reads one token axis at most, [B|1, H|1, tokens|1]."""

    def arange(count: int, *shape: int) -> Tensor:
        return torch.arange(count, device=binding.device).view(shape)

    h = arange(binding.heads, 1, -1, 1)
    positions = {
        "b": arange(binding.batch, -1, 1, 1),
        "h": h,
        "kv_head": h // max(1, binding.heads // max(1, binding.kv_heads)),
        "q_idx": arange(q_len, 1, 1, -1),
        "kv_idx": arange(kv_len, 1, 1, -1),
    }
    env = Env(positions, binding.scalars, {**binding.tensors, **found}, device=binding.device)
    value = evaluate_unchecked(expr, env)
    return value if value.dim() == 3 else value.expand(1, 1, 1)
