"""FlexAttention-style functions become Programs with the meaning that torch gives them."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, create_mask, noop_mask, or_masks

import attncc
from attncc.errors import AttnccError
from attncc.frontend.mods import traced_mods

B, H, N, D = 2, 4, 48, 16


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx >= kv_idx


def window(size: int) -> Any:
    def near(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx >= kv_idx) & (q_idx - kv_idx < size)

    return near


def documents(doc: Tensor) -> Any:
    return lambda b, h, q, k: doc[b, q] == doc[b][k]


def prefix(length: Tensor) -> Any:
    return lambda b, h, q, k: (k < length[b]) | (q >= k)


def natten(width: int, reach: int) -> Any:
    def near(b: Any, h: Any, q: Any, k: Any) -> Any:
        x, y = q // width, q % width
        centre = torch.clamp(x, min=reach, max=N // width - 1 - reach)
        across = y.clamp(reach, width - 1 - reach)
        return ((centre - k // width).abs() <= reach) & ((across - k % width).abs() <= reach)

    return near


class Dilated:
    """A callable object with numbers of its own."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return torch.remainder(q - k, self.step) == 0


def configured(b: Any, h: Any, q: Any, k: Any, *, size: int) -> Any:
    return (q - k).abs() <= size


DOC = torch.tensor([[0] * 10 + [1] * 20 + [2] * 18, [5] * 30 + [3] * 18], dtype=torch.int32)
KEEP = torch.rand(B, H, N, N, generator=torch.Generator().manual_seed(0)) < 0.6
KIND = torch.tensor([0, 1, 2, 1])

MASKS = {
    "causal": causal,
    "window": window(9),
    "documents": documents(DOC),
    "prefix": prefix(torch.tensor([7, 30])),
    "natten": natten(8, 2),
    "callable": Dilated(3),
    "partial": functools.partial(configured, size=5),
    "table": lambda b, h, q, k: KEEP[b, h, q, k],
    "views": lambda b, h, q, k: KEEP[b][h, :, :][q][k],
    "by head": lambda b, h, q, k: torch.where(KIND[h] == 1, q >= k, q - k < KIND[h] * 4),
    "torch's and": and_masks(causal, documents(DOC)),
    "torch's or": or_masks(window(4), lambda b, h, q, k: k < 3),
    "noop": noop_mask,
    "logical": lambda b, h, q, k: torch.logical_and(q >= k, torch.logical_not(k == 5)),
    "xor": lambda b, h, q, k: (q > k) ^ (k % 2 == 0),
    "bits": lambda b, h, q, k: ((q - k) & (q - k - 1)) == 0,
    "last": lambda b, h, q, k: DOC[b, q] == DOC[-1, k],
    "divisions": lambda b, h, q, k: torch.div(q, 7, rounding_mode="floor") >= k // 7,
    "truncated": lambda b, h, q, k: torch.div(q - k, 7, rounding_mode="trunc") == 0,
    "int as bool": lambda b, h, q, k: (q - k).bool(),
    "sum of bools": lambda b, h, q, k: (q > k).int() + (k > 3).long() + (q > 9) >= 2,
    "scalar tensor": lambda b, h, q, k: q - k < torch.tensor(6),
    "true": lambda b, h, q, k: True,
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_equal_torch(name: str) -> None:
    mask_mod = MASKS[name]
    attn = attncc.from_mods(mask_mod=mask_mod)
    wanted: Tensor
    if name == "true":
        wanted = torch.ones(B, H, N, N, dtype=torch.bool)
    else:
        wanted = create_mask(mask_mod, B, H, N, N, "cpu").bool()
    torch.manual_seed(0)
    q, k, v = torch.randn(3, B, H, N, D, dtype=torch.float64)
    out = attn(q, k, v)
    scores = (q @ k.mT / math.sqrt(D)).masked_fill(~wanted, -math.inf)
    expected = torch.nan_to_num(scores.softmax(-1)) @ v
    torch.testing.assert_close(out, expected)
    assert same_as_its_text(attn)


def same_as_its_text(attn: attncc.Attention) -> bool:
    return attncc.compile(str(attn)).program == attn.program


torch.manual_seed(1)
SLOPE = torch.rand(H, requires_grad=True)
BIAS = torch.randn(H, 2 * N, requires_grad=True)
GAIN = torch.randn(B, N, requires_grad=True)
ONE = torch.tensor(0.7, requires_grad=True)

SCORES = {
    "alibi": lambda s, b, h, q, k: s + SLOPE[h] * (k - q),
    "exp2": lambda s, b, h, q, k: s + torch.exp2(-((h + 1) * 8.0 / H)) * (k - q),
    "power": lambda s, b, h, q, k: s + 2 ** (-8.0 * (h + 1) / H) * (k - q),
    "softcap": lambda s, b, h, q, k: 5.0 * torch.tanh(s / 5.0),
    "relative": lambda s, b, h, q, k: s + BIAS[h, q - k + N],
    "gain": lambda s, b, h, q, k: s * (1.0 + 0.1 * GAIN[b, q]) + GAIN[b, k],
    "of zero axes": lambda s, b, h, q, k: s * ONE,
    "derived": lambda s, b, h, q, k: s + torch.sigmoid(BIAS)[h, q - k + N] + SLOPE.exp()[h],
    "causal by score": lambda s, b, h, q, k: torch.where(q >= k, s, -float("inf")),
    "other side": lambda s, b, h, q, k: torch.where(q < k, float("-inf"), s + SLOPE[h]),
    "conditional": lambda s, b, h, q, k: torch.where((q - k).abs() < 4, s * SLOPE[h], s),
    "square": lambda s, b, h, q, k: s + 0.1 * s**2 - 0.01 * (k - q).to(s.dtype).pow(2),
    "pointwise": lambda s, b, h, q, k: torch.nn.functional.softplus(s) + s.sigmoid().log1p(),
    "int": lambda s, b, h, q, k: q - k,
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_and_gradients_equal_torch(name: str) -> None:
    score_mod = SCORES[name]
    attn = attncc.from_mods(score_mod)
    torch.manual_seed(2)
    q, k, v = (torch.randn(B, H, N, D, requires_grad=True) for _ in range(3))
    leaves = [q, k, v, SLOPE, BIAS, GAIN, ONE]
    at = torch.meshgrid(*(torch.arange(n) for n in (B, H, N, N)), indexing="ij")
    expected = score_mod(q @ k.mT / math.sqrt(D), *at).float().softmax(-1) @ v
    dout = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, dout, allow_unused=True)
    got = torch.autograd.grad(attn(q, k, v), leaves, dout, allow_unused=True)
    torch.testing.assert_close(attn(q, k, v), expected, atol=2e-5, rtol=2e-5)
    names = ("q", "k", "v", "slope", "bias", "gain", "one")
    for leaf, mine, theirs in zip(names, got, wanted, strict=True):
        theirs = theirs if theirs is None or theirs.any() else None
        mine = mine if mine is None or mine.any() else None
        assert (mine is None) == (theirs is None), leaf
        if mine is not None:
            torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=2e-4)
    assert same_as_its_text(attn)


