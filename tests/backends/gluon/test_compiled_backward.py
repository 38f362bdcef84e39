"""Warp-specialised backwards, compiled for sm_90 without a GPU."""

import re

import pytest

pytest.importorskip("triton.experimental.gluon")

from attncc.backends.gluon import emit
from attncc.backends.triton import aot, sass
from attncc.backends.triton.emit import Call
from attncc.frontend import parse
from attncc.ir.plan import Plan
from attncc.passes import analyze
from tests.backends.gluon.test_compiled_forward import plan_of

FOLD = 6
"""Products of a block of queries: scores, dp, dv, dk, and dq of two blocks of keys."""


def compiled(plan: Plan, dim: int) -> dict[str, aot.Compiled]:
    rows = emit.compile_all(plan, Call("bf16", dim, dim), aot.target("sm_90"), "gluon_backward")
    return {row.kernel: row.compiled for row in rows}


def check(found: dict[str, aot.Compiled], begin: str, spills: int) -> None:
    """spills: bytes allowed of what today's kernels keep in memory."""
    assert found.keys() == {begin, "gluon_backward", "round_dq"}
    assert not found[begin].spills and not found["round_dq"].spills
    main = found["gluon_backward"]
    ptx = main.assembly
    assert main.fits
    assert main.spills <= spills, main.spills
    consumers = re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+240;", ptx)
    assert len(consumers) == 2, "one warpgroup gives up registers, the other takes them"
    assert re.search(r"setmaxnreg\.dec\.sync\.aligned\.u32\s+24;", ptx)
    assert main.instructions()["USETMAXREG"] == ptx.count("setmaxnreg")
    assert "red.relaxed.gpu.global.add.v4.f32" in ptx
    assert "REDG.E.ADD.F32x4" in main.disassembly()
    assert main.matrix_ops() >= 2 * FOLD * 4
    waits = main.disassembly().count("WARPGROUP.DEPBAR")
    assert waits == ptx.count("wgmma.wait_group"), "products are waited for one by one"
    assert waits < main.matrix_ops() / 4
    assert not main.remarks()
    assert sass.suspects(main.disassembly(), ptx) == ()


@pytest.mark.parametrize(
    ("name", "dim", "spills"),
    [
        ("full", 128, 0),
        ("causal", 128, 16),
        ("packed", 128, 16),
        ("softcap", 128, 128),
        ("relative_bias", 128, 176),
        ("full", 64, 64),
        ("full", 256, 0),
        ("causal", 256, 0),
        ("packed", 256, 32),
        ("softcap", 256, 32),
    ],
)
def test_backward(name: str, dim: int, spills: int) -> None:
    check(compiled(plan_of(name), dim), "delta", spills)


def test_factors_are_handed_over_four_at_a_time() -> None:
    ptx = compiled(plan_of("full"), 256)["gluon_backward"].assembly
    assert len(re.findall(r"st\.shared\.v4\.b32", ptx)) == 2 * 8, "of 32 numbers, in two loops"
    assert len(re.findall(r"ld\.shared\.v4\.b32", ptx)) == 8


@pytest.mark.parametrize(
    ("normalize", "dim", "spills"), [("sigmoid", 128, 16), ("sigmoid", 256, 16), ("none", 256, 48)]
)
def test_backward_without_a_softmax(normalize: str, dim: int, spills: int) -> None:
    text = f"mask = q_idx >= kv_idx\n    normalize = {normalize}"
    (program,) = parse(f"attention near():\n    {text}\n")
    check(compiled(analyze(program), dim), "clear", spills)
