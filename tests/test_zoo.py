"""Every program of examples/ against its published rule, written again in plain numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attncc
from attncc.backends.gluon import emit
from attncc.backends.triton import aot
from attncc.backends.triton.emit import Call
from attncc.inputs import Lengths
from attncc.ir.program import Normalize
from attncc.tiles import Counts

EXAMPLES = Path(__file__).parent.parent / "examples"
B, H, HKV, N = 2, 4, 2, 96

Array = np.ndarray
Rule = Callable[..., Array]
"""(arguments, b, h, i, j) to bools, or biases, of all pairs; i [N, 1], j [1, N]."""


@dataclass(frozen=True)
class System:
    """One published system: what it is called with here, which pairs it keeps, its scores."""

    keeps: Rule
    score: Callable[..., Any] = lambda s, a, b, h, i, j: s
    arguments: Callable[[np.random.Generator], Mapping[str, Any]] = lambda rng: {}
    n: int = N
    weights: Callable[[Array, Array], Array] = field(
        default=lambda s, keep: softmax(np.where(keep, s, -np.inf))
    )


def softmax(s: Array) -> Array:
    top = s.max(-1, keepdims=True)
    e = np.exp(s - np.where(np.isfinite(top), top, 0))
    return e / np.maximum(e.sum(-1, keepdims=True), 1e-300)


# -- arguments


def documents(rng: np.random.Generator, count: int = 5) -> Array:
    """doc [B, N], sorted, each row with cuts of its own."""
    cuts = [np.sort(rng.choice(np.arange(1, N), count - 1, replace=False)) for _ in range(B)]
    return np.stack([np.searchsorted(c, np.arange(N), side="right") for c in cuts])


def doc(rng: np.random.Generator) -> dict[str, Any]:
    return {"doc": documents(rng)}


def with_starts(rng: np.random.Generator) -> dict[str, Any]:
    ids = documents(rng)
    starts = np.stack([[np.argmax(row == d) for d in range(5)] for row in ids])
    return {"doc": ids, "start": starts, "prefix": 6}


def dynamic(rng: np.random.Generator) -> dict[str, Any]:
    """The 16 largest deltas among the keys that each row may see."""
    delta = rng.normal(size=(B, HKV, N)).astype(np.float32)
    least = np.stack(
        [np.sort(delta[..., : i + 1], -1)[..., max(0, i + 1 - 16)] for i in range(N)], -1
    )
    return {"delta": delta, "least": least}


def buckets(_: np.random.Generator) -> Array:
    """T5's, of distances 0 to 127 with 32 buckets."""
    n = np.arange(128)
    large = 16 + (np.log(np.maximum(n, 1) / 16) / np.log(128 / 16) * 16).astype(int)
    return np.where(n < 16, n, np.minimum(large, 31))


# -- rules


def causal(i: Array, j: Array) -> Array:
    return j <= i


