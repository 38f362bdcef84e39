import time
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

import attncc
from attncc import tuned
from attncc.backends import dense
from attncc.backends.gluon import configs as gluon
from attncc.backends.gluon import launch as gluon_launch
from attncc.backends.triton import launch, schedules
from attncc.backends.triton.configs import (
    KERNELS,
    Config,
    Shape,
    Traits,
    candidates,
    default,
    fits,
    padded,
    smaller,
)
from attncc.errors import ArgumentError, UnsupportedError
from attncc.inputs import Lengths, captured
from attncc.ir.plan import Blocks
from attncc.settings import settings
from attncc.tuning import trials
from attncc.tuning.bench import Bench
from attncc.tuning.sample import Sample
from attncc.tuning.search import FINALISTS, Choice, Tuned, distance

CAUSAL = "attention causal():\n    mask = kv_idx <= q_idx"
WINDOW = "attention window(width: int):\n    mask = abs(q_idx - kv_idx) < width"

LIMITS = {"A100": 163 * 1024, "H100": 227 * 1024, "RTX 4090": 99 * 1024}
SHAPES = [
    Shape(padded(dim), padded(value), itemsize, limit)
    for dim, value in [*((d, d) for d in (16, 17, 64, 80, 128, 192, 256)), (64, 256), (192, 128)]
    for itemsize, limit in product((2, 4), LIMITS.values())
]


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNCC_CACHE_DIR", str(tmp_path / "cache"))
    settings.cache_clear()
    schedules.database.cache_clear()
    yield tmp_path / "cache"
    settings.cache_clear()
    schedules.database.cache_clear()


def run(text: str = CAUSAL, q_len: int = 100, heads: int = 4, **params: object) -> launch.Run:
    plan = attncc.compile(text).plan(q_len=q_len, kv_len=100, heads=heads, kv_heads=2, **params)
    return launch.Run(plan, 1.0)


