"""The dense interpreter: what a Program means, pair by pair, with gradients by torch's autograd."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from attncc.binding import Binding
from attncc.ir.evaluate import Env, evaluate
from attncc.ir.program import Normalize, Program


def attention(
    program: Program,
    binding: Binding,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """out [B, Hq, Q, Dv], and lse [B, Hq, Q] where the program normalizes by softmax.

    q [B, Hq, Q, D], k [B, Hkv, KV, D], v [B, Hkv, KV, Dv]. Query head h reads key head h // group.
    Computes in `dtype`, by default in q's, or in float32 where q's is shorter; out has `dtype`, or
    q's, and lse the dtype computed in.

    Only pairs that the mask keeps exist: score, captured tensors, k and v are read nowhere else, so
    nothing that stands at another pair, NaN included, reaches an output or a gradient; but the
    output clause reads what it names at every query.
    Raises BoundsError where the program reads a captured tensor out of its range.
    """
    wide = dtype or torch.promote_types(q.dtype, torch.float32)
    group = binding.heads // binding.kv_heads
    heads = [
        [
            _finished(program, _env(binding, b, h, wide), *(x.to(wide) for x in parts))
            for h in range(binding.heads)
            for parts in [(q[b, h], k[b, h // group], v[b, h // group])]
        ]
        for b in range(binding.batch)
    ]
    shape = binding.batch, binding.heads, binding.q_len
    out = _stacked([[out for out, _ in row] for row in heads], (*shape, v.shape[-1]), v, wide)
    if program.normalize is not Normalize.SOFTMAX:
        return out.to(dtype or q.dtype), None
    lse = _stacked([[lse for _, lse in row] for row in heads], shape, v, wide)
    return out.to(dtype or q.dtype), lse


def rows(
    program: Program, binding: Binding, b: int, h: int, at: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """out [R, Dv] and lse [R] of the queries `at` [R] of one head, in the dtype of the inputs.

    q [R, D] are theirs; k [KV, D] and v [KV, Dv] all of the head.
    """
    env = _env(binding, b, h, q.dtype)
    positions = {**env.positions, "q_idx": at[:, None]}
    return _head(program, replace(env, positions=positions), q, k, v)


def _stacked(
    parts: list[list[Tensor]], shape: tuple[int, ...], like: Tensor, dtype: torch.dtype
) -> Tensor:
    if 0 in shape[:2]:
        return like.new_zeros(shape, dtype=dtype)
    return torch.stack([torch.stack(row) for row in parts])


def _env(binding: Binding, b: int, h: int, dtype: torch.dtype) -> Env:
    """One head's positions: b and h are numbers, q_idx [Q, 1] and kv_idx [KV]."""
    device = binding.device
    positions = {
        "b": torch.tensor(b, device=device),
        "h": torch.tensor(h, device=device),
        "kv_head": torch.tensor(h // (binding.heads // binding.kv_heads), device=device),
        "q_idx": torch.arange(binding.q_len, device=device)[:, None],
        "kv_idx": torch.arange(binding.kv_len, device=device),
    }
    return Env(positions, binding.scalars, binding.tensors, dtype=dtype, device=device)


def _head(program: Program, env: Env, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One head's out [Q, Dv] and lse [Q]."""
    size = len(q), len(k)
    kept = evaluate(program.mask, env).expand(size)
    rows, columns = kept.nonzero(as_tuple=True)
    scores = _dots(q, k, rows, columns) * _scale(program, env, q.shape[-1])
    scores = evaluate(program.score, _at_pairs(env, rows, columns, scores)).expand_as(scores)
    if program.normalize is not Normalize.SOFTMAX:
        weights = scores.sigmoid() if program.normalize is Normalize.SIGMOID else scores
        return _mix(weights, v, rows, columns, len(q)), q.new_zeros(len(q))
    sink = None if program.sink is None else evaluate(program.sink, env)
    dense = q.new_full(size, -math.inf).index_put((rows, columns), scores)
    weights, lse = _softmax(dense, sink)
    return _mix(weights[rows, columns], v, rows, columns, len(q)), lse


def _finished(program: Program, env: Env, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One head's out [Q, Dv] as the output clause makes it, and lse [Q] as it was before."""
    out, lse = _head(program, env, q, k, v)
    if program.output is None:
        return out, lse
    mean = v.sum(0) / max(len(v), 1)
    results = {"out": out, "lse": lse[:, None], "value": v, "mean_value": mean}
    return evaluate(program.output, replace(env, results=results)).expand_as(out), lse


def _at_pairs(env: Env, rows: Tensor, columns: Tensor, scores: Tensor) -> Env:
    """The same head at a list of pairs."""
    positions = {**env.positions, "q_idx": env.positions["q_idx"][rows, 0], "kv_idx": columns}
    return replace(env, positions=positions, score=scores)


def _scale(program: Program, env: Env, head_dim: int) -> Tensor | float:
    return head_dim**-0.5 if program.scale is None else evaluate(program.scale, env)


def _softmax(scores: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights and lse of each row; weights 0 and lse -inf where every score is -inf."""
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], -math.inf)
    top = scores.detach().amax(-1, keepdim=True)
    alive = top != -math.inf
    shift = top if sink is None else torch.maximum(top, sink.detach())
    shift = torch.where(shift == -math.inf, 0, shift)
    powers = torch.exp(scores - shift)
    total = powers.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - shift)
    total = torch.where(alive, total, 1)
    lse = torch.where(alive, shift + total.log(), -math.inf)
    return powers / total, lse.squeeze(-1)


def _dots(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """q . k at each pair."""
    if _finite(q) and _finite(k):
        return (q @ k.T)[rows, columns]  # the same, faster: 0 * finite is 0 in its gradient
    return (q[rows] * k[columns]).sum(-1)


def _mix(weights: Tensor, v: Tensor, rows: Tensor, columns: Tensor, q_len: int) -> Tensor:
    """For each row the sum of weight * v over its pairs."""
    if _finite(v):
        dense = weights.new_zeros(q_len, len(v)).index_put((rows, columns), weights)
        return dense @ v
    empty = v.new_zeros(q_len, v.shape[-1])
    return empty.index_add(0, rows, weights[:, None] * v[columns])


def _finite(x: Tensor) -> bool:
    return bool(x.isfinite().all())
