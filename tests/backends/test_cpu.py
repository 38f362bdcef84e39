"""The CPU backend equals the dense interpreter, forward and gradients."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attncc.backends import cpu, dense
from attncc.backends.cpu import workers
from attncc.backends.cpu.schedule import schedule, union
from attncc.binding import Binding, bind, bind_lengths
from attncc.errors import UnsupportedError
from attncc.frontend import parse
from attncc.ir.program import Program
from attncc.passes import analyze
from attncc.tiles import BoundPlan
from tests import strategies
from tests.cases import bindings

TILE = 16, 8


@pytest.fixture(params=[1, 3], ids=["one thread", "threads"])
def threads(request, monkeypatch):
    """Worker threads even for small problems."""
    monkeypatch.setattr(workers, "threads", lambda: request.param)
    monkeypatch.setattr(workers, "SMALL", 0)


def program(*lines: str, params: str = "") -> Program:
    (found,) = parse("\n    ".join([f"attention a({params}):", *lines]) + "\n")
    return found


def inputs(binding: Binding, value_dim: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q (scaled by 4, so that a missing score derivative shows), k and v."""
    rng = torch.Generator().manual_seed(1)
    b, h, hkv, n, m, d = (
        binding.batch,
        binding.heads,
        binding.kv_heads,
        binding.q_len,
        binding.kv_len,
        binding.head_dim,
    )
    shapes = (b, h, n, d), (b, hkv, m, d), (b, hkv, m, value_dim)
    made = [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes]
    made[0] *= 4
    return [x.to(dtype).requires_grad_() for x in made]


def results(call, leaves: list[Tensor]) -> dict[str, Tensor]:
    """Outputs, and gradients of random combinations of them."""
    out, lse = call()
    rng = torch.Generator().manual_seed(2)
    total = (out * torch.randn(out.shape, generator=rng, dtype=torch.float64)).sum()
    found = {"out": out}
    if lse is not None:
        found["lse"] = lse
        kept = torch.where(lse == -math.inf, 0, lse)
        total = total + (kept * torch.randn(lse.shape, generator=rng, dtype=torch.float64)).sum()
    grads = [None] * len(leaves)
    if total.requires_grad:
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
    for at, (grad, leaf) in enumerate(zip(grads, leaves, strict=True)):
        found[f"grad {at}"] = torch.zeros_like(leaf) if grad is None else grad
    return found


def agree(found: Program, binding: Binding, value_dim: int, tile=TILE) -> None:
    """float64: out, lse and every gradient equal the dense interpreter's."""
    grads = {
        t.name: binding.tensors[t.name].double().requires_grad_() for t in found.tensors if t.grad
    }
    tensors = {t.name: grads.get(t.name, binding.tensors[t.name]) for t in found.tensors}
    binding = replace(binding, tensors=tensors)
    q, k, v = inputs(binding, value_dim)
    leaves = [q, k, v, *grads.values()]
    bound = BoundPlan(analyze(found), binding, tile)
    expected = results(lambda: dense.attention(found, binding, q, k, v), leaves)
    got = results(lambda: cpu.attention(bound, q, k, v), leaves)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-7, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


def bound_at(found: Program, **arguments: Tensor | int) -> Binding:
    return bind_lengths(
        found,
        q_len=37,
        kv_len=41,
        batch=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        arguments=arguments,
    )


