"""Calls in an order: clauses, plans, repeated calls, autocast, and inputs that are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import attncc
from attncc.backends import registry
from attncc.errors import ArgumentError, BoundsError, ProgramValueError
from attncc.order import Orders
from tests.order.test_orders import DILATED, GRID, equal, inputs

DOCUMENTS = """
attention documents(doc: int[batch, kv_len], bias: float[7] grad):
    mask = doc[b, q_idx] == doc[b, kv_idx] and q_idx >= kv_idx
    score = score + bias[(q_idx - kv_idx) % 7]
"""


def doc_of(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, 5, (batch, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("lengths", [(48, 48), (31, 48)])
def test_sorted_by_a_tensor_equals_dense(batch: int, lengths: tuple[int, int]) -> None:
    attn = attncc.compile(DOCUMENTS)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    doc = doc_of(batch, lengths[1])
    equal(attn, inputs(batch, *lengths), [bias], order="by(doc)", doc=doc, bias=bias)


def test_sorting_gathers_documents() -> None:
    attn = attncc.compile(
        "attention a(doc: int[batch, kv_len]):\n"
        "    mask = doc[b, q_idx] == doc[b, kv_idx]\n"
        "    order = by(doc)\n"
    )
    doc = doc_of(2, 1024)
    plan = attn.plan(q_len=1024, kv_len=1024, batch=2, tile=(64, 64), doc=doc)
    orders = Orders(plan.plan)
    choice = orders.choose(plan.binding, "auto")
    assert choice is not None and choice.why == "sorted by doc, by copies"
    counts = orders.counts(choice, plan.binding, (64, 64))
    dense = sum(
        int((rows.min() <= keys.max()) & (keys.min() <= rows.max()))
        for one in doc.sort(-1).values
        for rows in one.split(64)
        for keys in one.split(64)
    )
    assert counts.full + counts.partial == dense < plan.counts.partial


@pytest.mark.parametrize(
    "mask", ["(q_idx - kv_idx) % step == apart", "apart == (kv_idx - q_idx) % step"]
)
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("lengths", [(24, 24), (25, 31)])
def test_keys_of_another_residue(mask: str, batch: int, lengths: tuple[int, int]) -> None:
    attn = attncc.compile(
        f"attention a(step: int, apart: int):\n    mask = {mask} and abs(q_idx - kv_idx) < 20\n"
    )
    for step, apart in ((4, 1), (3, 2), (2, 0)):
        equal(attn, inputs(batch, *lengths), [], order="residues", step=step, apart=apart)
    with pytest.raises(ArgumentError, match="keeps 4 modulo 4"):
        attn(*inputs(batch, *lengths), order="residues", step=4, apart=4)


@pytest.mark.parametrize(("step", "tokens"), [(1, 24), (24, 24), (23, 24), (70, 90)])
def test_steps_at_their_ends(step: int, tokens: int) -> None:
    attn = attncc.compile("attention a(step: int):\n    mask = (q_idx - kv_idx) % step == 0\n")
    equal(attn, inputs(2, tokens, tokens), [], order="residues", step=step)


@pytest.mark.parametrize("step", [0, -4, 25, 10**9])
def test_steps_that_make_no_classes(step: int) -> None:
    attn = attncc.compile(
        "attention a(step: int):\n    mask = step != 0 and (q_idx - kv_idx) % step == 0\n"
    )
    qkv = inputs(2, 24, 24)
    with pytest.raises(ArgumentError, match="order is residues"):
        attn(*qkv, order="residues", step=step)
    torch.testing.assert_close(attn(*qkv, step=step), attn.reference(*qkv, step=step))


# -- the clause


def test_one_of_several_steps() -> None:
    text = (
        "attention a(step: int = 3):\n"
        "    mask = (q_idx - kv_idx) % 2 == 0 and (q_idx - kv_idx) % step == 0\n"
        "    order = residues(step)\n"
    )
    attn = attncc.compile(text)
    orders = attn._compiled.orders
    choice = orders.choose(attn.plan(q_len=24, kv_len=24).binding, "auto")
    assert choice is not None and choice.step == 3
    equal(attn, inputs(2, 24, 24), [], order="auto")
    wrong = attncc.compile(text.replace("residues(step)", "residues(step + 1)"))
    with pytest.raises(ProgramValueError, match="program:3:13: order is residues"):
        wrong(*inputs(2, 24, 24))


def test_a_program_may_forbid_orders() -> None:
    attn = attncc.compile(
        Path("examples/dilated_window.attn").read_text() + "    order = natural\n"
    )
    binding = attn.plan(q_len=8192, kv_len=8192, heads=16).binding
    assert attn._compiled.orders.choose(binding, "auto", "cuda") is None
    assert attn._compiled.orders.described(binding) == ["natural: the program says so"]


def test_a_call_decides_before_its_program() -> None:
    attn = attncc.compile(GRID + "    order = tiles(2, 4)\n")
    binding = attn.plan(q_len=64, kv_len=64, bias=torch.zeros(5, 5)).binding
    orders = attn._compiled.orders
    tiles = [orders.choose(binding, asked) for asked in ("auto", [3, 5], "natural")]
    assert [choice and choice.tile for choice in tiles] == [(2, 4), (3, 5), None]


# -- calls


@pytest.mark.parametrize("order", ["residues", "auto"])
def test_a_repeated_call_starts_nothing_anew(order: str) -> None:
    attn = attncc.compile("attention a(step: int = 12):\n    mask = (q_idx - kv_idx) % step == 0\n")
    qkv = inputs(12, 12 * 128, 12 * 128) if order == "auto" else inputs(12, 24, 24)
    qkv = [x.detach().float()[:, :1] for x in qkv]
    attn(*qkv, order=order)
    with patch.object(registry, "choose", side_effect=AssertionError("planned again")):
        attn(*qkv, order=order)


@pytest.mark.parametrize(
    ("text", "order", "given"),
    [
        (GRID, (2, 4), {"bias": torch.randn(5, 5)}),
        (DOCUMENTS, "by(doc)", {"doc": doc_of(1, 64), "bias": torch.randn(7)}),
    ],
)
def test_a_first_call_in_inference_mode(text: str, order: Any, given: dict[str, Any]) -> None:
    attn = attncc.compile(text)
    qkv = [x.detach().float() for x in inputs(1, 64, 64)]
    with torch.inference_mode():
        attn(*qkv, order=order, **given)
    leaves = [x.requires_grad_() for x in qkv]
    attn(*leaves, order=order, **given).sum().backward()
    assert all(x.grad is not None for x in leaves)


def test_autocast_converts_first() -> None:
    attn = attncc.compile(GRID)
    q, k, v = (x.detach().float() for x in inputs(1, 64, 64))
    bias = torch.zeros(5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attn(q, k.bfloat16(), v, order=(2, 4), bias=bias)
    assert out.dtype is torch.bfloat16


def test_a_plan_refuses_another_mask() -> None:
    attn = attncc.compile(DILATED)
    qkv = [x.detach() for x in inputs(2, 64, 64)]
    keep, slope = torch.ones(2, 64, dtype=torch.bool), torch.zeros(2, dtype=torch.float64)
    plan = attn.plan(*qkv, keep=keep, slope=slope)
    with pytest.raises(ArgumentError, match="another step"):
        attn(*qkv, plan=plan, step=8, order="residues")
    mine = attn(*qkv, plan=plan, slope=slope + 1, order="residues")
    torch.testing.assert_close(mine, attn.reference(*qkv, keep=keep, slope=slope + 1))


@pytest.mark.parametrize(
    ("text", "order", "given"),
    [
        (GRID, (2, 4), {"bias": torch.randn(5, 5)}),
        (DOCUMENTS, "by(doc)", {"doc": doc_of(2, 48), "bias": torch.randn(7)}),
    ],
)
def test_a_plan_permutes_for_its_calls(text: str, order: Any, given: dict[str, Any]) -> None:
    attn = attncc.compile(text)
    q, k, v = (x.detach().float() for x in inputs(2, 40, 48))
    plan = attn.plan(q, k, v, order=order, tile=(16, 16), **given)
    assert plan.order is not None
    wanted, wanted_lse = attn.reference(q, k, v, return_lse=True, **given)
    torch.testing.assert_close(attn(q, k, v, plan=plan), wanted)
    own = [plan.order.permute(x) for x in (q, k, v)]
    out, lse = attn(*own, plan=plan, ordered=True, return_lse=True)
    torch.testing.assert_close(plan.order.unpermute(out), wanted)
    torch.testing.assert_close(plan.order.unpermute(lse), wanted_lse)
    counts = plan.order.counts(plan.tile)
    assert f"tiles then: {counts.full} full, {counts.partial} partial" in str(plan)
    with pytest.raises(ArgumentError, match="40 or 48"):
        plan.order.permute(torch.zeros(2, 2, 41))


def test_plans_of_natural_order_and_of_residues() -> None:
    attn = attncc.compile(DILATED)
    q, k, v = (x.detach() for x in inputs(2, 64, 64))
    given = {"keep": torch.ones(2, 64, dtype=torch.bool), "slope": torch.zeros(2)}
    plan = attn.plan(q, k, v, order="natural", **given)
    assert plan.order is not None and plan.order.permute(q) is q
    assert plan.order.counts() == plan.counts and str(plan.order) == "natural"
    classes = attn.plan(q, k, v, order="residues", **given)
    assert classes.order is not None
    with pytest.raises(ArgumentError, match="by residue"):
        classes.order.permute(q)
    torch.testing.assert_close(attn(q, k, v, plan=classes), attn.reference(q, k, v, **given))
    with pytest.raises(ArgumentError, match="tiles of 1 axes"):
        attn.plan(q, k, v, order=(4,), **given)


def test_errors_are_of_the_program_itself() -> None:
    text = (
        "attention a(t: int[n]):\n    mask = t[q_idx - kv_idx] > 0 and (q_idx - kv_idx) % 2 == 0\n"
    )
    attn = attncc.compile(text)
    with pytest.raises(BoundsError, match=r"t\[q_idx - kv_idx\]"):
        attn(*inputs(1, 8, 8), t=torch.ones(8, dtype=torch.int64), order="residues")


def test_names_that_are_taken() -> None:
    text = (
        "attention a(batch_before: int, x: float[batch], y: float[q_tokens, kv_len], "
        "q_before: int):\n"
        "    mask = (q_idx - kv_idx) % 2 == q_before\n"
        "    score = score + x[b] * batch_before + y[0, kv_idx]\n"
    )
    attn = attncc.compile(text)
    given = {"x": torch.ones(2, dtype=torch.float64), "y": torch.rand(3, 16, dtype=torch.float64)}
    for order in ("residues", torch.randperm(16)):
        equal(attn, inputs(2, 16, 16), [], order=order, batch_before=2, q_before=1, **given)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0)])
def test_nothing_to_order(shape: tuple[int, int]) -> None:
    attn = attncc.compile(GRID)
    out = attn(*inputs(*shape, shape[1]), order=(2, 4), bias=torch.zeros(5, 5))
    assert out.shape == (shape[0], 2, shape[1], 12)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.zeros(64, dtype=torch.int64), "each position once"),
        (torch.arange(1, 65), "each position once"),
        ("by(bias)", "no int tensor"),
        ("by(what)", "no int tensor"),
        ("tiles", "order is 'tiles'"),
    ],
)
def test_orders_that_are_none(order: Any, message: str) -> None:
    attn = attncc.compile(GRID)
    with pytest.raises(ArgumentError, match=message):
        attn(*inputs(1, 64, 64), order=order, bias=torch.zeros(5, 5))


def test_an_order_that_changes_is_looked_at_again() -> None:
    attn = attncc.compile("attention a():\n    mask = q_idx >= kv_idx\n")
    qkv = [x.detach() for x in inputs(1, 16, 16)]
    order = torch.randperm(16, dtype=torch.int32)
    wanted = attn.reference(*qkv)
    torch.testing.assert_close(attn(*qkv, order=order), wanted)
    order.copy_(order.flip(0))
    torch.testing.assert_close(attn(*qkv, order=order), wanted)
    order.zero_()
    with pytest.raises(ArgumentError, match="each position once"):
        attn(*qkv, order=order)


def test_gradients_repeat_bitwise() -> None:
    attn = attncc.compile(GRID)
    leaves = [x.detach().float().requires_grad_() for x in inputs(1, 64, 64)]
    bias = torch.randn(5, 5, requires_grad=True)
    runs = []
    for _ in range(2):
        out = attn(*leaves, order=(3, 5), bias=bias, deterministic=True)
        runs.append(torch.autograd.grad(out.square().sum(), [*leaves, bias]))
    for one, other in zip(*runs, strict=True):
        assert one.equal(other)
