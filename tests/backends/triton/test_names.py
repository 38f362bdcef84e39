"""No parameter's name takes the place of a name that generated files use for themselves."""

import ast
import re
from collections.abc import Iterable, Set
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from attncc.backends.triton import aot, emit
from attncc.backends.triton.text import HELPERS, Names
from attncc.frontend import parse
from attncc.ir.plan import Blocks, Plan
from attncc.ir.program import Program
from attncc.passes import analyze
from tests.goldens.files import SIGMOID, SINK

OTHERS = """
attention places(place: float[batch, kv_len] grad, near: bool[heads, kv_len]):
    mask = near[kv_head, kv_idx] or place[b, q_idx] <= place[b, kv_idx] + 0.5
    score = place[b, kv_idx] * 2.0
    normalize = none
"""
TEXTS = [path.read_text() for path in sorted(Path("examples").glob("*.attn"))]
PROGRAMS = [program for text in (*TEXTS, SINK, SIGMOID, OTHERS) for program in parse(text)]
ALONE = {*HELPERS, "tanh", "gather", "in_order", "add_pairs", "reference_row"}
"""Functions that are given no parameter, so that none can hide a name in them."""


def sources(plan: Plan) -> list[str]:
    found: list[str] = []
    for target in ("sm_80", "sm_90"):
        spec = emit.spec(plan, "bf16", aot.target(target))
        for wide in (False, True):
            found += emit.sources(replace(spec, wide=wide)).values()
    return found


def names_in(text: str, alone: Set[str]) -> set[str]:
    found: set[str] = set()
    for function in ast.parse(text).body:
        if not isinstance(function, ast.FunctionDef):
            continue
        found.add(function.name)
        if function.name not in alone:
            found |= {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
            found |= {a.arg for a in function.args.args}
    return found


def of_parameters(plan: Plan) -> set[str]:
    """Names of the program's own, and of what searches find, which never take one of those."""
    program = plan.program
    names = Names(p.name for p in plan.params)
    found = {names[p.name] for p in program.params}
    found |= {names.pointer(search.tensor.name) for search in plan.searches}
    for tensor in program.tensors:
        found.add(names.pointer(tensor.name))
        for axis in range(len(tensor.dims)):
            found |= {names.stride(tensor.name, axis), names.size(tensor.name, axis)}
    return found


def check_names(plan: Plan, texts: Iterable[str], alone: Set[str] = frozenset()) -> None:
    """alone: further functions that are given no parameter."""
    checked: set[str] = set()
    for text in texts:
        checked |= names_in(text, ALONE | alone)
    hidden = set()
    for name in checked - of_parameters(plan):
        for param in {name, re.sub(r"_ptr$|_(stride|size)_\d+$", "", name)}:
            names = Names([param])
            taken = {names[param], names.pointer(param)}
            taken |= {names.stride(param, 0), names.size(param, 0)}
            hidden |= {name} & taken
    assert not hidden, "names that a parameter would hide"


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_names_of_a_file_are_its_own(program: Program) -> None:
    ranged = analyze(program)
    for plan in (ranged, replace(ranged, blocks=Blocks.LISTS)):
        check_names(plan, sources(plan))


def test_renamed_parameters_stay_apart() -> None:
    params = ["rows", "rows_", "rows__", "g", "doc"]
    names = Names(params)
    assert len({names[p] for p in params}) == len(params)
    assert names["doc"] == "doc" and names["rows"] != "rows"
