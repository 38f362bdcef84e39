"""Kernels started again get what Triton's own launch would hand them, at new addresses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from triton import knobs

import attncc
from attncc.backends.triton import launch, prepared
from attncc.backends.triton.configs import padded
from attncc.backends.triton.kernels import Kernel
from attncc.backends.triton.launch import Run
from attncc.backends.triton.prepared import Prepared
from attncc.backends.triton.versions import OPTIONS

STREAM = 7


@dataclass
class Compiled:
    """Stands for what Triton compiled: keeps what it was started with."""

    names: tuple[str, ...]
    started: list[dict[str, Any]] = field(default_factory=list)
    function: int = 3
    packed_metadata: tuple[int, ...] = (4, 1, 0)

    def run(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        assert (stream, function) == (STREAM, self.function)
        arguments = rest[4:]  # behind the metadata and the hooks
        self.started.append({"grid": (x, y, z), **dict(zip(self.names, arguments, strict=True))})


@dataclass
class Function:
    """Stands for a jitted function: launches by name return what was compiled."""

    compiled: Compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def launched(**arguments: Any) -> Compiled:
            assert OPTIONS.items() <= arguments.items()
            options = {"num_warps", "num_stages", *OPTIONS}
            given = {n: x for n, x in arguments.items() if n not in options}
            assert tuple(given) == self.compiled.names
            x, y, z = (*grid, 1, 1)[:3]
            self.compiled.started.append({"grid": (x, y, z), **given})
            return self.compiled

        return launched


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[str, Compiled]:
    """What the kernels of the next Runs become, by name."""
    found: dict[str, Compiled] = {}

    def stand_in(name: str, kernel: Kernel) -> Kernel:
        found[name] = Compiled(kernel.arguments)
        return Kernel(Function(found[name]), kernel.arguments)

    real = Run.kernels

    def kernels(self: Run, *given: Any) -> dict[str, Kernel]:
        return {name: stand_in(name, kernel) for name, kernel in real(self, *given).items()}

    monkeypatch.setattr(Run, "kernels", kernels)
    monkeypatch.setattr(launch, "stream_of", lambda x: STREAM)
    monkeypatch.setattr(launch, "_beside", lambda *given: contextlib.nullcontext(STREAM))
    return found


def addressed(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments as a kernel sees them: tensors by address."""
    return {n: x.data_ptr() if isinstance(x, Tensor) else x for n, x in arguments.items()}


def tensors(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, h, 40, 16, generator=rng) for h in (4, 2, 2))
    return q, k, v


def run_of(program: str, **arguments: object) -> Run:
    return Run(attncc.compile(program).plan(*tensors(0), **arguments), 0.25)


ALIBI = "attention a(slope: float[heads] grad):\n    score = score + slope[h] * (kv_idx - q_idx)\n"


