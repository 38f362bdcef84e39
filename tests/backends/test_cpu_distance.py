"""What depends on the distance alone, and strips cut along it, equal what pairs give."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attncc.backends import cpu, dense
from attncc.backends.cpu import distance
from attncc.backends.cpu import pieces as pieces_of
from attncc.backends.cpu.block import Block, Problem
from attncc.backends.cpu.fused import Fused
from attncc.backends.cpu.pieces import BAND, Piece, pieces
from attncc.backends.cpu.tables import tables
from attncc.binding import bind_lengths
from attncc.ir.evaluate import evaluate_unchecked
from attncc.passes import analyze
from attncc.tiles import BoundPlan
from tests import strategies
from tests.backends.test_cpu import agree, inputs, program
from tests.cases import bindings, environment

TILE = 128, 64
LENGTHS = {"q_len": 330, "kv_len": 330, "batch": 1, "heads": 4, "kv_heads": 2, "head_dim": 4}

BY_DISTANCE = [
    "mask = q_idx >= kv_idx",
    "mask = 2 * q_idx + h > 2 * kv_idx + h * h",
    "mask = (kv_idx - q_idx - b) % 3 == 0 and abs(q_idx - kv_idx) < 5",
    "mask = log(float(q_idx - kv_idx)) < 2.0",
    "mask = t[h, max(q_idx - kv_idx, 0)] > 0.0",
    "mask = h * (q_idx - kv_idx) > 3",
]
BY_PAIR = [
    "mask = q_idx + kv_idx > 3",
    "mask = 2 * q_idx >= kv_idx",
    "mask = q_idx // 2 >= kv_idx // 2",
    "mask = float(q_idx) - float(kv_idx) > 1.0",
    "mask = t[h, kv_idx] > 0.0",
    "mask = h * q_idx - h * kv_idx > 3",
    "mask = q_idx - kv_idx >= kv_idx",
]


@pytest.mark.parametrize("line", BY_DISTANCE + BY_PAIR)
def test_by_distance(line):
    found = program(line, params="t: float[4, 41]")
    assert distance.by_distance(found.mask) == (line in BY_DISTANCE)


@pytest.mark.fuzz
@given(
    expr=st.one_of(strategies.bools(), strategies.floats()),
    binding=bindings(shortest=1),
    by=st.integers(1, 9),
)
def test_what_is_by_distance_moves_with_both_positions(expr, binding, by):
    if not distance.by_distance(expr):
        return
    env = environment(binding)
    moved = {
        name: at + by if name in ("q_idx", "kv_idx") else at for name, at in env.positions.items()
    }
    here = evaluate_unchecked(expr, env)
    there = evaluate_unchecked(expr, replace(env, positions=moved))
    torch.testing.assert_close(
        *torch.broadcast_tensors(here, there), rtol=0, atol=0, equal_nan=True
    )


@given(
    lengths=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    heads=st.sampled_from(((1, 1), (2, 3))),
)
def test_spread_puts_each_distance_at_its_pairs(lengths, heads):
    q_len, kv_len = lengths
    values = torch.randn(*heads, q_len + kv_len - 1)
    queries, keys = (q_len // 3, q_len), (kv_len // 4, kv_len)
    segment = distance.segment(values, q_len, queries, keys)
    found = distance.spread(segment, queries[1] - queries[0], lambda name, size: torch.empty(size))
    for q in range(*queries):
        for kv in range(*keys):
            at = found[..., q - queries[0], kv - keys[0]]
            assert torch.equal(at, values[..., q_len - 1 - (q - kv)])


PROGRAMS = {
    "window": program("mask = q_idx >= kv_idx and q_idx - kv_idx < 40"),
    "both sides": program("mask = abs(q_idx - kv_idx - 7) < 25"),
    "global": program("mask = abs(q_idx - kv_idx) < 20 or kv_idx < 9"),
    "window a head": program(
        "mask = abs(q_idx - kv_idx) < 12 * (h + 1)",
        "score = score + t[h, kv_idx % 41]",
        params="t: float[4, 41] grad",
    ),
    "dilated": program("mask = (q_idx - kv_idx) % 3 == 1 and abs(q_idx - kv_idx) < 60"),
    "causal": program("mask = q_idx >= kv_idx"),
    "linear bias": program(
        "mask = q_idx >= kv_idx",
        "score = score + s[h] * (kv_idx - q_idx)",
        params="s: float[4] grad",
    ),
    "linear bias to both sides": program(
        "mask = true", "score = score - s[h] * (q_idx - kv_idx)", params="s: float[4] grad"
    ),
    "linear bias in a window": program(
        "mask = q_idx >= kv_idx and q_idx - kv_idx < 40",
        "score = score + s[h] * (kv_idx - q_idx)",
        "sink = s[h]",
        params="s: float[4] grad",
    ),
    "bias by distance": program(
        "mask = q_idx >= kv_idx",
        "score = score + t[h, min(q_idx - kv_idx, 40)]",
        params="t: float[4, 41] grad",
    ),
    "bias by distance in documents": program(
        "mask = q_idx >= kv_idx and q_idx // 50 == kv_idx // 50",
        "score = score + t[h, min(q_idx - kv_idx, 40)]",
        params="t: float[4, 41] grad",
    ),
    "bias by distance in a band": program(
        "mask = abs(q_idx - kv_idx) < 20 and kv_idx % 5 != 0",
        "score = score + t[h, min(abs(q_idx - kv_idx), 40)]",
        params="t: float[4, 41] grad",
    ),
    "minus infinity by distance": program(
        "mask = q_idx >= kv_idx", "score = score + log(float(max(q_idx - kv_idx - 3, 0)))"
    ),
    "undefined where dropped": program(
        "mask = q_idx > kv_idx", "score = score + log(float(q_idx - kv_idx))"
    ),
}


def bound(name: str) -> BoundPlan:
    found = PROGRAMS[name]
    rng = torch.Generator().manual_seed(3)
    known = {"s": torch.randn(4, generator=rng), "t": torch.randn(4, 41, generator=rng)}
    arguments = {t.name: known[t.name] for t in found.tensors}
    return BoundPlan(analyze(found), bind_lengths(found, **LENGTHS, arguments=arguments), TILE)


@pytest.mark.parametrize("name", PROGRAMS)
def test_equals_dense(name):
    agree(PROGRAMS[name], bound(name).binding, 4, TILE)


def cut(name: str) -> tuple[Fused | None, list[tuple[Block, Piece]]]:
    """How the fused kernel would go about a program."""
    plan = bound(name)
    q, k, v = (x.detach().float() for x in inputs(plan.binding, 4))
    problem = Problem.of(plan, plan.binding.tensors, tables(plan), q, k, v)
    found = [(block, piece) for block in problem.blocks() for piece in pieces(block)]
    return Fused.of(problem), found


def test_pieces_read_a_bands_keys_only():
    _, found = cut("window")
    piece = next(piece for block, piece in found if block.strip.start == 128)
    assert (piece.start, piece.width, piece.parts) == (80, 80, 4)
    assert piece.mask.shape == (1, 1, 1, 32, 80), "one mask for all parts"


@pytest.mark.parametrize("name", ["window", "both sides", "window a head", "dilated"])
def test_bands_are_cut(name):
    _, found = cut(name)
    assert any(piece.parts > 1 for _, piece in found)


def test_causal_pieces_have_no_mask_to_add():
    _, found = cut("causal")
    assert all(piece.causal for block, piece in found if block.strip.start == piece.start)


@pytest.mark.parametrize(
    ("name", "masked", "by_key"),
    [
        ("linear bias", True, True),
        ("linear bias to both sides", True, True),
        ("bias by distance", True, False),
        ("bias by distance in documents", False, False),
        ("minus infinity by distance", True, False),
    ],
)
def test_distances_are_used(name, masked, by_key):
    fuse, _ = cut(name)
    assert fuse.distances is not None
    assert (fuse.masked, fuse.by_key) == (masked, by_key)


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize(
    "spans", list(product(((0, 30), (3, 60), (90, 8), (90, 60)), repeat=3)), ids=str
)
def test_a_band_holds_all_kept_keys(spans, step):
    """Spans of keys that 32 queries each keep, further on by 32 keys a part or less."""
    kept = torch.zeros(1, 1, BAND * len(spans), 192, dtype=torch.bool)
    for part, (start, width) in enumerate(spans):
        at = part * BAND * step // 3 + start // (1 + step)
        kept[..., part * BAND : (part + 1) * BAND, at : at + width] = True
    band = pieces_of._band(kept)
    if band is None:
        return
    last = (len(spans) - 1) * BAND
    assert band[0] >= 0 and band[1] + last <= 192
    for part in range(len(spans)):
        rows = kept[..., part * BAND : (part + 1) * BAND, :].clone()
        rows[..., band[0] + part * BAND : band[1] + part * BAND] = False
        assert not rows.any()


@pytest.mark.parametrize("name", ["causal", "window", "linear bias", "bias by distance"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_key_that_is_not_finite_reaches_those_that_keep_it_alone(name, bad):
    plan = bound(name)
    q, k, v = (x.detach() for x in inputs(plan.binding, 4))
    k[:, :, 100] = bad
    found = cpu.attention(plan, q, k, v)[0]
    expected = dense.attention(PROGRAMS[name], plan.binding, q, k, v)[0]
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7, equal_nan=True)
    assert not found[:, :, 100:110].isfinite().all() and found[:, :, :100].isfinite().all()
