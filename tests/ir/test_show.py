from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attncc.frontend import parse
from attncc.ir import ops
from attncc.ir.expr import KV_IDX, Q_IDX, Const, Expr, Score, apply, kind
from attncc.ir.ops import Kind
from attncc.ir.program import Normalize, Program
from attncc.ir.show import show
from tests import strategies

NAMES = (
    "window: int, cap: float, on: bool, doc: int[batch, kv_len] sorted, slope: float[heads] grad"
)


def clause_of(text: str) -> Expr:
    """The expression of a mask or score clause over NAMES."""
    try:
        (program,) = parse(f"attention t({NAMES}):\n    mask = {text}\n")
        return program.mask
    except Exception:
        (program,) = parse(f"attention t({NAMES}):\n    score = {text}\n")
        return program.score


@pytest.mark.parametrize(
    "text",
    [
        "q_idx - (kv_idx - window) >= 0",
        "q_idx - kv_idx - window >= 0",
        "(q_idx + kv_idx) * window // 2 % 7 == -1",
        "q_idx // (kv_idx + 1) // 2 >= q_idx // ((kv_idx + 1) // 2)",
        "-q_idx // 2 < -(q_idx // 2)",
        "-(1) + q_idx > -1",
        "-(-1) > q_idx - -1",
        "-(-q_idx) > ~(-q_idx)",
        "not q_idx >= kv_idx and on or not (on or q_idx == 0)",
        "(not on) == on",
        "(q_idx < kv_idx) == (kv_idx < window)",
        "(q_idx < kv_idx) != on",
        "on and (on and on) or (on or on)",
        "on and (on or on)",
        "q_idx & kv_idx | window ^ 3 << (1 << 2) >= 0",
        "(q_idx & (kv_idx | window)) << 2 >> 1 == 0",
        "q_idx & 1 == 0",
        "where(on, q_idx, -1) >= min(q_idx, kv_idx, window) - max(0, min(1, kv_idx))",
        "doc[b, q_idx] == doc[b, min(kv_idx, kv_len - 1)]",
        "cap * tanh(score / cap)",
        "score - (1e-05 + 1e+16 - 0.1)",
        "score + float(int(on)) * slope[h] * (kv_idx - q_idx)",
        "exp2(-8.0 * (h + 1) / heads) + kv_head / kv_heads + head_dim * q_len / batch",
        "score / (cap / cap) / cap",
        "min(score, max(cap, 0.0, slope[h]))",
        "min(score, min(cap, 0.0))",
    ],
)
def test_minimal_text_comes_back(text: str) -> None:
    assert show(clause_of(text)) == text


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("q_idx < kv_idx <= window", "q_idx < kv_idx and kv_idx <= window"),
        ("on & on | on ^ on", "on and on or on != on"),
        ("score ** 3", "score * score * score"),
        ("((q_idx)) >= (kv_idx)", "q_idx >= kv_idx"),
        ("min(min(q_idx, kv_idx), 3) > 0x10", "min(q_idx, kv_idx, 3) > 16"),
        ("- 1 < 1_000", "-1 < 1000"),
        ("not not on", "not not on"),
    ],
)
def test_other_spellings(text: str, printed: str) -> None:
    assert show(clause_of(text)) == printed


def test_names_stand_for_subexpressions() -> None:
    distance = apply(ops.SUB, Q_IDX, KV_IDX)
    expr = apply(ops.MUL, distance, Const(2))
    assert show(expr, {distance: "distance"}) == "distance * 2"


def test_a_long_header_is_broken() -> None:
    names = ", ".join(f"parameter_{i}: int = {i}" for i in range(8))
    (program,) = parse(f"attention wide({names}):\n    mask = true\n")
    assert max(map(len, str(program).split("\n"))) <= 100
    assert parse(str(program)) == (program,)


def test_coordinates_print_as_coordinates() -> None:
    text = (
        "attention grid(width: int):\n"
        "    axes (t: kv_len // (4 * width), y: 4, x: width)\n"
        "    mask = abs(q.x - kv.x) <= 2 and q.y == kv.y and q.t >= kv.t\n"
    )
    (program,) = parse(text)
    assert str(program) == text


def _whole(expr: Expr) -> Program:
    """A program around any expression, declaring every parameter the strategies use."""
    match kind(expr):
        case Kind.BOOL:
            return Program("whole", strategies.PARAMS, mask=expr)
        case Kind.INT:
            return Program("whole", strategies.PARAMS, mask=apply(ops.EQ, expr, Const(0)))
        case Kind.FLOAT:
            return Program("whole", strategies.PARAMS, score=expr)


@pytest.mark.fuzz
@given(
    st.one_of(
        strategies.bools(4, exact=False),
        strategies.ints(4, exact=False),
        strategies.floats(4, exact=False, score=True),
    )
)
def test_expressions_round_trip(expr: Expr) -> None:
    program = _whole(expr)
    assert parse(str(program)) == (program,)


@pytest.mark.fuzz
@given(
    strategies.programs(),
    st.none() | strategies.outputs(),
    st.text("ab #:\t()", max_size=20),
    st.integers(1, 3),
)
def test_programs_round_trip(program: Program, output: Expr | None, line: str, lines: int) -> None:
    commented = replace(program, comment="\n".join([line.rstrip()] * lines))
    if output is not None:
        softmax = {"normalize": Normalize.SOFTMAX}  # which lse needs
        commented = replace(commented, params=strategies.PARAMS, output=output, **softmax)
    (parsed,) = parse(str(commented))
    assert parsed == commented
    assert parsed.comment.split("\n") == commented.comment.split("\n")


def test_clauses_that_say_nothing_are_left_out() -> None:
    assert "score" not in str(Program("full"))
    assert "normalize = none" in str(Program("raw", score=Score(), normalize=Normalize.NONE))
