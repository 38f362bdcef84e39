"""The Triton backend as one differentiable operation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from attncc.backends.triton import launch
from attncc.backends.triton.launch import Run
from attncc.capture import capturing
from attncc.errors import UnsupportedError
from attncc.plans import CallPlan


def attention(run: Run, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """out [B, Hq, Q, Dv], and for a softmax lse [B, Hq, Q] float32.

    Differentiable, captured tensors included.
    """
    captured = run.differentiable
    if not wants_gradients(captured, q, k, v) and not _transformed():
        out, lse, _ = (run.forward or launch.forward)(run, q, k, v)
    else:
        apply: Any = _Attention.apply
        out, lse = apply(run, tuple(captured), q, k, v, *captured.values())
    return out, lse if run.lowering.softmax else None


def wants_gradients(captured: Mapping[str, Tensor], *inputs: Tensor) -> bool:
    """Whether autograd will ask for gradients of any of them."""
    if not torch.is_grad_enabled():
        return False
    return any(x.requires_grad for x in (*inputs, *captured.values()))


def _transformed() -> bool:
    """Whether tensors may carry more than their values: tangents, or levels of torch.func."""
    functions: Any = torch._C
    return forward_ad._current_level >= 0 or functions._are_functorch_transforms_active()


class _Attention(torch.autograd.Function):
    """Recomputes weights from lse2 in the backward; forward-mode and double backward raise."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Run,
        names: tuple[str, ...],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *captured: Tensor,
    ) -> tuple[Tensor, Tensor]:
        out, lse, lse2 = (run.forward or launch.forward)(run, q, k, v)
        ctx.run, ctx.names = run, names
        ctx.save_for_backward(q, k, v, out, lse2, *captured)
        ctx.set_materialize_grads(False)
        if not run.lowering.softmax:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse2, *captured = ctx.saved_tensors
        plan = ctx.run.bound
        made_in_graph = isinstance(plan, CallPlan) and plan.captured
        if made_in_graph != capturing(q.device):
            raise UnsupportedError(
                "a backward is captured into a CUDA graph, and its forward was not, or the reverse",
                hint="capture both, in one graph or in two",
            )
        if dout is None:
            dout = torch.zeros_like(out)
        backward = ctx.run.backward or launch.backward
        grads = backward(ctx.run, q, k, v, out, lse2, dout.to(out.dtype), dlse)
        mine = [
            grads.captured[name].to(data.dtype) if name in grads.captured else None
            for name, data in zip(ctx.names, captured, strict=True)
        ]
        return None, None, grads.q, grads.k, grads.v, *mine
