"""Ranges are printed into kernels, so they must read as a person would write them."""

import pytest

from attncc.frontend import parse
from attncc.ir.plan import Blocks, Order, Plan, Segment
from attncc.ir.show import show
from attncc.passes import analyze

PARAMS = (
    "window: int, sinks: int, prefix: int, bs: int, doc: int[batch, kv_len], retr: bool[kv_heads], "
    "seq: int[batch, kv_len] sorted, end: int[n] sorted"
)
CAUSAL = "q_idx >= kv_idx"
SAME = "seq[b, q_idx] == seq[b, kv_idx]"


def plan_of(mask: str) -> Plan:
    (program,) = parse(f"attention t({PARAMS}):\n    mask = {mask}\n")
    return analyze(program)


def text(segments: tuple[Segment, ...]) -> str:
    return " + ".join(f"[{show(s.lo)}, {show(s.hi)})" for s in segments)


@pytest.mark.parametrize(
    ("mask", "visit", "unmasked"),
    [
        ("true", "[0, kv_len)", "[0, kv_len)"),
        (CAUSAL, "[0, min(q_last + 1, kv_len))", "[0, min(q_lo + 1, kv_len))"),
        (
            f"{CAUSAL} and q_idx - kv_idx < window",
            "[max(0, q_lo - window + 1), min(q_last + 1, kv_len))",
            "[max(0, q_last - window + 1), min(q_lo + 1, kv_len))",
        ),
        (
            f"{CAUSAL} and (q_idx - kv_idx < window or kv_idx < sinks)",
            "[0, min(q_last + 1, sinks, kv_len)) + "
            "[max(0, q_lo - window + 1), min(q_last + 1, kv_len))",
            "[0, min(q_lo + 1, sinks, kv_len)) + "
            "[max(0, q_last - window + 1), min(q_lo + 1, kv_len))",
        ),
        (
            f"{CAUSAL} or kv_idx < prefix",
            "[0, min(max(q_last + 1, prefix), kv_len))",
            "[0, min(max(q_lo + 1, prefix), kv_len))",
        ),
        (
            "abs(q_idx - kv_idx) <= window",
            "[max(0, q_lo - window), min(q_last + window + 1, kv_len))",
            "[max(0, q_last - window), min(q_lo + window + 1, kv_len))",
        ),
        (
            "kv_idx < (q_idx // 512 + 1) * 512",
            "[0, min(q_last // 512 * 512 + 512, kv_len))",
            "[0, min(q_lo // 512 * 512 + 512, kv_len))",
        ),
        (
            "kv_idx < (q_idx // bs + 1) * bs",
            "[0, min(where(bs > 0, (q_last // bs + 1) * bs, kv_len), kv_len))",
            "[0, min(where(bs > 0, (q_lo // bs + 1) * bs, 0), kv_len))",
        ),
        (
            f"{CAUSAL} and (retr[kv_head] or q_idx - kv_idx < window)",
            "[where(retr[kv_head], 0, max(0, q_lo - window + 1)), min(q_last + 1, kv_len))",
            "[where(retr[kv_head], 0, max(0, q_last - window + 1)), min(q_lo + 1, kv_len))",
        ),
        (
            "2 * kv_idx <= q_idx + 8 and q_idx < 100",
            "[0, where(q_lo < 100, min(q_last // 2 + 5, kv_len), 0))",
            "[0, where(q_last < 100, min(q_lo // 2 + 5, kv_len), 0))",
        ),
        (
            "q_idx - q_idx % 256 >= kv_idx",
            "[0, min(q_last // 256 * 256 + 1, kv_len))",
            "[0, min(q_lo // 256 * 256 + 1, kv_len))",
        ),
        (
            SAME,
            "[max(0, first_key_0[b, q_lo]), min(past_key_0[b, q_last], kv_len))",
            "[max(0, first_key_0[b, q_last]), min(past_key_0[b, q_lo], kv_len))",
        ),
        (
            f"{SAME} and {CAUSAL}",  # past_key_0 lies past the query itself, so it says nothing
            "[max(0, first_key_0[b, q_lo]), min(q_last + 1, kv_len))",
            "[max(0, first_key_0[b, q_last]), min(q_lo + 1, kv_len))",
        ),
        (
            f"{SAME} and kv_idx < (q_idx // 512 + 1) * 512",
            "[max(0, first_key_0[b, q_lo]), "
            "min(past_key_0[b, q_last], q_last // 512 * 512 + 512, kv_len))",
            "[max(0, first_key_0[b, q_last]), "
            "min(past_key_0[b, q_lo], q_lo // 512 * 512 + 512, kv_len))",
        ),
        (
            "kv_idx < end[seq[b, q_idx]]",
            "[0, min(end[seq[b, q_last]], kv_len))",
            "[0, min(end[seq[b, q_lo]], kv_len))",
        ),
    ],
)
def test_key_ranges(mask: str, visit: str, unmasked: str) -> None:
    plan = plan_of(mask)
    assert plan.key_ranges is not None and plan.key_ranges.complete
    assert text(plan.key_ranges.visit) == visit
    assert text(plan.key_ranges.unmasked) == unmasked
    assert plan.blocks is Blocks.RANGES


