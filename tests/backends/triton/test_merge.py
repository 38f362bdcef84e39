"""The kernels that merge branches compile for a Hopper GPU, with wide loads and without spills."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import triton
from triton.compiler import ASTSource

from attncc.backends.triton import aot, merge

pytestmark = pytest.mark.skipif(bool(aot.missing_tools()), reason="needs ptxas and cuobjdump")

BRANCHES, COLUMNS = 3, 128
TYPES = {"outs": "*bf16", "out": "*bf16", "lses": "*fp32", "lse": "*fp32"}
TYPES |= {f"d{name}": type for name, type in TYPES.items()}
SIZES = {"COLUMNS": COLUMNS, "BLOCK": merge.BLOCK // COLUMNS, "WIDTH": COLUMNS}


@pytest.mark.parametrize("kernel", [merge._forward, merge._backward], ids=["forward", "backward"])
def test_wide_loads_and_no_spills(kernel) -> None:
    names = list(kernel.arg_names)
    signature, aligned = {}, []
    for at, name in enumerate(names):
        if name in TYPES and name.endswith("s"):
            signature[name] = (TYPES[name],) * BRANCHES
            aligned += [(at, part) for part in range(BRANCHES)]
            continue
        signature[name] = "constexpr" if name in SIZES else TYPES.get(name, "i32")
        if name in TYPES or name.startswith("s_"):
            aligned.append((at,))
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in SIZES.items()},
        attrs={path: [["tt.divisibility", 16]] for path in aligned},
    )
    target = aot.target("sm_90")
    compiled = aot._read_nvidia(triton.compile(source, target=target.gpu), target)
    outs = [line for line in compiled.assembly.split("\n") if "ld.global.v4.b32" in line]
    assert len(outs) >= BRANCHES and not compiled.spills
