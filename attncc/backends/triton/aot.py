"""Compiling a Triton kernel for a GPU that is not there, and reading what became of it."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from attncc.backends.triton.versions import OPTIONS
from attncc.errors import ArgumentError, suggest

ALIGNMENT = 16
"""Bytes (elements, for ints) that Triton's launcher tests arguments for, and specialises on."""


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU architecture; `shared_limit` is the shared memory one block may have, in bytes."""

    name: str
    gpu: GPUTarget
    shared_limit: int
    matrix_op: str
    """Prefix of its matrix instruction, as its disassembly writes it."""

    @property
    def descriptors(self) -> bool:
        """Whether it has tensor descriptors (TMA)."""
        return self.name in ("sm_90", "sm_100")


TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target("sm_80", GPUTarget("cuda", 80, 32), 163 * 1024, "HMMA"),
        Target("sm_90", GPUTarget("cuda", 90, 32), 227 * 1024, "HGMMA"),
        Target("sm_100", GPUTarget("cuda", 100, 32), 227 * 1024, "UTC"),
        Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 * 1024, "v_mfma"),
    )
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel for one target.

    registers: a thread's.
    spills:    bytes of a thread's stack; kernels have no other use for one.
    shared:    bytes of shared memory a block takes, dynamic and static.
    assembly:  PTX, or AMD's assembly.
    binary:    cubin or hsaco.
    """

    target: Target
    name: str
    registers: int
    spills: int
    shared: int
    assembly: str = field(repr=False)
    binary: bytes = field(repr=False)

    @property
    def fits(self) -> bool:
        """A block's shared memory is there to be had."""
        return self.shared <= self.target.shared_limit

    def disassembly(self) -> str:
        """SASS; for AMD, whose assembly is final, that."""
        return _cuobjdump(self.binary, "-sass") if _is_nvidia(self.target) else self.assembly

    def instructions(self) -> Counter[str]:
        """How often each instruction stands in the disassembly, by its first word (HGMMA, ...)."""
        pattern = _SASS if _is_nvidia(self.target) else _GCN
        return Counter(pattern.findall(self.disassembly()))

    def remarks(self) -> list[str]:
        """What ptxas says of a kernel for sm_90: that it waits for each wgmma by itself (C75..)."""
        from triton.backends.nvidia.compiler import get_ptxas  # where Triton has NVIDIA's part

        with tempfile.NamedTemporaryFile(mode="w", suffix=".ptx") as file:
            file.write(self.assembly)
            file.flush()
            command = [get_ptxas(self.target.gpu.arch).path, "-v", "--gpu-name=sm_90a", file.name]
            command += ["-o", "/dev/null"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [line for line in done.stderr.splitlines() if "C75" in line]

    def matrix_ops(self) -> int:
        """Matrix instructions of the target's best kind: wgmma on sm_90, tcgen05 on sm_100, ..."""
        prefix = self.target.matrix_op
        return sum(
            n
            for op, n in self.instructions().items()
            if op.startswith(prefix) and (prefix != "UTC" or op.endswith("MMA"))
        )


def target(name: str) -> Target:
    """The target of that name, or an ArgumentError."""
    if name not in TARGETS:
        hint = suggest(name, TARGETS) or f"targets are {', '.join(TARGETS)}"
        raise ArgumentError(f"there is no target {name!r}", hint=hint)
    return TARGETS[name]


def missing_tools() -> tuple[str, ...]:
    """The programs of Triton's wheel that are needed here, and are not there."""
    tools = {"ptxas": knobs.nvidia.ptxas, "cuobjdump": knobs.nvidia.cuobjdump}
    return tuple(name for name, tool in tools.items() if not Path(tool.path).exists())


def compile_for(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, object],
    target: Target,
    *,
    num_warps: int = 4,
    num_stages: int = 2,
    aligned: frozenset[str] | None = None,
    **options: object,
) -> Compiled:
    """Compile a `@triton.jit` or `@gluon.jit` function; 0.3 to 5 s, nothing kept on a device.

    signature:  Triton types ("*bf16", "i32", "fp32", ...) of the arguments that are no constexprs.
    constexprs: values of the others.
    aligned:    arguments known to be multiples of 16, as a launch finds out by looking; None
                stands for all pointers.
    options:    further options of Triton's compiler, such as enable_fp_fusion.
    """
    names = list(kernel.arg_names)
    if aligned is None:
        aligned = frozenset(n for n, type in signature.items() if type.startswith("*"))
    kind = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = kind(
        fn=kernel,
        signature={n: "constexpr" if n in constexprs else signature[n] for n in names},
        constexprs=dict(constexprs),
        attrs={(names.index(n),): [["tt.divisibility", ALIGNMENT]] for n in sorted(aligned)},
    )
    found = triton.compile(
        source,
        target=target.gpu,
        options={"num_warps": num_warps, "num_stages": num_stages, **OPTIONS, **options},
    )
    return _read_nvidia(found, target) if _is_nvidia(target) else _read_amd(found, target)


def _read_nvidia(found: Any, target: Target) -> Compiled:
    usage = _cuobjdump(found.asm["cubin"], "--dump-resource-usage")
    numbers = {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
    return Compiled(
        target=target,
        name=found.metadata.name,
        registers=numbers["REG"],
        spills=numbers["STACK"],
        # SHARED counts what the driver reserves (1 KiB from sm_90 on), which comes on top.
        shared=found.metadata.shared,
        assembly=found.asm["ptx"],
        binary=found.asm["cubin"],
    )


def _read_amd(found: Any, target: Target) -> Compiled:
    text = found.asm["amdgcn"]

    def number(key: str) -> int:
        match = re.search(rf"^\s*\.{key}:\s+(\d+)", text, re.MULTILINE)
        return int(match.group(1)) if match else 0

    return Compiled(
        target=target,
        name=found.metadata.name,
        registers=number("vgpr_count") + number("agpr_count"),
        spills=number("private_segment_fixed_size"),
        shared=found.metadata.shared,
        assembly=text,
        binary=found.asm["hsaco"],
    )


_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", re.MULTILINE)
_GCN = re.compile(r"^\t([a-z]\w+)", re.MULTILINE)


def _is_nvidia(target: Target) -> bool:
    return bool(target.gpu.backend == "cuda")


@functools.lru_cache(maxsize=16)
def _cuobjdump(cubin: bytes, flag: str) -> str:
    """The tool that comes inside Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        done = subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True)
    return done.stdout
