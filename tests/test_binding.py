"""What every wrong argument is told, and what right ones become."""

import numpy as np
import pytest
import torch

from attncc.binding import bind, bind_lengths
from attncc.errors import ArgumentError
from attncc.frontend import parse

(PROGRAM,) = parse(
    """attention a(window: int = 4, cap: float = 2.0, on: bool = true, must: int,
        doc: int[batch, kv_len] sorted, bias: float[heads, n], also: float[n, 3]):
    mask = q_idx - kv_idx < window and on and doc[b, q_idx] == must
    score = score + bias[h, 0] + also[0, 0]
"""
)


def qkv(**changes):
    made = {
        "q": torch.zeros(2, 4, 5, 8),
        "k": torch.zeros(2, 2, 6, 8),
        "v": torch.zeros(2, 2, 6, 3),
    }
    return made | changes


def arguments(**changes):
    made = {
        "must": 0,
        "doc": torch.zeros(2, 6, dtype=torch.int64),
        "bias": torch.zeros(4, 7),
        "also": torch.zeros(7, 3),
    }
    return {name: value for name, value in (made | changes).items() if value is not ...}


INPUTS = {
    "not a tensor": ({"q": [1]}, "q is a list, expected a tensor [B, Hq, Q, D]"),
    "none": ({"k": None}, "k is None, expected a tensor [B, Hkv, KV, D]"),
    "rank": ({"v": torch.zeros(2, 6, 3)}, "v has shape [2, 6, 3], expected [B, Hkv, KV, Dv]\n"
             "    add the missing axes: v[None] for the batch"),
    "int": ({"q": torch.zeros(2, 4, 5, 8, dtype=torch.int32)},
            "q is int32, expected bfloat16, float16, float32 or float64"),
    "dtype": ({"k": torch.zeros(2, 2, 6, 8, dtype=torch.float16)},
              "k is float16, but q is float32\n    convert one: k.to(q.dtype)"),
    "device": ({"v": torch.zeros(2, 2, 6, 3, device="meta")},
               "v is on meta, but q is on cpu\n    move one: v.to(q.device)"),
    "batch": ({"k": torch.zeros(1, 2, 6, 8)}, "k has batch 1, but q has batch 2"),
    "head dim": ({"k": torch.zeros(2, 2, 6, 9)}, "k has head dim 9, but q has head dim 8\n"
                 "    q and k share their last axis, of 1 or more; only v may differ"),
    "heads of v": ({"v": torch.zeros(2, 1, 6, 3)}, "v has 1 heads, but k has 2"),
    "keys of v": ({"v": torch.zeros(2, 2, 7, 3)}, "v has 7 keys, but k has 6"),
    "group": ({"q": torch.zeros(2, 5, 5, 8)}, "q has 5 heads and k has 2, which does not divide 5\n"
              "    tensors are [batch, heads, tokens, head_dim]: is an axis swapped?"),
}  # fmt: skip

ARGUMENTS = {
    "unknown": ({"windw": 3}, "a has no parameter 'windw'\n    did you mean 'window'?"),
    "unknown, nothing close": (
        {"zzz": 3},
        "a has no parameter 'zzz'\n    it takes window, cap, on, must, doc, bias, also",
    ),
    "missing scalar": (
        {"must": ...},
        "a is missing its parameter 'must: int'\n    pass it by name: must=...",
    ),
    "missing tensor": (
        {"doc": ...},
        "a is missing its parameter 'doc: int[batch, kv_len] sorted'\n    pass it by name: doc=...",
    ),
    "float for int": (
        {"window": 2.0},
        "window is 2.0, a float, expected an int\n    write int(...)",
    ),
    "bool for int": (
        {"window": True},
        "window is True, a bool, expected an int\n    write int(...)",
    ),
    "text for float": ({"cap": "x"}, "cap is 'x', a str, expected a float"),
    "int for bool": ({"on": 1}, "on is 1, an int, expected a bool\n    write True or False"),
    "none for int": ({"must": None}, "must is None, None, expected an int\n    write int(...)"),
    "too large": (
        {"window": 2**63},
        "window is 9223372036854775808, expected an int from -2**62 to 2**62\n"
        "    for no bound at all, any number above the lengths serves",
    ),
    "tensor for scalar": (
        {"window": torch.zeros(2)},
        "window is a tensor of shape [2], expected an int\n"
        "    to read its elements, declare 'window: int[n]'",
    ),
    "scalar that requires grad": (
        {"cap": torch.tensor(1.0, requires_grad=True)},
        "cap requires grad, but it is a scalar, which gets none\n"
        "    declare 'cap: float[1] grad', write cap[0], pass one",
    ),
    "list for tensor": (
        {"doc": [0]},
        "doc is a list, expected a tensor, 'doc: int[batch, kv_len] sorted'\n"
        "    pass torch.as_tensor(doc)",
    ),
    "float tensor for int": (
        {"doc": torch.zeros(2, 6)},
        "doc is float32, expected int32, int64, int16, int8 or uint8 "
        "for 'doc: int[batch, kv_len] sorted'",
    ),
    "device": (
        {"bias": torch.zeros(4, 7, device="meta")},
        "bias is on meta, but q is on cpu\n    move it: bias.to('cpu')",
    ),
    "requires grad": (
        {"bias": torch.zeros(4, 7, requires_grad=True)},
        "bias requires grad, but is not declared to get one\n"
        "    declare 'bias: float[heads, n] grad', or pass bias.detach()",
    ),
    "rank": (
        {"bias": torch.zeros(4)},
        "bias has shape [4], expected 2 axes, 'bias: float[heads, n]'",
    ),
    "named dim": (
        {"bias": torch.zeros(3, 7)},
        "bias has shape [3, 7]: its axis 0 has 3 elements, expected 4 (heads, from q, k and v), "
        "'bias: float[heads, n]'",
    ),
    "free name": (
        {"also": torch.zeros(8, 3)},
        "also has shape [8, 3]: its axis 0 has 8 elements, expected 7 (n, from bias), "
        "'also: float[n, 3]'",
    ),
    "constant dim": (
        {"also": torch.zeros(7, 4)},
        "also has shape [7, 4]: its axis 1 has 4 elements, expected 3, 'also: float[n, 3]'",
    ),
    "not sorted": (
        {"doc": torch.tensor([[0, 1, 1, 2, 2, 2], [0, 1, 2, 1, 2, 2]])},
        "doc is declared sorted, but doc[1, 2] is 2 and doc[1, 3] is 1\n"
        "    sort it along its last axis, or drop 'sorted' from 'doc: int[batch, kv_len] sorted'",
    ),
}


