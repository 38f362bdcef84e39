"""Reads and integer divisions that no pass proved, checked when a call is bound."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from attncc.binding import Binding
from attncc.capture import capturing, promise
from attncc.errors import BoundsError
from attncc.ir import ops
from attncc.ir.evaluate import Env, evaluate, evaluate_unchecked
from attncc.ir.expr import (
    RESULTS,
    TRUE,
    Apply,
    Axis,
    Const,
    Expr,
    Load,
    Scalar,
    Score,
    apply,
    axes,
    children,
    conjunction,
    disjunction,
    results,
    walk,
)
from attncc.ir.ops import Kind
from attncc.ir.plan import Plan
from attncc.ir.program import Program
from attncc.numeric import Intervals

STRIP = 1 << 22
"""Pairs evaluated at once."""

Reader = Load | Apply
"""What can go wrong: a Load, or an int // or %."""


@dataclass(frozen=True)
class Check:
    """A read or division, and the condition under which it is reached."""

    node: Reader
    reach: Expr


def check_bounds(plan: Plan, binding: Binding) -> None:
    """Raises BoundsError where the program reads out of range, or divides by zero, at a kept pair.

    Three steps, each for what the one before could not settle: numeric intervals; the index alone
    at every position it varies with, if that is one token axis at most; the index at every pair
    where the mask and the short-circuit operators reach it, in strips. A pair is visited only in
    the last. Outcomes are kept by what they depend on, so that a repeated call costs nothing
    and waits for no device.
    """
    if 0 in (binding.batch, binding.heads, binding.q_len):
        return
    of_pairs = checks(plan) if binding.kv_len else ()
    for check in (*of_pairs, *output_checks(plan.program)):
        try:
            _check(check, binding)
        except BoundsError as error:
            error.source = error.source or plan.program.source
            raise


@lru_cache(maxsize=256)
def checks(plan: Plan) -> tuple[Check, ...]:
    """What must be checked where there are pairs: one Check a distinct read or division."""
    reached: dict[Reader, list[Expr]] = {}
    for node, reach in _walk(plan.mask, TRUE):
        reached.setdefault(node, []).append(reach)
    for node, reach in _walk(plan.score, plan.mask):
        reached.setdefault(node, []).append(reach)
    for expr in (plan.program.sink, plan.program.scale):
        for node, reach in _walk(expr, TRUE) if expr is not None else ():
            reached.setdefault(node, []).append(reach)
    return tuple(
        Check(node, disjunction(tuple(dict.fromkeys(conditions))))
        for node, conditions in reached.items()
        if node not in plan.proved_loads
    )


@lru_cache(maxsize=256)
def output_checks(program: Program) -> tuple[Check, ...]:
    """What must be checked where there are queries."""
    if program.output is None:
        return ()
    return tuple(Check(node, reach) for node, reach in _walk(program.output, TRUE))


def _walk(expr: Expr, reach: Expr) -> Iterator[tuple[Reader, Expr]]:
    """Every read and division in an expression with what guards it; conditions stay shared."""
    stack = [(expr, reach)]
    seen: set[tuple[int, int]] = set()
    while stack:
        node, reach = stack.pop()
        if (id(node), id(reach)) in seen:
            continue
        seen.add((id(node), id(reach)))
        if isinstance(node, Load) or _divides(node):
            assert isinstance(node, Load | Apply)
            yield node, reach
        stack.extend(_guarded(node, reach))


def _divides(node: Expr) -> bool:
    match node:
        case Apply(ops.FLOORDIV | ops.MOD, (_, Const(divisor))):
            return divisor == 0
        case Apply(ops.FLOORDIV | ops.MOD):
            return node.kind is Kind.INT
        case _:
            return False


def _guarded(node: Expr, reach: Expr) -> list[tuple[Expr, Expr]]:
    """The parts of a node, each with the condition under which it is read."""
    match node:
        case Apply(ops.AND, (x, y)):
            return [(x, reach), (y, _and(reach, x))]
        case Apply(ops.OR, (x, y)):
            return [(x, reach), (y, _and(reach, apply(ops.NOT, x)))]
        case Apply(ops.WHERE, (c, x, y)):
            return [(c, reach), (x, _and(reach, c)), (y, _and(reach, apply(ops.NOT, c)))]
        case _:
            return [(child, reach) for child in children(node)]


def _and(x: Expr, y: Expr) -> Expr:
    """Both; a condition on what is not known yet counts as reachable."""
    if _unknown(y):
        return x
    return y if x == TRUE else conjunction((x, y))


def _unknown(expr: Expr) -> str:
    """What the expression reads that only kernels know: the score, or out; else empty."""
    if any(isinstance(node, Score) for node in walk(expr)):
        return "the score"
    return " and ".join(sorted(param.name for param in results(expr)))


# -- what an outcome depends on

KEPT = 1024

_passed: OrderedDict[Hashable, tuple[weakref.ref[Tensor], ...]] = OrderedDict()
"""Checks that passed, with the tensors they read: an id is a tensor's only while it lives."""


def _check(check: Check, binding: Binding) -> None:
    if capturing(binding.device):
        _run(check, binding)
        return
    key = _key(check, binding)
    read = _read(check, binding)
    known = _passed.get(key)
    if known is not None and all(ref() is x for ref, x in zip(known, read.values(), strict=True)):
        return
    _run(check, binding)
    if key is not None:
        _passed[key] = tuple(weakref.ref(tensor) for tensor in read.values())
        if len(_passed) > KEPT:
            _passed.popitem(last=False)