def inputs(dtype: torch.dtype = torch.bfloat16, dim: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(1, 4, 100, dim, dtype=dtype), torch.empty(1, 2, 100, dim, dtype=dtype)


def key(run: launch.Run, kernel: str = "forward", **made: object) -> tuned.Key:
    return schedules.key(kernel, run.bound.plan, run.bound.binding, *inputs(**made))


# -- schedules as text


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_schedule_reads_back(kernel):
    for config in candidates(kernel, Shape(128, 128, 2)):
        assert Config.parse(str(config)) == config
    assert Config.parse(" 64x128, warps=4, stages=3 ") == Config(64, 128, 4, 3)


@pytest.mark.parametrize(
    "text",
    [
        "", "64", "64x64", "64x64,warps=4", "48x64,warps=4,stages=2", "64x64,warps=3,stages=2",
        "64x64,warps=4,stages=0", "8x64,warps=4,stages=1", "64x64,warps=4,stages=2,x",
        "9" * 5000 + "x64,warps=4,stages=2", "64x64,warps=-4,stages=2",
    ],
)  # fmt: skip
def test_what_is_no_schedule_says_what_one_is(text):
    with pytest.raises(ArgumentError, match="128x64,warps=8,stages=3"):
        Config.parse(text)


def test_a_result_prints_lines_to_paste():
    choice = Choice("forward", Config(64, 64, 4, 3), 0.3124, Config(128, 64, 4, 2), 0.3301)
    line = "forward=64x64,warps=4,stages=3  312.4 us (default 330.1 us)"
    assert str(Tuned((choice, choice))) == f"{line}\n{line}"


# -- candidates and defaults


@pytest.mark.parametrize("kernel", KERNELS)
def test_candidates_fit_and_are_legal(kernel):
    for shape in SHAPES:
        found = list(candidates(kernel, shape))
        assert found, shape
        assert len(found) == len(set(found))
        assert all(c.legal and fits(kernel, c, shape) for c in found)


@pytest.mark.parametrize("kernel", KERNELS)
def test_defaults_fit_every_head_dim(kernel):
    limits = LIMITS.values()
    for dim, itemsize, limit, ampere in product(range(16, 257), (2, 4), limits, (False, True)):
        shape = Shape(padded(dim), padded(dim), itemsize, limit, ampere)
        for plain, short in product((False, True), repeat=2):
            config = default(kernel, shape, Traits(plain, short))
            assert config.legal, (shape, config)
            assert fits(kernel, config, shape), (shape, config)


def test_smaller_ends():
    config, steps = Config(128, 128, 8, 4), 0
    while (less := smaller(config)) is not None:
        config, steps = less, steps + 1
    assert config == Config(16, 16, 8, 1)
    assert steps == 9


def test_distance_counts_halvings():
    assert distance(Config(64, 64, 4, 2), Config(64, 64, 4, 2)) == 0
    assert distance(Config(128, 32, 8, 3), Config(64, 64, 4, 2)) == 4


# -- the database


def test_keys_tell_apart_what_moves_the_best_schedule():
    base = run()
    others = [
        key(base, "backward_q"),
        key(base, dtype=torch.float16),
        key(base, dim=80),
        key(run(q_len=300)),
        key(run(heads=8)),
        key(run(WINDOW, width=3)),
        replace(key(base), triton="0.0"),
        replace(key(base), attncc="0.0"),
    ]
    assert len({key(base), *others}) == 1 + len(others)


def test_keys_are_equal_for_lengths_that_round_up_alike():
    assert key(run(q_len=65)) == key(run(q_len=128))
    assert key(run(q_len=64)) != key(run(q_len=65))
    assert key(run(WINDOW, width=3)) == key(run(WINDOW, width=50))
    assert "heads4 group2" in key(run()).shape


def test_a_run_takes_what_was_tuned_for_calls_like_it():
    q, v = inputs()
    usual = run().config("forward", q, v)
    best = Config(32, 32, 4, 1)
    assert usual != best
    tuned.store(schedules.record(key(run()), best, 0.1))
    schedules.database.cache_clear()
    assert run().config("forward", q, v) == best
    assert run(q_len=300).config("forward", q, v) == usual
    given = launch.Run(run().bound, 1.0, configs={"forward": usual})
    assert given.config("forward", q, v) == usual


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4},
        {"BLOCK_M": 63, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 0, "num_stages": 2},
        {"BLOCK_M": 256, "BLOCK_N": 256, "num_warps": 4, "num_stages": 8},
    ],
)
def test_records_that_no_kernel_could_run_with_are_passed_over(config):
    tuned.store(tuned.Record(key(run()), config, 0.1))
    schedules.database.cache_clear()
    shape, traits = Shape(64, 64, 2), launch.traits(run().bound.plan)
    assert run().config("forward", *inputs()) == default("forward", shape, traits)


def test_a_database_that_cannot_be_read_fails_no_call(cache_dir, monkeypatch):
    cache_dir.mkdir(mode=0o700)
    tuned.path().mkdir()
    assert run().config("forward", *inputs())
    cache_dir.chmod(0o777)  # refused, for others could write to it
    schedules.database.cache_clear()
    assert run().config("forward", *inputs())


def test_the_choice_is_told_at_debug_level_1(monkeypatch, capsys):
    monkeypatch.setenv("ATTNCC_DEBUG", "1")
    settings.cache_clear()
    schedules._tell.cache_clear()
    run().config("forward", *inputs())
    run().config("forward", *inputs())
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "causal" in told[0]
    assert "by default" in told[0]


# -- compiling


class Compilation:
    """Stands for a Launch."""

    def __init__(self, seconds: float = 0.0, error: str = "") -> None:
        self.seconds, self.error = seconds, error

    def compile(self) -> None:
        time.sleep(self.seconds)
        if self.error:
            raise RuntimeError(self.error)


def finished(compilations, seconds):
    """Numbers of those that were compiled, and what failed, as a child tells it."""
    known = object.__new__(trials.Trials)
    known.device, known.seconds = torch.device("cpu"), seconds
    known._launch = lambda kernel, config: compilations[config.num_stages - 1]
    configs = [Config(16, 16, 4, stages) for stages in range(1, 1 + len(compilations))]
    return sorted(known.compile("forward", *configs))


def test_compilations_fail_alone():
    found = finished([Compilation(), Compilation(error="no such layout"), Compilation()], 10)
    assert found == [(0, ""), (1, "RuntimeError: no such layout"), (2, "")]


