"""No parameter's name takes the place of a name that warp-specialised kernels use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest

pytest.importorskip("triton")

from attncc.backends.gluon.backward_wide import backward_source
from attncc.backends.gluon.forward import forward_source
from attncc.backends.triton import aot, emit
from attncc.ir.plan import Blocks, Plan
from attncc.ir.program import Program
from attncc.passes import analyze
from tests.backends.triton.test_names import PROGRAMS, check_names

ALONE = {
    "bring",
    "arrived",
    "release",
    "tile_in",
    "barriers",
    "ring_of",
    "put",
    "look",
    "ask",
    "sigmoid",
    "row_tile_of",
    "show",
    "start_dq",
    "add_dq",
    "tiles_of",
    "packed",
    "unpacked",
    "halves",
    "apart",
    "add_groups",
    "add_diagonals",
    "copied",
    "start_pairs",
}
"""Functions that no parameter is in."""


def sources(plan: Plan) -> Iterator[str]:
    spec = emit.spec(plan, "bf16", aot.target("sm_90"))
    flags = (False, True)
    for consumers, out_in_q, wide in product((2, 3), flags, flags):
        yield forward_source(replace(spec, wide=wide), consumers, out_in_q)
    captures = any(tensor.grad for tensor in plan.program.tensors)
    for wide, columns in product(flags, (128,) if captures else (128, 256)):
        yield backward_source(replace(spec, wide=wide), columns)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_names_of_a_file_are_its_own(program: Program) -> None:
    ranged = analyze(program)
    for plan in (ranged, replace(ranged, blocks=Blocks.LISTS)):
        check_names(plan, sources(plan), ALONE)
