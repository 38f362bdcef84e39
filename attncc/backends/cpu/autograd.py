"""The CPU backend as one differentiable operation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attncc.backends.cpu.backward import Gradients, Saved, backward
from attncc.backends.cpu.block import Problem
from attncc.backends.cpu.forward import forward
from attncc.backends.cpu.tables import tables
from attncc.errors import UnsupportedError
from attncc.ir.program import Normalize
from attncc.tiles import BoundPlan


def attention(bound: BoundPlan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """out [B, Hq, Q, Dv], and lse [B, Hq, Q] where the program normalizes by softmax.

    Half types are computed in float32 and rounded once; lse is float32 then. Differentiable once
    in q, k, v and the captured tensors declared `grad`.
    """
    tensors = bound.binding.tensors
    names, captured = tuple(tensors), tuple(tensors.values())
    out, lse = _Attention.apply(bound, names, q, k, v, *captured)  # type: ignore[no-untyped-call]
    softmax = bound.plan.program.normalize is Normalize.SOFTMAX
    return out, lse if softmax else None


class _Attention(torch.autograd.Function):
    """Recomputes weights from lse in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        bound: BoundPlan,
        names: tuple[str, ...],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *captured: Tensor,
    ) -> tuple[Tensor, Tensor]:
        tensors = dict(zip(names, captured, strict=True))
        problem = Problem.of(bound, tensors, tables(bound), q, k, v)
        out, lse = forward(problem)
        rounded = out.to(q.dtype).view(*q.shape[:3], v.shape[-1])
        lse = lse.view(q.shape[:3])
        ctx.bound, ctx.names = bound, names
        ctx.save_for_backward(q, k, v, rounded, lse, *captured)
        ctx.set_materialize_grads(False)
        if not problem.softmax:
            ctx.mark_non_differentiable(lse)
        return rounded, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[5:]
        wanted = frozenset(name for name, need in zip(ctx.names, needed, strict=True) if need)
        call = _Call(ctx.bound, ctx.names, wanted)
        result = _Backward.apply(call, dout, dlse, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return None, None, *result

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise UnsupportedError(
            "forward-mode differentiation goes through no attention kernel",
            hint="use reverse mode, or the dense interpreter: attn.reference(...)",
        )


@dataclass(frozen=True)
class _Call:
    """What the backward needs besides tensors."""

    bound: BoundPlan
    names: tuple[str, ...]
    wanted: frozenset[str]


class _Backward(torch.autograd.Function):
    """The backward as an operation, so that differentiating it says what is wrong."""

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        dout: Tensor | None,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *captured: Tensor,
    ) -> tuple[Tensor | None, ...]:
        tensors = dict(zip(call.names, captured, strict=True))
        problem = Problem.of(call.bound, tensors, tables(call.bound), q, k, v)
        if dout is None:
            dout = torch.zeros_like(out)
        rows, group = problem.q.shape[:2]
        saved = (x.to(problem.q.dtype).reshape(rows, group, *x.shape[2:]) for x in (out, lse, dout))
        out, lse, dout = saved
        dlse = None if dlse is None else dlse.to(lse.dtype).reshape(lse.shape)
        grads = backward(problem, Saved(out, lse, dout, dlse), call.wanted)
        own = (
            grad.to(x.dtype).view(x.shape) for grad, x in ((grads.q, q), (grads.k, k), (grads.v, v))
        )
        return *own, *(_captured(grads, name, x) for name, x in tensors.items())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise UnsupportedError(
            "attention was differentiated twice, which no kernel does",
            hint="use the dense interpreter: attn.reference(...)",
        )


def _captured(grads: Gradients, name: str, like: Tensor) -> Tensor | None:
    grad = grads.captured.get(name)
    return None if grad is None else grad.to(like.dtype)
