import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton")

from attncc.backends.triton import aot, emit
from attncc.backends.triton.classify import lists_source
from attncc.frontend import parse
from attncc.ir.plan import Blocks, Plan
from attncc.passes import analyze

FLOATS = """
attention near(place: float[batch, kv_len], far: bool[heads, kv_len], reach: float = 2.0):
    mask = far[h, kv_idx] or abs(place[b, q_idx] - place[b, kv_idx]) < reach
"""


def plan(name: str) -> Plan:
    text = FLOATS if name == "floats" else Path(f"examples/{name}.attn").read_text()
    found = analyze(parse(text.replace(" sorted", ""))[0])
    assert found.blocks is Blocks.LISTS
    return found


PROGRAMS = ("packed", "share_question", "block_causal_documents", "s2", "floats")


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_kernels_compile_without_spills(name: str, target: str) -> None:
    call = emit.Call("bf16", 128, 128, 4)
    rows = emit.compile_all(plan(name), call, aot.target(target), only="lists")
    compiled = {row.kernel: row.compiled for row in rows}
    assert compiled.keys() == {"summarize", "key_lists", "query_lists"}
    for kernel in compiled.values():
        assert kernel.spills == 0, kernel


@pytest.mark.skipif(shutil.which("ruff") is None, reason="needs ruff")
@pytest.mark.parametrize("name", PROGRAMS)
def test_files_are_laid_out_as_ruff_has_them(name: str, tmp_path: Path) -> None:
    path = tmp_path / "lists.py"
    path.write_text(source(name))
    for command in (["format", "--check"], ["check", "--ignore", "D100"]):
        ruff = ["ruff", *command, "--config", "pyproject.toml", str(path)]
        subprocess.run(ruff, check=True)


def source(name: str) -> str:
    return lists_source(emit.spec(plan(name), "bf16", aot.target("sm_90")))


def test_equal_plans_give_equal_bytes() -> None:
    assert source("packed") == source("packed")
