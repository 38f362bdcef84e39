"""Output clauses after a kernel equal the dense interpreter's, forward and gradients."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from torch import Tensor

import attncc
from attncc.backends import registry
from attncc.binding import Binding
from attncc.ir.expr import LSE, Expr
from attncc.ir.expr import results as reads
from attncc.ir.program import Normalize, Program
from attncc.passes import analyze
from attncc.report import captured, data, lines
from attncc.tiles import BoundPlan
from tests import strategies
from tests.backends.test_cpu import inputs, results
from tests.cases import bindings

GATED = (
    "attention gated(gate: float[batch, heads, q_len] grad, a: float[heads] grad):\n"
    "    mask = q_idx > kv_idx\n"
    "    output = sigmoid(gate[b, h, q_idx]) * ((1 - a[h]) * out + a[h] * value) - mean_value\n"
)


def gated(dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
    """q, k, v and arguments of GATED; the first query has no keys."""
    rng = torch.Generator().manual_seed(0)
    shapes = [(2, heads, 9, 8) for heads in (4, 2, 2)]
    made = [torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for shape in shapes]
    gate, a = torch.randn(2, 4, 9, generator=rng), torch.rand(4, generator=rng)
    leaves = [x.requires_grad_() for x in (*made, gate.to(dtype), a.to(dtype))]
    return leaves[:3], {"gate": leaves[3], "a": leaves[4]}


@pytest.mark.fuzz
@given(strategies.programs(), strategies.outputs(), bindings(0, 24))
def test_random_outputs_equal_dense(program: Program, output: Expr, binding: Binding) -> None:
    if binding.q_len > binding.kv_len or not binding.kv_len:
        program = replace(program, mask=strategies.TRUE, score=strategies.Score(), sink=None)
    normalize = Normalize.SOFTMAX if LSE in reads(output) else program.normalize
    program = replace(program, params=strategies.PARAMS, output=output, normalize=normalize)
    tensors = {name: binding.tensors[name].double().requires_grad_() for name in ("bias", "slope")}
    binding = replace(binding, tensors={**binding.tensors, **tensors})
    bound = BoundPlan(analyze(program), binding, (16, 16))
    q, k, v = inputs(binding, value_dim=4)
    leaves = [q, k, v, *tensors.values()]
    found, expected = (
        results(lambda name=name: _run(name, bound, q, k, v), leaves) for name in ("cpu", "dense")
    )
    torch.testing.assert_close(found, expected, equal_nan=True)


def _run(backend: str, bound: BoundPlan, q: Tensor, k: Tensor, v: Tensor):
    return registry.choose(backend, q.device)(bound, q, v, False)(q, k, v)


def test_gradients_of_all_inputs_are_exact() -> None:
    (q, k, v), arguments = gated(torch.float64)

    def call(*given: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(arguments, given[3:], strict=True))
        out, lse = attncc.compile(GATED)(*given[:3], return_lse=True, backend="cpu", **named)
        return out, torch.where(lse.isfinite(), lse, 0)

    assert torch.autograd.gradcheck(call, (q, k, v, *arguments.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_lse(dtype: torch.dtype) -> None:
    qkv, arguments = gated(dtype)
    attn = attncc.compile(GATED)
    out, lse = attn(*qkv, return_lse=True, **arguments)
    exact, exact_lse = attn.reference(*qkv, return_lse=True, dtype=torch.float64, **arguments)
    assert out.dtype == dtype
    near = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=near, atol=near)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


def test_a_repeated_call_reads_the_gate_anew() -> None:
    qkv, arguments = gated(torch.float64)
    attn = attncc.compile(GATED)
    for _ in range(2):
        torch.testing.assert_close(attn(*qkv, **arguments), attn.reference(*qkv, **arguments))
        with torch.no_grad():
            arguments["gate"].add_(1)


def test_without_a_clause_the_kernel_is_called_alone() -> None:
    plain = attncc.compile("attention plain():\n    mask = true\n")
    qkv, _ = gated(torch.float64)
    bound = plain.plan(*qkv)
    from attncc.backends import epilogue

    kernel = registry.BACKENDS["cpu"](bound, qkv[0], qkv[2], False)
    assert epilogue.finished(bound, kernel) is kernel


def test_explain_says_what_runs_after_the_kernel() -> None:
    plan = analyze(attncc.compile(GATED).program)
    text = "\n".join(lines(plan))
    assert "output, by torch after the kernel\n  sigmoid(gate[b, h, q_idx])" in text
    assert data(plan)["output"].endswith("- mean_value")
    assert "gate[b, h, q_idx]" in captured(plan)["gate: float[batch, heads, q_len] grad"]
