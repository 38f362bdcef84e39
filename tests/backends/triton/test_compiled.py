"""What kernels compile to for GPUs that are not here, each with its default schedule."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from attncc.backends.triton import aot, emit
from attncc.frontend import parse
from attncc.passes import analyze

pytestmark = pytest.mark.skipif(bool(aot.missing_tools()), reason="needs ptxas and cuobjdump")

FORWARDS = (
    ("full", "sm_90", 64),
    ("full", "sm_90", 128),
    ("causal", "sm_90", 64),
    ("causal", "sm_90", 128),
    ("streaming", "sm_90", 128),
    ("packed", "sm_90", 128),
    ("block_causal_documents", "sm_90", 128),
    ("share_question", "sm_90", 128),
    ("softcap", "sm_90", 128),
    ("relative_bias", "sm_90", 64),
    ("relative_bias", "sm_90", 128),
    ("full", "sm_80", 64),
    ("packed", "sm_80", 64),
    ("softcap", "sm_80", 256),
    ("full", "sm_80", 128),
    ("causal", "sm_80", 128),
    ("packed", "sm_80", 128),
    ("softcap", "sm_80", 128),
    ("full", "sm_100", 128),
    ("causal", "sm_100", 64),
    ("packed", "sm_100", 128),
)
BACKWARDS = (
    ("causal", 128),
    ("packed", 64),
    ("softcap", 128),
    ("relative_bias", 128),
)

FLOAT32 = (("sm_80", 64), ("sm_80", 128), ("sm_80", 256))
FLOAT32 += (("sm_90", 64), ("sm_90", 128), ("sm_90", 256))


def rows(
    name: str, target: str, dim: int, only: str = "", dtype: str = "bf16"
) -> dict[str, aot.Compiled]:
    plan = analyze(parse(Path(f"examples/{name}.attn").read_text())[0])
    call = emit.Call(dtype, dim, dim, 2)
    found = emit.compile_all(plan, call, aot.target(target), only)
    return {row.kernel: row.compiled for row in found}


@pytest.mark.parametrize(("name", "target", "dim"), FORWARDS)
def test_forward_has_no_spills(name: str, target: str, dim: int) -> None:
    (compiled,) = rows(name, target, dim, "forward").values()
    assert compiled.spills == 0
    assert compiled.matrix_ops() > 0, compiled.instructions()
    assert compiled.fits


@pytest.mark.parametrize(("name", "dim"), BACKWARDS)
def test_backward_fits_and_uses_wgmma(name: str, dim: int) -> None:
    compiled = rows(name, "sm_90", dim, "backward")
    assert compiled.keys() == {"delta", "backward_kv", "backward_q"}
    for kernel, found in compiled.items():
        assert found.fits
        assert (found.matrix_ops() > 0) == (kernel != "delta")
        assert found.spills <= 256, found


@pytest.mark.parametrize(("target", "dim"), FLOAT32)
def test_float32_fits_registers(target: str, dim: int) -> None:
    for found in rows("causal", target, dim, dtype="fp32").values():
        assert found.fits
        assert found.spills <= 64, found