PROGRAMS = {
    "full": program("mask = true"),
    "causal": program("mask = q_idx >= kv_idx"),
    "empty rows": program("mask = q_idx + 7 <= kv_idx"),
    "two ranges": program("mask = q_idx >= kv_idx and (q_idx - kv_idx < 9 or kv_idx < 2)"),
    "softcap, sink": program(
        "mask = q_idx >= kv_idx",
        "score = 2.0 * tanh((score + s[h] * (kv_idx - q_idx)) / 2.0)",
        "sink = s[h] * 0.5",
        params="s: float[4] grad",
    ),
    "sum, sink, scale": program(
        "mask = q_idx > kv_idx",
        "score = s[h] + (score - log(float(q_idx - kv_idx)))",
        "sink = s[h]",
        "scale = -0.25",
        params="s: float[4] grad",
    ),
    "sigmoid": program("mask = abs(q_idx - kv_idx) < 9", "normalize = sigmoid"),
    "none": program("mask = kv_idx % 3 != 1", "score = exp(score / 8)", "normalize = none"),
    "documents": program(
        "mask = q_idx >= kv_idx and doc[b, q_idx] == doc[b, kv_idx]",
        params="doc: int[2, 41] sorted",
    ),
    "per head": program("mask = q_idx >= kv_idx and q_idx - kv_idx < w[h]", params="w: int[4]"),
    "bias by distance": program(
        "mask = q_idx >= kv_idx",
        "score = score * t[h, q_idx - kv_idx] + log(float(q_idx - kv_idx) + 1) * t[h, 3]",
        params="t: float[4, 41] grad",
    ),
    "bias by pair": program(
        "mask = (q_idx + kv_idx) % 3 != 0 or kv_idx > 30",
        "let low = softplus(score) - u[b, kv_idx]",
        "score = where(score > 0, score * u[b, q_idx] + t[h, kv_idx], low)",
        params="t: float[4, 41] grad, u: float[2, 41] grad",
    ),
    "constant score": program("score = float(kv_idx - q_idx) / 10"),
    "ties": program(
        "score = min(score + max(z[h] * score, 0, z[0]), score + z[h] * kv_idx)",
        params="z: float[4] grad",
    ),
    "minus infinity": program("score = score + log(float(min(q_idx, 1) * min(kv_idx, 1)))"),
}


def tensors_of(found: Program) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(3)
    known = {
        "doc": torch.randint(0, 5, (2, 41), generator=rng).sort(-1).values,
        "w": torch.tensor([1, 5, 3, 40]),
        "s": torch.randn(4, generator=rng),
        "t": torch.randn(4, 41, generator=rng),
        "u": torch.randn(2, 41, generator=rng),
        "z": torch.zeros(4),
    }
    return {t.name: known[t.name] for t in found.tensors}


@pytest.mark.parametrize("value_dim", [8, 5])
@pytest.mark.parametrize("name", PROGRAMS)
def test_equals_dense(name, value_dim, threads):
    found = PROGRAMS[name]
    agree(found, bound_at(found, **tensors_of(found)), value_dim)


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("lengths", [(0, 3), (3, 0), (0, 0), (1, 1), (1, 40), (40, 1), (33, 17)])
def test_shapes(lengths, heads):
    found = PROGRAMS["causal"]
    binding = bind_lengths(
        found, q_len=lengths[0], kv_len=lengths[1], heads=heads[0], kv_heads=heads[1], head_dim=3
    )
    agree(found, binding, 3)


@pytest.mark.fuzz
@given(
    found=strategies.programs(),
    binding=bindings(shortest=1),
    tile=st.sampled_from(((16, 8), (8, 16), (32, 32))),
    value_dim=st.sampled_from((16, 4)),
)
def test_random_programs_equal_dense(found, binding, tile, value_dim):
    agree(found, binding, value_dim, tile)


@pytest.mark.parametrize("name", ["causal", "softcap, sink", "documents"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_round_once(name, dtype):
    found = PROGRAMS[name]
    binding = bound_at(found, **tensors_of(found))
    q, k, v = inputs(binding, 8, dtype)
    bound = BoundPlan(analyze(found), binding, TILE)
    out, lse = cpu.attention(bound, q, k, v)
    exact, exact_lse = dense.attention(found, binding, q, k, v, torch.float64)
    assert out.dtype == dtype and lse.dtype == torch.float32
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 4e-6}
    torch.testing.assert_close(out.double(), exact, **close)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    dout = torch.randn_like(out)
    found_grads = torch.autograd.grad(out, (q, k, v), dout)
    exact_grads = torch.autograd.grad(exact, (q, k, v), dout.double())
    for got, expected in zip(found_grads, exact_grads, strict=True):
        assert got.dtype == dtype
        scale = expected.float().abs().max().item()
        torch.testing.assert_close(
            got.float(),
            expected.float(),
            rtol=4 * torch.finfo(dtype).eps,
            atol=scale * max(4 * torch.finfo(dtype).eps, 1e-5),
        )


def test_strided_inputs():
    found = PROGRAMS["causal"]
    plain = inputs(bound_at(found), 8)
    rows_first = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in plain]
    sliced = [torch.cat([x, x], -1)[..., : x.shape[-1]].detach() for x in plain]
    bound = BoundPlan(analyze(found), bound_at(found), TILE)
    expected = cpu.attention(bound, *plain)[0]
    for strided in (rows_first, sliced):
        leaves = [x.requires_grad_() for x in strided]
        out = cpu.attention(bound, *leaves)[0]
        torch.testing.assert_close(out, expected)
        assert all(
            g.shape == x.shape
            for g, x in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True)
        )


