"""Each operator against the plain Python that folds constants, and the guards."""

from itertools import product

import pytest
import torch

from attncc.errors import BoundsError
from attncc.ir import ops
from attncc.ir.evaluate import RULES, Env, evaluate, evaluate_unchecked
from attncc.ir.expr import KV_IDX, Apply, Const, Load, Scalar, ScalarParam, TensorParam
from attncc.ir.ops import Kind
from attncc.passes.fold_constants import TABLE as PYTHON

INTS = (-7, -2, -1, 0, 1, 3, 8, 2**40)
FLOATS = (-2.5, -1.0, 0.25, 1.0, 3.75)
BOOLS = (False, True)

SMALL = (ops.EXP, ops.EXP2, ops.SIGMOID, ops.SOFTPLUS, ops.SIN, ops.COS, ops.TANH)
"""Operators whose arguments stay below 2**40 here."""


def value(expr, **env):
    return evaluate(expr, Env({}, dtype=torch.float64, **env)).item()


def test_the_table_is_total():
    assert set(RULES) | {ops.AND, ops.OR, ops.WHERE} == set(ops.OPS)
    assert set(PYTHON) == set(ops.OPS)


def arguments(op):
    """Argument lists that the operator takes."""
    for values in product(*[(*INTS, *FLOATS, *BOOLS)] * op.arity):
        if op.arity == 3 and not (isinstance(values[0], bool) and abs(values[1]) < 9):
            continue
        if op in SMALL and abs(values[0]) > 2**20:
            continue
        shifts = op in (ops.SHL, ops.SHR)
        if shifts and not (0 <= values[1] <= 8 and type(values[1]) is int):
            continue
        if op.kind(tuple(Kind(type(x).__name__) for x in values)) is not None:
            yield values


@pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.name)
def test_as_python(op):
    count = 0
    for values in arguments(op):
        try:
            expected = PYTHON[op](*values)
        except (ZeroDivisionError, ValueError):
            continue
        if isinstance(expected, int) and abs(expected) >= 2**62:
            continue
        expr = Apply(op, tuple(map(Const, values)))
        found = value(expr)
        assert type(found).__name__ == expr.kind.value, values
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-12), values
        count += 1
    assert count


def test_ints_are_exact_beyond_floats():
    big = Const(2**53 + 1)
    assert value(Apply(ops.ADD, (big, Const(2)))) == 2**53 + 3
    assert value(Apply(ops.BIT_LENGTH, (Const(2**62),))) == 63
    assert value(Apply(ops.BIT_LENGTH, (Const(2**53 - 1),))) == 53


TABLE = TensorParam("table", Kind.FLOAT, (3,))


def positions(count):
    return Env({"kv_idx": torch.arange(count)}, tensors={"table": torch.tensor([1.0, 2.0, 4.0])})


def test_loads_are_checked_where_the_guard_holds():
    env, load = positions(5), Load(TABLE, (KV_IDX,))
    with pytest.raises(
        BoundsError, match=r"'table' is read at 3\.\.4 along its axis 0, which has 3"
    ):
        evaluate(load, env)
    found = evaluate(load, env, guard=torch.arange(5) < 3)
    assert found[:3].tolist() == [1, 2, 4]
    assert evaluate_unchecked(load, env).tolist() == [1, 2, 4, 4, 4]


def test_short_circuits_guard_reads():
    env, load = positions(5), Load(TABLE, (KV_IDX,))
    inside = Apply(ops.LT, (KV_IDX, Const(3)))
    large = Apply(ops.GT, (load, Const(1.5)))
    both = evaluate(Apply(ops.AND, (inside, large)), env)
    assert both.tolist() == [False, True, True, False, False]
    either = evaluate(Apply(ops.OR, (Apply(ops.NOT, (inside,)), large)), env)
    assert either.tolist() == [False, True, True, True, True]
    chosen = evaluate(Apply(ops.WHERE, (inside, load, Const(0.0))), env)
    assert chosen.tolist() == [1, 2, 4, 0, 0]
    with pytest.raises(BoundsError):
        evaluate(Apply(ops.AND, (large, inside)), env)


def test_division_by_zero_is_an_error_where_it_is_reached():
    zero = Scalar(ScalarParam("n", Kind.INT))
    env = Env({"kv_idx": torch.arange(3)}, {"n": 0})
    for op in (ops.FLOORDIV, ops.MOD):
        divided = Apply(op, (KV_IDX, zero))
        with pytest.raises(BoundsError, match="divided by zero"):
            evaluate(divided, env)
        safe = Apply(ops.WHERE, (Apply(ops.NE, (zero, Const(0))), divided, Const(-1)))
        assert evaluate(safe, env).tolist() == [-1, -1, -1]
        assert evaluate_unchecked(divided, env).tolist() == [0, 0, 0]


def test_an_empty_tensor_is_read_nowhere():
    env = Env({"kv_idx": torch.arange(0)}, tensors={"table": torch.zeros(0)})
    assert evaluate(Load(TABLE, (KV_IDX,)), env).shape == (0,)
