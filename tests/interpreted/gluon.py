"""Gluon kernels on the CPU: numpy for tensors, a thread for each partition.

As far as kernels can tell, a GPU: barriers have phases and counts, copies and products happen when
they are waited for and no sooner, shared memory is NaN until something fills it, positions outside
a tensor are an error. Half types have float32's precision.
"""

from __future__ import annotations

import operator
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

PATIENCE = 20.0
"""Seconds a partition waits before it is taken to wait forever."""

LAGGARD: int | None = None
"""The number of a partition that is late after each wait; who does not wait for it then fails."""


# -- dtypes and values


@dataclass(frozen=True)
class Dtype:
    numpy: Any
    nbytes: int = 4

    def is_int64(self) -> bool:
        return self.numpy is np.int64


INT8, INT32, INT64 = Dtype(np.int8, 1), Dtype(np.int32), Dtype(np.int64, 8)
FLOAT32, HALF = Dtype(np.float32), Dtype(np.float32, 2)


@dataclass(frozen=True)
class PointerType:
    element_ty: Dtype


def _dtype(array: np.ndarray) -> Dtype:
    return Dtype(array.dtype.type, array.dtype.itemsize)


def _plain(x: Any) -> Any:
    return x.data if isinstance(x, Value) else x


class Value:
    """A tensor, or with no axes a scalar, under Triton's rules."""

    def __init__(self, data: Any) -> None:
        self.data = np.asarray(data)

    @property
    def dtype(self) -> Dtype:
        return _dtype(self.data)

    def to(self, dtype: Dtype, bitcast: bool = False) -> Value:
        return self if bitcast else Value(self.data.astype(dtype.numpy))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def reshape(self, shape: Sequence[int]) -> Value:
        return Value(self.data.reshape(shape))

    def permute(self, order: Sequence[int]) -> Value:
        return Value(self.data.transpose(order))

    def __getitem__(self, at: Any) -> Value:
        return Value(self.data[at])

    def __bool__(self) -> bool:
        assert self.data.ndim == 0
        return bool(self.data)

    def __index__(self) -> int:
        assert self.data.ndim == 0
        return int(self.data)


def _binary(function: Callable[[Any, Any], Any], swapped: bool = False) -> Any:
    def method(self: Value, other: Any) -> Any:
        if not isinstance(other, Value | int | float):
            return NotImplemented
        x, y = (_plain(other), self.data) if swapped else (self.data, _plain(other))
        return Value(function(x, y))

    return method


def _is_float(*parts: Any) -> bool:
    return any(np.asarray(x).dtype.kind == "f" for x in parts)


def _truncated(x: Any, y: Any) -> Any:
    quotient = np.floor_divide(np.abs(x), np.abs(y))
    return np.where((np.asarray(x) < 0) != (np.asarray(y) < 0), -quotient, quotient).astype(
        np.result_type(x, y)
    )


def _floordiv(x: Any, y: Any) -> Any:
    assert not _is_float(x, y)
    return _truncated(x, y)


def _mod(x: Any, y: Any) -> Any:
    assert not _is_float(x, y)
    return x - _truncated(x, y) * y


def _div(x: Any, y: Any) -> Any:
    return np.divide(np.asarray(x, np.float32), np.asarray(y, np.float32))