def natten(i: Array, j: Array, length: Any, window: int, stride: int = 1) -> Array:
    """The rule of one axis (arXiv 2504.16922)."""
    left, right = window // 2, window // 2 + (window % 2 - 1)
    leader = np.minimum(i // stride * stride + stride // 2, length - 1)
    start = np.maximum(leader - left, 0)
    start = start + (leader + right >= length) * (length - right - leader - 1)
    return (start <= j) & (j < start + window)


def dilated(i: Array, j: Array, length: int, window: int, step: int) -> Array:
    own = -(-(length - i % step) // step)
    return (i % step == j % step) & natten(i // step, j // step, own, window)


def natten_causal(i: Array, j: Array, length: int, window: int, stride: int = 1) -> Array:
    leader = np.minimum(i // stride * stride + stride - 1, length - 1)
    reach = window // 2 + window // 2 + (window % 2 - 1)
    return (np.maximum(leader - reach, 0) <= j) & (j <= i)


def powers(i: Array, j: Array, block: int, window: int, sinks: int) -> Array:
    far = i // block - j // block
    two = np.isin(far, 2 ** np.arange(20))
    return causal(i, j) & ((far < window) | (j // block < sinks) | two)


def s2(a: Any, b: int, h: int, i: Array, j: Array) -> Array:
    far = (j // 8 + h * max(1, 4 // H)) % 4 == 0
    return causal(i, j) & ((i // 8 - j // 8 < 2) | far)


def longnet_count(h: int, i: Array, j: Array) -> Array:
    count = np.zeros(np.broadcast_shapes(i.shape, j.shape), int)
    for k in range(4):
        width, rate = 8 << k, 1 << k
        here = (i // width == j // width) & (i % rate == h % rate) & (j % rate == h % rate)
        count = count + here
    return count


def radial(a: Any, b: int, h: int, i: Array, j: Array) -> Array:
    tokens, block = a["tokens"], a["block"]
    keep = np.zeros((N, N), bool)
    for x in range(N):
        for y in range(N):
            dist = abs(x // tokens - y // tokens)
            length = 2.0 ** tokens.bit_length() / 2.0 ** dist.bit_length()
            w = tokens if dist <= 1 else max(block, 0.5 * length)
            near = abs(x % tokens - y % tokens) <= w
            every = length >= block or dist % int(block / length) == 0
            keep[x, y] = y // tokens == 0 or (near and every)
    return keep


def cells(a: Any, x: Array) -> tuple[Array, Array, Array]:
    c = x // a["group"]
    return np.unravel_index(c, (N, a["height"], a["width"]))


def grat(a: Any, b: int, h: int, i: Array, j: Array) -> Array:
    return np.any([x == y for x, y in zip(cells(a, i), cells(a, j), strict=True)], axis=0)


def grat_near(a: Any, b: int, h: int, i: Array, j: Array) -> Array:
    apart = [abs(x - y) for x, y in zip(cells(a, i), cells(a, j), strict=True)]
    return np.max(apart, axis=0) <= a["reach"]


def longlora(a: Any, b: int, h: int, i: Array, j: Array) -> Array:
    shift = a["group"] // 2 if h >= H / 2 else 0
    together = (i + shift) // a["group"] == (j + shift) // a["group"]
    return causal(i, j) & (together | (j < a["sinks"]))


def moa(a: Any, b: int, h: int, i: Array, j: Array) -> Array:
    return causal(i, j) & ((i - j < a["span"][h]) | (j < a["sinks"]))


def blockrank(a: Any, b: int, h: int, i: Array, j: Array) -> Array:
    seg = a["segment"][b]
    return causal(i, j) & ((seg[i] == seg[j]) | (seg[j] == 0) | (seg[i] == seg[-1]))


def plane(a: Any, i: Array, j: Array, at: str = "natten") -> Array:
    """Rows and columns of a row-major grid."""
    h, w = a["height"], a["width"]
    strides = a.get("stride_y", 1), a.get("stride_x", 1)
    rows = natten(i // w % h, j // w % h, h, a["window_y"], strides[0])
    return rows & natten(i % w, j % w, w, a["window_x"], strides[1])


def volume(a: Any, b: int, h: int, i: Array, j: Array) -> Array:
    frame = a["height"] * a["width"]
    length = N // frame
    return natten_causal(i // frame, j // frame, length, a["window_t"]) & plane(a, i, j)


def swin(a: Any, b: int, h: int, i: Array, j: Array) -> Array:
    w, m, s = a["width"], a["window"], a["shift"]
    rows = (i // w + s) // m == (j // w + s) // m
    return rows & ((i % w + s) // m == (j % w + s) // m)


def swin_bias(s: Array, a: Any, b: int, h: int, i: Array, j: Array) -> Array:
    w, m = a["width"], a["window"]
    rows, columns = i // w - j // w + m - 1, i % w - j % w + m - 1
    top = 2 * m - 2
    return s + a["bias"][h][rows.clip(0, top), columns.clip(0, top)]


def same(a: Any, b: int, i: Array, j: Array) -> Array:
    return a["doc"][b][i] == a["doc"][b][j]


def slope(h: int) -> float:
    return 2.0 ** (-8.0 * (h + 1) / H)


def of(rule: Callable[[Array, Array], Array]) -> Rule:
    """A rule of positions alone."""
    return lambda a, b, h, i, j: rule(i, j) & np.ones((len(i), j.shape[1]), bool)


ZOO: dict[str, System] = {
    "full": System(of(lambda i, j: i == i)),
    "causal": System(of(causal)),
    "sliding_window": System(
        of(lambda i, j: causal(i, j) & (i - j < 20)), arguments=lambda rng: {"window": 20}
    ),
    "streaming": System(
        of(lambda i, j: causal(i, j) & ((i - j < 20) | (j < 3))),
        arguments=lambda rng: {"window": 20, "sinks": 3},
    ),
    "near_window": System(of(lambda i, j: abs(i - j) <= 9), arguments=lambda rng: {"reach": 9}),
    "global_window": System(
        of(lambda i, j: (abs(i - j) <= 7) | (i < 14) | (j < 14)),
        arguments=lambda rng: {"window": 7},
    ),
    "prefix_lm": System(
        of(lambda i, j: causal(i, j) | (j < 30)), arguments=lambda rng: {"prefix": 30}
    ),
    "dilated_window": System(
        of(lambda i, j: causal(i, j) & (i - j < 24) & ((i - j) % 3 == 0)),
        arguments=lambda rng: {"window": 8, "step": 3},
    ),
    "packed": System(
        lambda a, b, h, i, j: causal(i, j) & (i - j < 10) & same(a, b, i, j),
        arguments=lambda rng: doc(rng) | {"window": 10},
    ),
    "full_documents": System(lambda a, b, h, i, j: same(a, b, i, j), arguments=doc),
    "causal_documents": System(
        lambda a, b, h, i, j: same(a, b, i, j) & causal(i, j), arguments=doc
    ),
    "share_question": System(
        lambda a, b, h, i, j: (
            ((a["doc"][b][i] != 0) & (a["doc"][b][j] == 0)) | (same(a, b, i, j) & causal(i, j))
        ),
        arguments=doc,
    ),
    "causal_blockwise": System(
        lambda a, b, h, i, j: (
            ((a["doc"][b][i] == 4) & (a["doc"][b][j] != 4)) | (same(a, b, i, j) & causal(i, j))
        ),
        arguments=doc,
    ),
    "prefix_documents": System(
        lambda a, b, h, i, j: (
            same(a, b, i, j) & (causal(i, j) | (j - a["start"][b][a["doc"][b][j]] <= 6))
        ),
        arguments=with_starts,
    ),
    "block_causal_documents": System(
        lambda a, b, h, i, j: same(a, b, i, j) & (j < (i // 16 + 1) * 16),
        arguments=lambda rng: doc(rng) | {"block": 16},
    ),
    "duo_attention": System(
        lambda a, b, h, i, j: (
            causal(i, j) & (a["retrieval"][h // (H // HKV)] | (i - j < 12) | (j < 4))
        ),
        arguments=lambda rng: {"retrieval": np.array([True, False]), "window": 12},
    ),
    "s2": System(s2, arguments=lambda rng: {"block": 8, "local": 2, "stride": 4}),
    "power_attention": System(
        of(lambda i, j: powers(i, j, 4, 3, 1)), arguments=lambda rng: {"block": 4, "window": 3}
    ),
    "blockrank": System(blockrank, arguments=lambda rng: {"segment": documents(rng)}),
    "radial": System(radial, arguments=lambda rng: {"tokens": 6, "block": 2}),
    "grat": System(grat, arguments=lambda rng: {"height": 2, "width": 3, "group": 4}),
    "grat_near": System(
        grat_near, arguments=lambda rng: {"height": 2, "width": 3, "group": 4, "reach": 1}
    ),
    "longnet": System(
        lambda a, b, h, i, j: causal(i, j) & (longnet_count(h, i, j) > 0),
        lambda s, a, b, h, i, j: s + np.log(np.maximum(longnet_count(h, i, j), 1)),
        lambda rng: {"segment": 8},
    ),
    "moa": System(
        moa,
        arguments=lambda rng: {"span": np.array([4, 9, 48, 30]), "sinks": 2},
    ),
    "longlora": System(longlora, arguments=lambda rng: {"group": 20, "sinks": 2}),
    "vdit": System(
        lambda a, b, h, i, j: (i // 8 == j // 8) | a["reference"][i // 8] | a["reference"][j // 8],
        arguments=lambda rng: {"reference": np.arange(12) % 5 == 0, "tokens": 8},
    ),
    "neighborhood_1d": System(
        of(lambda i, j: dilated(i, j, N, 6, 5)), arguments=lambda rng: {"window": 6, "dilation": 5}
    ),
    "neighborhood_2d": System(
        lambda a, b, h, i, j: plane(a, i, j),
        arguments=lambda rng: {
            "height": 8,
            "width": 12,
            "window_y": 4,
            "window_x": 5,
            "stride_y": 2,
            "stride_x": 3,
        },
    ),
    "neighborhood_3d": System(
        volume,
        arguments=lambda rng: {
            "height": 4,
            "width": 6,
            "window_t": 3,
            "window_y": 2,
            "window_x": 3,
        },
    ),
    "alibi": System(of(causal), lambda s, a, b, h, i, j: s + slope(h) * (j - i)),
    "softcap": System(
        of(causal), lambda s, a, b, h, i, j: 2 * np.tanh(s / 2), lambda rng: {"cap": 2.0}
    ),
    "relative_bias": System(
        of(causal),
        lambda s, a, b, h, i, j: s + a["bias"][h][(i - j).clip(0)],
        lambda rng: {"bias": rng.normal(size=(H, N))},
    ),
    "t5_bias": System(
        of(causal),
        lambda s, a, b, h, i, j: s + a["bias"][h][a["bucket"][(i - j).clip(0, 127)]],
        lambda rng: {"bias": rng.normal(size=(H, 32)), "bucket": buckets(rng)},
    ),
    "swin": System(
        swin,
        swin_bias,
        lambda rng: {
            "bias": rng.normal(size=(H, 7, 7)),
            "height": 8,
            "width": 12,
            "window": 4,
            "shift": 2,
        },
    ),
    "selective": System(
        of(causal),
        lambda s, a, b, h, i, j: s * (1 + np.exp(-np.exp(a["beta"][0])) * np.log(i + 1)),
        lambda rng: {"beta": np.array([0.3])},
    ),
    "dynamic_mask": System(
        lambda a, b, h, i, j: causal(i, j) & (a["delta"][b, h // 2][j] >= a["least"][b, h // 2][i]),
        lambda s, a, b, h, i, j: s + a["delta"][b, h // 2][j],
        dynamic,
    ),
    "forgetting": System(
        of(causal),
        lambda s, a, b, h, i, j: s + a["decay"][b, h][i] - a["decay"][b, h][j],
        lambda rng: {"decay": np.cumsum(-rng.random((B, H, N)), -1)},
    ),
    "sigmoid_attention": System(
        of(causal),
        lambda s, a, b, h, i, j: s - np.log(N),
        weights=lambda s, keep: keep / (1 + np.exp(-s)),
    ),
}

BY_OTHERS = {"gated", "softpag"}
"""In tests/backends/test_epilogue.py and test_systems.py, with their output clauses."""


def test_every_program_is_here() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.attn")}
    assert names == ZOO.keys() | BY_OTHERS


def loaded(name: str) -> attncc.Attention:
    return attncc.compile(EXAMPLES / f"{name}.attn")


def given(name: str) -> dict[str, Any]:
    return dict(ZOO[name].arguments(np.random.default_rng(1)))


def tensors(attn: attncc.Attention, arguments: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Arrays as tensors, floats in `dtype`, those with gradients as leaves."""
    grad = {p.name for p in attn.program.tensors if p.grad}
    made = {}
    for name, x in arguments.items():
        made[name] = torch.as_tensor(x) if isinstance(x, np.ndarray) else x
        if isinstance(x, np.ndarray) and x.dtype.kind == "f":
            made[name] = made[name].to(dtype).requires_grad_(name in grad)
    return made


def pairs(name: str, arguments: Mapping[str, Any]) -> Array:
    """bool [B, H, N, N]"""
    i, j = np.arange(N)[:, None], np.arange(N)[None]
    rule = ZOO[name].keeps
    return np.array([[rule(arguments, b, h, i, j) for h in range(H)] for b in range(B)])


@pytest.mark.parametrize("name", sorted({*ZOO, *BY_OTHERS}))
def test_a_program_is_short_says_its_paper_and_prints_back(name: str) -> None:
    attn, text = loaded(name), (EXAMPLES / f"{name}.attn").read_text()
    assert len(text.splitlines()) <= 25
    assert "arXiv" in text
    assert "Shows" in text or name == "full"
    assert attncc.compile(str(attn)).program == attn.program


def qkv(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    random = torch.Generator().manual_seed(3)
    shapes = (B, H, N, 16), (B, HKV, N, 16), (B, HKV, N, 16)
    made = [torch.randn(s, generator=random, dtype=torch.float64).to(dtype) for s in shapes]
    return [(2 * x if at == 0 else x).requires_grad_() for at, x in enumerate(made)]


@pytest.mark.parametrize("name", ZOO)
def test_the_interpreter_has_the_published_meaning(name: str) -> None:
    system, attn, arguments = ZOO[name], loaded(name), given(name)
    q, k, v = qkv()
    i, j = np.arange(N)[:, None], np.arange(N)[None]
    keep = pairs(name, arguments)
    out = np.zeros((B, H, N, 16))
    for b in range(B):
        for h in range(H):
            kv = h // (H // HKV)
            score = q[b, h].detach().numpy() @ k[b, kv].detach().numpy().T / 4.0
            with np.errstate(all="ignore"):
                score = system.score(score, arguments, b, h, i, j)
            out[b, h] = system.weights(score, keep[b, h]) @ v[b, kv].detach().numpy()
    found = attn.reference(q, k, v, **tensors(attn, arguments, torch.float64))
    np.testing.assert_allclose(found.detach().numpy(), out, atol=1e-6)


@pytest.mark.parametrize("name", ZOO)
def test_tiles_are_sound_and_counted(name: str) -> None:
    attn, arguments = loaded(name), given(name)
    plan = attn.plan(
        q_len=N, kv_len=N, batch=B, heads=H, kv_heads=HKV, tile=(16, 16),
        **tensors(attn, arguments, torch.float32),
    )  # fmt: skip
    tiles = pairs(name, arguments).reshape(B, H, 6, 16, 6, 16)
    every, some = int(tiles.all((3, 5)).sum()), int(tiles.any((3, 5)).sum())
    exact = Counts(every, some - every, tiles.shape[0] * H * 36 - some)
    assert plan.exact_counts() == exact
    assert plan.counts.full <= exact.full and plan.counts.empty <= exact.empty
    if plan.counts != exact:
        reason = LOOSE.get(name) or [note for note in plan.plan.notes if note.by == "infer_tiles"]
        assert reason, "what is lost has a reason"


LOOSE = {
    "global_window": "a tile that a window and global keys fill together",
    "vdit": "a tile that frames of reference and its own frame fill together",
    "prefix_documents": "documents that a tile's ends share, and keys of prefixes, of other ones",
}
"""Why some tiles of 16, which hold several frames or documents, are called partial."""


@pytest.mark.parametrize("name", ZOO)
def test_the_cpu_backend_equals_the_interpreter(name: str) -> None:
    attn = loaded(name)
    arguments = tensors(attn, given(name), torch.float64)
    inputs = qkv()
    leaves = [*inputs, *(x for x in arguments.values() if getattr(x, "requires_grad", False))]
    results = attn(*inputs, **arguments), attn.reference(*inputs, **arguments)
    dout = torch.randn(results[0].shape, dtype=torch.float64)
    torch.testing.assert_close(*results)
    for mine, wanted in zip(*(torch.autograd.grad(x, leaves, dout) for x in results), strict=True):
        torch.testing.assert_close(mine, wanted)


PUBLISHED = {
    "near_window": None,
    "global_window": ({"window": 256}, (322, 52)),
    "power_attention": ({"block": 128}, (183, 32)),
    "s2": ({"block": 128, "local": 4, "stride": 8}, (154, 32)),
    "longlora": ({"group": 1024}, (96, 32)),
    "grat": ({}, (736, 0)),
    "radial": ({}, (472, 232)),
    "neighborhood_2d": ({}, (0, 224)),
    "streaming": ({}, (196, 79)),
    "sliding_window": ({}, (196, 56)),
}


@pytest.mark.parametrize("name", [n for n, case in PUBLISHED.items() if case])
def test_counts_of_the_published_table(name: str) -> None:
    """4096 tokens in tiles of 128, of one head; S2-Attn's is a shifted one, S2's the first."""
    arguments, (full, partial) = PUBLISHED[name]
    heads = {"longlora": 2, "s2": 8}.get(name, 1)
    plan = loaded(name).plan(q_len=4096, kv_len=4096, heads=heads, **arguments)
    classes = plan.classify()
    one = classes[0, min(classes.shape[1] - 1, 1 if name == "longlora" else 0)]
    assert (int(one.eq(2).sum()), int(one.eq(1).sum())) == (full, partial)


def test_inputs_can_be_made_up_for_every_program() -> None:
    """As `attncc run` and `explain` do."""
    from attncc.inputs import captured

    for name in ZOO:
        program = loaded(name).program
        found = captured(program, Lengths(1, 4, 2, 256, 256, 16), {})
        assert found.tensors.keys() == {p.name for p in program.tensors}
        assert program.normalize in Normalize


@pytest.mark.skipif(bool(aot.missing_tools()), reason="needs ptxas and cuobjdump")
@pytest.mark.parametrize("name", ZOO)
def test_its_forward_compiles(name: str) -> None:
    """For sm_80, since that takes least; other tests compile each kind of kernel for all."""
    call, target = Call("bf16", 64, 64), aot.target("sm_80")
    (row,) = emit.compile_all(loaded(name).static, call, target, "forward")
    assert row.compiled.matrix_ops() > 0
