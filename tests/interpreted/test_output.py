"""Calls of programs with an output clause, through Triton's kernels."""

import pytest
import torch

import attncc

GATED = attncc.compile(
    "attention gated(gate: float[batch, heads, q_len] grad):\n"
    "    mask = q_idx > kv_idx\n"
    "    output = sigmoid(gate[b, h, q_idx]) * out + 0.5 * value * tanh(lse + 1e30)\n"
)


@pytest.mark.parametrize("rows_first", [False, True])
def test_calls_equal_dense(rows_first: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    made = [torch.randn(2, heads, 40, 16, generator=rng) for heads in (4, 2, 2)]
    if rows_first:
        made = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in made]
    q, k, v = (x.requires_grad_() for x in made)
    gate = torch.randn(2, 4, 40, generator=rng).requires_grad_()
    found, expected = [], []
    for backend, into in (("triton", found), ("dense", expected)):
        out, lse = GATED(q, k, v, gate=gate, backend=backend, return_lse=True)
        assert backend == "dense" or out.stride() == q.stride()
        loss = (out * torch.linspace(-1, 1, 16)).sum() + lse[:, :, 1:].sin().sum()
        into += [out, lse, *torch.autograd.grad(loss, (q, k, v, gate))]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