_OPERATORS = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": _floordiv,
    "mod": _mod,
    "truediv": _div,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "lshift": operator.lshift,
    "rshift": operator.rshift,
}
for _name, _function in _OPERATORS.items():
    setattr(Value, f"__{_name}__", _binary(_function))
    setattr(Value, f"__r{_name}__", _binary(_function, swapped=True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Value, f"__{_name}__", _binary(getattr(operator, _name)))
Value.__neg__ = lambda self: Value(-self.data)  # type: ignore[attr-defined]
Value.__invert__ = lambda self: Value(~self.data)  # type: ignore[attr-defined]


class Pointer:
    """Places in a flat array."""

    def __init__(self, array: np.ndarray, at: Any = 0) -> None:
        self.array, self.at = array, np.asarray(at, np.int64)

    def __add__(self, by: Any) -> Pointer:
        return Pointer(self.array, self.at + _plain(by))

    def __sub__(self, by: Any) -> Pointer:
        return Pointer(self.array, self.at - _plain(by))

    @property
    def dtype(self) -> PointerType:
        return PointerType(_dtype(self.array))

    def to(self, dtype: Dtype, bitcast: bool = False) -> Pointer:
        return self

    def load(self, mask: Any = None, other: Any = None) -> Value:
        assert (mask is None) == (other is None)
        (at,), keep = self._kept(mask)
        found = np.full(keep.shape, 0 if other is None else other, self.array.dtype)
        found[keep] = self.array[at]
        return Value(found)

    def store(self, value: Any, mask: Any = None) -> None:
        (at, value), _ = self._kept(mask, value)
        self.array[at] = value

    def add(self, value: Any, mask: Any = None) -> Value:
        (at, value), _ = self._kept(mask, value)
        with _LOCK:
            before = self.array.take(self.at, mode="clip")
            np.add.at(self.array, at, value)
        return Value(before)

    def _kept(self, mask: Any, *values: Any) -> tuple[list[np.ndarray], np.ndarray]:
        """Places, which must be there, and their values where a mask keeps them; and the mask."""
        keep = np.ones((), bool) if mask is None else _plain(mask)
        keep, *found = np.broadcast_arrays(keep, self.at, *map(_plain, values))
        found = [x[keep] for x in found]
        assert np.all((found[0] >= 0) & (found[0] < self.array.size)), "out of bounds"
        return found, keep


# -- shared memory and barriers

_LOCK = threading.RLock()
_CHANGED = threading.Condition(_LOCK)
_FAILED = threading.Event()


class Shared:
    """A block of shared memory, or a view of one."""

    def __init__(self, data: np.ndarray, dtype: Dtype) -> None:
        self.data, self.dtype = data, dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def index(self, at: Any) -> Shared:
        assert 0 <= int(at) < len(self.data)
        return Shared(self.data[int(at)], self.dtype)

    def reshape(self, shape: Sequence[int]) -> Shared:
        view = self.data.view()
        view.shape = tuple(shape)
        return Shared(view, self.dtype)

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        assert 0 <= start <= start + length <= self.shape[dim]
        at = (slice(None),) * dim + (slice(start, start + length),)
        return Shared(self.data[at], self.dtype)

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.transpose(order), self.dtype)

    def store(self, value: Value) -> None:
        self.data[...] = value.data

    def load(self, layout: Any) -> Value:
        return Value(self.data.copy())


