"""Derivatives against torch's autograd."""

import pytest
import torch
from hypothesis import assume, given

from attncc.ir import ops
from attncc.ir.derivative import ONE, RULES, ZERO, derivative
from attncc.ir.evaluate import Env, evaluate_unchecked
from attncc.ir.expr import Apply, Const, H, Load, Score, apply, walk
from attncc.ir.ops import Kind
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


@pytest.mark.fuzz
@given(expr=strategies.floats(3, True, True), binding=bindings(shortest=1, longest=8))
def test_random_expressions(expr, binding):
    env = environment(binding)
    slope = binding.tensors["slope"].double()
    env = Env(env.positions, env.scalars, {**env.tensors, "slope": slope}, env.score, env.dtype)
    size = binding.batch, binding.heads, binding.q_len, binding.kv_len
    assume(not ties(expr, env))
    for wrt in (Score(), BIAS):
        leaf = env.score if isinstance(wrt, Score) else slope
        leaf.requires_grad_().grad = None
        value = evaluate_unchecked(expr, env).expand(size)
        value = value + 0 * leaf.sum()
        (expected,) = torch.autograd.grad(value.sum(), leaf)
        found = evaluate_unchecked(derivative(expr, wrt), env).detach().expand(size)
        if wrt is BIAS:
            found = found.sum((0, 2, 3))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        leaf.requires_grad_(False)


def ties(expr, env):
    """Whether min or max meets equal arguments, where torch takes the mean of both slopes."""
    for node in walk(expr):
        if isinstance(node, Apply) and node.op in (ops.MIN, ops.MAX):
            x, y = (evaluate_unchecked(arg, env) for arg in node.args)
            if bool((x == y).any()):
                return True
    return False


def test_a_branch_that_is_not_taken_adds_nothing():
    negative = apply(ops.LT, Score(), Const(0.0))
    expr = apply(ops.WHERE, negative, Const(0.0), apply(ops.SQRT, Score()))
    env = Env({}, score=torch.tensor([-1.0, 4.0]))
    assert evaluate_unchecked(derivative(expr, Score()), env).tolist() == [0.0, 0.25]


def test_folding():
    cap = Const(30.0)
    inner = apply(ops.DIV, Score(), cap)
    softcap = apply(ops.MUL, cap, apply(ops.TANH, inner))
    tanh = apply(ops.TANH, inner)
    assert derivative(softcap, Score()) == apply(ops.SUB, ONE, apply(ops.MUL, tanh, tanh))
    assert derivative(apply(ops.ADD, Score(), BIAS), Score()) == ONE
    assert derivative(apply(ops.ADD, Score(), BIAS), BIAS) == ONE
    assert derivative(apply(ops.INT, Score()), Score()) == ZERO
