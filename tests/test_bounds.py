"""Reads and divisions checked at binding, and the width of ints."""

import pytest
import torch

from attncc import bounds
from attncc.backends import dense
from attncc.binding import bind_lengths
from attncc.bounds import check_bounds, checks
from attncc.errors import BoundsError
from attncc.frontend import parse
from attncc.ir import ops
from attncc.ir.ops import Kind
from attncc.numeric import RULES, index_bits
from attncc.passes import analyze


def plan_of(params, *lines):
    (program,) = parse("\n    ".join([f"attention a({params}):", *lines]) + "\n")
    return analyze(program)


def check(plan, q_len=8, kv_len=8, **arguments):
    binding = bind_lengths(plan.program, q_len=q_len, kv_len=kv_len, heads=2, arguments=arguments)
    check_bounds(plan, binding)
    return binding


FINE = {
    "causal distance": (
        ("t: float[n]", "mask = q_idx >= kv_idx", "score = score + t[q_idx - kv_idx]"),
        {"t": torch.zeros(8)},
    ),
    "one axis": (("t: float[n]", "score = score + t[kv_idx // 2]"), {"t": torch.zeros(4)}),
    "kept by where": (
        ("t: float[n]", "score = where(kv_idx < 3, score + t[min(kv_idx, 5)], score)"),
        {"t": torch.zeros(3)},
    ),
    "kept by and": (
        ("t: bool[n]", "mask = q_idx > kv_idx and t[q_idx - kv_idx - 1]"),
        {"t": torch.ones(7, dtype=torch.bool)},
    ),
    "through a tensor": (
        ("at: int[kv_len], t: float[n]", "score = score + t[at[kv_idx]]"),
        {"at": torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), "t": torch.zeros(3)},
    ),
    "clamped score": (
        ("t: float[4]", "score = score + t[min(max(int(score), 0), 3)]"),
        {"t": torch.zeros(4)},
    ),
    "divisor": (("n: int", "mask = q_idx // n == kv_idx // n"), {"n": 2}),
    "guarded divisor": (("n: int", "mask = where(n != 0, q_idx // n > kv_idx, true)"), {"n": 0}),
    "output": (
        ("t: float[q_len]", "mask = true", "output = t[q_idx] * out"),
        {"t": torch.zeros(8)},
    ),
    "clamped out": (
        ("t: float[4]", "mask = true", "output = t[min(max(int(out), 0), 3)]"),
        {"t": torch.zeros(4)},
    ),
    "divisor of one axis": (("", "mask = q_idx // (kv_idx + 1) == 0"), {}),
}

WRONG = {
    "distance": (
        ("t: float[n]", "score = score + t[q_idx - kv_idx]"),
        {"t": torch.zeros(8)},
        "'t' is read at -7..-1 along its axis 0, which has 8 elements",
    ),
    "second axis": (
        ("t: float[heads, n]", "mask = q_idx >= kv_idx", "score = score + t[h, q_idx - kv_idx]"),
        {"t": torch.zeros(2, 6)},
        "'t' is read at 6..7 along its axis 1, which has 6 elements",
    ),
    "through a tensor": (
        ("at: int[kv_len], t: float[n]", "score = score + t[at[kv_idx]]"),
        {"at": torch.tensor([0, 1, 2, 0, 9, 2, 0, 1]), "t": torch.zeros(3)},
        "'t' is read at 9..9 along its axis 0, which has 3 elements",
    ),
    "sink": (
        ("t: float[n]", "mask = true", "sink = t[h]"),
        {"t": torch.zeros(1)},
        "'t' is read at 1..1 along its axis 0, which has 1 elements",
    ),
    "output": (
        ("t: float[n]", "mask = kv_idx < 0", "output = where(q_idx > 0, t[q_idx] * out, 0.0)"),
        {"t": torch.zeros(7)},
        "'t' is read at 7..7 along its axis 0, which has 7 elements",
    ),
    "score": (
        ("t: float[4]", "score = score + t[int(score)]"),
        {"t": torch.zeros(4)},
        "depends on the score is not known before it is used",
    ),
    "out": (
        ("t: float[4]", "mask = true", "output = t[int(out)]"),
        {"t": torch.zeros(4)},
        "depends on out is not known before it is used",
    ),
    "divisor": (
        ("n: int", "mask = q_idx // n == kv_idx"),
        {"n": 0},
        "an integer is divided by zero by '//'",
    ),
    "modulo": (
        ("", "mask = q_idx >= kv_idx and q_idx % (q_idx - kv_idx) == 0"),
        {},
        "an integer is divided by zero by '%'",
    ),
}


