"""Gradients of captured tensors: buffers that kernels add to, and what becomes of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attncc.backends.triton.arguments import Values
from attncc.backends.triton.lower import Gradient, Lowering, Reduction
from attncc.ir.evaluate import Env, evaluate_unchecked
from attncc.ir.expr import Axis

if TYPE_CHECKING:
    from attncc.backends.triton.launch import Run

TINY = 1e-30
UNITS = 2.0**40
"""Fixed point of deterministic pair gradients: how many units the largest magnitude is."""


def buffers(
    run: Run, lowering: Lowering, lse: Tensor, without: Collection[int] = ()
) -> dict[str, Tensor]:
    """What kernels add to, cleared: grad_<n>, and for pairs grad_<n>_top, the largest magnitude.

    without: numbers of gradients that are summed otherwise.
    """
    binding = run.bound.binding
    made: dict[str, Tensor] = {}
    for at, gradient in enumerate(lowering.gradients):
        if at in without:
            continue
        match gradient.reduction:
            case Reduction.ROW:
                made[f"grad_{at}"] = torch.zeros_like(lse)
            case Reduction.COLUMN:
                made[f"grad_{at}"] = lse.new_zeros(binding.batch, binding.heads, binding.kv_len)
            case _:
                shape = [max(n, 1) for n in binding.tensors[gradient.load.tensor.name].shape]
                dtype = torch.int64 if run.deterministic else torch.float32
                made[f"grad_{at}"] = torch.zeros(shape, dtype=dtype, device=lse.device)
                made[f"grad_{at}_top"] = lse.new_full((1,), TINY)
    return made


def arguments(run: Run, lowering: Lowering, made: Mapping[str, Tensor]) -> Values:
    """The buffers as kernels name them."""
    values: Values = {f"{name}_ptr": x for name, x in made.items()}
    values["FIXED_POINT"] = 2 if run.deterministic else 0
    for at, gradient in enumerate(lowering.gradients):
        if is_pair(gradient) and f"grad_{at}" in made:
            for axis, stride in enumerate(made[f"grad_{at}"].stride()):
                values[f"grad_{at}_stride_{axis}"] = stride
    return values


def is_pair(gradient: Gradient) -> bool:
    """Whether it is summed pair by pair, by atomics."""
    return gradient.reduction is Reduction.PAIR


def collected(run: Run, lowering: Lowering, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each captured tensor's gradient, summed over the places that read it."""
    total: dict[str, Tensor] = {}
    for at, gradient in enumerate(lowering.gradients):
        if f"grad_{at}" not in made:
            continue
        name, buffer = gradient.load.tensor.name, made[f"grad_{at}"]
        data = run.bound.binding.tensors[name]
        if not is_pair(gradient):
            buffer = _scattered(run, gradient, buffer, data)
        elif run.deterministic:
            buffer = (buffer.double() * (made[f"grad_{at}_top"] / UNITS)).float()
        buffer = buffer[tuple(slice(n) for n in data.shape)]  # an empty tensor had a place-holder
        total[name] = total[name] + buffer if name in total else buffer
    return total


def _scattered(run: Run, gradient: Gradient, sums: Tensor, data: Tensor) -> Tensor:
    """Sums a [B, H, N] buffer into the elements that its rows or columns read; no atomics."""
    token = Axis.KV if gradient.reduction is Reduction.COLUMN else Axis.Q
    for dim, axis in enumerate((Axis.B, Axis.H, token)):
        if not gradient.load.axes & axis:
            sums = sums.sum(dim, keepdim=True)
    env = _positions(run, token)
    at = tuple(
        evaluate_unchecked(index, env).expand(sums.shape).clamp(0, max(size - 1, 0))
        for index, size in zip(gradient.load.at, data.shape, strict=True)
    )
    result = torch.zeros(data.shape, dtype=torch.float32, device=data.device)
    return result if 0 in data.shape else result.index_put_(at, sums, accumulate=True)


def _positions(run: Run, token: Axis) -> Env:
    """Positions that broadcast to [B, H, N] for one token axis."""
    binding = run.bound.binding
    device = binding.device
    b = torch.arange(binding.batch, device=device)[:, None, None]
    h = torch.arange(binding.heads, device=device)[None, :, None]
    positions = {"b": b, "h": h, "kv_head": h // (binding.heads // binding.kv_heads)}
    name, length = ("q_idx", binding.q_len) if token is Axis.Q else ("kv_idx", binding.kv_len)
    positions[name] = torch.arange(length, device=device)
    return Env(positions, binding.scalars, binding.tensors, device=device)


def add_sink(run: Run, captured: dict[str, Tensor], lse2: Tensor, delta: Tensor) -> None:
    """Adds the gradient through the sink, a logit whose value is 0 for every row."""
    program, binding = run.bound.plan.program, run.bound.binding
    wanted = [t.name for t in program.tensors if t.grad and binding.tensors[t.name].numel()]
    assert program.sink is not None
    with torch.enable_grad():
        leaves = {n: binding.tensors[n].detach().float().requires_grad_() for n in wanted}
        env = _positions(run, Axis.Q)
        env = Env(
            env.positions, binding.scalars, {**binding.tensors, **leaves}, device=binding.device
        )
        sink = evaluate_unchecked(program.sink, env).expand(*lse2.shape[:2], 1)
    if not sink.requires_grad:
        return
    probability = torch.exp2(sink.detach() / math.log(2) - lse2)
    dsink = -(probability * delta).sum(-1, keepdim=True)
    grads = torch.autograd.grad(sink, list(leaves.values()), dsink, allow_unused=True)
    for name, grad in zip(leaves, grads, strict=True):
        if grad is not None:
            captured[name] = captured[name] + grad if name in captured else grad
