import pytest
import torch

from attncc.errors import ArgumentError
from attncc.frontend import load
from attncc.inputs import Lengths, captured, qkv

PROGRAM = load("""
attention mixed(doc: int[batch, kv_len] sorted, kinds: int[kv_len], bias: float[heads, reach],
                flags: bool[batch], corner: float[3]):
    mask = doc[b, q_idx] == doc[b, kv_idx] and kinds[kv_idx] < 4 and flags[b]
    score = score + bias[h, q_idx - kv_idx + kv_len] + corner[0]
""")
LENGTHS = Lengths(batch=2, heads=4, kv_heads=2, q_len=300, kv_len=500)


def test_every_tensor_fits_its_declaration():
    made = captured(PROGRAM, LENGTHS, {}).tensors
    assert made["doc"].shape == (2, 500) and made["doc"].diff().min() >= 0
    assert made["doc"].dtype == torch.int64
    assert made["kinds"].shape == (500,) and 0 <= made["kinds"].min() <= made["kinds"].max() < 8
    assert made["bias"].shape == (4, 800)
    assert made["flags"].dtype == torch.bool and made["flags"].shape == (2,)
    assert made["corner"].shape == (3,)


def test_documents_are_told_and_the_seed_decides():
    first, again = captured(PROGRAM, LENGTHS, {}), captured(PROGRAM, LENGTHS, {})
    assert sum(document.length for document in first.rows[0]) == 500
    assert all(torch.equal(x, again.tensors[name]) for name, x in first.tensors.items())
    other = captured(PROGRAM, LENGTHS, {}, seed=1)
    assert not torch.equal(other.tensors["bias"], first.tensors["bias"])


def test_a_given_tensor_is_used_and_its_free_dims_hold():
    bias = torch.zeros(4, 7)
    made = captured(PROGRAM, LENGTHS, {"bias": bias})
    assert made.tensors["bias"] is bias
    assert made.origins["bias"] == "given"


def test_a_tensor_that_is_not_declared_is_an_error():
    with pytest.raises(ArgumentError, match=r"captures no tensor 'docs'\n.*did you mean 'doc'"):
        captured(PROGRAM, LENGTHS, {"docs": torch.zeros(1)})


def test_qkv_have_the_lengths():
    q, k, v = qkv(LENGTHS, torch.float32, torch.device("cpu"))
    assert q.shape == (2, 4, 300, 64)
    assert k.shape == v.shape == (2, 2, 500, 64)
