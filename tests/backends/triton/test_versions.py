"""A Triton too old for kernels, and names that differ from version to version."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.experimental.gluon")

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from attncc.backends.gluon import emit
from attncc.backends.gluon.dialect import RENAMED, translated
from attncc.backends.triton import aot
from attncc.backends.triton.emit import Call
from attncc.backends.triton.versions import installed, supported
from attncc.errors import ArgumentError, UnsupportedError
from attncc.frontend import parse
from attncc.passes import analyze

ROOT = Path(__file__).parents[3]
PLAN = analyze(parse((ROOT / "examples/causal.attn").read_text())[0])

ASK = """
import attncc, torch
from attncc.errors import UnsupportedError
q = torch.zeros(1, 1, 16, 16)
attn = attncc.compile("examples/causal.attn")
attn(q, q, q)
for ask in (attn.source, lambda: attn(q, q, q, backend="triton")):
    try:
        ask()
    except UnsupportedError as error:
        print(error)
"""


def with_triton(version: str, folder: Path, *command: str) -> str:
    """What a command prints where a Triton of that version is all there is of it."""
    (folder / "triton").mkdir()
    (folder / "triton/__init__.py").write_text(f"__version__ = {version!r}\n")
    path = os.pathsep.join((str(folder), str(ROOT)))
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1", "COLUMNS": "160"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout + done.stderr


NEEDED = "kernels need Triton 3.6 or later, not 3.5.1"


def test_an_old_triton_is_told_where_it_is_needed(tmp_path: Path) -> None:
    printed = with_triton("3.5.1", tmp_path, "-c", ASK)
    assert printed == 2 * f"{NEEDED}\n    pip install 'triton>=3.6'\n"


def test_doctor_tells_of_an_old_triton(tmp_path: Path) -> None:
    printed = with_triton("3.5.1", tmp_path, "-m", "attncc", "doctor")
    assert f"{NEEDED}: no GPU kernels" in printed
    assert "Error" not in printed


def test_versions_are_read() -> None:
    assert supported("3.6.0") == supported("3.6") == (3, 6)
    assert supported("3.10.1+git123") == (3, 10)
    with pytest.raises(UnsupportedError, match=r"not 2\.3\.1"):
        supported("2.3.1")
    with pytest.raises(ArgumentError, match="no version of Triton"):
        supported("newest")


@pytest.mark.parametrize(("name", "since", "new"), RENAMED)
def test_names_are_those_of_their_version(name: str, since: tuple[int, int], new: str) -> None:
    before = since[0], since[1] - 1
    assert translated(f"{name}(x)", before) == f"{name}(x)"
    assert translated(f"{name}(x)", since) == f"{new}(x)"
    assert translated(f"{name}_too(x)", since) == f"{name}_too(x)"
    module, _, attribute = translated(name, installed()).partition(".")
    assert hasattr({"gl": gl, "tma": tma}[module], attribute)


def test_files_differ_in_those_names_alone() -> None:
    call, target = Call("bf16", 128, 128), aot.target("sm_90")
    old, new = (emit.sources(PLAN, call, target, None, v) for v in ((3, 6), (3, 9)))
    assert emit.sources(PLAN, call, target) == emit.sources(PLAN, call, target, None, installed())
    for file, text in old.items():
        assert translated(text, (3, 9)).split() != text.split()
        words = [re.findall(r"\w+(?:\.\w+)*", x) for x in (translated(text, (3, 9)), new[file])]
        assert words[0] == words[1]
