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
from torch.nn import functional as F
from torch.nn.attention.flex_attention import (
    and_masks,
    create_block_mask,
    create_mask,
    flex_attention,
    noop_mask,
    or_masks,
)

import attncc
from attncc.errors import AttnccError
from attncc.frontend.mods import traced_mods
from attncc.ir.evaluate import Env, evaluate

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
BLOCKS = torch.tensor([[[1, 0, 1], [0, 1, 0], [1, 1, 1]]] * H, dtype=torch.bool)

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


def packed(mask_mod: Any, offsets: Tensor) -> Any:
    """The mask within each document, by positions that begin anew in it."""
    doc = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())

    def within(b: Any, h: Any, q: Any, k: Any) -> Any:
        inner = mask_mod(b, h, q - offsets[doc[q]], k - offsets[doc[k]])
        return torch.where(doc[q] == doc[k], inner, False)

    return within


def tiles(width: int, tile: int, reach: Tensor) -> Any:
    """Tiles of a grid that see tiles around them; the reach is a tensor of no axes."""

    def coordinates(token: Any) -> tuple[Any, Any]:
        return token // width // tile, token % width // tile

    def near(b: Any, h: Any, q: Any, k: Any) -> Any:
        pairs = zip(coordinates(q), coordinates(k), strict=True)
        return functools.reduce(torch.logical_and, [(x - y).abs() <= reach for x, y in pairs])

    return near


def dilated(size: int, step: int) -> Any:
    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        far = q - k
        try:
            if step == 1:
                return far < size
        except Exception:
            return q < k
        return (far >= 0) & (far <= size * step) & (far % step == 0)

    return mask


