"""The driver gets every parameter that Triton's own launch would hand it."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import attncc
from attncc.backends.gluon import emit
from attncc.backends.triton import aot, direct
from attncc.backends.triton.emit import Call

PTX = """
.visible .entry forward(
	.param .u64 .ptr .global .align 1 forward_param_0,
	.param .u32 forward_param_1,
	.param .align 64 .b8 forward_param_2[128],
	.param .u32 forward_param_3,
	.param .u32 forward_param_4,
	.param .u64 forward_param_5,
	.param .u64 forward_param_6,
	.param .f32 forward_param_7,
	.param .u64 forward_param_8,
	.param .u8 forward_param_9,
	.param .u64 .ptr .global .align 1 forward_param_10,
	.param .u64 .ptr .global .align 1 forward_param_11
)
"""

SIGNATURE = {
    "out_ptr": "*fp32",
    "n": "i32",
    "BLOCK": "constexpr",
    "q_desc": "tensordesc<bf16[64, 128],NVMMASharedLayout(swizzle_byte_width=128)>",
    "scale": "fp32",
    "wide": "i64",
    "flag": "i1",
}

META = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [64, 64], "fp4_padded": False}


@dataclass
class Driver:
    """Stands for libcuda: keeps what kernels are started with, read from memory at that time."""

    sizes: list[int]
    started: list[dict[str, Any]] = field(default_factory=list)
    encoded: list[list[Any]] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    no_map: bool = False
    bound: int = 0

    def cuLaunchKernel(self, function: Any, *rest: Any) -> int:
        *sizes, stream, params, extra = rest
        assert extra is None
        values = [
            ctypes.string_at(params[at], size) if size == 128 else
            ctypes.c_uint64.from_address(params[at]).value & ((1 << 8 * size) - 1)
            for at, size in enumerate(self.sizes)
        ]  # fmt: skip
        self.started.append(
            {
                "function": function.value,
                "sizes": [size.value for size in sizes],
                "stream": stream.value,
                "values": values,
            }
        )
        return self.codes.pop() if self.codes else 0

    def cuTensorMapEncodeTiled(
        self, at: Any, element: Any, rank: Any, base: Any, *rest: Any
    ) -> int:
        assert at.value % direct.MAP_ALIGNMENT == 0
        if self.no_map:
            self.no_map = False
            return 201
        ctypes.memset(at.value, len(self.encoded) + 1, direct.MAP_BYTES)
        shape, strides, box, steps, *flags = rest
        lists = [list(shape), list(strides), list(box), list(steps)]
        numbers = [element.value, rank.value, base.value, *(flag.value for flag in flags)]
        self.encoded.append([*numbers, *lists])
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> int:
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        self.bound += 1
        return 0

    def cuGetErrorString(self, code: int, text: Any) -> int:
        text._obj.value = b"out of luck"
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver(list(direct._sizes(PTX)))
    monkeypatch.setattr(direct, "driver", lambda: made)
    monkeypatch.setattr(direct, "_launcher", lambda: made.cuLaunchKernel)
    return made


def compiled(**changed: Any) -> Any:
    metadata = {
        "num_warps": 12,
        "num_ctas": 1,
        "shared": 1000,
        "global_scratch_size": 0,
        "profile_scratch_size": 0,
        "launch_cooperative_grid": False,
        "launch_pdl": False,
        "tensordesc_meta": [META],
    }
    return SimpleNamespace(
        asm={"ptx": changed.pop("ptx", PTX)},
        src=SimpleNamespace(signature=SIGNATURE),
        metadata=SimpleNamespace(**{**metadata, **changed}),
        function=77,
    )


def descriptor(**changed: Any) -> Any:
    given = {"shape": [300, 128], "strides": [256, 1], "padding": "zero"}
    return SimpleNamespace(**{**given, **changed})


GIVEN = {"n": -5, "BLOCK": 64, "scale": 0.3, "wide": 2**40 + 1, "flag": True}
OPEN = {"out_ptr": 1, "q_desc": 0}


def made(**changed: Any) -> direct.Direct | None:
    given = GIVEN | {"out_ptr": None, "q_desc": descriptor()}
    return direct.direct(compiled(**changed), (132, 2, 1), given, OPEN, 0)


def test_every_parameter_is_where_the_kernel_reads_it(driver: Driver) -> None:
    kernel = made()
    assert kernel is not None
    q, out = torch.zeros(300, 256), torch.zeros(4)
    kernel.start(5, (q, out))
    scale = int.from_bytes(struct.pack("<f", 0.3), "little")
    wide = 2**40 + 1
    values = [out.data_ptr(), 2**32 - 5, b"\1" * 128, 300, 128, 256, 1, scale, wide, 1, 0, 0]
    sizes = [132, 2, 1, 12 * 32, 1, 1, 1000]
    one = {"function": 77, "sizes": sizes, "stream": 5, "values": values}
    assert driver.started == [one]
    numbers = [9, 2, q.data_ptr(), 0, 3, direct.L2_PROMOTION_128B, 0]
    assert driver.encoded == [[*numbers, [128, 300], [512], [64, 64], [1, 1]]]


def test_a_second_start_differs_in_addresses_and_stream(driver: Driver) -> None:
    kernel = made()
    assert kernel is not None
    pairs = [(torch.zeros(300, 256), torch.zeros(4)) for _ in range(2)]
    for stream, pair in ((5, pairs[0]), (6, pairs[1]), (None, pairs[0])):
        kernel.start(stream or 0, pair)
    first, second, third = driver.started
    assert second["values"][0] == pairs[1][1].data_ptr()
    assert second["values"][2] == b"\2" * 128
    assert (
        first["values"][1:2] + first["values"][3:] == second["values"][1:2] + second["values"][3:]
    )
    assert third["values"] == first["values"]  # nothing is encoded again
    assert len(driver.encoded) == 2
    assert [one["stream"] for one in driver.started] == [5, 6, None]


def test_few_tensor_maps_are_kept(driver: Driver) -> None:
    kernel = made()
    assert kernel is not None
    out, tensors = torch.zeros(4), [torch.zeros(2, 2) for _ in range(direct.MAPS + 3)]
    for q in (*tensors, tensors[0]):
        kernel.start(0, (q, out))
    assert len(driver.encoded) == direct.MAPS + 4
    assert driver.encoded[-1][2] == tensors[0].data_ptr()


@pytest.mark.parametrize(
    "changed",
    [
        {"ptx": PTX.replace("	.param .u8 forward_param_9,\n", "")},
        {"ptx": PTX.replace(".param .f32 forward_param_7", ".param .f64 forward_param_7")},
        {"ptx": "// nothing"},
        {"global_scratch_size": 8},
        {"num_ctas": 2},
        {"launch_pdl": True},
        {"tensordesc_meta": []},
        {"tensordesc_meta": [META | {"fp4_padded": True}]},
    ],
)
def test_what_is_not_known_is_left_to_triton(driver: Driver, changed: dict[str, Any]) -> None:
    assert made(**changed) is None


def test_a_thread_without_a_context_gets_one(driver: Driver) -> None:
    kernel = made()
    assert kernel is not None
    driver.codes = [201]
    kernel.start(0, (torch.zeros(2), torch.zeros(4)))
    assert (len(driver.started), driver.bound) == (2, 1)
    driver.no_map = True
    kernel.start(0, (torch.zeros(3), torch.zeros(4)))
    assert (len(driver.started), driver.bound) == (3, 2)


def test_what_the_driver_refuses_is_an_error(driver: Driver) -> None:
    kernel = made()
    assert kernel is not None
    driver.codes = [1]
    with pytest.raises(RuntimeError, match="cuLaunchKernel: error 1, out of luck"):
        kernel.start(0, (torch.zeros(2), torch.zeros(4)))


def test_parameters_of_compiled_kernels_are_read_from_their_assembly() -> None:
    plan = attncc.compile("attention a():\n    mask = q_idx >= kv_idx\n").static
    row = next(
        emit.compile_all(plan, Call("bf16", 64, 64, 1), aot.target("sm_90"), "gluon_forward")
    )
    sizes = list(direct._sizes(row.compiled.assembly))
    assert sizes.count(128) == 4  # q, k, v, out
    assert set(sizes) == {4, 8, 128}
    assert sizes[-2:] == [8, 8]  # scratch