def test_repeats_bitwise(threads):
    found = PROGRAMS["bias by distance"]
    binding = bound_at(found, **tensors_of(found))
    table = binding.tensors["t"].requires_grad_()
    leaves = [*inputs(binding, 8, torch.float32), table]
    bound = BoundPlan(analyze(found), binding, TILE)
    runs = [results(lambda: cpu.attention(bound, *leaves[:3]), leaves) for _ in range(3)]
    for name, value in runs[0].items():
        assert all(torch.equal(value, other[name]) for other in runs[1:]), name


def test_a_failure_in_a_worker_is_raised(threads):
    def fail():
        raise RuntimeError("in a worker")

    with pytest.raises(RuntimeError, match="in a worker"):
        workers.run([fail, fail])


def test_workers_leave_torchs_threads_alone(threads):
    before = torch.get_num_threads()
    workers.run([lambda: None] * 2)
    assert torch.get_num_threads() == before


def test_inference_mode(threads):
    found = PROGRAMS["softcap, sink"]
    binding = bound_at(found, **tensors_of(found))
    bound = BoundPlan(analyze(found), binding, TILE)
    expected = cpu.attention(bound, *inputs(binding, 8))[0].detach()
    with torch.inference_mode():
        torch.testing.assert_close(cpu.attention(bound, *inputs(binding, 8))[0], expected)


def test_what_cannot_be_differentiated_says_so():
    found = PROGRAMS["causal"]
    binding = bound_at(found)
    bound = BoundPlan(analyze(found), binding, TILE)
    q, k, v = inputs(binding, 8)
    (grad,) = torch.autograd.grad(cpu.attention(bound, q, k, v)[0].sum(), q, create_graph=True)
    with pytest.raises(UnsupportedError, match="differentiated twice"):
        torch.autograd.grad(grad.sum(), q)
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level(), pytest.raises(UnsupportedError, match="forward-mode"):
        cpu.attention(bound, forward_ad.make_dual(q.detach(), q.detach()), k, v)


def test_a_tensor_changed_before_the_backward_is_an_error():
    found = PROGRAMS["documents"]
    doc = tensors_of(found)["doc"]
    q, k, v = inputs(bound_at(found, doc=doc), 8)
    out = cpu.attention(
        BoundPlan(analyze(found), bind(found, q, k, v, {"doc": doc}), TILE), q, k, v
    )[0]
    doc.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_only_visited_keys_are_scheduled():
    found = PROGRAMS["two ranges"]
    binding = bind_lengths(found, q_len=512, kv_len=512)
    (group,) = schedule(BoundPlan(analyze(found), binding, (16, 16)))
    last = group.strips[-1]
    assert (last.start, last.stop) == (496, 512)
    assert [(run.start, run.stop) for run in last.runs] == [(0, 16), (480, 512)]
    assert sum(strip.width for strip in group.strips) < 512 * 32 / 10


def test_union():
    assert union([(5, 7), (0, 2), (2, 3), (9, 12)], 0) == [(0, 3), (5, 7), (9, 12)]
    assert union([(0, 3), (5, 7), (9, 12)], 3) == [(0, 12)]
    assert union([], 4) == []
