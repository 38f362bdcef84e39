import pytest
import torch

from attncc.bench.cases import Asked, shrunk, tiny
from attncc.bench.problem import BLOCK, Problem
from attncc.bench.rows import PATTERNS, ROWS, chosen
from attncc.errors import ArgumentError
from attncc.frontend import load
from attncc.inputs import Lengths

CPU = torch.device("cpu")
VARIED = "attention varied(doc: int[batch, kv_len] sorted):\n    mask = {}\n"


def at(n: Lengths) -> list[torch.Tensor]:
    sizes = n.batch, n.heads, n.q_len, n.kv_len
    return list(torch.meshgrid(*map(torch.arange, sizes), indexing="ij"))


@pytest.mark.parametrize("title", PATTERNS)
def test_a_pattern_says_the_same_twice(title):
    """As a program, and as the mods that FlexAttention gets."""
    shape = Lengths(1, 1, 1, 2560, 2560, 8)
    problem = PATTERNS[title].problem(shape, CPU, torch.float32)
    own = Problem(problem.program, shape, problem.arguments, CPU)
    score = torch.randn(1, 1, shape.q_len, shape.kv_len)
    for written, mod, given in zip(problem.mods, own.mods, ((), (score,)), strict=True):
        assert (written is None) == (mod is None)
        if written is not None:
            torch.testing.assert_close(*(f(*given, *at(shape)) for f in (written, mod)))


@pytest.mark.parametrize(
    ("mask", "copies"),
    [
        ("q_idx >= kv_idx", (1, 1)),
        ("doc[b, kv_idx] < 3", (2, 1)),
        ("q_idx - kv_idx < 64 * (h + 1)", (1, 4)),
    ],
)
def test_kept_pairs_are_counted_by_tile(mask, copies):
    problem = Asked(load(VARIED.format(mask)), Lengths(2, 4, 2, 200, 300, 16)).problem(
        CPU, torch.float32
    )
    kept = problem.mods[0](*at(problem.lengths)).expand(2, 4, 200, 300)
    assert problem.copies == copies
    assert problem.tiles.shape == (*copies, 2, 3)
    assert problem.pairs == int(kept.sum())
    assert problem.tiles[0, 0, 0, 2] == kept[0, 0, :BLOCK, 2 * BLOCK :].sum()
    assert problem.flops == 4 * 16 * problem.pairs


def test_without_a_mask_every_pair_is_kept():
    program = load("attention all():\n    mask = true\n")
    problem = Problem(program, Lengths(2, 4, 2, 10, 20, 8), {}, CPU)
    assert (problem.tiles, problem.pairs, problem.density) == (None, 2 * 4 * 10 * 20, 1.0)


def test_words_choose_rows():
    assert chosen(()) == list(ROWS)
    assert [row.group for row in chosen(["d64"])] == ["d64"] * 3
    assert {row.title for row in chosen(["softcap", "N32768"])} >= {"softcap 30, causal"}
    with pytest.raises(ArgumentError, match="no row is 'fluff'"):
        chosen(["fluff"])


def test_shapes_of_rows_are_cut_with_their_groups_of_heads():
    long = ROWS[-1].shape
    assert str(long) == "B1 H64/8 N32768 D128"
    assert str(tiny(long)) == "B1 H8/1 N256 D128"
    assert str(shrunk(long, 512)) == "B1 H4/1 N512 D64"