def test_no_compilation_is_begun_after_the_budget(monkeypatch):
    monkeypatch.setattr(trials, "_workers", lambda: 1)
    begun = time.monotonic()
    late = [Compilation(), Compilation(0.3), Compilation(60), Compilation(60)]
    assert finished(late, 0.1) == [(0, ""), (1, "")]
    assert time.monotonic() - begun < 10


# -- warp-specialised kernels


def plan_of(name: str):
    return attncc.compile(Path(f"examples/{name}.attn")).static


@pytest.mark.parametrize("name", ["causal", "packed", "share_question", "alibi"])
@pytest.mark.parametrize("kernel", gluon.KERNELS)
def test_warp_specialised_candidates_fit_and_are_legal(name, kernel):
    plan = plan_of(name)
    dims = gluon.DIMS
    values = dims if kernel == "gluon_forward" else ()
    for dim, value in {*((d, d) for d in dims), *product(dims, values)}:
        shape = Shape(dim, value, 2)
        found = list(gluon.candidates(kernel, shape, plan, heads=32))
        fits = partial(gluon.fits, kernel, shape=shape, plan=plan)
        assert all(gluon.usual(kernel, shape, plan, keys) in found for keys in (100, 100_000))
        assert len(found) == len(set(found)) <= 60
        assert all(c.legal and fits(c) and Config.parse(str(c)) == c for c in found)
        listed = plan.blocks is Blocks.LISTS
        assert not listed or all(c.block_m == 128 for c in found if kernel == "gluon_forward")
        assert not fits(Config(64, 64, 4, 2))
        assert not fits(Config(128, 128, 8, 8))
    assert {c.heads for c in gluon.candidates(kernel, shape, plan, heads=3)} <= {0, 1}


def test_triton_has_no_tiles_of_192_rows():
    assert not any(fits(kernel, Config(192, 64, 12, 2), Shape(64, 64, 2)) for kernel in KERNELS)


@pytest.mark.parametrize("kernel", gluon.KERNELS)
def test_a_warp_specialised_launch_takes_what_was_tuned_for_calls_like_it(kernel):
    q, v = inputs(dim=128)
    usual = gluon_launch.schedule(run(), kernel, q, v)
    best = replace(usual, num_stages=3) if kernel == "gluon_backward" else Config(192, 64, 12, 3, 8)
    assert usual != best
    for config in (best, Config(128, 128, 8, 8)):  # the second cannot run
        tuned.store(schedules.record(key(run(), kernel, dim=128), config, 0.1))
        schedules.database.cache_clear()
        expected = best if config == best else usual
        assert gluon_launch.schedule(run(), kernel, q, v) == expected
        assert gluon_launch.schedule(run(q_len=300), kernel, q, v) == usual
    given = launch.Run(run().bound, 1.0, configs={kernel: best})
    assert gluon_launch.schedule(given, kernel, q, v) == best


def test_heads_side_by_side_are_those_of_the_schedule():
    values: dict[str, object] = {}
    for heads, expected in ((0, 4), (3, 3), (2**40, 4)):
        launch.tiled(run(), values, "q", Config(64, 64, 4, 2, heads), 4)
        assert values["swizzle"] == expected


