"""Generated kernels compile with the oldest Triton, the installed one and the newest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.experimental.gluon")

import triton

from attncc.backends.triton import aot
from tests.backends.tritons import KERNELS
from tests.goldens.files import GOLDENS

pytestmark = pytest.mark.skipif(bool(aot.missing_tools()), reason="needs ptxas and cuobjdump")

ROOT = Path(__file__).parents[2]
FETCHED = ROOT / ".venv" / "tritons"
"""A folder for each version, which `make test` fetches."""

OLDEST, NEWEST = (ROOT / "tests/backends/tritons.txt").read_text().split()
INSTALLED = triton.__version__

PRODUCTS = {"forward", "backward_kv", "backward_q", *KERNELS}
"""The kernels with matrix products."""

BACKWARD = 256
SPILLS = {
    ("full_forward", "forward"): 8,
    ("scattered_documents_64", "gluon_forward"): 48,
    ("alibi_64", "gluon_forward"): 320,
    ("softcap_256", "gluon_forward"): 32,
    ("causal_128", "gluon_backward"): 192,
    ("packed_64", "gluon_backward"): 304,
    ("scattered_documents_128", "gluon_backward"): 208,
    ("alibi_64", "gluon_backward"): 600,
    ("softcap_128", "gluon_backward"): 128,
}
"""Bytes allowed of what kernels keep in memory under one version or another; others nothing."""


def compiled(version: str, group: str) -> list[dict]:
    """What a process with that Triton says of the kernels of a group."""
    paths = [str(ROOT)]
    if version != INSTALLED:
        if not (FETCHED / version / "triton").exists():
            pytest.skip(f"Triton {version} is not in {FETCHED.relative_to(ROOT)}: `make test`")
        paths.insert(0, str(FETCHED / version))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "tests.backends.tritons", group]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("version", sorted({OLDEST, INSTALLED, NEWEST}))
@pytest.mark.parametrize("group", ["goldens", *KERNELS])
def test_kernels_compile(version: str, group: str) -> None:
    found = compiled(version, group)
    names = {golden.stem for golden in GOLDENS} if group == "goldens" else KERNELS[group]
    assert len({one["name"] for one in found}) == len(names)
    for one in found:
        kernel = one["kernel"]
        allowed = BACKWARD if kernel in ("backward_kv", "backward_q") else 0
        assert one["triton"] == version
        assert one["fits"], one
        assert one["spills"] <= SPILLS.get((one["name"], kernel), allowed), one
        assert (one["products"] > 0) == (kernel in PRODUCTS), one
        assert not one["remarks"] and not one["suspects"], one
