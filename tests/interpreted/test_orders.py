"""Kernels of programs whose tokens stand in another order, against the dense interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attncc.binding import bind_lengths
from attncc.frontend import parse
from attncc.ir.program import Program
from attncc.order import permuted, residues
from attncc.passes import analyze
from tests.interpreted.harness import check, inputs
from tests.order.test_orders import GRID


def only(text: str) -> Program:
    (program,) = parse(text)
    return program


@pytest.mark.parametrize("one_sequence", [False, True])
@pytest.mark.parametrize("shift", [0, 3])
def test_classes_of_residues(one_sequence: bool, shift: int) -> None:
    program = only(Path("examples/dilated_window.attn").read_text())
    found = residues.find(program, analyze(program).mask)
    assert found is not None
    ordered = found.ordered(4, shift, one_sequence, ragged=True)
    names = {"q_tokens": 158, "kv_tokens": 159}
    which = {"sequences": 1, "sequence": 0} if one_sequence else {"residue": 2}
    given = {"window": 13, "step": 4, **names, **which}
    lengths = {"batch": 4 if one_sequence else 2, "heads": 2, "q_len": 40, "kv_len": 40}
    binding = bind_lengths(ordered, **lengths, head_dim=16, arguments=given)
    check(ordered, binding, inputs(binding, 16))


@pytest.mark.parametrize("by_sequence", [False, True])
def test_permuted_grids(by_sequence: bool) -> None:
    program = only(GRID)
    ordered, names = permuted.permuted(program, analyze(program).mask, by_sequence)
    order = torch.stack(
        [torch.randperm(40, generator=torch.Generator().manual_seed(n)) for n in (0, 1)]
    )
    order = order if by_sequence else order[0]
    given = {"bias": torch.randn(5, 5), **dict.fromkeys(names, order)}
    binding = bind_lengths(ordered, q_len=40, kv_len=40, batch=2, head_dim=16, arguments=given)
    check(ordered, binding, inputs(binding, 16))
