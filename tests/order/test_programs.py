"""Any program, in any order, has the dense meaning: results and gradients on the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attncc
from attncc.binding import Binding
from attncc.ir import ops
from attncc.ir.expr import KV_IDX, Q_IDX, Const, apply, conjunction
from attncc.ir.program import Normalize, Program
from attncc.order import permuted
from tests import strategies
from tests.cases import bindings
from tests.interpreted.harness import inputs


def arguments(program: Program, binding: Binding) -> dict[str, Any]:
    """Those that the program takes; tensors whose gradients it asks for are leaves."""
    values: dict[str, Any] = {**binding.scalars, **binding.tensors}
    for tensor in program.tensors:
        if tensor.grad:
            values[tensor.name] = values[tensor.name].detach().double().requires_grad_()
    return {p.name: values[p.name] for p in program.params}


def agree(program: Program, binding: Binding, run: Any) -> None:
    """`run(q, k, v, arguments)` against the interpreter, gradients too."""
    made = inputs(binding, 8)
    leaves = [x.double().requires_grad_() for x in (made.q, made.k, made.v)]
    values = arguments(program, binding)
    leaves += [x for x in values.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    attn = attncc.compile(program)
    softmax = program.normalize is Normalize.SOFTMAX
    wanted = attn.reference(*leaves[:3], return_lse=softmax, **values)
    wanted = wanted if softmax else (wanted, None)
    found = []
    for out, lse in (run(*leaves[:3], values), wanted):
        total = (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()
        if lse is not None:
            total = total + lse.masked_fill(lse.isinf(), 0).sum()
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        zeros = [torch.zeros_like(x) for x in leaves]
        found.append(
            [out, lse, *(z if g is None else g for z, g in zip(zeros, grads, strict=True))]
        )
    for mine, theirs in zip(*found, strict=True):
        if theirs is not None:
            size = theirs[theirs.isfinite()].abs().max().item() if theirs.isfinite().any() else 0.0
            torch.testing.assert_close(
                mine.double(), theirs.double(), rtol=1e-6, atol=1e-6 * max(1, size), equal_nan=True
            )


@pytest.mark.fuzz
@given(strategies.programs(), bindings(1, 24), st.booleans(), st.integers(0, 2**20))
def test_any_permutation(program: Program, binding: Binding, by_sequence: bool, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    plan = attncc.compile(program).static

    def order(length: int) -> torch.Tensor:
        if not by_sequence:
            return torch.randperm(length, generator=random)
        rows = [torch.randperm(length, generator=random) for _ in range(binding.batch)]
        return torch.stack(rows)

    def start(program: Program, q: Any, k: Any, v: Any, given: Any) -> Any:
        attn = attncc.compile(program)
        return lambda q, k, v: attn._call(q, k, v, given, None, "cpu", False, "natural", False)

    def run(q: Any, k: Any, v: Any, values: dict[str, Any]) -> Any:
        orders = order(binding.q_len), order(binding.kv_len)
        return permuted.ready(start, program, plan.mask, values, orders, False)(q, k, v)

    agree(program, binding, run)


@pytest.mark.fuzz
@given(
    strategies.programs(),
    bindings(1, 24),
    st.integers(2, 5).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))),
    st.booleans(),
)
def test_any_program_by_residue(
    program: Program, binding: Binding, step: tuple[int, int], forward: bool
) -> None:
    pair = (Q_IDX, KV_IDX) if forward else (KV_IDX, Q_IDX)
    rest = apply(ops.MOD, apply(ops.SUB, *pair), Const(step[0]))
    apart = apply(ops.EQ, rest, Const(step[1]))
    program = replace(program, mask=conjunction((apart, program.mask)), order=None)
    attn = attncc.compile(program)
    if attn._compiled.orders.residues is None or min(binding.q_len, binding.kv_len) < step[0]:
        return

    def run(q: Any, k: Any, v: Any, values: dict[str, Any]) -> Any:
        return attn._call(q, k, v, values, None, "cpu", False, "residues", False)

    agree(program, binding, run)
