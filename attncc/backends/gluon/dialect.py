"""What a Gluon file writes where a Triton file writes something else."""

from __future__ import annotations

import re
from collections.abc import Sequence

from attncc.backends.triton.sections import IN_ORDER, File, header
from attncc.backends.triton.text import GATHER, HELPERS, TANH_HALF, laid_out

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
    functions = "\n\n".join(translated(part.strip() + "\n") for part in (*helpers, *parts))
    return laid_out(f"{header(file.spec, title)}{IMPORTS}\n\n{functions}")


def translated(source: str) -> str:
    """A function printed for Triton as Gluon has it; no other name of a file is `tl`."""
    source = re.sub(r"\btl\.sigmoid\(", "sigmoid(", source)
    return re.sub(r"\btl\.", "gl.", source).replace("@triton.jit", "@gluon.jit")
