"""The output clause, by torch's operations on what a kernel returned; autograd knows them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attncc.bounds import strip_env
from attncc.ir.evaluate import evaluate_unchecked
from attncc.ir.expr import LSE, MEAN_VALUE, VALUE, Axis, Expr, results
from attncc.tiles import BoundPlan

if TYPE_CHECKING:
    from attncc.backends.registry import Ready, Result


def finished(bound: BoundPlan, kernel: Ready) -> Ready:
    """The kernel's calls with the program's output clause; the kernel itself where there is none.

    Computed in float32, or float64 where q is; its reads were checked when the call was bound.
    """
    clause = bound.plan.program.output
    if clause is None:
        return kernel

    def run(q: Tensor, k: Tensor, v: Tensor) -> Result:
        out, lse = kernel(q, k, v)
        return _output(clause, bound, v, out, lse), lse

    return run


def _output(clause: Expr, bound: BoundPlan, v: Tensor, out: Tensor, lse: Tensor | None) -> Tensor:
    """The clause at each element of out [B, Hq, Q, Dv], in its dtype and layout."""
    binding, reads = bound.binding, results(clause)
    wide = torch.promote_types(out.dtype, torch.float32)
    group = binding.heads // binding.kv_heads
    found = {"out": out.to(wide)}
    if LSE in reads and lse is not None:
        found["lse"] = lse[..., None].to(wide)
    if VALUE in reads:
        found["value"] = v.to(wide).repeat_interleave(group, 1)
    if MEAN_VALUE in reads:
        mean = v.sum(2, keepdim=True, dtype=wide) / max(binding.kv_len, 1)
        found["mean_value"] = mean.repeat_interleave(group, 1)
    env = strip_env(binding, Axis.B | Axis.H | Axis.Q, 0, binding.q_len)
    made = evaluate_unchecked(clause, replace(env, dtype=wide, results=found))
    return torch.empty_like(out).copy_(made)
