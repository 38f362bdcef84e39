"""Results in float64, by the mods that peers use: what every contestant is held to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attncc.bench.contestants import Contestant
from attncc.bench.problem import Problem
from attncc.ir import expr as ir
from attncc.ir.program import Normalize

SLICE = 64
"""Queries of the first head that are looked at, spread over the sequence."""

CHUNK = 1024
"""Queries at a time, whose scores against all keys are held."""

ALLOWED = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 2e-3}
"""Relative errors by norms that pass; gradients may have twice as much."""


@dataclass(frozen=True)
class Part:
    """The true values of some rows of a result: result[batch, heads, rows]."""

    name: str
    batch: int
    heads: slice
    rows: Tensor
    value: Tensor


def parts(problem: Problem, gradients: bool) -> list[Part]:
    """Some queries of the first heads; the last key head whole, with its heads' queries."""
    n, group = problem.lengths, problem.group
    if 0 in (n.q_len, n.kv_len):
        return []
    some = torch.linspace(0, n.q_len - 1, min(SLICE, n.q_len), device=problem.device).long()
    every = torch.arange(n.q_len, device=problem.device)
    found = []
    for b, head, rows in ((0, 0, some), (n.batch - 1, n.kv_heads - 1, every)):
        heads = slice(head * group, (head + 1) * group)
        out, dq, dk, dv = _of_key_head(problem, b, head, rows)
        found.append(Part("out", b, heads, rows, out))
        if gradients:
            found.append(Part("dq", b, heads, rows, dq))
    if gradients:
        keys = torch.arange(n.kv_len, device=problem.device)
        own = slice(n.kv_heads - 1, n.kv_heads)
        found += [Part("dk", n.batch - 1, own, keys, dk), Part("dv", n.batch - 1, own, keys, dv)]
    return found


def problems(contestant: Contestant, truth: list[Part]) -> list[str]:
    """What is wrong with a contestant's results; empty where nothing is."""
    out = contestant.forward()
    results = {"out": contestant.back(out.detach())}
    if out.requires_grad:
        names = "dq", "dk", "dv"
        gradients = map(contestant.back, contestant.backward(out))
        results |= dict(zip(names, gradients, strict=True))
    wrong = [f"{name} is not finite" for name, x in results.items() if not x.isfinite().all()]
    for part in truth:
        if part.name in results:
            got = results[part.name][part.batch, part.heads][:, part.rows]
            wrong += _apart(f"{part.name}[{part.batch}, {part.heads.start}]", part, got)
    return wrong


def _apart(what: str, part: Part, got: Tensor) -> list[str]:
    factor = 1 if part.name == "out" else 2
    allowed = factor * ALLOWED[got.dtype]
    size = float(part.value.norm())
    error = float((got.double() - part.value).norm()) / (size or 1.0)
    return [] if error <= allowed else [f"{what} is off by {error:.3g} in norm, allowed {allowed}"]


@torch.enable_grad()
def _of_key_head(
    problem: Problem, b: int, kv_head: int, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out and dq [group, rows, D] of the query heads of a key head; dk and dv, of those rows."""
    q, k, v = problem.inputs
    keys, values = (x[b, kv_head].double().requires_grad_() for x in (k, v))
    outs, dqs, totals = [], [], [torch.zeros_like(keys), torch.zeros_like(values)]
    for h in range(kv_head * problem.group, (kv_head + 1) * problem.group):
        for some in torch.split(rows, CHUNK):
            queries = q[b, h, some].double().requires_grad_()
            weights, lse = _weights(problem, queries @ keys.T * problem.scale, b, h, some)
            out = _finished(problem, weights @ values, lse, values, b, h, some)
            dout = problem.dout[b, h, some].double()
            dq, *others = torch.autograd.grad(out, (queries, keys, values), dout)
            outs.append(out.detach())
            dqs.append(dq)
            totals = [total + one for total, one in zip(totals, others, strict=True)]
    shape = problem.group, len(rows), -1
    return torch.cat(outs).view(shape), torch.cat(dqs).view(shape), totals[0][None], totals[1][None]


def _finished(
    problem: Problem, out: Tensor, lse: Tensor, values: Tensor, b: int, h: int, rows: Tensor
) -> Tensor:
    """The rows' out [rows, D] as the output clause makes it."""
    clause = problem.program.output
    if clause is None:
        return out
    numbers = (torch.tensor(x, device=problem.device) for x in (b, h))
    at = dict(zip(("b", "h", "q_idx"), (*numbers, rows[:, None]), strict=True))
    found = {"out": out, "lse": lse, "mean_value": values.mean(0)}
    if ir.VALUE in ir.results(clause):
        found["value"] = values[rows]
    return problem.value(clause, at, results=found).expand_as(out)


def _weights(
    problem: Problem, scores: Tensor, b: int, h: int, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """[rows, KV]: what each key's value counts for each query, 0 where it is masked; lse [rows, 1].

    A lse is NaN where there is none.
    """
    (mask, score), program = problem.mods, problem.program
    keys = torch.arange(scores.shape[1], device=problem.device)[None, :]
    batch, head = (torch.tensor(x, device=problem.device) for x in (b, h))
    at = batch, head, rows[:, None], keys
    kept = torch.ones_like(scores, dtype=torch.bool)
    if mask is not None:
        kept = mask(*at).expand(scores.shape)
    if score is not None:
        scores = score(scores, *at)
    if program.normalize is not Normalize.SOFTMAX:
        weights = scores.sigmoid() if program.normalize is Normalize.SIGMOID else scores
        return torch.where(kept, weights, 0.0), scores.new_full((len(rows), 1), math.nan)
    logits = torch.where(kept, scores, -math.inf)
    if program.sink is not None:
        sink = problem.value(program.sink, {"b": batch, "h": head}).to(logits)
        logits = torch.cat([logits, sink.expand(len(rows), 1)], dim=1)
    empty = ~kept.any(dim=1, keepdim=True)
    logits = torch.where(empty, 0.0, logits)
    lse = torch.where(empty, -math.inf, logits.logsumexp(dim=1, keepdim=True))
    weights = logits.softmax(dim=1)[:, : scores.shape[1]]
    return torch.where(kept, weights, 0.0), lse
