"""Warp-specialised forwards, on a GPU made of threads, against the dense interpreter."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attncc.backends.gluon.forward import forward_source
from attncc.backends.triton import launch
from attncc.backends.triton.configs import Config
from attncc.backends.triton.launch import Run
from attncc.backends.triton.versions import Version, installed
from attncc.binding import Binding
from attncc.frontend import parse
from attncc.inputs import Lengths
from attncc.ir.plan import Blocks
from attncc.ir.program import Program
from tests import strategies
from tests.cases import bindings
from tests.interpreted import gluon
from tests.interpreted.harness import check, inputs
from tests.interpreted.test_kernels import EXAMPLES, bind, load


@dataclass(frozen=True)
class Schedule:
    """How a forward is printed and started; few programs, so that each has many tiles of work."""

    consumers: int = 2
    block_n: int = 16
    stages: int = 2
    out_in_q: bool = False
    q_stages: int = 2
    programs: int = 2
    triton: Version = field(default_factory=installed)

    def forward(self, run: Run, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if run.bound.plan.blocks is Blocks.LISTS and self.consumers == 3:
            return replace(self, consumers=2).forward(run, q, k, v)
        config = Config(64 * self.consumers, self.block_n, 4 * self.consumers, self.stages)
        spec = launch.lowered(run.bound.plan, True, True, True, run.wide)
        spec = replace(spec, triton=self.triton)
        out = torch.full((*q.shape[:3], v.shape[-1]), torch.nan)
        lse, lse2 = (torch.full(q.shape[:3], torch.nan) for _ in range(2))
        values = launch.common(run, q, v)
        works = launch.tiled(run, values, "q", config, run.bound.binding.heads)
        counter = torch.zeros(1, dtype=torch.int32)
        values |= {"lse_ptr": lse, "lse2_ptr": lse2, "works": works, "nought": 0}
        values |= {"STAGES": self.stages, "Q_STAGES": self.q_stages, "CONSUMERS": self.consumers}
        values |= {"counter_ptr": counter, "REGISTERS": 240}
        tiles = {"q": (64, q), "k": (self.block_n, k), "v": (self.block_n, v), "out": (64, out)}
        for name, (rows, x) in tiles.items():
            columns = values["BLOCK_DV" if name in ("v", "out") else "BLOCK_D"]
            values[f"{name}_desc"] = gluon.described(x, rows, columns)
        text = forward_source(spec, self.consumers, self.out_in_q)
        programs = min(works, self.programs)
        gluon.run(text, "forward", (programs,), values)
        assert not programs or counter == 0, "the counter is as it was for the next call"
        return out, lse, lse2


SCHEDULES = [
    Schedule(),
    Schedule(consumers=3, block_n=32, stages=3, programs=3, triton=(3, 9)),
    Schedule(out_in_q=True, q_stages=1, programs=1),
    Schedule(q_stages=1, stages=1, programs=4),
]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.parametrize("at", range(2))
def test_examples_equal_dense(path: Path, at: int) -> None:
    lengths = [Lengths(1, 4, 2, 70, 70, 16), Lengths(2, 2, 1, 33, 41, 20)][at]
    program = load(path)
    binding = bind(program, lengths)
    given = inputs(binding, value_dim=24)
    check(program, binding, given, forward=SCHEDULES[at].forward)


@settings(max_examples=max(25, settings.default.max_examples // 4))
@given(strategies.programs(), bindings(1, 90), st.sampled_from(SCHEDULES))
def test_random_programs_equal_dense(
    program: Program, binding: Binding, schedule: Schedule
) -> None:
    given = inputs(binding, value_dim=16)
    check(program, binding, given, wide=True, forward=schedule.forward)


def test_values_read_for_one_tile_serve_until_it_is_stored() -> None:
    text = "attention slopes(slope: float[heads] grad):\n    mask = q_idx >= kv_idx\n"
    (program,) = parse(text + "    score = score + slope[h] * (kv_idx - q_idx)\n")
    binding = bind(program, Lengths(2, 3, 1, 130, 130, 16))
    check(program, binding, inputs(binding, value_dim=16), forward=Schedule(programs=1).forward)


def test_parameters_keep_apart_from_values_that_are_read_ahead() -> None:
    text = "attention near(row_0: int = 3, column_1: int = 2, t: int[kv_len]):\n"
    text += "    mask = (q_idx + kv_idx) % 7 < row_0 + t[q_idx] % 5 + t[kv_idx] % 3 * column_1\n"
    (program,) = parse(text)
    binding = bind(program, Lengths(1, 2, 1, 70, 70, 16))
    check(program, binding, inputs(binding, value_dim=16), forward=Schedule().forward)


@pytest.mark.parametrize("mask", ["not q_idx >= kv_idx", "kv_idx != kv_idx", "true"])
def test_keys_beyond_the_last_are_never_kept(mask: str) -> None:
    (program,) = parse(f"attention short():\n    mask = {mask}\n")
    for lengths in (Lengths(1, 1, 1, 1, 1, 16), Lengths(1, 2, 1, 70, 37, 16)):
        binding = bind(program, lengths)
        check(program, binding, inputs(binding, value_dim=16), forward=Schedule().forward)


def test_a_barrier_that_nothing_completes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon, "PATIENCE", 0.1)
    barrier = gluon.Barrier()
    barrier.init(1)
    barrier.wait(1)
    with pytest.raises(AssertionError, match="nothing will complete"):
        barrier.wait(0)
    barrier.arrive()
    barrier.wait(0)
