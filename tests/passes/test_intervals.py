from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attncc.binding import Binding
from attncc.ir import ops
from attncc.ir.evaluate import Env, evaluate_unchecked
from attncc.ir.expr import Expr
from attncc.ir.rewrite import Rewriter
from attncc.passes.interval_rules import RULES
from attncc.passes.intervals import Bounder
from attncc.passes.simplify import RULES as SIMPLIFY
from tests import strategies
from tests.cases import bindings, environment

NUMBERS = st.one_of(strategies.ints(3, exact=False), strategies.floats(3, exact=False))


def test_the_table_is_total() -> None:
    assert set(RULES) == set(ops.OPS)


@pytest.mark.fuzz
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(expr=NUMBERS, binding=bindings(shortest=1), block=st.sampled_from((1, 2, 8)))
def test_values_lie_between_the_bounds(dtype, expr: Expr, binding: Binding, block: int) -> None:
    interval = Bounder(Rewriter(SIMPLIFY))(expr)
    env = environment(binding, dtype)
    value = evaluate_unchecked(expr, env)
    ends = dict(tile_ends(binding, block))
    shape = (binding.batch, binding.heads, binding.q_len, binding.kv_len)
    known = evaluate_unchecked(interval.when, bounds_env(env, ends)).expand(shape)
    for end, outside in ((interval.lo, torch.lt), (interval.hi, torch.gt)):
        if end is not None:
            bound = evaluate_unchecked(end, bounds_env(env, ends)).expand(*shape)
            assert not (known & outside(value.expand(shape), bound)).any()


def tile_ends(binding: Binding, block: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The ends of the tile that each position is in."""
    ends: list[tuple[str, torch.Tensor]] = []
    for name, length, shape in (
        ("q", binding.q_len, (1, 1, -1, 1)),
        ("kv", binding.kv_len, (1, 1, 1, -1)),
    ):
        low = torch.arange(length) // block * block
        ends.append((f"{name}_lo", low.view(shape)))
        ends.append((f"{name}_last", ((low + block).clamp(max=length) - 1).view(shape)))
    return iter(ends)


def bounds_env(env: Env, ends: dict[str, torch.Tensor]) -> Env:
    return Env({**env.positions, **ends}, env.scalars, env.tensors, dtype=torch.float64)