# -- what is captured


def test_numbers_are_parameters() -> None:
    program = traced_mods(None, window(9)).program
    assert "size: int" in str(program)
    assert program == traced_mods(None, window(1000)).program
    assert traced_mods(None, window(9)).arguments() == {"size": 9}


def test_numbers_that_python_asks_for_are_constants() -> None:
    def banded(count: int, width: int) -> Any:
        def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
            found = q == k
            for at in range(count):
                found = found | (q - k == at * width)
            return found if width > 0 else q >= k

        return mask

    found = traced_mods(None, banded(3, 8))
    assert found.arguments() == {}
    assert found.program != traced_mods(None, banded(4, 8)).program


def test_a_number_that_looks_like_one_is_one() -> None:
    def of(size: int) -> Any:
        return lambda b, h, q, k: (q - k < size) if isinstance(size, int) else q < k

    assert traced_mods(None, of(3)).arguments() == {"size": 3}


def test_the_users_function_stays_as_it_is() -> None:
    mod = Dilated(3)
    traced_mods(None, mod)
    assert mod.step == 3 and type(mod.step) is int


def test_tensors_are_read_when_called() -> None:
    doc = DOC.clone()
    attn = attncc.from_mods(mask_mod=documents(doc))
    q, k, v = torch.randn(3, B, H, N, D)
    first = attn(q, k, v)
    doc[0] = torch.arange(N)
    assert not torch.equal(first, attn(q, k, v))
    torch.testing.assert_close(attn(q, k, v)[0], v[0])


def test_an_argument_takes_the_place_of_what_was_captured() -> None:
    attn = attncc.from_mods(mask_mod=window(9))
    q, k, v = torch.randn(3, B, H, N, D)
    torch.testing.assert_close(attn(q, k, v, size=1), v)
    assert attn.plan(q, k, v, size=1).density != attn.plan(q, k, v).density