@pytest.mark.parametrize("name", INPUTS)
def test_wrong_inputs(name):
    changes, message = INPUTS[name]
    with pytest.raises(ArgumentError) as error:
        bind(PROGRAM, **qkv(**changes), arguments=arguments())
    assert str(error.value) == message


@pytest.mark.parametrize("name", ARGUMENTS)
def test_wrong_arguments(name):
    changes, message = ARGUMENTS[name]
    with pytest.raises(ArgumentError) as error:
        bind(PROGRAM, **qkv(), arguments=arguments(**changes))
    assert str(error.value) == message


def test_what_is_bound():
    found = bind(PROGRAM, **qkv(), arguments=arguments(window=np.int32(3), cap=2))
    assert (found.batch, found.heads, found.kv_heads) == (2, 4, 2)
    assert (found.q_len, found.kv_len, found.head_dim) == (5, 6, 8)
    assert found.scalars["window"] == 3 and type(found.scalars["window"]) is int
    assert found.scalars["cap"] == 2.0 and type(found.scalars["cap"]) is float
    assert found.scalars["on"] is True and found.scalars["kv_len"] == 6
    assert set(found.tensors) == {"doc", "bias", "also"}


@pytest.mark.parametrize("value", [3, np.int64(3), torch.tensor(3), np.array(3)])
def test_ints_from_anywhere(value):
    assert bind(PROGRAM, **qkv(), arguments=arguments(must=value)).scalars["must"] == 3


def test_sorted_is_checked_once_a_version(monkeypatch):
    doc = torch.zeros(2, 6, dtype=torch.int64)
    bind(PROGRAM, **qkv(), arguments=arguments(doc=doc))
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__lt__", lambda *_: pytest.fail("looked again"))
        bind(PROGRAM, **qkv(), arguments=arguments(doc=doc))
    doc[0, 0] = 1
    with pytest.raises(ArgumentError, match="sorted"):
        bind(PROGRAM, **qkv(), arguments=arguments(doc=doc))


def test_requires_grad_is_fine_without_gradients():
    with torch.no_grad():
        bind(PROGRAM, **qkv(), arguments=arguments(bias=torch.zeros(4, 7, requires_grad=True)))


def test_lengths():
    given = arguments(doc=torch.zeros(1, 6, dtype=torch.int64), bias=torch.zeros(3, 7))
    found = bind_lengths(PROGRAM, q_len=5, kv_len=6, heads=3, arguments=given)
    assert (found.batch, found.heads, found.kv_heads, found.head_dim) == (1, 3, 3, 64)
    with pytest.raises(ArgumentError, match="q_len is -1, expected an int that is not negative"):
        bind_lengths(PROGRAM, q_len=-1, kv_len=6, arguments=given)
    with pytest.raises(ArgumentError, match="does not divide"):
        bind_lengths(PROGRAM, q_len=5, kv_len=6, heads=3, kv_heads=2, arguments=given)
