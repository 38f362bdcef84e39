import pytest
import torch
from hypothesis import given

from attncc.frontend import parse
from attncc.ir import ops
from attncc.ir.expr import Q_IDX, Const, apply
from attncc.ir.plan import Plan
from attncc.ir.program import Program
from attncc.ir.show import show
from attncc.passes.fold_constants import fold_constants
from attncc.passes.simplify import simplify
from tests import strategies
from tests.cases import bindings, everywhere


@pytest.mark.fuzz
@pytest.mark.parametrize("change", [fold_constants, simplify])
@given(program=strategies.programs(), binding=bindings(shortest=1))
def test_values_stay(change, program, binding) -> None:
    before = Plan(program, mask=program.mask, score=program.score)
    after = change(before)
    assert torch.equal(everywhere(after.mask, binding), everywhere(before.mask, binding))
    assert torch.allclose(
        everywhere(after.score, binding),
        everywhere(before.score, binding),
        rtol=1e-9,
        atol=1e-9,
        equal_nan=True,
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("q_idx - q_idx % 64 >= kv_idx", "q_idx // 64 * 64 >= kv_idx"),
        ("q_idx + n - q_idx < kv_idx", "n < kv_idx"),
        ("q_idx - kv_idx < n", "q_idx - kv_idx < n"),
        ("0 <= q_idx - kv_idx", "q_idx >= kv_idx"),
        ("0 <= n", "n >= 0"),
        ("q_idx < kv_idx + 1", "q_idx <= kv_idx"),
        ("q_idx + 1 > q_idx", "true"),
        ("kv_idx < kv_len and q_idx >= 0", "true"),
        ("kv_idx == kv_len", "false"),
        ("2 * q_idx == 2 * kv_idx + 1", "false"),
        ("2 * q_idx < 2 * kv_idx", "q_idx < kv_idx"),
        ("not not on", "on"),
        ("not q_idx < kv_idx", "q_idx >= kv_idx"),
        ("not x < 1.0", "not x < 1.0"),
        ("on and (on or q_idx < n)", "on"),
        ("(on and q_idx < n) and on", "on and q_idx < n"),
        ("on == false", "not on"),
        ("where(on, q_idx < n, false)", "on and q_idx < n"),
        ("q_idx // 4 // 8 < n", "q_idx // 32 < n"),
        ("(q_idx * 8 + 5) // 8 < n", "q_idx < n"),
        ("(q_idx + n) // n < 3", "q_idx // n < 2"),
        ("q_idx % 7 % 7 < n", "q_idx % 7 < n"),
        ("max(0, q_idx) < n", "q_idx < n"),
        ("min(min(n, 3), 5) < q_idx", "min(n, 3) < q_idx"),
        ("abs(-n) < q_idx", "abs(n) < q_idx"),
        ("-7 // 2 == -4 and -7 % 2 == 1", "true"),
    ],
)
def test_rules(before: str, after: str) -> None:
    (program,) = parse(f"attention t(n: int, on: bool, x: float):\n    mask = {before}\n")
    plan = simplify(fold_constants(Plan(program, mask=program.mask)))
    assert show(plan.mask) == after


def test_a_division_by_zero_stays() -> None:
    zero = apply(ops.FLOORDIV, Const(1), Const(0))
    mask = apply(ops.LT, zero, Q_IDX)
    plan = Plan(Program("t", mask=mask), mask=mask)
    assert fold_constants(plan).mask == mask
