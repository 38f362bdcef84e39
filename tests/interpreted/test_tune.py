import pytest
import torch

import attncc
from attncc.backends.triton import schedules
from attncc.backends.triton import tune as tuning
from attncc.backends.triton.configs import KERNELS, Config
from attncc.backends.triton.tune import Tuned
from attncc.settings import settings

WINDOW = """
attention window(width: int, bias: float[H] grad):
    mask = kv_idx <= q_idx and q_idx - kv_idx < width
    score = score + bias[h] * (kv_idx - q_idx)
"""


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNCC_CACHE_DIR", str(tmp_path))
    settings.cache_clear()
    schedules.database.cache_clear()
    yield
    settings.cache_clear()
    schedules.database.cache_clear()


@pytest.fixture
def call(monkeypatch):
    two = Config(16, 16, 4, 1), Config(32, 16, 4, 1)
    monkeypatch.setattr(tuning, "candidates", lambda *_: iter(two))
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 40, 16, generator=rng) for heads in (2, 1, 1))
    return (q, k, v), {"width": 9, "bias": torch.tensor([0.1, 0.2])}


def test_winners_are_right_kept_and_used(call, monkeypatch):
    inputs, params = call
    attention = attncc.compile(WINDOW)
    found = attention.tune(*inputs, **params)
    assert [choice.kernel for choice in found.choices] == list(KERNELS)
    assert all(c.failed == 0 and c.timed == 3 and not c.wrong for c in found.choices)
    assert not found.not_kept
    for line, choice in zip(str(found).splitlines(), found.choices, strict=True):
        pasted = line.partition("=")[2].split("  ")[0]
        assert Config.parse(pasted) == choice.config
    assert len(schedules.database()) == 3
    monkeypatch.setattr(schedules, "default", lambda *_: pytest.fail("the default was asked for"))
    out = attention(*inputs, backend="triton", **params)
    torch.testing.assert_close(out, attention.reference(*inputs, **params), atol=1e-5, rtol=1e-5)


def test_schedules_that_fail_are_survived_and_wrong_ones_refused(call, monkeypatch):
    inputs, params = call
    start = tuning.Launch.start

    def flawed(self):
        if self.arguments["BLOCK_M"] == 16:
            raise RuntimeError("no such instruction")
        start(self)
        if self.arguments["BLOCK_M"] == 32 and self.arguments["BLOCK_N"] == 16:
            self.arguments["out_ptr"][0, 0, 3] += 1

    monkeypatch.setattr(tuning.Launch, "start", flawed)
    monkeypatch.setattr(tuning, "median", lambda launch, _: launch.arguments["BLOCK_N"])
    attention = attncc.compile(WINDOW)
    (choice,) = attention.tune(*inputs, kernels=("forward",), **params).choices
    assert choice.config == choice.default
    assert choice.failed == 1
    assert choice.wrong == (Config(32, 16, 4, 1),)
    assert "# forward=32x16,warps=4,stages=1 was quicker" in str(Tuned((choice,)))


def test_a_database_that_cannot_be_written_is_said(call, monkeypatch):
    def refused(record):
        raise OSError("read-only file system")

    monkeypatch.setattr(tuning.tuned, "store", refused)
    inputs, params = call
    found = attncc.compile(WINDOW).tune(*inputs, kernels=("forward",), **params)
    assert "read-only file system" in str(found)


def test_weights_that_are_not_a_softmax_have_no_delta_to_start(call):
    inputs, _ = call
    attention = attncc.compile("attention f():\n    mask = true\n    normalize = sigmoid")
    found = attention.tune(*inputs, kernels=("backward_q",))
    assert not found.choices[0].wrong
    assert found.choices[0].failed == 0


def test_no_queries_leave_nothing_to_tune(call):
    (q, k, v), params = call
    assert (
        not attncc.compile(WINDOW).tune(q[:, :, :0], k, v, kernels=("forward",), **params).choices
    )
