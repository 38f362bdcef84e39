import ast
import difflib
import os
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from tests.goldens.files import GOLDENS, HERE, Golden

MOD = {"score", "scale", "b", "h", "q_idx", "kv_idx"}
REWRITE = "if the change is meant, run `python -m tests.goldens` and read the difference"


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden.stem)
def test_generated_files_are_those_kept(golden: Golden) -> None:
    kept = golden.path.read_text() if golden.path.exists() else ""
    found = golden.text()
    if found != kept:
        lines = difflib.unified_diff(kept.splitlines(), found.splitlines(), lineterm="", n=1)
        pytest.fail("\n".join([f"{golden.path.name} differs; {REWRITE}", *lines]), pytrace=False)


def test_no_golden_is_left_over() -> None:
    assert {path.name for path in HERE.glob("*.py.txt")} == {g.path.name for g in GOLDENS}, REWRITE


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden.stem)
def test_only_what_is_used_is_there(golden: Golden) -> None:
    """Every function is called, and reads its arguments; mods have one signature."""
    tree = ast.parse(golden.text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    kernels = {"forward", "delta", "backward_kv", "backward_q"}
    kernels |= {"summarize", "key_lists", "query_lists"}
    for function in functions:
        assert function.name in names | kernels, function.name
        read = {n.id for node in function.body for n in ast.walk(node) if isinstance(n, ast.Name)}
        for argument in function.args.args:
            assert argument.arg in read | MOD, f"{function.name} does not read {argument.arg}"


@pytest.mark.skipif(shutil.which("ruff") is None, reason="needs ruff")
def test_files_are_clean_and_laid_out_as_ruff_has_them(tmp_path) -> None:
    for golden in GOLDENS:
        (tmp_path / f"{golden.stem}.py").write_text(golden.text())
    for command in (["format", "--diff"], ["check", "--ignore", "D100"]):
        ruff = ["ruff", *command, "--no-cache", "--config", "pyproject.toml", str(tmp_path)]
        done = subprocess.run(ruff, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


PRINT = "from tests.goldens.files import GOLDENS\nfor g in GOLDENS: print(g.text())"


def test_another_process_gives_the_same_bytes() -> None:
    """Whatever its hash seed, so that no set decides an order."""
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-c", PRINT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "".join(golden.text() + "\n" for golden in GOLDENS)
