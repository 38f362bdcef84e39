import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl

from attncc.backends.triton import aot
from attncc.errors import ArgumentError


@triton.jit
def product(a, b, c, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    m = tl.arange(0, M)
    n = tl.arange(0, N)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(a + m[:, None] * K + (start + k)[None, :])
        y = tl.load(b + (start + k)[:, None] * N + n[None, :])
        total = tl.dot(x, y, total)
    tl.store(c + m[:, None] * N + n[None, :], total.to(c.dtype.element_ty))


def compile_product(target: str, size: int, num_warps: int, **options) -> aot.Compiled:
    return aot.compile_for(
        product,
        {"a": "*bf16", "b": "*bf16", "c": "*bf16", "K": "i32"},
        {"M": size, "N": size, "BLOCK_K": 64},
        aot.target(target),
        num_warps=num_warps,
        **options,
    )


@pytest.mark.parametrize("name", aot.TARGETS)
def test_every_target_compiles_here_and_uses_its_matrix_instruction(name):
    compiled = compile_product(name, size=64, num_warps=4)
    assert compiled.matrix_ops() > 0
    assert 16 <= compiled.registers <= 512
    assert compiled.spills == 0
    assert compiled.shared > 0
    assert compiled.fits
    assert "product" in compiled.assembly


def test_spills_are_seen():
    crowded = compile_product("sm_90", size=128, num_warps=4)
    assert crowded.spills > 0
    assert crowded.instructions()["STL"] > 0


def test_too_much_shared_memory_is_seen():
    assert compile_product("sm_80", size=128, num_warps=8, num_stages=8).fits
    assert not compile_product("sm_80", size=128, num_warps=8, num_stages=12).fits


def test_an_unknown_target_is_corrected():
    with pytest.raises(ArgumentError, match="did you mean 'sm_90'"):
        aot.target("sm_9")
