"""One call of generated kernels, and the dense interpreter beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from attncc.backends import dense, epilogue
from attncc.backends.triton import autograd
from attncc.backends.triton.configs import Config
from attncc.backends.triton.launch import Forward, Run, scale_of
from attncc.binding import Binding
from attncc.ir.plan import Plan
from attncc.ir.program import Program
from attncc.passes import analyze
from attncc.tiles import BoundPlan

SMALL = {
    "forward": Config(16, 16, 4, 1),
    "backward_kv": Config(16, 16, 4, 1),
    "backward_q": Config(16, 16, 4, 1),
}
"""Tiles small enough for lengths of tens to have full, partial and empty ones."""


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor

    def leaves(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(x.detach().to(dtype).requires_grad_() for x in (self.q, self.k, self.v))


def inputs(binding: Binding, value_dim: int, *, rows_first: bool = False, seed: int = 0) -> Inputs:
    """q (scaled by 4, so that a missing score derivative shows), k, v; [B, N, H, D] on request."""
    rng = torch.Generator().manual_seed(seed)

    def make(heads: int, length: int, columns: int) -> Tensor:
        shape = (binding.batch, heads, length, columns)
        if not rows_first:
            return torch.randn(shape, generator=rng)
        shape = (binding.batch, length, heads, columns)
        return torch.randn(shape, generator=rng).transpose(1, 2)

    return Inputs(
        make(binding.heads, binding.q_len, binding.head_dim) * 4,
        make(binding.kv_heads, binding.kv_len, binding.head_dim),
        make(binding.kv_heads, binding.kv_len, value_dim),
    )


@dataclass(frozen=True)
class Result:
    """Outputs and gradients by name; lse is None unless softmax."""

    values: Mapping[str, Tensor]


def _captured(program: Program, binding: Binding, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        t.name: binding.tensors[t.name].detach().to(dtype).requires_grad_()
        for t in program.tensors
        if t.grad
    }


def _bound(binding: Binding, tensors: Mapping[str, Tensor]) -> Binding:
    return Binding(
        **{name: getattr(binding, name) for name in _SIZES},
        scalars=binding.scalars,
        tensors={**binding.tensors, **tensors},
        device=binding.device,
    )


_SIZES = ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim")


def _differentiated(
    out: Tensor, lse: Tensor | None, leaves: Mapping[str, Tensor], seed: int
) -> Result:
    rng = torch.Generator().manual_seed(seed)
    dout = torch.randn(out.shape, generator=rng).to(out.dtype)
    loss = (out * dout).sum()
    if lse is not None:
        dlse = torch.randn(lse.shape, generator=rng).to(lse.dtype)
        loss = loss + (torch.where(lse.isfinite(), lse, 0.0) * dlse).sum()
    values = {"out": out.detach()} | ({} if lse is None else {"lse": lse.detach()})
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            values[f"d{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return Result(values)


def by_dense(
    program: Program, binding: Binding, given: Inputs, dtype: torch.dtype, seed: int = 1
) -> Result:
    """The meaning of the program, computed in `dtype`."""
    q, k, v = given.leaves(dtype)
    captured = _captured(program, binding, dtype)
    out, lse = dense.attention(program, _bound(binding, captured), q, k, v, dtype)
    return _differentiated(out, lse, {"q": q, "k": k, "v": v, **captured}, seed)


def by_kernels(
    plan: Plan,
    binding: Binding,
    given: Inputs,
    *,
    descriptors: bool = False,
    deterministic: bool = False,
    wide: bool = False,
    configs: Mapping[str, Config] = SMALL,
    forward: Forward | None = None,
    seed: int = 1,
) -> Result:
    """The same by generated kernels, in float32."""
    q, k, v = (x.detach().requires_grad_() for x in (given.q, given.k, given.v))
    captured = _captured(plan.program, binding, torch.float32)
    bound = BoundPlan(plan, _bound(binding, captured), (16, 16))
    run = Run(
        bound,
        scale_of(plan, binding),
        wide=wide,
        deterministic=deterministic,
        configs=configs,
        descriptors=descriptors,
        forward=forward,
    )
    out, lse = epilogue.finished(bound, partial(autograd.attention, run))(q, k, v)
    softmax = plan.program.normalize.value == "softmax"
    leaves = {"q": q, "k": k, "v": v, **captured}
    return _differentiated(out, lse if softmax else None, leaves, seed)


def check(program: Program, binding: Binding, given: Inputs, **options: object) -> None:
    """Kernels are as near to float64 as float32 torch is, within a factor and a rounding."""
    found = by_kernels(analyze(program), binding, given, **options)  # type: ignore[arg-type]
    exact = by_dense(program, binding, given, torch.float64)
    rough = by_dense(program, binding, given, torch.float32)
    assert found.values.keys() == exact.values.keys()
    for name, value in exact.values.items():
        mine, theirs = found.values[name].double(), rough.values[name].double()
        finite = value.isfinite()
        assert torch.equal(mine.isfinite(), finite), f"{name}: {program}"
        assert torch.equal(mine[~finite], value[~finite]), f"{name}: {program}"
        if not finite.any():
            continue
        size = value[finite].abs().max().item()
        error = (mine - value)[finite].abs().max().item()
        allowed = 4 * (theirs - value)[finite].abs().max().item() + 2e-5 * max(size, 1.0)
        assert error <= allowed, (
            f"{name} is off by {error}, of {size}, allowed {allowed}\n{program}"
        )
