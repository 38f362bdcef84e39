from pathlib import Path

import pytest
import torch

from attncc.binding import bind_lengths
from attncc.frontend import parse
from attncc.passes import analyze
from attncc.tiles import BoundPlan

EXAMPLES = sorted(Path(__file__).parents[2].glob("examples/*.attn"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.parametrize(("length", "tile"), [(2048, (128, 128)), (1999, (64, 32))])
def test_no_tile_is_lost(path: Path, length: int, tile: tuple[int, int]) -> None:
    for program in parse(path.read_text(), str(path)):
        lengths = torch.tensor([700, 1, 299, 800, length - 1800])
        documents = torch.repeat_interleave(torch.arange(5), lengths)[None]
        sizes = {"batch": 1, "heads": 2, "q_len": length, "kv_len": length}
        given = {t.name: torch.zeros([sizes[dim] for dim in t.dims]) for t in program.tensors}
        given |= {t.name: documents for t in program.tensors if t.sorted}
        binding = bind_lengths(program, q_len=length, kv_len=length, heads=2, arguments=given)
        bound = BoundPlan(analyze(program), binding, tile)
        assert bound.counts == bound.exact_counts()
