"""The random programs are what they promise: varied, and well defined where evaluated."""

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from attncc.ir import ops
from attncc.ir.evaluate import Env, evaluate
from attncc.ir.expr import Load, walk
from attncc.ir.program import Program
from tests import strategies

Q, KV, HEADS = 6, 9, 2


def _env() -> Env:
    source = torch.Generator().manual_seed(0)
    positions = {
        "b": torch.arange(2).view(2, 1, 1, 1),
        "h": torch.arange(HEADS).view(1, HEADS, 1, 1),
        "kv_head": torch.zeros(1, 1, 1, 1, dtype=torch.int64),
        "q_idx": torch.arange(Q).view(1, 1, Q, 1),
        "kv_idx": torch.arange(KV).view(1, 1, 1, KV),
    }
    scalars = {"window": 4, "offset": -3, "cap": 2.5, "enabled": True}
    sizes = {"batch": 2, "heads": HEADS, "kv_heads": 1, "q_len": Q, "kv_len": KV, "head_dim": 8}
    tensors = {
        "doc": torch.randint(0, 3, (2, KV), generator=source).sort(-1)[0],
        "table": torch.randint(-9, 9, (7,), generator=source),
        "keep": torch.rand(KV, generator=source) < 0.5,
        "bias": torch.randn(HEADS, 5, generator=source),
        "slope": torch.rand(HEADS, generator=source),
    }
    score = torch.randn(2, HEADS, Q, KV, generator=source, dtype=torch.float64)
    return Env(positions, {**scalars, **sizes}, tensors, score, torch.float64)


@given(strategies.programs())
def test_programs_can_be_evaluated(program: Program) -> None:
    env = _env()
    assert evaluate(program.mask, env).dtype is torch.bool
    assert evaluate(program.score, env).isfinite().all()


def test_they_reach_every_operator_and_tensor() -> None:
    reached: set[object] = set()

    @seed(1)
    @settings(
        max_examples=300,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategies.programs(exact=False))
    def collect(program: Program) -> None:
        for clause in (program.mask, program.score):
            reached.update(strategies.ops_of(clause))
            reached.update(part.tensor for part in walk(clause) if isinstance(part, Load))

    collect()
    missing = set(ops.OPS) - reached
    assert not missing
    assert {param for param in strategies.PARAMS if hasattr(param, "dims")} <= reached