def _key(check: Check, binding: Binding) -> Hashable:
    """Everything the outcome depends on, or None where a tensor cannot tell whether it changed."""
    read = _read(check, binding)
    if any(tensor.is_inference() for tensor in read.values()):
        return None
    parts = (*_violations(check.node, binding), check.reach)
    params = {n.param for e in parts for n in walk(e) if isinstance(n, Scalar)}
    shape = binding.tensors[check.node.tensor.name].shape if isinstance(check.node, Load) else ()
    lengths = (binding.batch, binding.heads, binding.kv_heads, binding.q_len, binding.kv_len)
    names = sorted(param.name for param in params.difference(RESULTS))
    scalars = tuple((name, binding.scalars[name]) for name in names)
    tensors = tuple((name, id(tensor), tensor._version) for name, tensor in read.items())
    return check.node, check.reach, lengths, scalars, tensors, tuple(shape), str(binding.device)


def _read(check: Check, binding: Binding) -> dict[str, Tensor]:
    """The tensors whose elements decide the outcome: not the one that the Load itself reads."""
    parts = (*children(check.node), check.reach)
    loads = {n.tensor.name for part in parts for n in walk(part) if isinstance(n, Load)}
    return {name: binding.tensors[name] for name in sorted(loads)}


# -- the steps


def _run(check: Check, binding: Binding) -> None:
    open_parts = _violations(check.node, binding)
    for unknown in filter(None, map(_unknown, open_parts)):
        raise BoundsError(
            f"an index or integer divisor that depends on {unknown} is not known before it is used",
            hint=f"keep it in range whatever {unknown}: min(max(int(x), 0), n - 1)",
            span=check.node.span,
        )
    if open_parts and not _clear_alone(open_parts, binding):
        _clear_at_pairs(check, disjunction(open_parts), binding)


def _violations(node: Reader, binding: Binding) -> tuple[Expr, ...]:
    """Conditions under which the node fails, less those that numeric intervals rule out."""
    intervals = Intervals(binding)
    if isinstance(node, Apply):
        divisor = node.args[1]
        low, high = intervals(divisor)
        return (apply(ops.EQ, divisor, Const(0)),) if low <= 0 <= high else ()
    failing: list[Expr] = []
    for index, size in zip(node.at, binding.tensors[node.tensor.name].shape, strict=True):
        low, high = intervals(index)
        if low < 0:
            failing.append(apply(ops.LT, index, Const(0)))
        if high >= size:
            failing.append(apply(ops.GE, index, Const(size)))
    return tuple(failing)


def _clear_alone(violations: tuple[Expr, ...], binding: Binding) -> bool:
    """Whether the violations hold nowhere at all, tried where that takes O(N)."""
    return all(
        Axis.Q | Axis.KV not in axes(part) and not _any(part, binding) for part in violations
    )


def _any(condition: Expr, binding: Binding) -> bool:
    return _found(condition, strip_env(binding, axes(condition), 0, binding.q_len))


def _found(condition: Expr, env: Env) -> bool:
    """Whether a condition that must not hold does somewhere; in a CUDA graph, never if it is to go.

    Even at positions that the mask does not reach, where one token axis decides: a graph cannot
    look at pairs only if there is need.
    """
    found = evaluate_unchecked(condition, env).any()
    if capturing(found.device):
        promise(~found, "a captured tensor is read out of range, or divided by zero, in a replay")
        return False
    return bool(found)


def _clear_at_pairs(check: Check, violation: Expr, binding: Binding) -> None:
    condition = _and(check.reach, violation)
    for start, stop in _strips(axes(condition), binding):
        env = strip_env(binding, axes(condition), start, stop)
        if _found(condition, env):
            _fail(check, env)


def _fail(check: Check, env: Env) -> None:
    """Raises as `evaluate` does, which knows the words."""
    reach = evaluate_unchecked(check.reach, env)
    evaluate(check.node, env, guard=reach)
    raise AssertionError("a failed check did not fail again")


def _strips(varies: Axis, binding: Binding) -> Iterator[tuple[int, int]]:
    """Query ranges of about STRIP points each; one range where q_idx does not matter."""
    if not varies & Axis.Q:
        yield 0, binding.q_len
        return
    sizes = ((Axis.B, binding.batch), (Axis.H, binding.heads), (Axis.KV, binding.kv_len))
    row = 1
    for axis, size in sizes:
        row *= size if varies & axis else 1
    step = max(1, STRIP // max(row, 1))
    for start in range(0, binding.q_len, step):
        yield start, min(start + step, binding.q_len)


def strip_env(binding: Binding, varies: Axis, start: int, stop: int) -> Env:
    """Positions [B, H, start..stop, KV]; an axis that is not in `varies` is 1 long."""

    def arange(axis: Axis, low: int, high: int, dim: int) -> Tensor:
        high = high if varies & axis else min(low + 1, high)
        shape = [1, 1, 1, 1]
        shape[dim] = -1
        return torch.arange(low, high, device=binding.device).view(shape)

    h = arange(Axis.H, 0, binding.heads, 1)
    positions = {
        "b": arange(Axis.B, 0, binding.batch, 0),
        "h": h,
        "kv_head": h // (binding.heads // binding.kv_heads),
        "q_idx": arange(Axis.Q, start, stop, 2),
        "kv_idx": arange(Axis.KV, 0, binding.kv_len, 3),
    }
    return Env(positions, binding.scalars, binding.tensors, device=binding.device)