class Barrier:
    """Counts arrivals and bytes; a phase ends when none are missing."""

    def __init__(self) -> None:
        self.count = 0
        self.missing = 0
        self.bytes = 0
        self.phase = 0

    def init(self, count: int) -> None:
        self.count = self.missing = count

    def arrive(self, count: int = 1) -> None:
        with _LOCK:
            self.missing -= count
            assert self.missing >= 0, "one arrival too many in a phase"
            self._end()

    def expect(self, count: int) -> None:
        with _LOCK:
            self.bytes += count
            self.arrive()

    def brought(self, count: int) -> None:
        with _LOCK:
            self.bytes -= count
            self._end()

    def wait(self, parity: Any) -> None:
        with _LOCK:
            passed = _CHANGED.wait_for(
                lambda: _FAILED.is_set() or self.phase & 1 != int(parity), PATIENCE
            )
            if _FAILED.is_set():
                raise Stopped
            assert passed, "a barrier is waited for that nothing will complete"
        if _HERE.part.number == LAGGARD:
            time.sleep(0.002)

    def _end(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.phase += 1
            self.missing = self.count
            _CHANGED.notify_all()


class Barriers:
    def __init__(self, count: int) -> None:
        self.all = [Barrier() for _ in range(count)]

    def index(self, at: Any) -> Barrier:
        return self.all[int(at)]


class Stopped(Exception):
    """Another partition failed."""


# -- copies and products


@dataclass
class Descriptor:
    """A tensor, and the tiles it is read or written in."""

    tensor: np.ndarray
    block: tuple[int, ...]
    layout: Any = None
    dtype: Dtype = HALF

    @property
    def block_type(self) -> Any:
        nbytes = int(np.prod(self.block)) * self.dtype.nbytes
        return SimpleNamespace(shape=list(self.block), nbytes=nbytes)

    def places(self, coordinates: Sequence[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Where the part of a tile that lies inside is, in the tensor and in the tile."""
        inside, tile = [], []
        for at, size, length in zip(coordinates, self.block, self.tensor.shape, strict=True):
            at = int(at)
            lo, hi = min(max(at, 0), length), min(max(at + size, 0), length)
            inside.append(slice(lo, hi))
            tile.append(slice(lo - at, hi - at) if hi > lo else slice(0, 0))
        return tuple(inside), tuple(tile)


def described(x: Tensor, rows: int, columns: int) -> Descriptor:
    """A [B, H, N, D] tensor in tiles of half-type numbers, as launches describe it."""
    return Descriptor(x.detach().numpy(), (1, 1, rows, columns))


@dataclass
class Part:
    """What one partition has in flight."""

    program: tuple[int, ...] = (0,)
    number: int = 0
    products: deque[Any] = field(default_factory=deque)
    stores: list[Callable[[], None]] = field(default_factory=list)


_HERE = threading.local()


class Product:
    """A product in flight; nothing may read it."""

    def __init__(self, compute: Callable[[], np.ndarray]) -> None:
        self.compute = compute
        self.value: Value | None = None


def _finish(product: Product) -> None:
    product.value = Value(product.compute())


def warpgroup_mma(a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool) -> Product:
    """acc: a Value, or a product in flight that this one goes on with."""
    assert is_async

    def compute() -> np.ndarray:
        product = a.data.astype(np.float32) @ b.data.astype(np.float32)
        before = acc.value if isinstance(acc, Product) else acc
        return product + before.data if use_acc else product

    product = Product(compute)
    _HERE.part.products.append(product)
    return product


def warpgroup_mma_wait(outstanding: int, deps: Sequence[Product]) -> Any:
    products = _HERE.part.products
    while len(products) > outstanding:
        _finish(products.popleft())
    found = tuple(product.value for product in deps)
    assert all(x is not None for x in found), "waited for too few products"
    return found if len(found) > 1 else found[0]


def _bring(desc: Descriptor, at: Sequence[Any], barrier: Barrier, to: Shared) -> None:
    inside, tile = desc.places(at)
    with _LOCK:
        to.data[...] = 0
        to.data[tile] = desc.tensor[inside]
        barrier.brought(desc.block_type.nbytes)


def _take_away(desc: Descriptor, at: Sequence[Any], source: Shared) -> None:
    def copy() -> None:
        inside, tile = desc.places(at)
        desc.tensor[inside] = source.data[tile]

    _HERE.part.stores.append(copy)


def _store_wait(pendings: int) -> None:
    assert pendings == 0
    for copy in _HERE.part.stores:
        copy()
    _HERE.part.stores.clear()


def _warp_specialize(parts: Sequence[Any], warps: Sequence[int], registers: Sequence[int]) -> None:
    assert len(warps) == len(registers) == len(parts) - 1
    program = _HERE.part.program
    errors: list[BaseException] = []

    def run(number: int, function: Any, args: Sequence[Any]) -> None:
        _HERE.part = Part(program, number)
        try:
            with np.errstate(all="ignore"):
                function(*args)
            assert not _HERE.part.products and not _HERE.part.stores, "left in flight"
        except BaseException as error:
            with _LOCK:
                errors.append(error)
                _FAILED.set()
                _CHANGED.notify_all()

    threads = [threading.Thread(target=run, args=(i, *part)) for i, part in enumerate(parts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _FAILED.clear()
    for error in errors:
        if not isinstance(error, Stopped):
            raise error


# -- the language


def _allocate(dtype: Dtype, shape: Sequence[int], layout: Any) -> Shared | Barriers:
    if dtype is INT64:
        return Barriers(shape[0])
    empty = np.nan if np.dtype(dtype.numpy).kind == "f" else -(2**30)
    return Shared(np.full(shape, empty, dtype.numpy), dtype)


def _unary(function: Callable[[Any], Any]) -> Callable[[Value], Value]:
    return lambda x: Value(function(x.data))


def _pair(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Value]:
    return lambda x, y: Value(function(_plain(x), _plain(y)))


def _where(condition: Any, x: Any, y: Any) -> Value:
    return Value(np.where(_plain(condition), _plain(x), _plain(y)).astype(_common(x, y)))


def _common(x: Any, y: Any) -> Any:
    if isinstance(x, float) or isinstance(y, float):
        return np.float32
    found = [v.data.dtype for v in (x, y) if isinstance(v, Value)]
    return np.result_type(*found) if found else np.int32


def _add_by_fours(to: Pointer, x: Value) -> Value:
    """Adds a thread's four numbers, of two columns and rows 8 apart, from their one pointer on."""
    if x.data.ndim == 1:  # four neighbors
        number = np.arange(x.data.size)
        first = to.at[number // 4 * 4]
        assert np.all(first % 4 == 0), "out of line"
        return Pointer(to.array, first + number % 4).add(x)
    row, column = np.indices(x.data.shape)
    first = to.at[row - row % 16 // 8 * 8, column - column % 2]
    assert np.array_equal(to.at, first), "four numbers of a thread go to one place"
    assert np.all(first % 4 == 0), "out of line"
    Pointer(to.array, first + row % 16 // 8 * 2 + column % 2).add(x)
    return Value(np.zeros(x.data.shape, np.int8))


def _assembly(text: str, constraints: str, args: Sequence[Any], **options: Any) -> Any:
    if text.startswith("red.relaxed.gpu.global.add.v4.f32"):
        return _add_by_fours(*args)
    if text.startswith("cvt.rn."):  # two numbers in one
        low, high = args
        return Value(low.data + 1j * high.data)
    (x,) = args
    if text.startswith("mov.b32 {"):
        return Value(x.data.real), Value(x.data.imag)
    if text.startswith("mov.b32"):
        return x
    if text.startswith("tanh.approx"):
        return Value(np.tanh(x.data))
    assert text.startswith("ld.global.nc.f32"), text
    return x.load()


def _ignored(*args: Any, **options: Any) -> None:
    return None


def _jit(function: Any = None, **options: Any) -> Any:
    return function if function is not None else _jit


class _Program:
    """gl.program_id and gl.num_programs of the program that runs."""

    grid: tuple[int, ...] = (1,)

    def identity(self, axis: int) -> Value:
        return Value(np.int32(_HERE.part.program[axis]))

    def number(self, axis: int) -> Value:
        return Value(np.int32(self.grid[axis]))


_PROGRAM = _Program()

GL = SimpleNamespace(
    constexpr=object,
    int8=INT8,
    int32=INT32,
    int64=INT64,
    float32=FLOAT32,
    bfloat16=HALF,
    int16=INT8,
    allocate_shared_memory=_allocate,
    arange=lambda lo, hi, layout: Value(np.arange(lo, hi, dtype=np.int32)),
    zeros=lambda shape, dtype, layout: Value(np.zeros(shape, dtype.numpy)),
    full=lambda shape, x, dtype, layout: Value(np.full(shape, _plain(x), dtype.numpy)),
    zeros_like=_unary(np.zeros_like),
    minimum=_pair(np.minimum),
    maximum=_pair(np.maximum),
    where=_where,
    exp=_unary(np.exp),
    exp2=_unary(np.exp2),
    log=_unary(np.log),
    log2=_unary(np.log2),
    abs=_unary(np.abs),
    floor=_unary(np.floor),
    sqrt=_unary(np.sqrt),
    rsqrt=_unary(lambda x: 1 / np.sqrt(x)),
    sin=_unary(np.sin),
    cos=_unary(np.cos),
    cdiv=lambda x, y: Value(_truncated(_plain(x) + (_plain(y) - 1), _plain(y))),
    max=lambda x, axis: Value(x.data.max(axis)),
    sum=lambda x, axis: Value(x.data.sum(axis)),
    load=lambda pointer, mask=None, other=None: pointer.load(mask, other),
    store=lambda pointer, value, mask=None: pointer.store(value, mask),
    atomic_add=lambda pointer, value, sem, mask=None: pointer.add(value, mask),
    convert_layout=lambda x, layout, assert_trivial=False: x,
    split=lambda x: (x[..., 0], x[..., 1]),
    join=lambda x, y: Value(np.stack([x.data, y.data], -1)),
    cast=lambda x, dtype: Value(np.asarray(_plain(x), dtype.numpy)),
    static_range=range,
    program_id=_PROGRAM.identity,
    num_programs=_PROGRAM.number,
    inline_asm_elementwise=_assembly,
    warp_specialize=_warp_specialize,
    BlockedLayout=_ignored,
    SliceLayout=_ignored,
    NVMMADistributedLayout=_ignored,
    DotOperandLayout=_ignored,
    SharedLinearLayout=_ignored,
    SwizzledSharedLayout=_ignored,
    NVMMASharedLayout=SimpleNamespace(get_default_for=_ignored),
)
NAMES = {
    "gl": GL,
    "gluon": SimpleNamespace(jit=_jit),
    "fence_async_shared": _ignored,
    "warpgroup_mma": warpgroup_mma,
    "warpgroup_mma_wait": warpgroup_mma_wait,
    "mbarrier": SimpleNamespace(
        MBarrierLayout=_ignored,
        init=lambda barrier, count: barrier.init(count),
        arrive=lambda barrier, pred=True: barrier.arrive() if pred else None,
        expect=lambda barrier, count: barrier.expect(count),
        wait=lambda barrier, parity: barrier.wait(parity),
    ),
    "tma": SimpleNamespace(
        async_copy_global_to_shared=_bring,
        async_copy_shared_to_global=_take_away,
        async_load=_bring,
        async_store=_take_away,
        store_wait=_store_wait,
    ),
}


def run(text: str, kernel: str, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Runs a kernel of a Gluon file, its programs one after the other.

    arguments: tensors for pointers, Descriptors, numbers; those in capitals are constexprs.
    """
    function = _function(text, kernel)
    given = {name: _argument(name, arguments[name]) for name in _wanted(function)}
    _PROGRAM.grid = grid
    with np.errstate(all="ignore"):
        for program in np.ndindex(grid):
            _HERE.part = Part(program)
            function(**given)


def arguments(text: str, kernel: str) -> tuple[str, ...]:
    """The names of a kernel's arguments, in order."""
    return _wanted(_function(text, kernel))


def _function(text: str, kernel: str) -> Any:
    names = dict(NAMES)
    exec(compile(text[text.index("@gluon.jit") :], "<gluon>", "exec"), names)
    return names[kernel]


def _wanted(function: Any) -> tuple[str, ...]:
    names: tuple[str, ...] = function.__code__.co_varnames[: function.__code__.co_argcount]
    return names


def _argument(name: str, x: Any) -> Any:
    if name.isupper() or isinstance(x, Descriptor):
        return x
    if isinstance(x, Tensor):
        return Pointer(_from_its_begin(x))
    return Value(np.float32(x) if isinstance(x, float) else np.int32(x))


def _from_its_begin(x: Tensor) -> np.ndarray:
    """A tensor's memory from where it begins, so that its strides find the rest."""
    room = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return torch.as_strided(x.detach(), (room,), (1,)).numpy()