@pytest.mark.parametrize("name", FINE)
def test_fine(name):
    lines, arguments = FINE[name]
    check(plan_of(*lines), **arguments)


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name):
    lines, arguments, message = WRONG[name]
    with pytest.raises(BoundsError) as error:
        check(plan_of(*lines), **arguments)
    assert message in str(error.value)
    assert "^" in str(error.value)


@pytest.mark.parametrize("name", [name for name in WRONG if name not in ("score", "out")])
def test_the_dense_interpreter_agrees(name):
    lines, arguments, message = WRONG[name]
    program = plan_of(*lines).program
    binding = bind_lengths(program, q_len=8, kv_len=8, heads=2, arguments=arguments)
    inputs = (torch.zeros(1, 2, 8, 4) for _ in range(3))
    with pytest.raises(BoundsError) as error:
        dense.attention(program, binding, *inputs)
    assert message in str(error.value)


def test_no_pair_no_error():
    plan = plan_of("t: float[n]", "score = score + t[3]")
    check(plan, q_len=0, t=torch.zeros(1))
    check(plan, kv_len=0, t=torch.zeros(1))
    output = plan_of("t: float[n]", "mask = true", "output = out + t[q_idx]")
    check(output, q_len=0, t=torch.zeros(1))
    with pytest.raises(BoundsError, match=r"'t' is read at 1\.\.7"):  # rows have an output without
        check(output, kv_len=0, t=torch.zeros(1))


def test_what_passes_proved_is_not_checked():
    assert checks(plan_of("t: float[heads, kv_len]", "score = score + t[h, kv_idx]")) == ()


def test_an_outcome_is_kept_by_what_it_depends_on(monkeypatch):
    lines, _ = FINE["causal distance"]
    plan, table = plan_of(*lines), torch.zeros(8)
    ran = []
    true_run = bounds._run
    monkeypatch.setattr(bounds, "_run", lambda *args: (ran.append(1), true_run(*args)))
    bounds._passed.clear()
    check(plan, t=table)
    table += 1
    check(plan, t=table)  # the values read do not matter
    check(plan, t=table.clone())
    assert len(ran) == 1
    check(plan, kv_len=7, t=table)
    assert len(ran) == 2

    lines, arguments = FINE["through a tensor"]
    plan = plan_of(*lines)
    check(plan, **arguments)
    check(plan, **arguments)
    before = len(ran)
    arguments["at"][0] = 1
    check(plan, **arguments)
    assert len(ran) > before
    arguments["at"][0] = 8
    with pytest.raises(BoundsError):
        check(plan, **arguments)
    arguments["at"][0] = 0


BITS = [
    (("", "mask = q_idx - kv_idx < 5"), {}, 32),
    (("", "mask = q_idx * 4 > kv_idx"), {}, 32),
    (("w: int", "mask = q_idx + w > kv_idx"), {"w": 2**31 - 1}, 64),
    (("w: int", "mask = kv_idx < w"), {"w": 2**40}, 64),
    (("", "mask = (q_idx << 29) > kv_idx"), {}, 64),
    (("", "mask = (q_idx % 2 << 29) > kv_idx"), {}, 32),
    (("t: int[kv_len]", "mask = t[kv_idx] + 1 > q_idx"), {"t": torch.zeros(8).long()}, 32),
    (("t: int[kv_len]", "mask = t[kv_idx] * 3 > q_idx"), {"t": torch.zeros(8).long()}, 64),
    (("t: int[kv_len]", "mask = t[kv_idx] * 3 > q_idx"), {"t": torch.zeros(8).short()}, 32),
]


@pytest.mark.parametrize("lines, arguments, bits", BITS)
def test_index_bits(lines, arguments, bits):
    plan = plan_of(*lines)
    assert index_bits(plan, check(plan, **arguments)) == bits


def test_the_interval_table_is_total():
    ints = {op for op in ops.OPS if op.kind((Kind.INT,) * op.arity) is Kind.INT}
    assert set(RULES) == ints
