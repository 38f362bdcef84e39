"""Generated kernels against the dense interpreter: forward, lse, and every gradient."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import attncc
from attncc.backends.triton.configs import Config
from attncc.binding import Binding
from attncc.frontend import parse
from attncc.inputs import Lengths, captured
from attncc.ir.expr import VALUE, Expr, results
from attncc.ir.plan import Blocks
from attncc.ir.program import Program
from attncc.numeric import index_bits
from attncc.passes import analyze
from tests import strategies, test_searches
from tests.cases import bindings
from tests.interpreted.harness import SMALL, by_dense, by_kernels, check, inputs

EXAMPLES = sorted(Path("examples").glob("*.attn"))
SCALARS = {
    "window": 13,
    "sinks": 3,
    "block": 8,
    "prefix": 20,
    "stride": 3,
    "step": 4,
    "segment": 6,
    "cap": 2.0,
}


def load(path: Path) -> Program:
    (program,) = parse(path.read_text(), str(path))
    return program


def bind(program: Program, lengths: Lengths) -> Binding:
    """Real values for every parameter: small scalars, so that tens of tokens show structure."""
    if VALUE in results(program.output):
        lengths = replace(lengths, kv_len=lengths.q_len)
    sizes = lengths.sizes()
    scalars = {p.name: SCALARS.get(p.name, p.default) for p in program.scalars}
    tensors = captured(program, lengths, {}).tensors
    return Binding(**sizes, scalars={**scalars, **sizes}, tensors=tensors)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("lengths", "descriptors"),
    [
        (Lengths(1, 2, 1, 50, 50, 16), True),
        (Lengths(2, 1, 1, 33, 41, 20), False),
    ],
    ids=["grouped", "ragged"],
)
def test_examples_equal_dense(path: Path, lengths: Lengths, descriptors: bool) -> None:
    program = load(path)
    binding = bind(program, lengths)
    given = inputs(binding, value_dim=24, rows_first=not descriptors)
    check(program, binding, given, descriptors=descriptors)


@settings(max_examples=max(25, settings.default.max_examples // 4))
@given(strategies.programs(), bindings(1, 30), st.booleans(), st.booleans())
def test_random_programs_equal_dense(
    program: Program, binding: Binding, descriptors: bool, deterministic: bool
) -> None:
    given = inputs(binding, value_dim=16)
    options = {"descriptors": descriptors, "deterministic": deterministic}
    check(program, binding, given, wide=True, **options)


@settings(max_examples=max(12, settings.default.max_examples // 8))
@given(test_searches.masks(safe=True), test_searches.bindings(), st.booleans())
def test_searched_ranges_equal_dense(mask: Expr, binding: Binding, wide: bool) -> None:
    program = Program("searched", test_searches.PARAMS, mask=mask)
    assume(binding.q_len <= binding.kv_len)
    plan = analyze(program)
    check(
        program, binding, inputs(binding, value_dim=16), wide=wide or index_bits(plan, binding) > 32
    )


DILATED = """
attention dilated_documents(doc: int[batch, kv_len] sorted):
    mask = q_idx >= kv_idx and doc[b, q_idx] == doc[b, kv_idx] and (q_idx - kv_idx) % 3 == 0
"""


def test_searched_ranges_that_leave_something_out_are_not_the_mask() -> None:
    (program,) = parse(DILATED)
    plan = analyze(program)
    assert plan.blocks is Blocks.RANGES and plan.searches
    binding = bind(program, Lengths(1, 1, 1, 40, 40, 16))
    check(program, binding, inputs(binding, value_dim=16))


PAIRS = """
attention pairs(bias: float[heads, q_len, kv_len] grad, table: float[heads, span] grad):
    mask = q_idx >= kv_idx
    score = score + bias[h, q_idx, kv_idx] + table[h, (q_idx - kv_idx) % 7]
