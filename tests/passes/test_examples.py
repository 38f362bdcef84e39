from pathlib import Path

import pytest
import torch

from attncc.binding import bind_lengths
from attncc.frontend import parse
from attncc.ir.ops import Kind
from attncc.passes import analyze
from attncc.tiles import BoundPlan

DTYPES = {Kind.INT: torch.int32, Kind.FLOAT: torch.float32, Kind.BOOL: torch.bool}
LOOSE = {"prefix_documents", "swin"}
"""Each of two conditions holds in some tile, and never both: documents and prefixes, columns of
other rows."""

EXAMPLES = sorted(Path(__file__).parents[2].glob("examples/*.attn"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.parametrize(("length", "tile"), [(2048, (128, 128)), (1999, (64, 32))])
def test_no_tile_is_lost(path: Path, length: int, tile: tuple[int, int]) -> None:
    for program in parse(path.read_text(), str(path)):
        lengths = torch.tensor([700, 1, 299, 800, length - 1800])
        documents = torch.repeat_interleave(torch.arange(5), lengths)[None]
        sizes = {"batch": 1, "heads": 2, "kv_heads": 2, "q_len": length, "kv_len": length}
        given = {}
        for tensor in program.tensors:
            shape = [sizes.get(dim, 16) if isinstance(dim, str) else dim for dim in tensor.dims]
            given[tensor.name] = torch.zeros(shape, dtype=DTYPES[tensor.kind])
        given |= {t.name: documents for t in program.tensors if t.sorted}
        if "start" in given:
            given["start"] = (lengths.cumsum(0) - lengths)[None]
        if "span" in given:
            given["span"] = torch.tensor([300, 40])
        binding = bind_lengths(program, q_len=length, kv_len=length, heads=2, arguments=given)
        bound = BoundPlan(analyze(program), binding, tile)
        exact = bound.exact_counts()
        if program.name in LOOSE:
            assert bound.counts.full <= exact.full and bound.counts.empty <= exact.empty
        else:
            assert bound.counts == exact
