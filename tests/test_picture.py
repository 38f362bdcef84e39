from xml.etree import ElementTree

import pytest

from attncc import picture

CAUSAL = [[1, 0, 0, 0], [2, 1, 0, 0], [2, 2, 1, 0], [2, 2, 2, 1]]


def test_text_has_one_cell_a_tile():
    assert picture.text(CAUSAL) == "▒▒······\n██▒▒····\n████▒▒··\n██████▒▒"


def test_a_large_grid_is_scaled_and_keeps_its_meaning():
    side = 100
    grid = [[2 if k < q else int(k == q) for k in range(side)] for q in range(side)]
    assert picture.text(grid, width=8, height=4) == picture.text(CAUSAL)


def test_an_empty_grid_is_an_empty_picture():
    assert picture.text([]) == ""
    assert ElementTree.fromstring(picture.svg([], "nothing")) is not None


def test_svg_is_well_formed_and_covers_the_tiles_that_are_not_empty():
    root = ElementTree.fromstring(picture.svg(CAUSAL, "a < b & c"))
    title, _, *tiles = root
    assert title.text == "a < b & c"
    area = sum(int(t.get("width")) * int(t.get("height")) for t in tiles)
    assert area == 10 * picture.CELL**2
    assert len(tiles) == 7, "runs are merged"


def test_png_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    picture.save_png(CAUSAL, "causal", tmp_path / "causal.png")
    assert (tmp_path / "causal.png").read_bytes().startswith(b"\x89PNG")
