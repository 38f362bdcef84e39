from pathlib import Path

import pytest

from attncc.errors import ArgumentError, ProgramNameError
from attncc.frontend import load, parse, read

TWO = "attention first():\n    mask = true\nattention second():\n    mask = true\n"


def test_one_of_several() -> None:
    assert load(TWO, name="second").name == "second"
    with pytest.raises(ArgumentError, match="there are 2 programs: first, second"):
        load(TWO)
    with pytest.raises(ArgumentError, match="no program 'secnd'") as caught:
        load(TWO, name="secnd")
    assert caught.value.hint == "did you mean 'second'?"


def test_paths_and_texts_and_programs(tmp_path: Path) -> None:
    path = tmp_path / "two.attn"
    path.write_text("\ufeff" + TWO, "utf-8")
    assert read(path) == read(str(path)) == parse(TWO)
    assert load(str(path), "first") == load(path, "first") == load(TWO, "first")
    program = parse(TWO)[0]
    assert load(program) is program


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "causal.attn").write_text(TWO)
    with pytest.raises(ArgumentError, match="no file") as caught:
        load(tmp_path / "casual.attn")
    assert caught.value.hint == "did you mean 'causal.attn'?"
    with pytest.raises(ArgumentError, match="no file"):
        load(tmp_path / "nowhere" / "causal.attn")
    with pytest.raises(ArgumentError, match="cannot read"):
        read(tmp_path)
    binary = tmp_path / "binary.attn"
    binary.write_bytes(b"\xff\xfe\0")
    with pytest.raises(ArgumentError, match="is not text"):
        read(binary)
    large = tmp_path / "large.attn"
    large.write_bytes(b"#" * 2_000_000)
    with pytest.raises(ArgumentError, match="too large"):
        read(large)


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "wrong.attn"
    path.write_text("attention a():\n    mask = causall()\n")
    with pytest.raises(ProgramNameError, match=r"wrong\.attn:2:12: unknown function 'causall'"):
        load(path)