def test_a_second_forward_differs_from_the_first_in_addresses(
    compiled: dict[str, Compiled],
) -> None:
    slope = torch.randn(4, requires_grad=True)
    run = run_of(ALIBI, slope=slope)
    one, two = tensors(1), tensors(2)
    launch.forward(run, *one)
    out, lse, lse2 = launch.forward(run, *two)
    first, second = (addressed(x) for x in compiled["forward"].started)
    moved = {f"{name}_ptr" for name in ("q", "k", "v", "out", "lse", "lse2")}
    assert {name for name in first if first[name] != second[name]} <= moved
    expected = dict(zip("qkv", two, strict=True)) | {"out": out, "lse": lse, "lse2": lse2}
    assert {name: second[f"{name}_ptr"] for name in expected} == {
        name: x.data_ptr() for name, x in expected.items()
    }
    assert first["slope_ptr"] == slope.data_ptr()


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_second_backward_differs_from_the_first_in_addresses(
    compiled: dict[str, Compiled], deterministic: bool
) -> None:
    bound = run_of(ALIBI, slope=torch.randn(4, requires_grad=True)).bound
    run = Run(bound, 0.25, deterministic=deterministic)
    rng = torch.Generator().manual_seed(3)
    for seed in (1, 2):
        q, k, v = tensors(seed)
        out, dout = (torch.randn(q.shape, generator=rng) for _ in range(2))
        lse = torch.randn(q.shape[:3], generator=rng)
        found = launch.backward(run, q, k, v, out, lse, dout, None)
    for name, own in (("delta", ("out", "dout")), ("backward_kv", ("q", "k", "v", "dout"))):
        first, second = (addressed(x) for x in compiled[name].started)
        differ = {n for n in first if first[n] != second[n]}
        assert all(n.endswith("_ptr") for n in differ)
        given = {"q": q, "k": k, "v": v, "out": out, "dout": dout}
        assert {n: second[f"{n}_ptr"] for n in own} == {n: given[n].data_ptr() for n in own}
    last = addressed(compiled["backward_kv"].started[-1])
    assert (last["dk_ptr"], last["dv_ptr"]) == (found.k.data_ptr(), found.v.data_ptr())
    assert last["lse2_ptr"] == lse.data_ptr()
    assert addressed(compiled["backward_q"].started[-1])["dq_ptr"] == found.q.data_ptr()


def test_other_strides_are_prepared_anew(compiled: dict[str, Compiled]) -> None:
    run = run_of("attention a():\n    mask = q_idx >= kv_idx\n")
    launch.forward(run, *tensors(1))
    first = compiled["forward"].started[0]
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors(1))
    launch.forward(run, q, k, v)
    second = compiled["forward"].started[-1]
    assert second["q_stride_n"] == q.stride(2) != first["q_stride_n"]
    assert second["out_stride_n"] == q.stride(2)


def test_a_profiler_hears_of_every_launch(
    compiled: dict[str, Compiled], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of("attention a():\n    mask = q_idx >= kv_idx\n")
    launch.forward(run, *tensors(1))
    known = compiled["forward"]
    monkeypatch.setattr(Prepared, "start", lambda *given: pytest.fail("not by Triton's own way"))
    knobs.runtime.launch_enter_hook.add(print)
    try:
        launch.forward(run, *tensors(2))
    finally:
        knobs.runtime.launch_enter_hook.remove(print)
    assert compiled["forward"] is not known


def test_few_layouts_are_kept(compiled: dict[str, Compiled]) -> None:
    run = run_of("attention a():\n    mask = q_idx >= kv_idx\n")
    q, k, v = tensors(1)
    for spare in range(prepared.LAYOUTS + 5):
        wide = torch.zeros(2, 4, 40, 16 + spare)[..., :16].copy_(q)
        launch.forward(run, wide, k, v)
    assert 0 < len(run.ready) <= prepared.LAYOUTS


def test_aligned_copies_keep_values_and_the_order_of_axes() -> None:
    wide = torch.randn(2, 7, 3, 21, dtype=torch.float16)
    x = wide.transpose(1, 2)[..., 1:18]  # 17 columns, 42 bytes a row, an odd base
    copy = launch.aligned(x)
    assert torch.equal(copy, x)
    assert launch.describable(copy)
    assert copy.stride(2) > copy.stride(1) > copy.stride(3) == 1


@pytest.mark.parametrize("value_dim", [8, 16, 64, 100])
def test_narrow_values_of_half_types_are_laid_out_as_keys(value_dim: int) -> None:
    q, v = torch.zeros(1, 1, 4, 96), torch.zeros(1, 1, 4, value_dim)
    wide = max(64, padded(value_dim))
    assert launch.tile_columns(q.bfloat16(), v.bfloat16()) == (128, wide)
    assert launch.tile_columns(q[..., :32].half(), v.half()) == (32, max(32, padded(value_dim)))
    assert launch.tile_columns(q, v) == (128, padded(value_dim))
