import subprocess
import sys

import pytest
from hypothesis import given

from attncc.frontend import parse
from attncc.ir import ops
from attncc.ir.expr import KV_IDX, Q_IDX, Const, apply
from attncc.ir.plan import Plan
from attncc.ir.program import Program
from attncc.ir.show import show
from attncc.ir.verify import verify
from attncc.passes import PASSES, analyze
from tests import strategies


@pytest.mark.fuzz
@given(strategies.programs(exact=False))
def test_plans_are_legal_after_every_pass(program) -> None:
    plan = Plan(program, mask=program.mask, score=program.score)
    for run in PASSES:
        plan = run(plan)
        verify(plan, after=run.__name__)


def test_analysis_needs_no_torch() -> None:
    code = "import sys, attncc.passes, attncc.ir.verify; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_debug_names_each_change() -> None:
    (program,) = parse("attention t():\n    mask = q_idx >= kv_idx and not false\n")
    lines: list[str] = []
    analyze(program, debug=lines.append)
    assert "fold_constants: mask = q_idx >= kv_idx and true" in lines
    assert "simplify: mask = q_idx >= kv_idx" in lines
    assert any(line.startswith("infer_ranges: key_ranges = visit [0, min(") for line in lines)


@pytest.mark.parametrize("op", [ops.ADD, ops.MUL, ops.BITXOR, ops.MAX, ops.FLOORDIV])
def test_deep_expressions_are_analysed(op) -> None:
    deep = apply(ops.SUB, Q_IDX, KV_IDX)
    for step in range(195):
        deep = apply(op, deep, KV_IDX if step % 2 else Const(3))
    mask = apply(ops.GE, deep, Const(0))
    analyze(Program("deep", mask=mask))


@pytest.mark.parametrize(
    ("score", "cancels"),
    [
        ("score", False),
        ("score + slope[h] * (kv_idx - q_idx)", True),
        ("score + bias[q_idx]", False),
        ("score - 0.5 * place[q_idx] + 0.1 * place[kv_idx]", True),
        ("score + where(q_idx < 9, 0.0, -1e9)", False),
        ("score + 1.0 / q_idx", False),
        ("score + bias[kv_idx]", False),
        ("score - 2.0 * (bias[q_idx] - bias[kv_idx])", False),
        ("score * 2.0 + bias[q_idx]", False),
        ("tanh(score) + bias[q_idx]", False),
        ("score + bias[q_idx] * bias[kv_idx]", False),
    ],
)
def test_row_terms(score: str, cancels: bool) -> None:
    params = "slope: float[heads], bias: float[q_len], place: int[q_len]"
    (program,) = parse(f"attention t({params}):\n    score = {score}\n")
    assert analyze(program).row_terms_cancel is cancels


def test_row_terms_stay_beside_a_sink_or_without_a_softmax() -> None:
    for clause in ("sink = 0.5", "normalize = sigmoid"):
        text = f"attention t(bias: float[q_len]):\n    score = score + bias[q_idx]\n    {clause}\n"
        (program,) = parse(text)
        assert not analyze(program).row_terms_cancel


@pytest.mark.parametrize(
    ("load", "proved"),
    [
        ("t[b, h, q_idx, kv_idx]", True),
        ("t[b, kv_head, q_idx, kv_idx]", True),
        ("t[b, h, q_idx - 1, kv_idx]", False),
        ("t[b, h, max(q_idx - 1, 0), kv_idx]", True),
        ("t[b, h, min(q_idx + 1, q_len - 1), kv_idx]", True),
        ("t[b, h, min(q_idx + 1, q_len), kv_idx]", False),
        ("t[b, h, q_idx // 2, kv_idx % 5]", True),
        ("t[b, h, kv_idx, q_idx]", False),
        ("t[b, h, abs(q_idx - kv_idx), kv_idx]", False),
        ("u[h % 4]", True),
        ("u[min(max(q_idx - kv_idx, 0), 3)]", True),
        ("u[min(max(q_idx - kv_idx, -1), 3)]", False),
        ("u[int(q_idx > kv_idx)]", True),
        ("free[kv_idx]", False),
    ],
)
def test_loads_in_range(load: str, proved: bool) -> None:
    params = "t: float[batch, heads, q_len, kv_len], u: float[4], free: float[n]"
    (program,) = parse(f"attention t({params}):\n    score = score + {load}\n")
    plan = analyze(program)
    assert bool(plan.proved_loads) is proved, show(plan.score)
