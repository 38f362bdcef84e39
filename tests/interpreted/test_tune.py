import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.progress import Progress

import attncc
from attncc.backends.gluon import configs as gluon
from attncc.backends.gluon.launch import schedule
from attncc.backends.triton import configs, schedules
from attncc.backends.triton.configs import KERNELS, Config
from attncc.backends.triton.launch import Run
from attncc.errors import UnsupportedError
from attncc.settings import settings
from attncc.tuning import search, trials
from attncc.tuning.search import Tuned
from attncc.tuning.trials import Failed, Worker
from tests.interpreted.simulated import simulated

WINDOW = """
attention window(width: int, bias: float[H] grad):
    mask = kv_idx <= q_idx and q_idx - kv_idx < width
    score = score + bias[h] * (kv_idx - q_idx)
"""

HANGS, DIES, RIGHT, WRONG, ELSEWHERE = (Config(16, n, 4, 1) for n in (16, 32, 64, 128, 256))
"""What `flawed` makes of schedules."""


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNCC_CACHE_DIR", str(tmp_path / "cache"))
    settings.cache_clear()
    schedules.database.cache_clear()
    yield
    settings.cache_clear()
    schedules.database.cache_clear()


@pytest.fixture
def call(monkeypatch):
    candidates(monkeypatch, Config(16, 16, 4, 1), Config(32, 16, 4, 1))
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 40, 16, generator=rng) for heads in (2, 1, 1))
    return (q, k, v), {"width": 9, "bias": torch.tensor([0.1, 0.2])}


@pytest.fixture
def flawed(monkeypatch):
    monkeypatch.setattr(Worker, "module", "tests.interpreted.flawed")
    monkeypatch.setattr(search, "COLD", 10.0)
    monkeypatch.setattr(search, "INTERPRETED", 5)


def candidates(monkeypatch, *found):
    monkeypatch.setattr(configs, "candidates", lambda *_: iter(found))


def usual(monkeypatch, config):
    """Makes it the default."""
    monkeypatch.setattr(configs, "default", lambda *_: config)


def test_winners_are_right_kept_and_used(call, monkeypatch):
    inputs, params = call
    attention = attncc.compile(WINDOW)
    found = attention.tune(*inputs, **params)
    assert [choice.kernel for choice in found.choices] == list(KERNELS)
    assert all(not c.failed and c.timed == 3 and not c.wrong for c in found.choices)
    assert not found.not_kept
    for line, choice in zip(str(found).splitlines(), found.choices, strict=True):
        pasted = line.partition("=")[2].split("  ")[0]
        assert Config.parse(pasted) == choice.config
    assert len(schedules.database()) == 3
    won = {choice.kernel: choice.config for choice in found.choices}
    run = attention.plan(*inputs, **params)
    q, _, v = inputs
    for kernel in KERNELS:
        record = schedules.database()[schedules.key(kernel, run.plan, run.binding, q, v)]
        assert schedules.config_of(record) == won[kernel]
    out = attention(*inputs, backend="triton", **params)
    torch.testing.assert_close(out, attention.reference(*inputs, **params), atol=1e-5, rtol=1e-5)


def test_warp_specialised_kernels_are_tuned_where_a_call_runs_them(call, monkeypatch):
    inputs, _ = call
    monkeypatch.setattr(Worker, "module", "tests.interpreted.simulated")
    heads = Config(128, 128, 8, 2, heads=1)
    given = {"gluon_forward": [Config(192, 64, 12, 3), heads], "gluon_backward": []}
    monkeypatch.setattr(gluon, "candidates", lambda kernel, *_: given[kernel])
    attention = attncc.compile("attention near():\n    mask = abs(q_idx - kv_idx) < 30")
    with simulated():
        found = attention.tune(*inputs)
        assert [choice.kernel for choice in found.choices] == list(gluon.KERNELS)
        assert [choice.timed for choice in found.choices] == [3, 1]
        assert not any(choice.failed or choice.wrong for choice in found.choices)
        bound = attention.plan(*inputs)
        for choice in found.choices:
            best = schedule(Run(bound, 1.0), choice.kernel, inputs[0], inputs[2])
            assert best == choice.config


def test_schedules_that_hang_die_or_are_wrong_cost_only_themselves(call, flawed, monkeypatch):
    inputs, params = call
    usual(monkeypatch, Config(32, 64, 4, 1))
    candidates(monkeypatch, HANGS, DIES, RIGHT, WRONG, ELSEWHERE)
    begun = time.monotonic()
    attention = attncc.compile(WINDOW)
    found = attention.tune(*inputs, kernels=("forward",), **params)
    (choice,) = found.choices
    assert choice.config in (RIGHT, choice.default)
    assert choice.failed.keys() == {HANGS, DIES}
    assert choice.failed[HANGS] == "no answer within 10 s"
    assert choice.failed[DIES] == "its process was ended by SIGKILL"
    assert choice.wrong.keys() == {WRONG, ELSEWHERE}
    assert "out is off" in choice.wrong[WRONG]
    assert choice.wrong[ELSEWHERE] == "it differs from the default in out"
    assert f"# forward={WRONG} was quicker, but out is off" in str(found)
    assert [schedules.config_of(r) for r in schedules.database().values()] == [choice.config]
    assert time.monotonic() - begun < 100


