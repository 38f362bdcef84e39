"""The standard library against the papers' formulas, written out point by point."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attncc.frontend import parse
from attncc.frontend.functions import standard
from attncc.ir.evaluate import Env, evaluate
from attncc.ir.program import Program

N, HEADS = 24, 4


def _value(program: Program, **given: int | Tensor) -> Tensor:
    q = torch.arange(N).view(1, 1, N, 1)
    kv = torch.arange(N).view(1, 1, 1, N)
    h = torch.arange(HEADS).view(1, HEADS, 1, 1)
    positions = {"b": torch.zeros(1, 1, 1, 1, dtype=torch.int64), "h": h, "q_idx": q, "kv_idx": kv}
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    scalars = {name: value for name, value in given.items() if isinstance(value, int)}
    sizes = {"q_len": N, "kv_len": N, "heads": HEADS, "batch": 1}
    env = Env(positions, {**sizes, **scalars}, tensors, torch.ones(1, 1, 1, 1, dtype=torch.float64),
              torch.float64)  # fmt: skip
    has_mask = program.score == Program("").score
    return evaluate(program.mask if has_mask else program.score, env).expand(1, HEADS, N, N)


def _program(text: str, clause: str = "mask", params: str = "n: int") -> Program:
    names = ", ".join(standard())
    return parse(f"from std import {names}\nattention a({params}):\n    {clause} = {text}\n")[0]


def _pairs(rule: Callable[[int, int], bool]) -> Tensor:
    return torch.tensor([[rule(i, j) for j in range(N)] for i in range(N)]).expand(1, HEADS, N, N)


@pytest.mark.parametrize("n", [1, 4, 7])
@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("causal()", lambda i, j, n: j <= i),
        ("window(n)", lambda i, j, n: i - j < n),
        ("sliding(n)", lambda i, j, n: 0 <= i - j < n),
        ("near(n)", lambda i, j, n: abs(i - j) <= n),
        ("sinks(n)", lambda i, j, n: j < n),
        ("prefix(n)", lambda i, j, n: j <= i or j < n),
        ("block_causal(n)", lambda i, j, n: j < (i // n + 1) * n),
        ("block_local(n)", lambda i, j, n: i // n == j // n),
        ("dilated(n)", lambda i, j, n: (i - j) % n == 0),
        ("neighborhood_causal(q_idx, kv_idx, n)", lambda i, j, n: max(i - n + 1, 0) <= j <= i),
    ],
)
def test_masks(text: str, rule: Callable[[int, int, int], bool], n: int) -> None:
    assert torch.equal(_value(_program(text), n=n), _pairs(lambda i, j: rule(i, j, n)))


def _natten(i: int, j: int, length: int, window: int, stride: int) -> bool:
    """Generalized neighborhood attention along one axis, as its reference code computes it."""
    left, right = window // 2, window // 2 + (window % 2 - 1)
    leader = min(i // stride * stride + stride // 2, length - 1)
    start = max(leader - left, 0)
    start += (length - right - leader - 1) if leader + right >= length else 0
    return start <= j < start + window


@pytest.mark.parametrize("window", [1, 2, 5, 8, 24])
@pytest.mark.parametrize("stride", [1, 2, 5, 8])
def test_neighborhoods(window: int, stride: int) -> None:
    if stride > window:
        pytest.skip("a stride is at most the window")
    program = _program(f"neighborhood_strided(q_idx, kv_idx, kv_len, n, {stride})")
    expected = _pairs(lambda i, j: _natten(i, j, N, window, stride))
    assert torch.equal(_value(program, n=window), expected)
    if stride == 1:
        plain = _program("neighborhood(q_idx, kv_idx, kv_len, n)")
        assert torch.equal(_value(plain, n=window), expected)


def _natten_causal(i: int, j: int, length: int, window: int, stride: int) -> bool:
    left, right = window // 2, window // 2 + (window % 2 - 1)
    leader = min(i // stride * stride + stride - 1, length - 1)
    return max(leader - left - right, 0) <= j <= i


@pytest.mark.parametrize("window", [1, 4, 7])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_causal_neighborhoods_with_strides(window: int, stride: int) -> None:
    program = _program(f"neighborhood_causal_strided(q_idx, kv_idx, kv_len, n, {stride})")
    expected = _pairs(lambda i, j: _natten_causal(i, j, N, window, stride))
    assert torch.equal(_value(program, n=window), expected)


@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_dilated_neighborhoods(window: int, step: int) -> None:
    program = _program(f"neighborhood_dilated(q_idx, kv_idx, kv_len, n, {step})")

    def rule(i: int, j: int) -> bool:
        own = len(range(i % step, N, step))
        return i % step == j % step and _natten(i // step, j // step, own, window, 1)

    assert torch.equal(_value(program, n=window), _pairs(rule))


def test_neighborhood_on_a_grid() -> None:
    text = (
        "from std import neighborhood\nattention a(height: int, width: int):\n"
        "    axes (y: height, x: width)\n"
        "    mask = neighborhood(q.y, kv.y, height, 3) and neighborhood(q.x, kv.x, width, 4)\n"
    )
    (program,) = parse(text)
    expected = _pairs(
        lambda i, j: _natten(i // 6, j // 6, 4, 3, 1) and _natten(i % 6, j % 6, 6, 4, 1)
    )
    assert torch.equal(_value(program, height=4, width=6), expected)


def test_documents() -> None:
    doc = torch.sort(torch.randint(0, 4, (1, N), generator=torch.Generator().manual_seed(0)))[0]
    expected = (doc[0][:, None] == doc[0][None]).expand(1, HEADS, N, N)
    program = _program("document(doc)", params="doc: int[batch, kv_len]")
    assert torch.equal(_value(program, doc=doc), expected)
    flat = _program("document_1d(doc)", params="doc: int[kv_len]")
    assert torch.equal(_value(flat, doc=doc[0]), expected)


def test_scores() -> None:
    h = torch.arange(HEADS, dtype=torch.float64).view(1, HEADS, 1, 1)
    distance = torch.arange(N).view(1, N) - torch.arange(N).view(N, 1)
    alibi = _value(_program("score + alibi()", "score"))
    torch.testing.assert_close(alibi, 1 + 2 ** (-8 * (h + 1) / HEADS) * distance)
    capped = _value(_program("softcap(score, 30.0)", "score"))
    torch.testing.assert_close(capped[0, 0, 0, 0], 30 * torch.tanh(torch.tensor(1 / 30).double()))


def test_every_def_is_tried_here() -> None:
    source = Path(__file__).read_text("utf-8")
    helpers = {"neighborhood_start", "within", "alibi_slope"}
    assert not [name for name in standard() if f"{name}(" not in source and name not in helpers]