"""


def test_deterministic_gradients_of_pairs_are_right_and_repeat() -> None:
    (program,) = parse(PAIRS)
    sizes = Lengths(2, 2, 1, 40, 40, 16)
    rng = torch.Generator().manual_seed(0)
    tensors = {
        "bias": torch.randn(2, 40, 40, generator=rng),
        "table": torch.randn(2, 7, generator=rng),
    }
    binding = Binding(**sizes.sizes(), scalars=sizes.sizes(), tensors=tensors)
    given = inputs(binding, value_dim=16)
    check(program, binding, given, deterministic=True)
    plan = analyze(program)
    first, second = (by_kernels(plan, binding, given, deterministic=True) for _ in range(2))
    for name, value in first.values.items():
        assert torch.equal(value, second.values[name]), name


TIES = """
attention ties(z: float[heads] grad, zero: float = 0):
    score = min(max(z[h] * score + score, score, zero), max(q_idx - kv_idx - zero, z[0]))
"""


def test_ties_of_min_and_max_take_the_mean_slope() -> None:
    (program,) = parse(TIES)
    sizes = Lengths(1, 2, 1, 40, 40, 16).sizes()
    tensors = {"z": torch.zeros(2)}
    binding = Binding(**sizes, scalars={**sizes, "zero": 0.0}, tensors=tensors)
    check(program, binding, inputs(binding, value_dim=16))


DISTANT = """
attention distant():
    mask = q_idx >= kv_idx
    score = score + kv_idx - q_idx
"""


def test_row_terms_far_beyond_the_keys_round_nothing() -> None:
    """Scores of -2000, whose rounding alone is 6e-5, but gradients as exact as of small ones."""
    (program,) = parse(DISTANT)
    binding = bind(program, Lengths(1, 2, 1, 2000, 24, 16))
    given = inputs(binding, value_dim=16)
    configs = dict.fromkeys(SMALL, Config(64, 16, 4, 1))
    found = by_kernels(analyze(program), binding, given, configs=configs)
    exact = by_dense(program, binding, given, torch.float64)
    torch.testing.assert_close(
        found.values["lse"].double(), exact.values["lse"], rtol=1e-6, atol=1e-5
    )
    for name in ("out", "dq", "dk", "dv"):
        value = exact.values[name]
        error = (found.values[name] - value).abs().max() / value.abs().max()
        assert error < 2e-6, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("value", [-math.inf, -1e9, 1e9, math.nan])
def test_what_one_row_adds_to_its_scores_stays_in_it(value: float) -> None:
    text = "mask = q_idx >= kv_idx\n    score = score + bias[q_idx]"
    attention = attncc.compile(f"attention rows(bias: float[q_len]):\n    {text}\n")
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 40, 16, generator=rng, requires_grad=True) for _ in range(3))
    bias = torch.zeros(40)
    bias[[0, 16, 39]] = value
    rows = bias == 0
    found, wanted = (
        attention(q, k, v, bias=bias, backend=name)[:, :, rows] for name in ("triton", "dense")
    )
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    grads = [torch.autograd.grad(out.square().sum(), q)[0][:, :, rows] for out in (found, wanted)]
    torch.testing.assert_close(*grads, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 5), (5, 0), (0, 0)])
def test_no_queries_or_no_keys(q_len: int, kv_len: int) -> None:
    program = load(Path("examples/causal.attn"))
    binding = bind(program, Lengths(1, 2, 1, q_len, kv_len, 16))
    check(program, binding, inputs(binding, value_dim=16))


def test_a_mask_that_keeps_nothing() -> None:
    (program,) = parse("attention none():\n    mask = kv_idx != kv_idx\n")
    binding = bind(program, Lengths(1, 2, 1, 20, 20, 16))
    check(program, binding, inputs(binding, value_dim=16))


@pytest.mark.parametrize("window", [2**31 - 1, 2**31, 2**40, -(2**31), -(2**40)])
def test_scalars_at_the_end_of_32_bits(window: int) -> None:
    text = "mask = q_idx >= kv_idx and q_idx - kv_idx < window"
    attention = attncc.compile(f"attention far(window: int):\n    {text}\n")
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 40, 16, generator=rng, requires_grad=True) for _ in range(3))
    found, wanted = (
        torch.autograd.grad(
            attention(q, k, v, window=window, backend=name).square().sum(), (q, k, v)
        )
        for name in ("triton", "dense")
    )
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)
