"""What a Gluon file writes where a Triton file writes something else."""

from __future__ import annotations

import re
from collections.abc import Sequence

from attncc.backends.triton.sections import IN_ORDER, File, header
from attncc.backends.triton.text import GATHER, HELPERS, TANH_HALF, laid_out
from attncc.backends.triton.versions import Version

IMPORTS = """\
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
"""

RENAMED: tuple[tuple[str, Version, str], ...] = (
    ("gl.thread_barrier", (3, 7), "gl.barrier"),
    ("tma.async_copy_global_to_shared", (3, 8), "tma.async_load"),
    ("tma.async_copy_shared_to_global", (3, 8), "tma.async_store"),
)
"""What Triton 3.6 calls something, which is what printers write; since when it has a new name."""

SIGMOID = '''
@gluon.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); exp of what is too large is inf, and its inverse 0."""
    return 1.0 / (1.0 + gl.exp(-x))
'''


def text(file: File, title: str, kernels: Sequence[str]) -> str:
    """The whole file; functions printed for Triton are translated."""
    parts = [*(f.text for f in file.functions), *kernels]
    used = "".join(parts)
    helpers = [HELPERS[h] for h in sorted(file.printer.helpers)]
    if "tanh(" in used:
        helpers.append(TANH_HALF)
    if "gather(" in used:
        helpers.append(GATHER)
    if "in_order(" in used:
        helpers.append(IN_ORDER)
    if "tl.sigmoid(" in used:
        helpers.append(SIGMOID)
    triton = file.spec.triton
    functions = "\n\n".join(translated(part.strip() + "\n", triton) for part in (*helpers, *parts))
    return laid_out(f"{header(file.spec, title)}{IMPORTS}\n\n{functions}")


def translated(source: str, triton: Version) -> str:
    """A function printed for Triton as that version's Gluon has it; no other name is `tl`."""
    source = re.sub(r"\btl\.sigmoid\(", "sigmoid(", source)
    source = re.sub(r"\btl\.", "gl.", source).replace("@triton.jit", "@gluon.jit")
    for name, since, new in RENAMED:
        if triton >= since:
            source = re.sub(rf"\b{re.escape(name)}\b", new, source)
    return source