def test_functions_alike_share_their_program() -> None:
    first, second = (attncc.from_mods(SCORES["softcap"], window(n)) for n in (3, 4))
    assert first.program == second.program


def test_sorted_documents_are_loop_bounds() -> None:
    doc = DOC[:1].expand(B, N).contiguous()
    attn = attncc.from_mods(mask_mod=documents(doc), sorted=["doc"])
    assert attn.static.searches
    with pytest.raises(AttnccError, match="which no function captures"):
        attncc.from_mods(mask_mod=causal, sorted=["doc"])


def test_masks_of_scores_skip_tiles() -> None:
    attn = attncc.from_mods(SCORES["causal by score"])
    assert attn.plan(q_len=512, kv_len=512).counts.empty > 0


# -- errors


def branches(b: Any, h: Any, q: Any, k: Any) -> Any:
    if q >= k:
        return k > 3
    return k > 5


def writes(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    s.add_(1)
    return s


def unknown(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return s + torch.erfinv(q * 0.1)


def random(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return s + torch.rand(())


def whole(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return s + BIAS[h]


def by_float(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return s + BIAS[h, q / 2]


def floats(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q * 0.5


def nothing(b: Any, h: Any, q: Any, k: Any) -> Any:
    pass


def changes(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    BIAS.data.zero_()
    return s


@pytest.mark.parametrize(
    ("score_mod", "mask_mod", "message", "line"),
    [
        (None, branches, "Python branches", "if q >= k:"),
        (writes, None, "writes in place", "s.add_(1)"),
        (unknown, None, "erfinv", "torch.erfinv(q * 0.1)"),
        (random, None, "random", "torch.rand(())"),
        (whole, None, "open axis", "s + BIAS[h]"),
        (by_float, None, "indexed by a float", "BIAS[h, q / 2]"),
        (changes, None, "writes in place", "BIAS.data.zero_()"),
        (None, floats, "expected a bool", "def floats("),
        (None, nothing, "returned None", "def nothing("),
        (causal, None, "too many positional arguments", "def causal("),
    ],
)
def test_errors_show_the_users_line(score_mod: Any, mask_mod: Any, message: str, line: str) -> None:
    with pytest.raises(AttnccError) as caught:
        attncc.from_mods(score_mod, mask_mod)
    assert message in str(caught.value)
    assert line in str(caught.value)
    assert "test_mods.py:" in str(caught.value)


def test_reads_out_of_range_are_errors_where_they_are_kept() -> None:
    table = torch.randn(N)
    attn = attncc.from_mods(lambda s, b, h, q, k: s + table[q - k])
    q, k, v = torch.randn(3, B, H, N, D)
    with pytest.raises(AttnccError, match="table"):
        attn(q, k, v)
    both = attncc.from_mods(lambda s, b, h, q, k: s + table[q - k], causal)
    assert both(q, k, v).isfinite().all()


# -- random functions


def expressions() -> st.SearchStrategy[str]:
    """Python text over ints q, k, h, b, a captured number and a captured table."""
    leaves = st.sampled_from(["q", "k", "h", "b", "size", "3", "table[k]", "table[q]", "(q - k)"])
    steps = [
        "({} + {})",
        "({} - {})",
        "({} * {})",
        "({} // ({}).abs().clamp(min=1))",
        "torch.minimum({}, {})",
        "torch.where({} > {}, q, k)",
        "(({}) % 7 + ({} >= q))",
        "(({} & 15) | ({} & 3))",
        "torch.div({}, 2, rounding_mode='trunc') + {}",
    ]
    tensors = leaves.map(lambda x: f"(q * 0 + {x})")
    return st.recursive(
        tensors,
        lambda x: st.tuples(st.sampled_from(steps), x, x).map(lambda t: t[0].format(*t[1:])),
    )


@given(expressions(), st.sampled_from(["<", "<=", "==", "!=", ">"]), expressions())
@settings(max_examples=60)
def test_random_functions_equal_torch(left: str, compare: str, right: str) -> None:
    table = torch.arange(N).flip(0) % 11
    text = f"lambda b, h, q, k: ({left}) {compare} ({right})"
    mask_mod = eval(text, {"torch": torch, "table": table, "size": 5})
    attn = attncc.from_mods(mask_mod=mask_mod)
    wanted = create_mask(mask_mod, 1, 2, 12, 12, "cpu").bool()
    q = torch.zeros(1, 2, 12, 1, dtype=torch.float64)
    v = torch.eye(12, dtype=torch.float64).expand(1, 2, 12, 12)
    assert torch.equal(attn(q, q, v) > 0, wanted)
