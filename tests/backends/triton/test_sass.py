"""The descriptors of matrix instructions, in SASS as ptxas wrote it and in compiled kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from attncc.backends.triton import aot, emit, sass
from attncc.frontend import parse
from attncc.ir.program import Program
from attncc.passes import analyze
from tests.goldens.files import SINK

PTX = """
	bfe.u32 	%r2, %r1, 4, 14;
	cvt.u64.u32 	%rd2, %r2;
	or.b64 	%rd3, %rd2, 4611686293305294848;
	add.s64 	%rd4, %rd2, 4611686293305294850;
	or.b64 	%rd5, %rd2, -4611685949707911168;
	add.s64 	%rd6, %rd2, -4611685949707911136;
	wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%r8,%r9}, %rd3, %rd3, 0, 1, 1, 0, 0;
	wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%r8,%r9}, %rd4, %rd4, %p2, 1, 1, 0, 0;
	wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%r8,%r9}, {%r4,%r5}, %rd5, %p2, 1, 1, 1;
	wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%r8,%r9}, {%r6,%r7}, %rd6, %p2, 1, 1, 1;
"""

# As ptxas 12.8 wrote it, but for what is left out: the queries' and keys' descriptors, then, from
# the same base UR50, the values', whose second k-step is in UR14 and UR15.
PRODUCTS = """
USHF.R.U32.HI UR12, URZ, 0x4, UR9 ;
USGXT.U32 UR50, UR12, 0xe ;
UMOV UR48, UR50 ;
UMOV UR49, 0x40000040 ;
UMOV UR51, 0x40000040 ;
UMOV UR10, URZ ;
UIADD3 UR14, UP1, UR50, 0x2, URZ ;
UIADD3.X UR15, UR10, 0x40000040, URZ, UP1, !UPT ;
UMOV UR12, UR14 ;
UMOV UR13, UR15 ;
HGMMA.64x64x16.F32.BF16 R24, gdesc[UR48], RZ, !UPT ;
HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], R24, gsb0 ;
"""
COPIES = """
UMOV UR14, UR50 ;
UMOV UR15, URZ ;
"""
VALUES = """
UIADD3 UR14, UP0, UR14, 0x20, URZ ;
UIADD3.X UR15, UR15, -0x3ffffff0, URZ, UP0, !UPT ;
UMOV UR51, 0xc0000010 ;
HGMMA.64x16x16.F32.BF16 R56, R24, gdesc[UR48].tnspB, R56 ;
HGMMA.64x16x16.F32.BF16 R56, R36, gdesc[UR12].tnspB, R56, gsb0 ;
EXIT ;
"""


def listed(*parts: str) -> str:
    """Lines as cuobjdump writes them."""
    lines = "\n".join(part.strip() for part in parts).splitlines()
    return "\n".join(
        f"        /*{16 * n:04x}*/    {line}    /* 0x0 */" for n, line in enumerate(lines)
    )


def test_a_lost_copy_is_seen() -> None:
    assert sass.suspects(listed(PRODUCTS, COPIES, VALUES), PTX) == ()
    found = sass.suspects(listed(PRODUCTS, VALUES), PTX)
    assert {s.text for s in found} == {
        "HGMMA.64x16x16.F32.BF16 R56, R36, gdesc[UR12].tnspB, R56, gsb0"
    }
    assert [s.reason for s in found] == [
        "UR15 may be 0x50, which the PTX has not",
        "UR14 may be an address + 0x22, which the PTX has not",
    ]


def test_a_register_that_was_never_set_is_seen() -> None:
    found = sass.suspects(listed(PRODUCTS, VALUES.replace("UR14, 0x20", "UR20, 0x20")), PTX)
    assert "UR14 may be unset" in {s.reason for s in found}


def test_an_argument_is_no_address() -> None:
    copies = COPIES.replace("UMOV UR14, UR50", "ULDC UR14, c[0x0][0x228]")
    (found,) = sass.suspects(listed(PRODUCTS, copies, VALUES), PTX)
    assert found.reason == "UR14 may be an argument of the kernel"


@pytest.mark.parametrize(("target", "right"), [("0xd0", True), ("0xf0", False)])
def test_one_bad_path_of_two_is_seen(target: str, right: bool) -> None:
    """A jump to the copies, or over them."""
    code = listed(PRODUCTS, f"@P1 BRA {target} ;", COPIES, VALUES)
    assert (sass.suspects(code, PTX) == ()) == right


@pytest.mark.parametrize("high", ["0x3fffffef", "0x3fffffee"])
def test_taking_the_opposite_away_is_adding(high: str) -> None:
    """ptxas adds 0xc000001000000020 in this way too."""
    copies = f"""
UMOV UR60, UR50 ;
UMOV UR61, URZ ;
UMOV UR32, 0xffffffe0 ;
UMOV UR33, {high} ;
UIADD3.64 UR14, UR60, -UR32, URZ ;
"""
    values = VALUES[VALUES.index("UMOV") :]
    right = high == "0x3fffffef"
    assert (sass.suspects(listed(PRODUCTS, copies, values), PTX) == ()) == right


@pytest.mark.parametrize(("high", "right"), [("R1", True), ("R0", False)])
def test_sums_in_other_registers_are_followed(high: str, right: bool) -> None:
    """What ptxas keeps there when the uniform ones run out; R0 was the low word, too."""
    copies = f"""
IMAD.U32 R0, RZ, RZ, UR50 ;
CS2R R2, SRZ ;
MOV R1, R3 ;
IADD3 R44, P0, R0, 0x20, RZ ;
IADD3.X R0, {high}, -0x3ffffff0, RZ, P0, !PT ;
R2UR UR14, R44 ;
R2UR UR15, R0 ;
"""
    values = VALUES[VALUES.index("UMOV") :]
    assert (sass.suspects(listed(PRODUCTS, copies, values), PTX) == ()) == right


def test_two_layouts_at_one_address_are_a_risk() -> None:
    assert sass.at_risk(PTX)
    assert not sass.at_risk(PTX.replace("%rd2, -4", "%rd1, -4"))
    assert not sass.at_risk("")


def test_other_kernels_are_left_alone() -> None:
    assert sass.suspects("", "") == ()
    assert sass.suspects(listed(PRODUCTS, VALUES), "") == ()


def program(name: str) -> Program:
    text = name if "\n" in name else Path(f"examples/{name}.attn").read_text()
    return parse(text)[0]


@pytest.mark.skipif(bool(aot.missing_tools()), reason="needs ptxas and cuobjdump")
@pytest.mark.parametrize(
    ("name", "dim", "only"),
    [
        ("causal", 64, "forward"),
        ("causal", 128, "backward"),
        ("full", 128, "forward"),
        ("packed", 256, "forward"),
        (SINK, 64, "forward"),
    ],
)
def test_default_schedules_have_the_descriptors_they_ask_for(
    name: str, dim: int, only: str
) -> None:
    call = emit.Call("bf16", dim, dim, 2)
    for row in emit.compile_all(analyze(program(name)), call, aot.target("sm_90"), only):
        assert sass.suspects(row.compiled.disassembly(), row.compiled.assembly) == ()
        assert not sass.at_risk(row.compiled.assembly)
        assert row.kernel == "delta" or sass.descriptors(row.compiled.assembly).high
