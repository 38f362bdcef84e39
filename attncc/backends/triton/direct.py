"""Starts compiled kernels by the CUDA driver's own call.

Triton's launch parses dozens of arguments and encodes every tensor map anew. Here a kernel's
parameters lie ready in memory, and only the addresses that change are written.
"""

from __future__ import annotations

import ctypes
import re
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NoReturn

from torch import Tensor

MAP_BYTES = 128
MAP_ALIGNMENT = 64
MAPS = 64
"""Encoded tensor maps kept for one parameter: its addresses recur, as memory is used again."""

ELEMENTS = {"bf16": 9, "fp16": 6, "fp32": 7, "f32": 7, "f16": 6}
"""CUtensorMapDataType by Triton's name."""

FORMATS = {"fp32": "<f", "f32": "<f", "fp64": "<d", "f64": "<d"}

_ENTRY = re.compile(r"\.entry\s+\w+\s*\(([^)]*)\)")
_PARAM = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.[a-z]+(\d+)[^,\[]*(?:\[(\d+)\])?")
_DESCRIPTOR = re.compile(r"tensordesc<(\w+)\[([^]]*)\]")


class Direct:
    """One compiled kernel with its parameters; tensors that come and go are left open."""

    def __init__(self, compiled: Any, grid: tuple[int, int, int], count: int, device: int) -> None:
        metadata = compiled.metadata
        self.device = device
        self._slots = (ctypes.c_uint64 * count)()
        self._params = (ctypes.c_void_p * count)()
        begin = ctypes.addressof(self._slots)
        for at in range(count):
            self._params[at] = begin + 8 * at
        sizes = (*grid, 32 * metadata.num_warps, 1, 1, metadata.shared)
        self._before = (ctypes.c_void_p(compiled.function), *map(ctypes.c_uint, sizes))
        self._pointers: list[tuple[int, int]] = []
        self._maps: list[tuple[int, int, _Maps]] = []
        self._streams: dict[int, ctypes.c_void_p] = {}
        self._lock = threading.Lock()

    def start(self, stream: int, tensors: Sequence[Tensor]) -> None:
        """Starts it on a stream of the current device, with the tensors that were left open."""
        queue = self._streams.get(stream)
        if queue is None:
            queue = self._streams[stream] = ctypes.c_void_p(stream)
        with self._lock:
            try:
                self._start(queue, tensors)
            except _NoContext:  # a thread's first use of the GPU
                _bind(self.device)
                self._start(queue, tensors)

    def _start(self, queue: ctypes.c_void_p, tensors: Sequence[Tensor]) -> None:
        slots, params = self._slots, self._params
        for at, which in self._pointers:
            slots[at] = tensors[which].data_ptr()
        for at, which, maps in self._maps:
            address = tensors[which].data_ptr()
            params[at] = maps.made.get(address) or maps.encoded(address)
        if failed := _launcher()(*self._before, queue, params, None):
            _raise("cuLaunchKernel", failed)

    def _fill(
        self, values: Sequence[tuple[str, Any]], moving: Mapping[int, int], maps: Mapping[int, Any]
    ) -> None:
        for at, (kind, value) in enumerate(values):
            if at in maps:
                self._maps.append((at, moving[at], maps[at]))
            elif at in moving:
                self._pointers.append((at, moving[at]))
            else:
                self._slots[at] = _bits(kind, value)


def direct(
    compiled: Any,
    grid: tuple[int, int, int],
    given: Mapping[str, Any],
    open_at: Mapping[str, int],
    device: int,
) -> Direct | None:
    """What starts a kernel; None where its parameters are not laid out as they are known to be.

    given: every argument by name; tensors may stand for their addresses. open_at: the arguments
    that each start brings anew, as which of its tensors.
    """
    try:
        values, moving, maps = _expanded(compiled, given, open_at)
        sizes = list(_sizes(compiled.asm["ptx"]))
        metadata = compiled.metadata
    except (AttributeError, KeyError, ValueError):
        return None
    spare = sizes[len(values) :]  # pointers to scratch memory
    scratch = metadata.global_scratch_size, getattr(metadata, "profile_scratch_size", 0)
    plain = not any(scratch) and metadata.num_ctas == 1
    plain = plain and not (metadata.launch_cooperative_grid or metadata.launch_pdl)
    expected = [_size(kind) for kind, _ in values]
    if not plain or sizes[: len(values)] != expected or any(size != 8 for size in spare):
        return None
    made = Direct(compiled, grid, len(sizes), device)
    made._fill(values, moving, maps)
    return made


def _expanded(
    compiled: Any, given: Mapping[str, Any], open_at: Mapping[str, int]
) -> tuple[list[tuple[str, Any]], dict[int, int], dict[int, _Maps]]:
    """Parameters as (type, value), which of them are open, and the makers of tensor maps."""
    values: list[tuple[str, Any]] = []
    moving: dict[int, int] = {}
    maps: dict[int, _Maps] = {}
    described = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    for name, kind in compiled.src.signature.items():
        if kind == "constexpr":
            continue
        value, at = given[name], len(values)
        if name in open_at:
            moving[at] = open_at[name]
        if match := _DESCRIPTOR.match(kind):
            maps[at] = _Maps(match[1], value, next(described, None))
            if at not in moving:
                raise ValueError("a tensor map that no tensor comes for")
            rank = len(value.shape)
            values.append(("map", None))
            values += zip(["i32"] * rank, value.shape, strict=True)
            values += zip(["i64"] * rank, value.strides, strict=True)
        else:
            values.append((kind, value))
    return values, moving, maps


def _sizes(ptx: str) -> Iterator[int]:
    """Bytes of a kernel's parameters, in order."""
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise ValueError("no .entry in PTX")
    for line in entry[1].split(","):
        param = _PARAM.search(line)
        if param is None:
            raise ValueError(f"no parameter: {line}")
        yield int(param[1]) // 8 * int(param[2] or 1)


def _size(kind: str) -> int:
    if kind == "map":
        return MAP_BYTES
    if kind.startswith("*"):
        return 8
    return max(int(re.sub(r"\D", "", kind)) // 8, 1)


def _bits(kind: str, value: Any) -> int:
    """A value as the low bytes of 64 bits."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if kind in FORMATS:
        return int.from_bytes(struct.pack(FORMATS[kind], value), "little")
    if kind.startswith(("fp", "f", "bf")):
        raise ValueError(f"a number of type {kind}")
    return int(value or 0) & (2**64 - 1)


class _Maps:
    """Tensor maps of one parameter, by address; encoded as Triton's launch encodes them."""

    def __init__(self, element: str, descriptor: Any, meta: Mapping[str, Any] | None) -> None:
        if meta is None or meta["fp4_padded"] or getattr(descriptor, "round_f32_to_tf32", False):
            raise ValueError("a descriptor that is no plain tensor map")
        rank = len(descriptor.shape)
        size = meta["elem_size"]
        self._element = ELEMENTS[element]
        self._shape = (ctypes.c_uint64 * rank)(*reversed(descriptor.shape))
        strides = [size * stride for stride in reversed(descriptor.strides[:-1])]
        self._strides = (ctypes.c_uint64 * max(rank - 1, 1))(*strides)
        self._box = (ctypes.c_uint32 * rank)(*reversed(meta["block_size"]))
        self._steps = (ctypes.c_uint32 * rank)(*[1] * rank)
        self._swizzle = int(meta["swizzle"])
        self._nan = int(descriptor.padding == "nan")
        self.made: dict[int, int] = {}
        """Where the tensor map for an address lies."""
        self._memory: list[Any] = []

    def encoded(self, address: int) -> int:
        """Makes one, and returns where it lies."""
        if len(self.made) >= MAPS:
            self.made.clear()
            self._memory.clear()
        memory = ctypes.create_string_buffer(MAP_BYTES + MAP_ALIGNMENT)
        begin = ctypes.addressof(memory)
        begin += -begin % MAP_ALIGNMENT
        arguments = (
            ctypes.c_void_p(begin),
            ctypes.c_int(self._element),
            ctypes.c_uint32(len(self._shape)),
            ctypes.c_void_p(address),
            self._shape,
            self._strides,
            self._box,
            self._steps,
            ctypes.c_int(0),
            ctypes.c_int(self._swizzle),
            ctypes.c_int(L2_PROMOTION_128B),
            ctypes.c_int(self._nan),
        )
        if failed := driver().cuTensorMapEncodeTiled(*arguments):
            _raise("cuTensorMapEncodeTiled", failed)
        self._memory.append(memory)
        self.made[address] = begin
        return begin


L2_PROMOTION_128B = 2

# -- the driver

NO_CONTEXT = 201
"""CUDA_ERROR_INVALID_CONTEXT."""


@cache
def driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


@cache
def _launcher() -> Any:
    return driver().cuLaunchKernel


class _NoContext(Exception):
    """The calling thread has not used the GPU."""


def _bind(device: int) -> None:
    """Makes a device's context, which torch works in, the calling thread's."""
    context = ctypes.c_void_p()
    if failed := driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
        _raise("cuDevicePrimaryCtxRetain", failed)
    if failed := driver().cuCtxSetCurrent(context):
        _raise("cuCtxSetCurrent", failed)


def _raise(call: str, code: int) -> NoReturn:
    if code == NO_CONTEXT:
        raise _NoContext
    text = ctypes.c_char_p()
    driver().cuGetErrorString(code, ctypes.byref(text))
    raise RuntimeError(f"{call}: error {code}, {(text.value or b'unknown').decode()}")