def compiled(call, seconds, *configs):
    """How long a trial of each may take after all were compiled for a GPU, and which failed."""
    inputs, params = call
    device = SimpleNamespace(device=torch.device("cuda"))
    space = SimpleNamespace(kernel="forward", q=device, candidates=lambda: [RIGHT, *configs])
    bound = attncc.compile(WINDOW).plan(*inputs, **params)
    with Worker(trials.job(bound, *inputs)) as worker:
        found = search._Search(space, worker, seconds / search.COMPILING, Progress(disable=True))
        worker.start()
        found.begun = time.monotonic()
        return found._compiled(HANGS), found.failed


def test_compilers_that_fail_hang_or_die_leave_the_rest_to_be_tried(call, flawed, monkeypatch):
    monkeypatch.setattr(search, "COLD", 3.0)
    monkeypatch.setattr(search, "WARM", 1.0)
    found, failed = compiled(call, 20.0, ELSEWHERE, WRONG)
    assert found == {RIGHT: 1.0, WRONG: 1.0}
    assert failed == {ELSEWHERE: "RuntimeError: no such layout"}
    found, failed = compiled(call, 20.0, DIES)
    assert found in ({RIGHT: 1.0, DIES: 3.0}, {RIGHT: 3.0, DIES: 3.0})
    assert not failed
    hangs = replace(HANGS, num_stages=2)
    found, failed = compiled(call, 1.0, hangs)
    assert found[hangs] == 3.0
    assert not failed


def test_a_default_that_is_wrong_is_said_and_nothing_kept(call, flawed, monkeypatch):
    inputs, params = call
    usual(monkeypatch, WRONG)
    candidates(monkeypatch, RIGHT)
    with pytest.raises(UnsupportedError, match=r"no schedule of forward .* out is off"):
        attncc.compile(WINDOW).tune(*inputs, kernels=("forward",), **params)
    assert not schedules.database()


def test_a_default_that_dies_is_said(call, flawed, monkeypatch):
    inputs, params = call
    usual(monkeypatch, DIES)
    with pytest.raises(
        UnsupportedError, match=r"16x32,.* the default, cannot be timed: .* SIGKILL"
    ):
        attncc.compile(WINDOW).tune(*inputs, kernels=("forward",), **params)


def test_a_child_that_is_gone_is_replaced_and_ends_with_its_worker(call):
    (q, k, v), params = call
    bound = attncc.compile(WINDOW).plan(q, k, v, **params)
    config = Config(16, 16, 4, 1)
    with Worker(trials.job(bound, q, k, v)) as worker:
        assert worker.ask("glance", "forward", config, seconds=60) > 0
        first, _ = worker._child
        first.kill()
        first.wait()
        assert worker.ask("check", "backward_q", config, config, seconds=60) == ""
        second, _ = worker._child
        with pytest.raises(Failed, match="AttributeError"):
            worker.ask("nonsense", "forward", config, seconds=60)
        assert worker.ask("glance", "forward", config, seconds=60) > 0
        assert worker._child[0] is second, "an error does not end a child"
    assert second.poll() is not None


def test_a_child_that_does_not_start_is_said(call, monkeypatch):
    inputs, params = call
    monkeypatch.setattr(Worker, "module", "attncc.no_such_module")
    with pytest.raises(UnsupportedError, match="does not start: its process ended with 1"):
        attncc.compile(WINDOW).tune(*inputs, **params)


def test_inputs_keep_their_layout():
    q = torch.randn(1, 40, 3, 2, 16).permute(2, 0, 3, 1, 4)
    bound = attncc.compile("attention f():\n    mask = true").plan(*q)
    given = trials.Trials(trials.job(bound, *q)).bench
    for mine, its in zip(q, (given.q, given.k, given.v), strict=True):
        assert torch.equal(mine, its)
        assert mine.stride() == its.stride()
        assert mine.storage_offset() == its.storage_offset()
    assert given.q.untyped_storage().data_ptr() == given.v.untyped_storage().data_ptr()


def test_a_database_that_cannot_be_written_is_said(call, monkeypatch):
    def refused(record):
        raise OSError("read-only file system")

    monkeypatch.setattr(search.tuned, "store", refused)
    inputs, params = call
    found = attncc.compile(WINDOW).tune(*inputs, kernels=("forward",), **params)
    assert "read-only file system" in str(found)


def test_weights_that_are_not_a_softmax_have_no_delta_to_start(call):
    inputs, _ = call
    attention = attncc.compile("attention f():\n    mask = true\n    normalize = sigmoid")
    found = attention.tune(*inputs, kernels=("backward_q",))
    assert not found.choices[0].wrong
    assert not found.choices[0].failed


def test_no_queries_leave_nothing_to_tune(call):
    (q, k, v), params = call
    found = attncc.compile(WINDOW).tune(q[:, :, :0], k, v, kernels=("forward",), **params)
    assert found == Tuned(())


def test_gradients_that_cancel_to_nothing_are_no_mistake(call):
    inputs, params = call
    found = attncc.compile(WINDOW).tune(*inputs, kernels=("backward_q",), **params | {"width": 1})
    assert not found.choices[0].wrong
