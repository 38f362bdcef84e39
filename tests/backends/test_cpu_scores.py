"""Scores that the CPU computes in place equal what their expression says."""

import math

import pytest
import torch

from attncc.backends.cpu.block import Buffers
from attncc.backends.cpu.scores import exp_, steps, tanh_
from attncc.binding import bind_lengths
from attncc.ir import ops
from tests.backends.test_cpu import agree, program

CHAINS = {
    "score = 3.0 * tanh(score / 3.0)": [ops.DIV, ops.TANH, ops.MUL],
    "score = 5.0 - (t[h, kv_idx] - score)": [ops.SUB, ops.SUB],
    "score = 2.0 / (abs(score) + 1.0)": [ops.ABS, ops.ADD, ops.DIV],
    "score = -min(max(score, t[h, q_idx]), 1.0)": [ops.MAX, ops.MIN, ops.NEG],
    "score = log(exp(score) + exp2(score))": None,
    "score = score * score": None,
    "score = where(q_idx > 3, score, 0.0)": None,
    "score = score * t[h, max(q_idx - kv_idx, 0)] * 2.0 / 0.5": [ops.MUL, ops.MUL, ops.DIV],
    "score = 0.25 * (score * 8.0) / size": [ops.MUL, ops.MUL, ops.DIV],
    "score = tanh(score * 1e-30) * 1e30": [ops.MUL, ops.TANH, ops.MUL],
    "score = sqrt(log2(exp2(abs(score)))) + sigmoid(0.5)": [
        *(ops.ABS, ops.EXP2, ops.LOG2, ops.SQRT),
        ops.ADD,
    ],
}
PARAMS = "t: float[4, 90] grad, size: float = 3.0"


@pytest.mark.parametrize("line", CHAINS)
def test_steps(line):
    found = steps(program("mask = true", line, params=PARAMS).score)
    assert (None if found is None else [step.op for step in found]) == CHAINS[line]


@pytest.mark.parametrize("normalize", ["softmax", "sigmoid"])
@pytest.mark.parametrize("line", CHAINS)
def test_equals_dense(line, normalize):
    lines = ("mask = q_idx >= kv_idx or kv_idx > 80", line, f"normalize = {normalize}")
    found = program(*lines, params=PARAMS)
    table = torch.randn(4, 90, generator=torch.Generator().manual_seed(3))
    arguments = {t.name: table for t in found.tensors}
    lengths = {"q_len": 70, "kv_len": 90, "batch": 1, "heads": 4, "kv_heads": 2, "head_dim": 4}
    agree(found, bind_lengths(found, **lengths, arguments=arguments), 4, (32, 16))


@pytest.mark.parametrize("largest", [1e-6, 0.1, 0.5, 0.51, 3.0, 50.0])
def test_tanh(largest):
    """Both ways, beside float64."""
    x = torch.linspace(-1, 1, 100_001) ** 3 * largest
    found = tanh_(x.clone(), Buffers(x))
    torch.testing.assert_close(found.double(), x.double().tanh(), rtol=3e-7, atol=0)


def test_tanh_of_what_is_not_finite():
    x = torch.tensor([0.1, math.inf, -math.inf, math.nan, 0.0])
    found = tanh_(x.clone(), Buffers(x))
    torch.testing.assert_close(found, x.tanh(), equal_nan=True)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_exp(dtype, error):
    x = torch.linspace(-80, 1, 10_001, dtype=dtype)
    torch.testing.assert_close(exp_(x.clone()), x.exp(), rtol=error, atol=0)
    assert exp_(torch.tensor([-math.inf])) == 0
