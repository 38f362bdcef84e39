import pytest
import torch

from attncc.bench.cases import Asked
from attncc.bench.form import Form, ends, form
from attncc.bench.rows import ROWS
from attncc.frontend import load
from attncc.inputs import Lengths

CPU = torch.device("cpu")
SHAPE = Lengths(2, 2, 2, 64, 64, 8)
PARAMS = "doc: int[batch, kv_len] sorted, tag: int[kv_len], w: int = 5, s: float[heads]"


def of(mask: str, *lines: str, shape: Lengths = SHAPE):
    text = "\n    ".join([f"attention x({PARAMS}):", f"mask = {mask}", *lines])
    problem = Asked(load(text + "\n"), shape).problem(CPU, torch.float32)
    return form(problem), problem


def test_rows_that_kernels_with_fixed_masks_can_do():
    found = {row.title: form(row.problem(CPU, torch.float32)) for row in ROWS[:3] + ROWS[-8:]}
    assert found["full"] == Form()
    assert found["causal"] == Form(causal=True)
    assert found["causal, window 1024"] == Form(causal=True, window=1024)
    assert found["sliding_window_causal"] == Form(causal=True, window=1025)
    assert found["full_document"].documents.name == "doc"
    others = ("share_question", "causal_blockwise", "prefix_lm_document", "block_causal_document")
    assert [found[name] for name in others] == [None] * 4


@pytest.mark.parametrize("mask", ["q_idx >= kv_idx", "kv_idx <= q_idx"])
def test_causal_is_seen_either_way(mask):
    assert of(mask)[0] == Form(causal=True)


def test_a_window_may_be_a_parameter():
    assert of("q_idx - kv_idx <= w and q_idx >= kv_idx")[0] == Form(causal=True, window=6)


def test_documents_of_a_batch_are_laid_end_to_end():
    found, problem = of("doc[b, q_idx] == doc[b, kv_idx]")
    problem.arguments["doc"][:] = torch.arange(64) // 40 + torch.tensor([[0], [3]])
    assert ends(problem, found.documents).tolist() == [0, 40, 64, 104, 128]


@pytest.mark.parametrize(
    ("mask", "lines"),
    [
        ("q_idx >= kv_idx or kv_idx < 4", ()),
        ("q_idx - kv_idx < 4", ()),
        ("tag[q_idx] == tag[kv_idx]", ()),
        ("q_idx > kv_idx", ()),
        ("q_idx - kv_idx < h and q_idx >= kv_idx", ()),
        ("q_idx >= kv_idx", ("score = 2.0 * score",)),
        ("q_idx >= kv_idx", ("sink = s[h]",)),
        ("q_idx >= kv_idx", ("output = s[h] * out",)),
        ("q_idx >= kv_idx", ("normalize = sigmoid",)),
    ],
)
def test_anything_else_has_no_form(mask, lines):
    assert of(mask, *lines)[0] is None


def test_other_lengths_have_none_but_full():
    uneven = Lengths(2, 2, 2, 32, 64, 8)
    assert of("true", shape=uneven)[0] == Form()
    assert of("q_idx >= kv_idx", shape=uneven)[0] is None
