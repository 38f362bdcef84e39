"""A call's sizes, scalars and tensors as arguments of generated kernels."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from attncc.backends.triton.text import Names
from attncc.ir.plan import Plan
from attncc.tiles import BoundPlan

Values = dict[str, Any]


def captured(bound: BoundPlan) -> Values:
    """Sizes, scalars, captured tensors and what searches found, as kernels name them."""
    plan, binding = bound.plan, bound.binding
    values: Values = dict(binding.scalars)
    names = _names(plan)
    for scalar in plan.program.scalars:
        value = binding.scalars[scalar.name]
        # Triton's interpreter takes no bools.
        values[names[scalar.name]] = int(value) if isinstance(value, bool) else value
    for name, data in bound.found.items():
        values[names.pointer(name)] = data
    for tensor in plan.program.tensors:
        if tensor.name not in binding.tensors:  # a plan that calls share holds the mask's alone
            continue
        data = binding.tensors[tensor.name]
        if data.numel() == 0:  # never read where it matters, but kernels clamp into it
            data = data.new_zeros([1] * data.dim())
        values[names.pointer(tensor.name)] = data
        for axis in range(data.dim()):
            values[names.stride(tensor.name, axis)] = data.stride(axis)
            values[names.size(tensor.name, axis)] = data.shape[axis]
    for size in ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim"):
        values[size] = getattr(binding, size)
    return values


@lru_cache(maxsize=256)
def _names(plan: Plan) -> Names:
    return Names(param.name for param in plan.params)