MASKS |= {
    "packed": packed(window(6), torch.tensor([0, 11, 30, N])),
    "packed natten": packed(natten(4, 1), torch.tensor([0, 20, N])),
    "tiles": tiles(8, 2, torch.tensor(1)),
    "dilated": dilated(5, 3),
    "not dilated": dilated(5, 1),
    "blocks": lambda b, h, q, k: BLOCKS[h][q // 16, k // 16],
    "chosen": lambda b, h, q, k: torch.where(
        torch.where(q > 9, True, k > 3),
        torch.where(k > q, False, k % 5 > h),
        (k > 7).where(q < 5, True),
    ),
    "first of each": lambda b, h, q, k: (k == torch.tensor([0, 3, 5, 7])[h]) | (q == k),
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


# -- torch's functions, one by one

X = torch.linspace(-6, 6, 25, dtype=torch.float64)
ROWS, COLUMNS = torch.meshgrid(torch.arange(25), torch.arange(25), indexing="ij")

POINTWISE = {
    "shift left": lambda s, d, k: (k + 1) << (d % 5),
    "shift left by all": lambda s, d, k: (k + 1) << (d * 6),
    "shift right": lambda s, d, k: (d * 9) >> (k % 3),
    "shift right by all": lambda s, d, k: (d * 9) >> (d * 6),
    "one shifted": lambda s, d, k: 1 << (k % 9),
    "and": lambda s, d, k: (d & 6) + (6 & d),
    "xor": lambda s, d, k: torch.bitwise_xor(d, k) + (~d) + torch.bitwise_not(k),
    "floor of negative": lambda s, d, k: d // 4 + d % 4 + 7 // (k + 1) + 7 % (k + 1),
    "remainder": lambda s, d, k: torch.remainder(d, 5) + d.remainder(-3) + s.remainder(1.5),
    "fmod": lambda s, d, k: torch.fmod(d, 5) + s.fmod(1.5) + d.fmod(-4),
    "round": lambda s, d, k: (d / 2).round() + torch.round(s * 1.25) + torch.round(d),
    "floor": lambda s, d, k: s.floor() + torch.ceil(s * 0.7) + s.trunc() + torch.floor(d),
    "div": lambda s, d, k: torch.div(d, 4, rounding_mode="trunc") + d.div(4) + 3 / (k + 1),
    "div of floats": lambda s, d, k: torch.div(s, 0.75, rounding_mode="floor") + s // 2.0,
    "truncated": lambda s, d, k: torch.div(s, 0.75, rounding_mode="trunc") + s.to(torch.int32),
    "reversed": lambda s, d, k: (2 - s) + (3 - d) + (1 / (k + 2)) + 2**k * 1e-6 + 7 // (k + 1),
    "powers": lambda s, d, k: s**2 + d**3 + (k + 1.0) ** -1 + (k + 1.0) ** -0.5 + k**0.5 + d**0,
    "bases": lambda s, d, k: 2.0**s + 0.5**k + torch.pow(1.5, d) + torch.pow(2, d * 2),
    "extremes": lambda s, d, k: torch.minimum(d, k) + d.maximum(k) + torch.clamp(s, -1, 2.5),
    "clamps": lambda s, d, k: d.clamp(min=-3) + d.clamp(max=4) + s.clamp_min(0) + k.clamp_max(7),
    "bools": lambda s, d, k: torch.minimum(d > 2, k > 3) + 0.0 + ~torch.maximum(d > 1, k > 9),
    "sums of bools": lambda s, d, k: (d > 1) + (k > 3) + (d > 2) * (k > 2) * 2.0 + (d > 2) * s,
    "bits of bools": lambda s, d, k: ((d > 1) | (k > 3)) * 1.0 + ((d > 1) ^ (k > 3)) * 2 + ~(d > 0),
    "equal bools": lambda s, d, k: ((d > 1) == (k > 3)) + 0.5 * ((d > 1) != (k > 3)),
    "casts": lambda s, d, k: s.int() + s.bool() + d.bool().long() + (d > 0).float() + d.double(),
    "types": lambda s, d, k: d.to(s.dtype) + s.to(torch.int64) + s.type_as(s) + d.to(s),
    "sign": lambda s, d, k: (
        torch.sign(d) + s.sign() * 3 + d.abs() + abs(s) - s.neg() + torch.neg(d)
    ),
    "where": lambda s, d, k: torch.where(d > 0, s, -1.0) + torch.where(k > 3, d, k).where(d < 9, 2),
    "masked": lambda s, d, k: s.masked_fill(d > 3, 0.5) + d.masked_fill(k < 3, 7),
    "likes": lambda s, d, k: torch.zeros_like(s) + torch.ones_like(d) + torch.full_like(s, 2.5) * d,
    "news": lambda s, d, k: s + s.new_full((), 3.5) + d.new_ones(()) + torch.tensor(0.25) * d,
    "softs": lambda s, d, k: F.softplus(s) + F.silu(s) + F.logsigmoid(s) + s.sigmoid() + s.tanh(),
    "logs": lambda s, d, k: torch.log(k + 1) + (k + 2.0).log2() + (k + 1).log10() + k.log1p(),
    "exps": lambda s, d, k: torch.exp(s) + s.exp2() + torch.expm1(s) + (k + 1).rsqrt() + k.sqrt(),
    "waves": lambda s, d, k: torch.sin(s) + s.cos() + torch.relu(s) + F.relu(d) + s.square(),
    "add": lambda s, d, k: torch.add(s, d, alpha=2) + s.sub(d, alpha=0.5) + torch.rsub(d, k),
    "logic": lambda s, d, k: (
        torch.logical_or(d, k > 3) + 1.0 * torch.logical_xor(d, k).logical_not()
    ),
    "in place": lambda s, d, k: _added(s, d),
}


def _added(s: Any, d: Any) -> Any:
    s = s + 0
    s += d
    return s


@pytest.mark.parametrize("name", POINTWISE)
def test_functions_mean_what_torch_computes(name: str) -> None:
    f = POINTWISE[name]
    program = traced_mods(lambda s, b, h, q, k: f(s, q - k, k), None).program
    score = X[ROWS] * 0.9 + X[COLUMNS] * 0.1
    env = Env({"q_idx": ROWS, "kv_idx": COLUMNS}, score=score, dtype=torch.float64)
    expected = f(score, ROWS - COLUMNS, COLUMNS).double()
    torch.testing.assert_close(
        evaluate(program.score, env).expand(25, 25), expected, rtol=1e-6, atol=1e-6
    )


# -- torch's own meaning


@pytest.mark.parametrize("score", ["alibi", "relative", "softcap", "gain"])
@pytest.mark.parametrize("mask", ["window", "documents", "natten"])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_calls_equal_flex_attention(score: str, mask: str) -> None:
    torch.manual_seed(3)
    q, k, v = torch.randn(3, B, H, N, D)
    block_mask = create_block_mask(MASKS[mask], B, H, N, N, "cpu")
    with torch.no_grad():
        expected = flex_attention(q, k, v, SCORES[score], block_mask)
        found = attncc.from_mods(SCORES[score], MASKS[mask])(q, k, v)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


# -- what is a parameter

SCALE = 0.5


def of_everything(near: int, factor: float) -> Any:
    """A function with numbers in each place that can hold one."""

    def inner(x: Any, *, shift: int = 3) -> Any:
        return x * factor + shift * SCALE

    def score(extra: float, s: Any, b: Any, h: Any, q: Any, k: Any, bound: int = near) -> Any:
        return inner(s) + torch.where(q - k < bound, extra, -extra) * near

    return functools.partial(score, 0.75)


def test_numbers_are_found_wherever_they_are() -> None:
    found = traced_mods(of_everything(4, 1.5), None)
    assert found.arguments() == {
        "near": 4,
        "factor": 1.5,
        "shift": 3,
        "SCALE": 0.5,
        "extra": 0.75,
        "bound": 4,
    }
    assert found.program == traced_mods(of_everything(40, 0.25), None).program


def told(names: dict[int, str], size: int) -> Any:
    return lambda b, h, q, k: q - k < 2 * size if names[size] == f"of {size}" else q < k


def of_type(size: int) -> Any:
    return lambda b, h, q, k: (q - k < size) if type(size) is int else q < k


def rounded(size: float) -> Any:
    return lambda b, h, q, k: q - k < round(size) + size.is_integer()


def powers(base: float, count: int) -> Any:
    return lambda b, h, q, k: (k - q) * base**q < k**count


def member(size: int) -> Any:
    return lambda b, h, q, k: q - k < size if size in {4, 8} and str(size) != "8" else q < k


@pytest.mark.parametrize(
    "make",
    [
        lambda: told({4: "of 4"}, 4),
        lambda: of_type(4),
        lambda: rounded(3.5),
        lambda: powers(1.5, 2),
        lambda: member(4),
        lambda: window(True),
    ],
)
def test_what_python_does_with_a_number_stays(make: Any) -> None:
    mod = make()
    wanted = create_mask(mod, 1, 1, 12, 12, "cpu")[0, 0].bool()
    q = torch.zeros(1, 1, 12, 1, dtype=torch.float64)
    v = torch.eye(12, dtype=torch.float64)[None, None]
    attn = attncc.from_mods(mask_mod=mod)
    assert torch.equal(attn(q, q, v)[0, 0] > 0, wanted)


def test_flags_are_parameters_where_python_does_not_branch() -> None:
    def of(on: bool) -> Any:
        return lambda b, h, q, k: on & (q >= k)

    assert traced_mods(None, of(True)).arguments() == {"on": True}
    assert traced_mods(None, of(True)).program == traced_mods(None, of(False)).program


def test_names_that_calls_have_are_changed() -> None:
    def of(tile: int, k: int, kv_len: int) -> Any:
        return lambda b, h, i, j: (i // tile == j // tile) & (j < kv_len) & (i != k)

    attn = attncc.from_mods(mask_mod=of(8, 3, 40))
    assert [p.name for p in attn.program.params] == ["k_value", "kv_len_value", "tile_value"]


def even(n: int, x: Any) -> Any:
    return x if n == 0 else odd(n - 1, x + 1)


def odd(n: int, x: Any) -> Any:
    return even(n - 1, x + SCALE)


def test_functions_that_call_each_other() -> None:
    assert traced_mods(lambda s, b, h, q, k: even(4, s), None).arguments() == {"SCALE": 0.5}


class Settings:
    def __init__(self, reach: int) -> None:
        self.reach = reach
        self.unused = 5


def test_attributes_of_captured_objects() -> None:
    settings = Settings(6)
    found = traced_mods(None, lambda b, h, q, k: q - k < settings.reach)
    assert found.arguments() == {"reach": 6}
    assert vars(settings) == {"reach": 6, "unused": 5}


class Gate(torch.nn.Module):
    """A module with a parameter, a number and a method that serves as a mask."""

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.rand(H))
        self.register_buffer("table", torch.rand(N))
        self.reach = reach

    def forward(self, s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return s * self.gain[h] + self.table[k]

    def mask(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return q - k < self.reach


def test_modules_and_methods() -> None:
    gate = Gate(7)
    attn = attncc.from_mods(gate, gate.mask)
    assert {p.name for p in attn.program.params} == {"gain", "table", "reach"}
    q, k, v = torch.randn(3, B, H, N, D)
    attn(q, k, v).sum().backward()
    assert gate.gain.grad is not None and gate.gain.grad.any()
    assert type(gate.reach) is int and isinstance(gate.gain, torch.nn.Parameter)


def test_what_wraps_a_function_stays_as_it_is() -> None:
    cached = functools.lru_cache(window(5))
    held = cached.__wrapped__
    with pytest.raises(AttnccError):
        attncc.from_mods(mask_mod=lambda b, h, q, k: cached(b, h, q, k) if q > 3 else k)
    attncc.from_mods(mask_mod=lambda b, h, q, k: cached(b, h, q, k))
    assert cached.__wrapped__ is held


# -- scores of -inf

NEGATIVE = -float("inf")

DROPPED = {
    "added": (lambda s, b, h, q, k: s + torch.where(q >= k, 0.0, NEGATIVE), True),
    "taken from": (lambda s, b, h, q, k: torch.where(q < k, NEGATIVE, 0.0) + s * 2, True),
    "nested": (
        lambda s, b, h, q, k: torch.where(
            q >= k, torch.where(q - k < 5, s, NEGATIVE) + SLOPE[h], NEGATIVE
        ),
        True,
    ),
    "of both": (
        lambda s, b, h, q, k: torch.where(
            h > 1, torch.where(q >= k, s, NEGATIVE), s.masked_fill(q < k, NEGATIVE)
        ),
        True,
    ),
    "by the score": (lambda s, b, h, q, k: torch.where(s > 0.2, s, NEGATIVE), False),
    "scaled": (lambda s, b, h, q, k: torch.where(q >= k, s, NEGATIVE) * 2, False),
    "everywhere": (lambda s, b, h, q, k: torch.full_like(s, NEGATIVE), True),
}


@pytest.mark.parametrize("name", DROPPED)
def test_scores_of_minus_infinity_mask(name: str) -> None:
    score_mod, masks = DROPPED[name]
    attn = attncc.from_mods(score_mod)
    assert ("mask" in str(attn)) == masks
    assert masks != ("log(0.0)" in str(attn))
    q, k, v = torch.randn(3, B, H, N, D)
    at = torch.meshgrid(*(torch.arange(n) for n in (B, H, N, N)), indexing="ij")
    scores = score_mod(q @ k.mT / math.sqrt(D), *at)
    expected = torch.nan_to_num(scores.softmax(-1)) @ v
    torch.testing.assert_close(attn(q, k, v), expected, atol=1e-5, rtol=1e-5)
    assert same_as_its_text(attn)


# -- captured tensors


def test_sizes_that_a_function_reads_are_those_of_its_program() -> None:
    table = torch.randn(H, 9)

    def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return s + table[h, (q - k).clamp(0, table.shape[1] - 1)]

    attn = attncc.from_mods(score)
    assert "table: float[4, 9]" in str(attn)
    q, k, v = torch.randn(3, B, H, N, D)
    with pytest.raises(AttnccError, match="expected 9"):
        attn(q, k, v, table=torch.randn(H, 5))
    assert "DOC: int[DOC_0, DOC_1]" in str(
        attncc.from_mods(mask_mod=lambda b, h, q, k: DOC[b, q] > 0)
    )


def test_values_made_of_captured_tensors_are_kept_while_those_stay() -> None:
    lengths = torch.tensor([7, 30])
    attn = attncc.from_mods(
        mask_mod=lambda b, h, q, k: (k < (lengths * 2)[b]) & (q < lengths.max())
    )
    q, k, v = torch.randn(3, B, H, N, D)
    first, again = attn.plan(q, k, v), attn.plan(q, k, v)
    assert first.origin is again.origin
    lengths += 1
    assert attn.plan(q, k, v).origin is not first.origin
    expected = torch.softmax(
        (q @ k.mT)[0, :, :9] / math.sqrt(D) + torch.where(torch.arange(N) < 16, 0, NEGATIVE), -1
    )
    torch.testing.assert_close(attn(q, k, v)[0, :, :9], expected @ v[0])


VIEWS = {
    "row": lambda s, b, h, q, k: s + BIAS[0][q - k + N],
    "last": lambda s, b, h, q, k: s + BIAS[-1, q - k + N],
    "flat": lambda s, b, h, q, k: s + BIAS.view(-1)[h * 2 * N + q],
    "turned": lambda s, b, h, q, k: s + BIAS.T[q, h] + BIAS[:, 3][h],
    "rows": lambda s, b, h, q, k: s + BIAS[1:][h % 3, k],
    "halved": lambda s, b, h, q, k: s + torch.chunk(BIAS, 2)[1][h // 2, k],
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("tracing_grad", [True, False])
def test_views_and_parts_get_gradients(name: str, tracing_grad: bool) -> None:
    with torch.set_grad_enabled(tracing_grad):
        attn = attncc.from_mods(VIEWS[name])
    q, k, v = torch.randn(3, B, H, N, D)
    at = torch.meshgrid(*(torch.arange(n) for n in (B, H, N, N)), indexing="ij")
    expected = VIEWS[name](q @ k.mT / math.sqrt(D), *at).softmax(-1) @ v
    dout = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad(expected, BIAS, dout)
    for _ in range(2):
        (found,) = torch.autograd.grad(attn(q, k, v), BIAS, dout)
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=2e-4)


def test_a_plan_of_other_captured_values_is_refused() -> None:
    q, k, v = torch.randn(3, B, H, N, D)
    first, second = attncc.from_mods(mask_mod=window(4)), attncc.from_mods(mask_mod=window(9))
    with pytest.raises(AttnccError, match="plan has another size"):
        second(q, k, v, plan=first.plan(q, k, v))
    alike = attncc.from_mods(mask_mod=window(4))
    torch.testing.assert_close(alike(q, k, v, plan=first.plan(q, k, v)), first(q, k, v))
    changed = first.plan(q, k, v, size=9)
    torch.testing.assert_close(first(q, k, v, plan=changed), second(q, k, v))


@pytest.mark.parametrize(
    ("mask_mod", "message"),
    [
        (lambda b, h, q, k: q - k < DOC[0, 0].item(), "Python asks for the value of a captured"),
        (
            lambda b, h, q, k: q >= k if DOC.any() else k > 3,
            "Python asks for the value of a captured",
        ),
        (lambda b, h, q, k: q - k < torch.add(q, 1, out=DOC[0, 0]), "in place"),
        (lambda b, h, q, k: (DOC[b] * 2)[q] > 0, "DOC is used with 1 open axis"),
        (lambda b, h, q, k: DOC[b].sum() > q, "DOC is used with 1 open axis"),
        (lambda b, h, q, k: [True, False][q % 2], "Python asks for the value of 'q_idx % 2'"),
        (lambda b, h, q, k: q // 0 > k, "division by zero"),
        (lambda b, h, q, k: q.missing, "a position has no attribute 'missing'"),
        (lambda b, h, q, k: q.view(1) > k, "a position is given a shape"),
        (lambda b, h, q, k: q > k and q < 9, "Python branches on the value of 'q_idx > kv_idx'"),
        (
            lambda b, h, q, k: functools.reduce(lambda x, i: x | (q == i), range(300), q == k),
            "200 levels",
        ),
        (lambda b, h, q, k: functools.reduce(lambda x, i: x + x, range(60), q) > k, "20,000"),
        (lambda b, h, q, k: DOC[b, q, k] > 0, "indexed by more"),
        (lambda b, h, q, k: undefined > 0, "NameError"),  # type: ignore[name-defined]  # noqa: F821
    ],
)
def test_what_has_no_meaning_for_a_pair_is_an_error(mask_mod: Any, message: str) -> None:
    with pytest.raises(AttnccError, match=message) as caught:
        attncc.from_mods(mask_mod=mask_mod)
    assert caught.value.hint


def test_errors_of_calls_show_the_program() -> None:
    table = torch.randn(N)
    attn = attncc.from_mods(lambda s, b, h, q, k: s + table[q - k])
    q, k, v = torch.randn(3, B, H, N, D)
    with pytest.raises(AttnccError) as caught:
        attn(q, k, v)
    assert "score = score + table[q_idx - kv_idx]" in str(caught.value)
    assert "^" in str(caught.value)


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


@given(expressions(), st.sampled_from(["<", "<=", ">"]), expressions())
@settings(max_examples=60)
def test_a_number_passed_is_a_number_captured(left: str, compare: str, right: str) -> None:
    table = torch.arange(N).flip(0) % 11
    text = f"lambda size: lambda b, h, q, k: ({left}) {compare} ({right}) + size"
    of = eval(text, {"torch": torch, "table": table})
    q = torch.zeros(1, 2, 12, 1, dtype=torch.float64)
    v = torch.eye(12, dtype=torch.float64).expand(1, 2, 12, 12)
    attn = attncc.from_mods(mask_mod=of(3))
    wanted = create_mask(of(-4), 1, 2, 12, 12, "cpu").bool()
    assert torch.equal(attn(q, q, v, size=-4) > 0, wanted)


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
