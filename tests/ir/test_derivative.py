"""Derivatives against torch's autograd."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given

from attncc.ir import ops
from attncc.ir.derivative import ONE, RULES, ZERO, derivative
from attncc.ir.evaluate import Env, evaluate_unchecked
from attncc.ir.expr import Q_IDX, Apply, Const, H, Load, Score, TensorParam, apply, walk
from attncc.ir.ops import Kind
from attncc.ir.show import show
from attncc.passes.fold_scale import in_raw_units
from tests import strategies
from tests.cases import bindings, environment

BIAS = Load(strategies.SLOPE, (H,))


def test_the_table_is_total():
    """Every operator that gives a float from floats, but for what gives bools and ints."""
    floats = {op for op in ops.OPS if op.kind((Kind.FLOAT,) * op.arity) is Kind.FLOAT}
    assert set(RULES) == floats | {ops.WHERE}


UNARY = [op for op in RULES if op.arity == 1 and op is not ops.FLOAT]


@pytest.mark.parametrize("op", UNARY, ids=lambda op: op.name)
@pytest.mark.parametrize("at", [0.3, 1.7])
def test_one_operator(op, at):
    x = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    expr = Apply(op, (Score(),))
    env = Env({}, score=x, dtype=torch.float64)
    (expected,) = torch.autograd.grad(evaluate_unchecked(expr, env), x)
    found = evaluate_unchecked(derivative(expr, Score()), env)
    torch.testing.assert_close(found, expected)


X, Y = (Load(TensorParam(name, Kind.FLOAT, (25,), grad=True), (Q_IDX,)) for name in "xy")
TIED = torch.cartesian_prod(torch.arange(-2, 3), torch.arange(-2, 3)).double().unbind(1)
"""Every pair of small integers, so that half-way values, zeros and equal ones all occur."""

ARGUMENTS = (
    (X, Y),
    (Y, X),
    (X, X),
    (X, Const(0)),
    (Const(1.0), X),
    (apply(ops.NEG, X), X),
    (apply(ops.MUL, X, Y), apply(ops.MAX, X, Y)),
    (apply(ops.FLOAT, apply(ops.FLOOR, X)), Y),
)


@pytest.mark.parametrize("args", ARGUMENTS, ids=lambda args: ", ".join(map(show, args)))
@pytest.mark.parametrize("op", RULES, ids=lambda op: op.name)
def test_one_operator_at_ties(op, args):
    if op is ops.WHERE:
        expr = apply(op, apply(ops.LE, *args), *args)
    else:
        expr = apply(op, *args[: op.arity])
    tensors = {name: x.clone().requires_grad_() for name, x in zip("xy", TIED, strict=True)}
    env = Env({"q_idx": torch.arange(25)}, {}, tensors, dtype=torch.float64)
    value = evaluate_unchecked(expr, env).expand(25)
    defined = value.isfinite()
    total = value[defined].sum() + 0 * sum(x.sum() for x in tensors.values())
    expected = torch.autograd.grad(total, tuple(tensors.values()))
    for load, slope in zip((X, Y), expected, strict=True):
        found = evaluate_unchecked(derivative(expr, load), env).expand(25)
        torch.testing.assert_close(found[defined], slope[defined], equal_nan=True)


@pytest.mark.fuzz
@pytest.mark.parametrize("whole", [False, True], ids=["", "whole numbers"])
@given(expr=strategies.floats(3, False, True), binding=bindings(shortest=1, longest=8))
def test_random_expressions(whole, expr, binding):
    """Whole numbers make ties of min and max, and zeros of abs."""
    env = environment(binding)
    score = env.score.round() if whole else env.score
    floats = {name: binding.tensors[name].double() for name in ("slope", "bias")}
    if whole:
        floats = {name: value.round() for name, value in floats.items()}
    env = replace(env, tensors={**env.tensors, **floats}, score=score)
    size = binding.batch, binding.heads, binding.q_len, binding.kv_len
    for wrt in (Score(), BIAS):
        leaf = env.score if isinstance(wrt, Score) else floats["slope"]
        leaf.requires_grad_().grad = None
        value = evaluate_unchecked(expr, env).expand(size)
        value = value + 0 * leaf.sum()
        (expected,) = torch.autograd.grad(value.sum(), leaf)
        found = evaluate_unchecked(derivative(expr, wrt), env).detach().expand(size)
        if wrt is BIAS:
            found = found.sum((0, 2, 3))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        leaf.requires_grad_(False)


def test_a_branch_that_is_not_taken_adds_nothing():
    negative = apply(ops.LT, Score(), Const(0.0))
    expr = apply(ops.WHERE, negative, Const(0.0), apply(ops.SQRT, Score()))
    env = Env({}, score=torch.tensor([-1.0, 4.0]))
    assert evaluate_unchecked(derivative(expr, Score()), env).tolist() == [0.0, 0.25]


def test_min_and_max_stay_short():
    """What cannot differ is not asked for; 0 is no factor; a long chain grows by its length."""
    relu = apply(ops.MAX, Score(), Const(0.0))
    below, at = (apply(op, Score(), Const(0.0)) for op in (ops.LT, ops.EQ))
    slope = apply(ops.WHERE, below, ZERO, apply(ops.WHERE, at, Const(0.5), ONE))
    assert derivative(relu, Score()) == slope
    assert derivative(relu, BIAS) == ZERO
    shifted = apply(ops.ADD, Score(), BIAS)
    assert derivative(apply(ops.MIN, Score(), shifted), Score()) == ONE
    chain = Score()
    for at_most in range(60):
        chain = apply(ops.MIN, apply(ops.TANH, chain), Const(float(at_most)))
    nodes = sum(1 for _ in walk(in_raw_units(derivative(chain, Score()))))
    assert nodes < 60 * 20


def test_folding():
    cap = Const(30.0)
    inner = apply(ops.DIV, Score(), cap)
    softcap = apply(ops.MUL, cap, apply(ops.TANH, inner))
    tanh = apply(ops.TANH, inner)
    assert derivative(softcap, Score()) == apply(ops.SUB, ONE, apply(ops.MUL, tanh, tanh))
    assert derivative(apply(ops.ADD, Score(), BIAS), Score()) == ONE
    assert derivative(apply(ops.ADD, Score(), BIAS), BIAS) == ONE
    assert derivative(apply(ops.INT, Score()), Score()) == ZERO
