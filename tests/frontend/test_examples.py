from pathlib import Path

import pytest

from attncc.frontend import parse, read

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.attn"))
EXPECTED = {
    *("full", "causal", "sliding_window", "streaming", "packed", "prefix_lm", "share_question"),
    *("block_causal_documents", "global_window", "alibi", "softcap", "relative_bias"),
    *("dilated_window", "s2", "power_attention", "longnet", "gated", "softpag"),
}


def test_every_published_system_has_its_file() -> None:
    assert {path.stem for path in EXAMPLES} >= EXPECTED


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_parses_and_comes_back(path: Path) -> None:
    (program,) = read(path)
    assert program.name == path.stem
    assert parse(str(program)) == (program,)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_names_its_paper_and_convention(path: Path) -> None:
    (program,) = read(path)
    assert "arXiv" in program.comment
    assert "Shows" in program.comment or path.stem == "full"
    assert max(map(len, path.read_text().split("\n"))) <= 100
