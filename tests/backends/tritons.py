"""Compiles kernels with whichever Triton is there, and says in JSON what became of each.

`python -m tests.backends.tritons GROUP`; `test_tritons.py` says which Triton that is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import triton

from attncc.backends.gluon import emit as gluon_emit
from attncc.backends.triton import aot, emit, sass
from attncc.backends.triton.emit import Call, Row
from attncc.frontend import parse
from attncc.passes import analyze
from tests.goldens.files import EXAMPLES, GOLDENS, SCATTERED

SEARCHES, LISTS = "packed", SCATTERED
KERNELS = {
    "gluon_forward": (
        ("causal", 128),
        (SEARCHES, 128),
        (LISTS, 64),
        ("alibi", 64),
        ("softcap", 256),
    ),
    "gluon_backward": (
        ("causal", 128),
        (SEARCHES, 64),
        (LISTS, 128),
        ("alibi", 64),
        ("softcap", 128),
    ),
}
"""Programs and head dims of each warp-specialised file."""


def goldens() -> Iterator[tuple[str, Row]]:
    for golden in GOLDENS:
        assert golden.text() == golden.path.read_text(), "Triton files do not depend on its version"
        target = aot.target(golden.target)
        for row in emit.compile_all(golden.plan, Call("bf16", 128, 128, 2), target, golden.kernel):
            yield golden.stem, row


def specialised(file: str) -> Iterator[tuple[str, Row]]:
    for text, dim in KERNELS[file]:
        text = text if "\n" in text else (EXAMPLES / f"{text}.attn").read_text()
        (program,) = parse(text)
        call, target = Call("bf16", dim, dim), aot.target("sm_90")
        for row in gluon_emit.compile_all(analyze(program), call, target, file):
            yield f"{program.name}_{dim}", row


def described(name: str, row: Row) -> dict[str, object]:
    found = row.compiled
    return {
        "name": name,
        "kernel": row.kernel,
        "triton": triton.__version__,
        "fits": found.fits,
        "spills": found.spills,
        "products": found.matrix_ops(),
        "remarks": found.remarks() if row.kernel.startswith("gluon") else [],
        "suspects": sass.suspects(found.disassembly(), found.assembly),
    }


if __name__ == "__main__":
    group = sys.argv[1]
    found = goldens() if group == "goldens" else specialised(group)
    print(json.dumps([described(name, row) for name, row in found]))
