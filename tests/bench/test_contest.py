import json
from functools import partial

import pytest
import torch

from attncc.bench import contest
from attncc.bench.cases import Asked
from attncc.bench.contestants import Contestant, LeftOut, makers
from attncc.frontend import load
from attncc.inputs import Lengths

CPU = torch.device("cpu")
TEXT = """
attention x(doc: int[kv_len] sorted):
    mask = q_idx >= kv_idx and doc[q_idx] == doc[kv_idx]
"""


@pytest.fixture
def problem():
    return Asked(load(TEXT), Lengths(1, 2, 1, 96, 96, 16)).problem(CPU, torch.float32)


def absent(problem):
    raise LeftOut("is not here")


def failing(problem):
    raise ValueError("no\n  kernel")


def wrong(problem):
    right = makers()["attncc"](problem)
    return Contestant(lambda q, k, v: 2 * right.call(q, k, v), right.inputs, right.dout)


def dying(problem):
    """Right until it is timed."""
    right, calls = makers()["attncc"](problem), iter(range(1000))

    def call(q, k, v):
        if next(calls) > 3:
            raise MemoryError("spent")
        return right.call(q, k, v)

    return Contestant(call, right.inputs, right.dout)


def test_only_who_is_right_is_timed(problem):
    own = {name: makers()[name] for name in ("attncc", "sdpa")}
    entering = {"flex": failing, "cudnn": absent, "flash": wrong, "varlen": dying, **own}
    found = contest.contest(problem, entering)
    times = contest.timed(found, rounds=2, rep=1)
    record = contest.result(found, times)
    assert set(record["results"]) == {"attncc", "sdpa"}
    assert record["left_out"] == {"cudnn": "is not here"}
    assert record["failed"] == {"flex": "ValueError: no kernel", "varlen": "MemoryError: spent"}
    assert record["wrong"]["flash"].startswith("out[0, 0] is off by 1 in norm")
    assert json.loads(json.dumps(record)) == record


def test_a_record_has_speeds_of_kept_pairs_and_costs(problem):
    found = contest.contest(problem, {"attncc": makers()["attncc"]}, tiny=problem)
    record = contest.result(found, contest.timed(found, rounds=3, rep=1))
    own = record["results"]["attncc"]
    assert own["plan_ms"] >= 0 and own["forward_host_us"] > 0 < own["backward_host_us"]
    assert "peak_MiB" not in own, "a CPU has no counter of it"
    for direction, products in (("forward", 2), ("backward", 5)):
        of = own[direction]
        assert len(of["rounds_ms"]) == 3
        flops = products * 2 * problem.pairs * 16
        assert of["tflops"] == pytest.approx(flops / of["ms"] / 1e9)
    assert record["shape"] == "B1 H2/1 N96 D16" and record["dtype"] == "float32"


def test_turns_are_taken_in_every_round(problem, monkeypatch):
    found = contest.contest(problem, {name: makers()[name] for name in ("attncc", "sdpa")})
    names = {id(made): name for name, made in found.contestants.items()}
    turns = []

    def milliseconds(call, rep, device):
        method = call.func if isinstance(call, partial) else call
        turns.append((names[id(method.__self__)], method.__name__))
        return 1.0

    monkeypatch.setattr(contest, "milliseconds", milliseconds)
    contest.timed(found, rounds=2, rep=1)
    both = "forward", "backward"
    assert turns == [(name, way) for name in ("attncc", "sdpa") for way in both] * 2


def test_without_gradients_there_is_no_backward(problem):
    with torch.no_grad():
        found = contest.contest(problem, {"attncc": makers()["attncc"]})
        assert set(contest.timed(found, rounds=1, rep=1)["attncc"]) == {"forward"}


def test_a_turn_takes_its_milliseconds():
    calls = []
    assert 0 < contest.milliseconds(lambda: calls.append(sum(range(1000))), 5, CPU) < 5
    assert len(calls) > 3
