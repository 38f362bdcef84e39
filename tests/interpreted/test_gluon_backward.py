"""Warp-specialised backwards, on a GPU made of threads, against the dense interpreter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import attncc
from attncc.backends.gluon import configs as schedules
from attncc.backends.gluon import launch_backward
from attncc.backends.triton import launch
from attncc.backends.triton.configs import Config
from attncc.backends.triton.launch import Gradients, Run
from attncc.binding import Binding
from attncc.frontend import parse
from attncc.inputs import Lengths
from attncc.ir.expr import Axis
from attncc.ir.program import Normalize, Program
from attncc.passes import analyze
from attncc.tiles.host import visited
from benchmarks.cases import programs
from tests import strategies
from tests.cases import bindings
from tests.interpreted import gluon
from tests.interpreted.harness import Inputs, check, inputs
from tests.interpreted.test_gluon import Schedule
from tests.interpreted.test_kernels import EXAMPLES, bind, load

FORWARD = {"forward": Config(64, 64, 4, 1)}


@contextmanager
def simulated() -> Iterator[list[str]]:
    """Backwards are warp-specialised ones, launched as ever, run by `gluon`; yields what ran."""
    ran: list[str] = []

    def loaded(stem: str, text: str, names: tuple[str, ...]) -> dict[str, tuple[str, str]]:
        return {name: (text, name) for name in names}

    def start(kernel: tuple[str, str], grid: tuple[int, ...], values: Any, *rest: Any) -> None:
        gluon.run(*kernel, grid, values)
        ran.append(kernel[1])

    def in_line(x: Tensor, count: int) -> gluon.Descriptor:
        return gluon.Descriptor(x.view(-1).numpy(), (count,), dtype=gluon.FLOAT32)

    stand_ins = {"load": loaded, "start": start, "described": gluon.described, "_in_line": in_line}
    with (
        mock.patch.multiple(launch_backward, **stand_ins),
        mock.patch.object(launch, "backward", _backward),
    ):
        yield ran


def _backward(run: Run, *given: Any) -> Gradients:
    torch.use_deterministic_algorithms(True)  # which fills new memory with nan
    try:
        return launch_backward.backward(run, *given)
    finally:
        torch.use_deterministic_algorithms(False)


def configs(value_dim: int, stages: int) -> dict[str, Config]:
    config = schedules.backward(schedules.backward_columns(16, value_dim))
    return FORWARD | {"gluon_backward": replace(config, num_stages=stages)}


def compare(program: Program, binding: Binding, value_dim: int, **options: Any) -> None:
    given = inputs(binding, value_dim, rows_first=binding.batch > 1)
    with simulated() as ran:
        check(program, binding, given, **{"configs": FORWARD, **options})
    first = "delta" if program.normalize is Normalize.SOFTMAX else "clear"
    assert ran == [first, "backward", "round_dq"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_narrow_heads_equal_dense(path: Path) -> None:
    program = load(path)
    compare(program, bind(program, Lengths(1, 4, 2, 270, 280, 64)), value_dim=64)


def captures(program: Program) -> bool:
    """Whether captured tensors have gradients, of which the kernels for 256 columns make none."""
    return any(tensor.grad for tensor in program.tensors)


@pytest.mark.parametrize("name", [n for n, p in programs().items() if not captures(p)])
def test_heads_of_up_to_256_columns_equal_dense(name: str) -> None:
    program = programs()[name]
    compare(program, bind(program, Lengths(1, 4, 2, 150, 170, 192)), value_dim=136)


@pytest.mark.parametrize(
    ("lengths", "value_dim"),
    [
        (Lengths(2, 2, 1, 90, 200, 256), 256),
        (Lengths(1, 1, 1, 200, 90, 40), 256),
        (Lengths(1, 4, 2, 65, 64, 136), 8),
        (Lengths(2, 1, 1, 1, 1, 256), 192),
    ],
)
@pytest.mark.parametrize("name", ["causal", "softcap", "s2"])
def test_lengths_and_dims_of_up_to_256_columns(name: str, lengths: Lengths, value_dim: int) -> None:
    program = programs()[name]
    compare(program, bind(program, lengths), value_dim)


@pytest.mark.parametrize("normalize", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("score", ["score", "tanh(score / thresholds) * thresholds"])
@pytest.mark.parametrize("value_dim", [16, 136])
def test_slopes_under_each_normalization(normalize: str, score: str, value_dim: int) -> None:
    body = f"mask = q_idx >= kv_idx\n    score = {score}\n    normalize = {normalize}"
    (program,) = parse(f"attention a(thresholds: float = 2.0):\n    {body}\n")
    compare(program, bind(program, Lengths(1, 2, 1, 150, 140, 16)), value_dim)


@pytest.mark.parametrize("name", programs())
def test_wide_heads_equal_dense(name: str) -> None:
    program = programs()[name]
    compare(program, bind(program, Lengths(2, 2, 1, 150, 290, 40)), value_dim=72)


@pytest.mark.parametrize("name", ["alibi", "empty_rows", "head_sink", "s2", "sigmoid_bias"])
def test_more_queries_than_keys_after_a_forward_of_their_kind(name: str) -> None:
    program = programs()[name]
    binding = bind(program, Lengths(1, 2, 2, 290, 140, 128))
    compare(program, binding, value_dim=24, forward=Schedule(block_n=64).forward)


DISTANCES = {
    "each head's": ("t: float[heads, 700] grad", "score + t[h, q_idx - kv_idx + kv_len]"),
    "all heads'": ("t: float[700] grad", "score + t[abs(kv_idx - q_idx)]"),
    "each sequence's": ("t: float[batch, 700] grad", "score * t[b, kv_idx + 3 - q_idx + q_len]"),
    "buckets": (
        "t: float[heads, 700] grad",
        "score + t[h, min((abs(q_idx - kv_idx) + 2) // 5, 9)]",
    ),
    "twice": (
        "t: float[heads, 700] grad",
        "score + t[h, q_idx - kv_idx + kv_len] * t[h, max(q_idx - kv_idx, 0)]",
    ),
}


@pytest.mark.parametrize("mask", ["true", "q_idx >= kv_idx", "kv_idx % 3 != 0"])
@pytest.mark.parametrize("name", DISTANCES)
def test_gradients_by_distance_equal_dense(name: str, mask: str) -> None:
    param, score = DISTANCES[name]
    (program,) = parse(f"attention a({param}):\n    mask = {mask}\n    score = {score}\n")
    assert not schedules.backward_unsupported(analyze(program), "bfloat16", 64, 64, False)
    for value_dim in (16, 72):
        binding = bind(program, Lengths(2, 4, 2, 150, 290, 16))
        compare(program, binding, value_dim)


def test_gradients_of_other_places_are_left_to_triton() -> None:
    for at in ("q_idx", "kv_idx", "q_idx + kv_idx", "q_idx - 2 * kv_idx + kv_len * 2"):
        text = f"attention a(t: float[700] grad):\n    score = score + t[{at}]\n"
        plan = analyze(*parse(text))
        reason = schedules.backward_unsupported(plan, "bfloat16", 64, 64, False)
        assert "by distance" in reason


@settings(max_examples=max(25, settings.default.max_examples // 4))
@given(
    strategies.programs(), bindings(1, 150), st.sampled_from((16, 72, 136)), st.sampled_from((2, 3))
)
def test_random_programs_equal_dense(
    program: Program, binding: Binding, value_dim: int, stages: int
) -> None:
    assume(value_dim <= 128 or not captures(program))
    compare(program, binding, value_dim, wide=True, configs=configs(value_dim, stages))


@pytest.mark.parametrize("value_dim", [16, 136])
def test_heavy_tiles_of_all_heads_go_first(monkeypatch: pytest.MonkeyPatch, value_dim: int) -> None:
    monkeypatch.setattr(launch_backward, "HEAVY", 1)
    (program,) = parse(
        "attention a():\n    mask = q_idx >= kv_idx and (q_idx - kv_idx < 40 or kv_idx < 200)\n"
    )
    binding = bind(program, Lengths(2, 4, 2, 500, 500, 16))
    ranges = analyze(program).query_ranges
    work = visited(ranges.visit, Axis.KV, binding, (128, 128))
    assert launch_backward._heavy_first(work) == 2
    compare(program, binding, value_dim)


@pytest.mark.parametrize("laggard", range(3))
@pytest.mark.parametrize(("value_dim", "stages"), [(16, 2), (72, 3), (136, 2), (136, 3)])
def test_whoever_is_late_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, laggard: int, value_dim: int, stages: int
) -> None:
    monkeypatch.setattr(gluon, "LAGGARD", laggard)
    program = load(Path("examples/causal.attn"))
    binding = bind(program, Lengths(1, 2, 1, 400, 250, 16))
    compare(program, binding, value_dim, configs=configs(value_dim, stages))


@pytest.mark.parametrize("mask", ["not q_idx >= kv_idx", "kv_idx != kv_idx", "true"])
@pytest.mark.parametrize("value_dim", [16, 136])
def test_keys_beyond_the_last_get_nothing_and_give_nothing(mask: str, value_dim: int) -> None:
    (program,) = parse(f"attention short():\n    mask = {mask}\n")
    for lengths in (Lengths(1, 1, 1, 1, 1, 16), Lengths(1, 2, 1, 70, 37, 16)):
        compare(program, bind(program, lengths), value_dim)


@pytest.mark.parametrize("value_dim", [16, 136])
def test_keys_beyond_the_last_do_not_reach_dq_however_low_scores_are(value_dim: int) -> None:
    program = load(Path("examples/full.attn"))
    binding = bind(program, Lengths(1, 1, 1, 256, 150, 64))
    given = inputs(binding, value_dim)
    low = Inputs(given.q.sign() * 0.01 - 4, given.k.sign() * 0.01 + 4, given.v)
    with simulated():
        check(program, binding, low, configs=FORWARD)


def _grads(attention: Any, backend: str, *given: Tensor, **captured: Tensor) -> list[Tensor]:
    out = attention(*given, **captured, backend=backend)
    return list(torch.autograd.grad(out.square().sum(), given))


def test_lse_may_have_no_gradient() -> None:
    attention = attncc.compile("examples/causal.attn")
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 150, 16, generator=rng, requires_grad=True) for _ in range(3))
    with simulated() as ran:
        found = _grads(attention, "triton", q, k, v)
    assert "backward" in ran
    torch.testing.assert_close(found, _grads(attention, "dense", q, k, v), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("value", [-math.inf, -1e9, 1e9, math.nan])
@pytest.mark.parametrize("dim", [16, 136])
def test_what_one_row_adds_to_its_scores_stays_in_its_dq(value: float, dim: int) -> None:
    text = "mask = q_idx >= kv_idx\n    score = score + bias[q_idx]"
    attention = attncc.compile(f"attention rows(bias: float[q_len]):\n    {text}\n")
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 150, dim, generator=rng, requires_grad=True) for _ in range(3))
    bias = torch.zeros(150)
    bias[[0, 16, 149]] = value
    with simulated() as ran:
        found = _grads(attention, "triton", q, k, v, bias=bias)
    assert "backward" in ran
    wanted = _grads(attention, "dense", q, k, v, bias=bias)
    rows = bias == 0
    torch.testing.assert_close(found[0][:, :, rows], wanted[0][:, :, rows], atol=1e-4, rtol=1e-4)