def test_warp_specialised_kernels_are_recorded_with_what_they_write(monkeypatch):
    """On the CPU nothing starts; what would is looked at."""
    monkeypatch.setattr(gluon_launch, "_processors", lambda device: 4)
    q, v = inputs()
    bench = Bench(run().bound, q, v, v)
    out = torch.empty_like(q), torch.empty(1, 4, 100)
    bench.__dict__["forward"] = out
    forwards = [bench.launch("gluon_forward", Config(m, 64, m // 16, 2)) for m in (128, 192)]
    assert all([part.name for part in one.parts] == ["forward"] for one in forwards)
    assert forwards[0].results.keys() == {"out", "lse", "lse2"}
    first, second = (one.parts[0].arguments for one in forwards)
    assert first["out_desc"].base is second["out_desc"].base is forwards[0].results["out"]
    assert first["lse_ptr"] is second["lse_ptr"]
    assert (first["CONSUMERS"], second["CONSUMERS"]) == (2, 3)
    backward = bench.launch("gluon_backward", gluon.backward(64))
    assert [part.name for part in backward.parts] == ["delta", "backward", "round_dq"]
    assert backward.results.keys() == {"dq", "dk", "dv"}
    main = backward.parts[1].arguments
    assert main["dk_desc"].base is backward.results["dk"]
    assert backward.parts[2].arguments["dq_ptr"] is backward.results["dq"]
    assert main["dq_sum_ptr"] is backward.parts[0].arguments["dq_sum_ptr"]


# -- samples of the dense interpreter


SINK = """
attention sink(logit: float[heads] grad):
    mask = kv_idx <= q_idx
    score = score + 0.01 * (kv_idx - q_idx)
    sink = logit[h]
"""
SIGMOID = "attention weights():\n    mask = kv_idx <= q_idx + b\n    normalize = sigmoid"
EXAMPLES = [Path(f"examples/{name}.attn") for name in ("causal", "packed", "alibi")]


@pytest.mark.parametrize("source", [*EXAMPLES, SINK, SIGMOID, WINDOW], ids=range(6))
def test_samples_are_the_reference(source):
    attention = attncc.compile(source)
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 200, 16, generator=rng) for heads in (4, 2, 2))
    lengths = Lengths(2, 4, 2, 200, 200, 16)
    arguments = captured(attention.program, lengths, {}).tensors
    scalars = {"width": 5} if source == WINDOW else {}
    bound = attention.plan(q, k, v, **arguments, **scalars)
    sample = Sample(bound, q, k, v)
    given = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = dense.attention(attention.program, bound.binding, *given, torch.float64)
    grads = torch.autograd.grad(out, given, sample.dout.double())
    found = dict(zip(("dq", "dk", "dv"), grads, strict=True)) | {"out": out.detach()}
    if lse is not None:
        found["lse"] = lse.detach()
    assert sample.problem(found) == ""
    row = int(sample.rows[-1])
    for name, at in (("out", (1, 3, row)), ("dq", (0, 0, row)), ("dk", (1, 1, 0)), ("dv", (0, 0))):
        wrong = found[name].clone()
        wrong[at] *= 1.5
        assert sample.problem(found | {name: wrong}).startswith(f"{name} is off by")
        wrong[at] = torch.nan
        assert sample.problem(found | {name: wrong}).startswith(f"{name} is off by")


# -- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_runs_what_was_tuned():
    rng = torch.Generator("cuda").manual_seed(0)
    make = {"generator": rng, "device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    q, k, v = (torch.randn(2, heads, 2048, 64, **make) for heads in (8, 2, 2))
    attention = attncc.compile(CAUSAL)
    found = attention.tune(q, k, v, time_budget=60)
    hopper = torch.cuda.get_device_capability() == (9, 0)
    expected = gluon.KERNELS if hopper else KERNELS
    assert [choice.kernel for choice in found.choices] == list(expected)
    for choice in found.choices:
        assert choice.ms <= choice.default_ms
        assert choice.timed > (0 if choice.kernel == "gluon_backward" else FINALISTS)
        assert not choice.wrong
    assert len(schedules.database()) == len(expected)
    attention(q, k, v).sum().backward()
    out, expected = attention(q, k, v), attention.reference(q, k, v, dtype=torch.float64)
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)


# -- what is refused


def test_tune_says_that_there_is_no_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, v = inputs(torch.float32)
    with pytest.raises(UnsupportedError, match=r"tune times GPU kernels, .* on cpu"):
        attncc.compile(CAUSAL).tune(q, v, v)


def test_a_kernel_there_is_none_of_is_named(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q, v = inputs(torch.float32)
    with pytest.raises(ArgumentError, match="backward_v"):
        attncc.compile(CAUSAL).tune(q, v, v, kernels=("backward_v",))


def test_a_kernel_that_does_not_serve_a_call_says_why(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q, v = inputs(torch.float32)
    with pytest.raises(UnsupportedError, match=r"gluon_forward does not serve this call: .* sm_90"):
        attncc.compile(CAUSAL).tune(q, v, v, kernels=("gluon_forward",))


def test_a_parameter_may_not_hide_behind_an_argument():
    with pytest.raises(ArgumentError, match="time_budget"):
        attncc.compile("attention f(time_budget: int):\n    mask = q_idx < time_budget")
