import pytest
import torch
from hypothesis import given

from attncc.ir.plan import Plan
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
