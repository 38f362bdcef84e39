"""The few masks that kernels with fixed masks know, recognised in a program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attncc.bench.problem import Problem
from attncc.ir import ops
from attncc.ir.expr import (
    KV_IDX,
    Q_IDX,
    TRUE,
    Apply,
    Axis,
    B,
    Expr,
    Load,
    Score,
    TensorParam,
    apply,
    axes,
)
from attncc.ir.program import Normalize

CAUSAL = (apply(ops.GE, Q_IDX, KV_IDX), apply(ops.LE, KV_IDX, Q_IDX))
DISTANCE = apply(ops.SUB, Q_IDX, KV_IDX)


@dataclass(frozen=True)
class Form:
    """A conjunction of: q_idx >= kv_idx; q_idx - kv_idx < window; one document."""

    causal: bool = False
    window: int | None = None
    documents: TensorParam | None = None


def form(problem: Problem) -> Form | None:
    """How a program with a plain softmax over q . k masks, where it is by a Form.

    None for other masks, scores, sinks and outputs; for a window that is not causal; for documents
    not declared sorted; and, unless all is kept, for other numbers of queries than of keys.
    """
    program, n = problem.program, problem.lengths
    if program.normalize is not Normalize.SOFTMAX or program.sink or program.score != Score():
        return None
    if program.output is not None:
        return None
    causal, window, documents = False, None, None
    for part in _conjuncts(program.mask):
        if part in CAUSAL:
            causal = True
        elif (width := _window(part, problem)) is not None:
            window = width if window is None else min(width, window)
        elif (tensor := _documents(part)) is not None and documents in (None, tensor):
            documents = tensor
        else:
            return None
    found = Form(causal, window, documents)
    allowed = found == Form() or (n.q_len == n.kv_len and (causal or window is None))
    return found if allowed else None


def ends(problem: Problem, documents: TensorParam) -> Tensor:
    """int32 [documents + 1]: where each begins in the packed batch, 0 first, its length last."""
    n = problem.lengths
    ids = problem.arguments[documents.name].expand(n.batch, n.kv_len)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = first.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([n.batch * n.kv_len])]).to(torch.int32)


def _conjuncts(mask: Expr) -> Iterator[Expr]:
    match mask:
        case Apply(op, args) if op is ops.AND:
            for part in args:
                yield from _conjuncts(part)
        case _ if mask != TRUE:
            yield mask


def _window(part: Expr, problem: Problem) -> int | None:
    """The w of q_idx - kv_idx < w, where it is one number of the call."""
    match part:
        case Apply(op, (distance, bound)) if distance == DISTANCE and axes(bound) == Axis.NONE:
            if op is ops.LT or op is ops.LE:
                zero = torch.zeros((), dtype=torch.int64, device=problem.device)
                return int(problem.value(bound, {"h": zero})) + (op is ops.LE)
    return None


def _documents(part: Expr) -> TensorParam | None:
    """The doc of doc[q_idx] == doc[kv_idx] or doc[b, q_idx] == doc[b, kv_idx], sorted."""
    match part:
        case Apply(op, (Load(tensor, at), Load(other, to))) if op is ops.EQ and tensor == other:
            read = {at, to}
            if tensor.sorted and read in ({(Q_IDX,), (KV_IDX,)}, {(B, Q_IDX), (B, KV_IDX)}):
                return tensor
    return None
