import re

import pytest

import attncc
from benchmarks.readme import PLACE, README, ROOT, filled

TEXT = README.read_text()


def test_tables_are_those_of_the_results() -> None:
    assert PLACE.search(TEXT)
    assert filled(TEXT) == TEXT, "run python -m benchmarks.readme"


def test_the_program_shown_is_the_example() -> None:
    shown = re.search(r"(?m)^    attention packed(?:.*\n    )*.*\n", TEXT)
    assert shown is not None
    example = attncc.compile(ROOT / "examples" / "packed.attn")
    assert attncc.compile(shown[0].replace("\n    ", "\n").strip()).program == example.program


@pytest.mark.parametrize("name", ["README.md", "DESIGN.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    paths = re.findall(r"`((?:attncc|tests|benchmarks|examples)/[\w/.]*)`", text)
    assert paths and [path for path in paths if not (ROOT / path).exists()] == []