@pytest.mark.parametrize(
    ("mask", "visit", "unmasked"),
    [
        (CAUSAL, "[kv_lo, q_len)", "[kv_last, q_len)"),
        (
            f"{CAUSAL} and q_idx - kv_idx < window",
            "[kv_lo, min(kv_last + window, q_len))",
            "[kv_last, min(kv_lo + window, q_len))",
        ),
        (
            f"{CAUSAL} or kv_idx < prefix",
            "[where(kv_lo < prefix, 0, kv_lo), q_len)",
            "[where(kv_last < prefix, 0, kv_last), q_len)",
        ),
        (
            "kv_idx < (q_idx // 512 + 1) * 512",
            "[kv_lo // 512 * 512, q_len)",
            "[kv_last // 512 * 512, q_len)",
        ),
        (
            f"{SAME} and {CAUSAL}",
            "[kv_lo, min(past_query_0[b, kv_last], q_len))",
            "[kv_last, min(past_query_0[b, kv_lo], q_len))",
        ),
        (
            "kv_idx < end[q_idx // 8]",
            "[max(0, first_query_0[kv_lo] * 8), q_len)",
            "[max(0, first_query_0[kv_last] * 8), q_len)",
        ),
    ],
)
def test_query_ranges(mask: str, visit: str, unmasked: str) -> None:
    ranges = plan_of(mask).query_ranges
    assert ranges is not None and ranges.complete
    assert text(ranges.visit) == visit
    assert text(ranges.unmasked) == unmasked


@pytest.mark.parametrize(
    ("mask", "blocks"),
    [
        ("doc[b, q_idx] == doc[b, kv_idx]", Blocks.LISTS),
        (SAME, Blocks.RANGES),
        (f"{SAME} and ({CAUSAL} or kv_idx < prefix)", Blocks.RANGES),
        (f"seq[b, q_idx] // 4 >= seq[b, kv_idx] // 4 and {CAUSAL}", Blocks.RANGES),
        ("seq[b, q_idx] == seq[b, kv_idx] % 4", Blocks.LISTS),
        ("seq[b, q_idx] == doc[b, kv_idx]", Blocks.LISTS),
        (f"seq[b, q_idx] != 0 and seq[b, kv_idx] == 0 or {SAME} and {CAUSAL}", Blocks.LISTS),
        (f"{CAUSAL} and (q_idx - kv_idx) % 4 == 0", Blocks.RANGES),
        (f"{CAUSAL} and (q_idx - kv_idx) % 65 == 0", Blocks.LISTS),
        (f"{CAUSAL} and (q_idx - kv_idx) % window == 0", Blocks.LISTS),
        (f"{CAUSAL} and kv_idx // 64 % 4 == 0", Blocks.LISTS),
        ("kv_idx < 8 or kv_idx > 30 and kv_idx < 40 or kv_idx > 90", Blocks.LISTS),
    ],
)
def test_blocks(mask: str, blocks: Blocks) -> None:
    assert plan_of(mask).blocks is blocks


def test_lists_are_made_without_searches() -> None:
    plan = plan_of(f"{SAME} and doc[b, kv_idx] == 0")
    assert plan.blocks is Blocks.LISTS and not plan.searches


def test_no_search_takes_a_parameters_name() -> None:
    params = "first_key_0: int[kv_len] sorted, past_key_0: int"
    mask = "first_key_0[q_idx] == first_key_0[kv_idx] + past_key_0 and kv_idx > 3"
    (program,) = parse(f"attention t({params}):\n    mask = {mask}\n")
    names = {search.tensor.name for search in analyze(program).searches}
    assert len(names) == 4 and names.isdisjoint(p.name for p in program.params)


@pytest.mark.parametrize(
    ("mask", "query_order", "key_order"),
    [
        ("true", Order.NATURAL, Order.NATURAL),
        (CAUSAL, Order.REVERSED, Order.NATURAL),
        ("q_idx <= kv_idx", Order.NATURAL, Order.REVERSED),
        (f"{CAUSAL} and q_idx - kv_idx < window", Order.NATURAL, Order.NATURAL),
        (f"{CAUSAL} or kv_idx < prefix", Order.REVERSED, Order.NATURAL),
        ("kv_idx < (q_idx // bs + 1) * bs", Order.REVERSED, Order.NATURAL),
        ("doc[b, q_idx] == doc[b, kv_idx]", Order.BY_WORK, Order.NATURAL),
    ],
)
def test_order(mask: str, query_order: Order, key_order: Order) -> None:
    plan = plan_of(mask)
    assert (plan.query_order, plan.key_order) == (query_order, key_order)
