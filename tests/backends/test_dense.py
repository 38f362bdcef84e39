"""The dense interpreter against torch written out by hand, SDPA, and finite differences."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attncc.backends.dense import attention
from attncc.binding import bind
from attncc.errors import ArgumentError, BoundsError
from attncc.frontend import parse
from attncc.ir.program import Program

B, H, HKV, Q, KV, D, DV = 2, 4, 2, 7, 9, 8, 5
INF = math.inf
ROWS = torch.arange(Q)[:, None]
KEYS = torch.arange(KV)


def program(*lines: str, params: str = "") -> Program:
    """One attention of some clauses."""
    (found,) = parse("\n    ".join([f"attention a({params}):", *lines]) + "\n")
    return found


def inputs(q_len: int = Q, kv_len: int = KV, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q (scaled by 4), k and v; leaves."""
    rng = torch.Generator().manual_seed(0)
    shapes = (B, H, q_len, D), (B, HKV, kv_len, D), (B, HKV, kv_len, DV)
    made = [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes]
    made[0] *= 4
    return [x.to(dtype).requires_grad_() for x in made]


def run(found: Program, q: Tensor, k: Tensor, v: Tensor, **arguments: object):
    return attention(found, bind(found, q, k, v, arguments), q, k, v)


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.repeat_interleave(H // HKV, 1).transpose(2, 3) / math.sqrt(D)


def mixed(weights: Tensor, v: Tensor) -> Tensor:
    return weights @ v.repeat_interleave(H // HKV, 1)


def same(found: tuple[Tensor, Tensor | None], out: Tensor, lse: Tensor | None = None) -> None:
    torch.testing.assert_close(found[0], out)
    if lse is not None:
        torch.testing.assert_close(found[1], lse)


def test_causal_equals_sdpa():
    q, k, v = inputs(8, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    same(run(program("mask = q_idx >= kv_idx"), q, k, v), expected)


def test_window_and_lse():
    q, k, v = inputs()
    kept = (ROWS >= KEYS) & (ROWS - KEYS < 3)
    scores = scores_of(q, k).masked_fill(~kept, -INF)
    found = run(program("mask = q_idx >= kv_idx and q_idx - kv_idx < 3"), q, k, v)
    same(found, mixed(scores.softmax(-1), v), scores.logsumexp(-1))


def test_score_sink_and_scale():
    q, k, v = inputs()
    slope, sink = torch.randn(H, dtype=q.dtype), torch.randn(H, dtype=q.dtype)
    found = program(
        "score = 3.0 * tanh((score + slope[h] * (kv_idx - q_idx)) / 3.0)",
        "scale = 0.5",
        "sink = extra[h]",
        params="slope: float[heads], extra: float[heads]",
    )
    raw = scores_of(q, k) * math.sqrt(D) * 0.5 + slope[:, None, None] * (KEYS - ROWS)
    scores = 3 * torch.tanh(raw / 3)
    extra = sink[:, None, None].expand(B, H, Q, 1)
    whole = torch.cat([scores, extra], -1)
    same(
        run(found, q, k, v, slope=slope, extra=sink),
        mixed(whole.softmax(-1)[..., :-1], v),
        whole.logsumexp(-1),
    )


def test_other_normalizations_have_no_lse():
    q, k, v = inputs()
    kept = (ROWS + KEYS) % 3 != 0
    for name, weigh in (("sigmoid", torch.sigmoid), ("none", torch.clone)):
        found = run(program("mask = (q_idx + kv_idx) % 3 != 0", f"normalize = {name}"), q, k, v)
        same(found, mixed(weigh(scores_of(q, k)) * kept, v))
        assert found[1] is None


def test_documents_and_heads():
    q, k, v = inputs()
    doc = torch.tensor([[0] * 4 + [1] * 5, [0, 0, 1, 1, 1, 2, 2, 2, 3]])
    width = torch.tensor([1, 2, 4, 9])
    kept = (doc[:, None, :Q, None] == doc[:, None, None]) & (
        (ROWS - KEYS).abs() < width[:, None, None]
    )
    found = program(
        "mask = doc[b, q_idx] == doc[b, kv_idx] and abs(q_idx - kv_idx) < width[h]",
        params="doc: int[batch, kv_len], width: int[heads]",
    )
    scores = scores_of(q, k).masked_fill(~kept, -INF)
    same(run(found, q, k, v, doc=doc, width=width), mixed(scores.softmax(-1), v))


def test_output_clauses():
    q, k, v = inputs(8, 8)
    kept = torch.arange(8)[:, None] > torch.arange(8)
    scores = scores_of(q, k).masked_fill(~kept, -INF)
    raw, lse = mixed(scores.softmax(-1).nan_to_num(), v), scores.logsumexp(-1)
    values = v.repeat_interleave(H // HKV, 1)
    gate, table = torch.randn(B, H, 8, dtype=q.dtype), torch.randn(HKV, 8, dtype=q.dtype)
    per_head = table.repeat_interleave(H // HKV, 0)[..., None]
    for clause, expected in (
        ("gate[b, h, q_idx] * out", gate[..., None] * raw),
        ("(1 - table[kv_head, q_idx]) * out + table[kv_head, q_idx] * value", None),
        ("out - mean_value", raw - values.mean(2, keepdim=True)),
        ("out * sigmoid(lse - 0.5)", raw * torch.sigmoid(lse - 0.5)[..., None]),
        ("where(lse < -1e30, -1, out)", torch.where(lse == -INF, -1, raw.movedim(-1, 0))),
        ("table[0, 0]", table[0, 0].expand_as(raw)),
    ):
        if expected is None:
            expected = (1 - per_head) * raw + per_head * values
        elif "where" in clause:
            expected = expected.movedim(0, -1)
        found = program(
            "mask = q_idx > kv_idx",
            f"output = {clause}",
            params="gate: float[batch, heads, q_len], table: float[kv_heads, q_len]",
        )
        same(run(found, q, k, v, gate=gate, table=table), expected, lse)


def test_output_without_keys_or_queries():
    found = program("mask = true", "output = out + mean_value + t[h]", params="t: float[heads]")
    given = torch.arange(4.0, dtype=torch.float64)
    out, lse = run(found, *inputs(3, 0), t=given)
    assert torch.equal(out, given[:, None, None].expand(B, H, 3, DV)) and (lse == -INF).all()
    assert run(found, *inputs(0, 3), t=given)[0].shape == (B, H, 0, DV)


def test_values_of_the_querys_own_position_need_as_many():
    found = program("mask = true", "output = out + value")
    with pytest.raises(ArgumentError, match="there are 3 queries and 5 keys"):
        run(found, *inputs(3, 5))


GRADIENTS = {
    "output": (
        (
            "mask = q_idx >= kv_idx + 2",
            "output = t[h, q_idx] * out * sigmoid(lse) + tanh(t[h, 1] * mean_value)",
        ),
        "t: float[heads, 9] grad",
    ),
    "causal": (("mask = q_idx >= kv_idx",), ""),
    "empty rows, sink": (
        ("mask = kv_idx > q_idx + 2", "sink = t[h, 0]"),
        "t: float[heads, 9] grad",
    ),
    "bias": (
        ("mask = q_idx >= kv_idx", "score = score * t[h, q_idx - kv_idx] + exp(t[h, 1])"),
        "t: float[heads, 9] grad",
    ),
    "sigmoid": (("score = score - t[h, kv_idx]", "normalize = sigmoid"), "t: float[heads, 9] grad"),
    "none": (("mask = kv_idx > 3", "score = tanh(score)", "normalize = none"), ""),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_by_finite_differences(name):
    clauses, params = GRADIENTS[name]
    found = program(*clauses, params=params)
    leaves = inputs(4, 5)
    if params:
        leaves.append(torch.randn(H, 9, dtype=torch.float64, requires_grad=True))

    def call(q, k, v, *t):
        out, lse = run(found, q, k, v, **({"t": t[0]} if t else {}))
        return out if lse is None else (out, torch.where(lse == -INF, 0, lse))

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("sink", ["", "sink = 1.5"])
def test_a_row_that_keeps_no_key_is_zero(sink):
    q, k, v = inputs()
    out, lse = run(program("mask = q_idx > kv_idx + 2", *filter(None, [sink])), q, k, v)
    assert (out[:, :, :3] == 0).all() and (lse[:, :, :3] == -INF).all()
    assert lse[:, :, 3:].isfinite().all()
    grads = torch.autograd.grad((out.sum() + lse[:, :, 3:].sum()), (q, k, v))
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][:, :, :3] == 0).all()


def test_scores_of_minus_infinity_weigh_nothing():
    q, k, v = inputs()
    out, lse = run(program("score = score + log(float(kv_idx * min(q_idx, 1)))"), q, k, v)
    assert (out[:, :, 0] == 0).all() and (lse[:, :, 0] == -INF).all()
    assert out.isfinite().all()


def test_nothing_leaks_from_dropped_pairs():
    q, k, v = inputs()
    slope = torch.randn(H, dtype=q.dtype, requires_grad=True)
    found = program(
        "mask = q_idx >= kv_idx",
        "score = score + slope[h] * log(float(q_idx - kv_idx + 1))",
        params="slope: float[heads] grad",
    )
    clean = run(found, q, k, v, slope=slope)[0]
    clean_grads = torch.autograd.grad(clean.sum(), (q, k, v, slope))
    for x, bad in ((k, math.nan), (v, math.nan), (k, INF), (v, -INF)):
        with torch.no_grad():
            saved = x[:, :, Q:].clone()
            x[:, :, Q:] = bad  # keys that no query keeps
        out = run(found, q, k, v, slope=slope)[0]
        grads = torch.autograd.grad(out.sum(), (q, k, v, slope))
        with torch.no_grad():
            x[:, :, Q:] = saved
        for got, expected in zip((out, *grads), (clean, *clean_grads), strict=True):
            torch.testing.assert_close(got, expected)


def test_a_kept_nan_reaches_the_rows_that_keep_it_alone():
    q, k, v = inputs()
    with torch.no_grad():
        v[:, :, 4] = math.nan
    out = run(program("mask = q_idx >= kv_idx"), q, k, v)[0]
    assert out[:, :, :4].isfinite().all() and out[:, :, 4:].isnan().all()


@pytest.mark.parametrize("lengths", [(0, 4), (4, 0), (0, 0), (1, 1)])
def test_short_lengths(lengths):
    q, k, v = inputs(*lengths)
    out, lse = run(program("mask = q_idx >= kv_idx", "sink = 0.5"), q, k, v)
    assert out.shape == (B, H, lengths[0], DV) and lse.shape == (B, H, lengths[0])
    if lengths[1] == 0:
        assert (out == 0).all() and (lse == -INF).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_round_once(dtype):
    q, k, v = inputs(dtype=dtype)
    found = program("mask = q_idx >= kv_idx")
    binding = bind(found, q, k, v, {})
    exact, exact_lse = attention(found, binding, q, k, v, torch.float64)
    assert exact.dtype == exact_lse.dtype == torch.float64
    out, lse = attention(found, binding, q, k, v)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact, atol=1e-6, rtol=torch.finfo(dtype).eps)


def test_a_read_out_of_range_is_an_error_only_where_it_is_kept():
    q, k, v = inputs()
    found = program(
        "mask = q_idx >= kv_idx", "score = score + t[q_idx - kv_idx]", params="t: float[n]"
    )
    run(found, q, k, v, t=torch.zeros(Q))
    with pytest.raises(BoundsError, match=r"'t' is read at 6\.\.6 along its axis 0, which has 6"):
        run(found, q, k, v, t=torch.zeros(Q - 1))
    with pytest.raises(BoundsError):
        run(
            replace(found, mask=parse("attention a():\n    mask = true\n")[0].mask),
            q,
            k,
            v,
            t=torch.zeros(Q),
        )
