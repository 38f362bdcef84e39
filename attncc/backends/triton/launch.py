"""Runs generated kernels: arguments by name, grids, and gradients of captured tensors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from attncc.backends.triton import gradients, kernels
from attncc.backends.triton.arguments import Values, captured
from attncc.backends.triton.configs import (
    Config,
    Shape,
    Traits,
    default,
    fits,
    padded,
    padded_value,
    smaller,
)
from attncc.backends.triton.kernels import Kernel
from attncc.backends.triton.lists import key_lists, query_lists
from attncc.backends.triton.lower import Lowering, lower
from attncc.backends.triton.prepared import (
    ALIGNMENT,
    LAYOUTS,
    Prepared,
    again,
    layout,
    start,
    stream_of,
)
from attncc.backends.triton.schedules import choose
from attncc.backends.triton.sections import Spec
from attncc.binding import Binding
from attncc.ir.evaluate import Env, evaluate_unchecked
from attncc.ir.expr import TRUE, Score
from attncc.ir.plan import Blocks, Order, Plan
from attncc.tiles import BoundPlan

SEARCHED_HEADS = 11
"""About how many heads run side by side where rows of tiles are put in order by searches.

The last ones' short rows then fill the GPU to the end; with more, the rows that run at one time
lie further apart than the L2 holds (documents on an H100, 32 heads of 8192: 1 at a time 204 us, 8
189, 11 187, 16 199, all 246).
"""

L2_SHARE = 0.5
"""How much of the L2 the heads in flight may fill with keys and values."""


@lru_cache(maxsize=256)
def lowered(plan: Plan, half: bool, ptx: bool, descriptors: bool, wide: bool) -> Spec:
    """The spec of a plan's kernels; one object for equal arguments."""
    return Spec(lower(plan), half, ptx, descriptors, wide)


Forward = Callable[["Run", Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(run, q, k, v) to (out, lse, lse2), as `forward` describes them."""

Backward = Callable[
    ["Run", Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], "Gradients"
]
"""(run, q, k, v, out, lse2, dout, dlse) to gradients, as `backward`."""


@dataclass(frozen=True)
class Run:
    """One call: its plan, its settings, and the configuration of each kernel."""

    bound: BoundPlan
    scale: float
    wide: bool = False
    deterministic: bool = False
    configs: Mapping[str, Config] | None = None
    descriptors: bool | None = None
    """None chooses: where the GPU has them and the strides allow."""
    forward: Forward | None = None
    """Instead of this module's own; so also `backward`."""
    backward: Backward | None = None
    programs: int | None = None
    """Of kernels whose programs take tile after tile; None: one for each multiprocessor."""
    memo: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)
    """Kernels and schedules already looked up."""
    ready: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)
    """Kernels ready to start again, by their name and the layout of the tensors."""

    def spec(self, *inputs: Tensor) -> Spec:
        half = inputs[0].dtype in (torch.float16, torch.bfloat16)
        chosen = self.descriptors
        if chosen is None:  # products of float32 spill where tiles came through descriptors
            chosen = half and inputs[0].is_cuda and _has_descriptors(inputs[0].device)
        able = chosen and all(map(describable, inputs))
        ptx = inputs[0].is_cuda and torch.version.hip is None
        spec: Spec = self._known(
            ("spec", half, ptx, able),
            lambda: lowered(self.bound.plan, half, ptx, bool(able), self.wide),
        )
        return spec

    @cached_property
    def lowering(self) -> Lowering:
        return lower(self.bound.plan)

    @cached_property
    def differentiable(self) -> dict[str, Tensor]:
        return differentiable(self.bound)

    def kernels(
        self, spec: Spec, load: Callable[..., dict[str, Kernel]], *more: Hashable
    ) -> dict[str, Kernel]:
        """The kernels of a file; hashing a spec costs more than a launch, so by its identity."""
        found: dict[str, Kernel] = self._known((load, id(spec), *more), lambda: load(spec, *more))
        return found

    def config(self, kernel: str, q: Tensor, v: Tensor) -> Config:
        if self.configs and kernel in self.configs:
            return self.configs[kernel]
        key = kernel, q.shape[-1], v.shape[-1], q.dtype
        found: Config = self._known(key, lambda: self._chosen(kernel, q, v))
        return found

    def _chosen(self, kernel: str, q: Tensor, v: Tensor) -> Config:
        plan, binding = self.bound.plan, self.bound.binding
        shape = shape_of(q, v)
        usual = default(kernel, shape, traits(plan))
        return choose(kernel, plan, binding, q, v, usual, partial(fits, kernel, shape=shape))

    def prepared(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What is ready for a layout; only so many are kept."""
        if key not in self.ready:
            if len(self.ready) >= LAYOUTS:
                self.ready.clear()
            self.ready[key] = make()
        return self.ready[key]

    def _known(self, key: Hashable, find: Callable[[], Any]) -> Any:
        if key not in self.memo:
            self.memo[key] = find()
        return self.memo[key]


def differentiable(bound: BoundPlan) -> dict[str, Tensor]:
    """The captured tensors that the program gives gradients to, by name."""
    return {t.name: bound.binding.tensors[t.name] for t in bound.plan.program.tensors if t.grad}


def scale_of(plan: Plan, binding: Binding) -> float:
    """The factor that makes scores of products; worked out on the host."""
    expr = plan.program.scale
    if expr is None:
        return 1.0 / math.sqrt(max(binding.head_dim, 1))
    return float(evaluate_unchecked(expr, Env({}, binding.scalars, dtype=torch.float64)))


def traits(plan: Plan) -> Traits:
    """What of a plan moves its best schedule."""
    masked = plan.mask != TRUE
    short = masked and plan.query_order is not Order.REVERSED
    plain = not masked and plan.score == Score()
    return Traits(plain, short, listed=plan.blocks is Blocks.LISTS)


def tile_columns(q: Tensor, v: Tensor) -> tuple[int, int]:
    """Columns of tiles of queries and keys, and of values."""
    dim, value_dim = q.shape[-1], v.shape[-1]
    return padded(dim), padded_value(dim, value_dim, q.element_size())


def shape_of(q: Tensor, v: Tensor) -> Shape:
    """What schedules depend on, of these inputs on their device."""
    dims = tile_columns(q, v)
    ampere = q.is_cuda and torch.version.hip is None and not _has_descriptors(q.device)
    return Shape(*dims, q.element_size(), _shared_limit(q.device), ampere)


@lru_cache
def _shared_limit(device: torch.device) -> int:
    if device.type != "cuda":
        return 227 * 1024
    found: Any = torch.cuda.get_device_properties(device)
    return int(found.shared_memory_per_block_optin)


@lru_cache
def _has_descriptors(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


@lru_cache
def _l2_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 32 << 20
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can stand for it: 16-byte aligned base and strides."""
    itemsize = x.element_size()
    if x.numel() == 0 or x.data_ptr() % ALIGNMENT or x.stride(-1) != 1:
        return False
    used = [s * itemsize for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1]
    return all(s % ALIGNMENT == 0 and 0 < s < 2**40 for s in used)


def described(x: Tensor, rows: int, columns: int) -> Any:
    """A descriptor of [1, 1, rows, columns] tiles of a [B, H, N, D] tensor."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    strides = list(x.stride())
    for axis in range(2, -1, -1):  # the stride of a size-1 axis is free; it must still be legal
        if x.shape[axis] == 1:
            above = strides[axis + 1] * x.shape[axis + 1]
            strides[axis] = max(16, above + -above % 16)
    return TensorDescriptor(x, list(x.shape), strides, [1, 1, rows, columns])


def rows(x: Tensor) -> Tensor:
    """The tensor with its last axis contiguous, copied if it was not.

    On a GPU with descriptors also if its rows are not aligned for them: a copy is quicker than the
    loads of unaligned rows.
    """
    if not x.is_cuda or not _has_descriptors(x.device):
        return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
    return x if x.numel() == 0 or describable(x) else aligned(x)


def in_rows(run: Run, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors by `rows`; looking at them takes longer than knowing their layout again."""
    key = "in rows", layout(*tensors)
    if key in run.ready:
        return tensors
    found = tuple(map(rows, tensors))
    if all(one is other for one, other in zip(found, tensors, strict=True)):
        run.ready[key] = None
    return found


def aligned(x: Tensor) -> Tensor:
    """A copy whose rows begin at multiples of 16 bytes, axes in memory as they were."""
    step = ALIGNMENT // x.element_size()
    columns = x.shape[-1]
    copy = like(x, columns + -columns % step)[..., :columns]
    return copy.copy_(x)


def like(x: Tensor, columns: int) -> Tensor:
    """An empty [B, H, N, columns] tensor whose axes lie in memory in the order of x's."""
    if columns == x.shape[-1]:
        return torch.empty_like(x)
    order = sorted(range(3), key=lambda axis: x.stride(axis), reverse=True)
    out = x.new_empty([x.shape[axis] for axis in order] + [columns])
    back = [order.index(axis) for axis in range(3)]
    return out.permute(*back, 3)


def in_line(x: Tensor) -> Tensor:
    """The numbers as float32, contiguous and aligned as what torch allocates."""
    x = x.float().contiguous()
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def strided(values: Values, name: str, x: Tensor) -> None:
    """A [B, H, N, D] tensor as `name`_ptr and three strides."""
    values[f"{name}_ptr"] = x
    for axis, letter in enumerate("bhn"):
        values[f"{name}_stride_{letter}"] = x.stride(axis)


def common(run: Run, q: Tensor, v: Tensor) -> Values:
    """Arguments that every kernel may name: sizes, scalars, captured tensors."""
    binding = run.bound.binding
    values = captured(run.bound)
    values["BLOCK_D"], values["BLOCK_DV"] = tile_columns(q, v)
    values |= {
        "scale": run.scale,
        "GROUP": binding.heads // binding.kv_heads,
        "HEAD_DIM": q.shape[-1],
        "VALUE_DIM": v.shape[-1],
    }
    return values


def tiled(run: Run, values: Values, side: str, config: Config, width: int) -> int:
    """Adds a kernel's tiles, lists and order to its arguments; returns its grid.

    side: "q" for kernels that own query tiles, "kv" for key tiles. width: heads of the grid.
    """
    binding, plan = run.bound.binding, run.bound.plan
    rows, block = (
        (binding.q_len, config.block_m) if side == "q" else (binding.kv_len, config.block_n)
    )
    tiles = math.ceil(rows / block)
    order = plan.query_order if side == "q" else plan.key_order
    values |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, f"{side}_tiles": tiles}
    values["swizzle"] = min(config.heads, binding.batch * width) or _swizzle(run, order, width)
    if plan.blocks is Blocks.LISTS:
        bound = run.bound.retiled((config.block_m, config.block_n))
        lists = key_lists(bound) if side == "q" else query_lists(bound)
        values |= {
            "index_ptr": lists.index,
            "start_ptr": lists.start,
            "full_count_ptr": lists.full_count,
            "partial_count_ptr": lists.partial_count,
        }
        _head_strides(values, "count", lists.full_count)
        if lists.order is not None:
            values["order_ptr"] = lists.order
    elif order is Order.BY_WORK:
        bound = run.bound.retiled((config.block_m, config.block_n))
        values["order_ptr"] = bound.query_order
    if "order_ptr" in values:
        _head_strides(values, "order", values["order_ptr"])
    return tiles * binding.batch * width


def _head_strides(values: Values, name: str, x: Tensor) -> None:
    """Strides over batch and head of a [B|1, H|1, ...] tensor; 0 where it does not vary."""
    for axis, letter in enumerate("bh"):
        values[f"{name}_stride_{letter}"] = x.stride(axis) if x.shape[axis] > 1 else 0


def _swizzle(run: Run, order: Order, width: int) -> int:
    """How many heads run side by side: as many as share the L2, unless order does not matter."""
    binding = run.bound.binding
    if order is Order.NATURAL:
        return 1
    if run.bound.plan.searches:
        heads = binding.batch * width
        return max(1, math.ceil(heads / max(1, round(heads / SEARCHED_HEADS))))
    group = max(1, width // binding.kv_heads)
    bytes_a_head = 2 * binding.kv_len * binding.head_dim * 2
    fit = int(L2_SHARE * _l2_bytes(binding.device)) // max(bytes_a_head, 1)
    return max(1, min(fit * group, binding.batch * width))


def fitting(
    run: Run,
    kernel: Kernel,
    config: Config,
    shape: Shape,
    attempt: Callable[[Config], Prepared | None],
) -> Prepared | None:
    """Makes an attempt with a default schedule, or with the next smaller one that the GPU takes.

    A program's own loads take shared memory that no estimate knows. A schedule that was asked for
    is tried as it is.
    """
    from triton.runtime.errors import OutOfResources

    found = kernel.fitted.get((config, shape), config)
    while True:
        try:
            return attempt(found)
        except OutOfResources:
            less = None if run.configs else smaller(found)
            if less is None:
                raise
            torch.cuda.synchronize()  # lists for other tiles may be made on another stream now
            found = kernel.fitted[config, shape] = less


def forward(run: Run, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, Hq, Q, Dv] laid out as q is, lse [B, Hq, Q] float32, and lse2 for the backward.

    lse2 is in log2 units, rounded once, and inf where a row keeps no key. If not softmax neither is
    written.
    """
    with on(q.device):
        q, k, v = in_rows(run, q, k, v)
        out = like(q, v.shape[-1])
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        lse2 = torch.empty_like(lse)
        tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "lse2": lse2}

        def first() -> Prepared | None:
            return _first_forward(run, tensors)

        again(run.ready, ("forward", layout(q, k, v)), tensors, stream_of(q), first)
    return out, lse, lse2


def _first_forward(run: Run, tensors: dict[str, Tensor]) -> Prepared | None:
    q, k, v = (tensors[name] for name in "qkv")
    spec = run.spec(q, k, v)
    kernel = run.kernels(spec, kernels.forward)["forward"]

    def attempt(config: Config) -> Prepared | None:
        values = common(run, q, v)
        grid = tiled(run, values, "q", config, run.bound.binding.heads)
        inputs(values, spec, config, q=q, k=k, v=v)
        strided(values, "out", tensors["out"])
        values |= {f"{name}_ptr": tensors[name] for name in ("lse", "lse2")}
        return start(kernel, (grid,), values, tensors, config)

    return fitting(run, kernel, run.config("forward", q, v), shape_of(q, v), attempt)


def inputs(values: Values, spec: Spec, config: Config, **tensors: Tensor) -> None:
    """Input tensors as descriptors of their kernel's tiles, or as pointers and strides."""
    for name, x in tensors.items():
        if spec.descriptors:
            rows = config.block_m if name in ("q", "dout") else config.block_n
            columns = values["BLOCK_DV" if name in ("v", "dout") else "BLOCK_D"]
            values[f"{name}_desc"] = described(x, rows, columns)
        else:
            strided(values, name, x)


@dataclass(frozen=True)
class Gradients:
    """What the backward returns; captured by tensor name, float32 in the tensor's shape."""

    q: Tensor
    k: Tensor
    v: Tensor
    captured: dict[str, Tensor]


def backward(
    run: Run,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse2: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
) -> Gradients:
    """Gradients of out and lse with respect to q, k, v and captured tensors."""
    with on(q.device):
        q, k, v, dout = in_rows(run, q, k, v, dout)
        return _Backward(run, q, k, v, out, lse2, dout, dlse).gradients()


class _Backward:
    """The kernels of one backward: each row's delta, then dk and dv beside dq."""

    def __init__(
        self,
        run: Run,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse2: Tensor,
        dout: Tensor,
        dlse: Tensor | None,
    ) -> None:
        self.run, self.has_dlse = run, dlse is not None
        self.q, self.v, self.lse2 = q, v, lse2
        self.lowering = run.lowering
        self.dq, self.dk, self.dv = (torch.empty_like(x) for x in (q, k, v))
        self.buffers = gradients.buffers(run, self.lowering, lse2)
        self.tensors = {"q": q, "k": k, "v": v, "out": out, "lse2": lse2, "dout": dout}
        self.tensors |= {"dq": self.dq, "dk": self.dk, "dv": self.dv, **self.buffers}
        self.tensors["delta"] = torch.empty_like(lse2)
        self.tensors["dlse"] = lse2 if dlse is None else in_line(dlse)
        self.layout = self.has_dlse, *layout(q, k, v, out, dout)

    def gradients(self) -> Gradients:
        run, device = self.run, self.q.device
        stream = stream_of(self.q)
        if self.lowering.softmax:
            self._again("delta", stream, self._first_delta)
        if ("lists", *self.layout) not in run.ready:  # makes the lists of both, here and in order
            for kernel in SIDES:
                self._tiled(kernel, {}, self._fitted(kernel))
            run.ready["lists", *self.layout] = None
        ready = torch.cuda.current_stream(device).record_event() if self.q.is_cuda else None
        self._again("backward_kv", stream, lambda: self._first("backward_kv", 2))
        with _beside(device, ready) as stream:
            if run.deterministic and any(map(gradients.is_pair, self.lowering.gradients)):
                self._again("backward_q, top", stream, lambda: self._first("backward_q", 1))
            self._again("backward_q", stream, lambda: self._first("backward_q", 2))
        captured = gradients.collected(run, self.lowering, self.buffers)
        if self.lowering.sink is not None:
            gradients.add_sink(run, captured, self.lse2, self.tensors["delta"])
        return Gradients(self.dq, self.dk, self.dv, captured)

    @cached_property
    def spec(self) -> Spec:
        return self.run.spec(*(self.tensors[name] for name in ("q", "k", "v", "dout")))

    @cached_property
    def kernels(self) -> dict[str, Kernel]:
        return self.run.kernels(self.spec, kernels.backward)

    def _again(self, what: str, stream: int | None, first: Callable[[], Prepared | None]) -> None:
        again(self.run.ready, (what, *self.layout), self.tensors, stream, first)

    def _values(self) -> Values:
        """What every kernel may name."""
        values = common(self.run, self.q, self.v)
        for name in ("dq", "dk", "dv", "out"):
            strided(values, name, self.tensors[name])
        values |= gradients.arguments(self.run, self.lowering, self.buffers)
        return values | {f"{name}_ptr": self.tensors[name] for name in ("lse2", "delta", "dlse")}

    def _first_delta(self) -> Prepared | None:
        batch, heads, q_len = self.lse2.shape
        values = self._values() | {"HAS_DLSE": self.has_dlse, "BLOCK_M": DELTA_ROWS}
        strided(values, "dout", self.tensors["dout"])
        grid = math.ceil(q_len / DELTA_ROWS), batch * heads
        return start(self.kernels["delta"], grid, values, self.tensors, None)

    def _first(self, name: str, fixed_point: int) -> Prepared | None:
        """fixed_point: 1 finds the largest magnitude, 2 adds in units of it, if deterministic."""
        kernel = self.kernels[name]

        def attempt(config: Config) -> Prepared | None:
            values = self._values()
            if self.run.deterministic:
                values["FIXED_POINT"] = fixed_point
            grid = self._tiled(name, values, config)
            given = {name: self.tensors[name] for name in ("q", "k", "v", "dout")}
            inputs(values, self.spec, config, **given)
            return start(kernel, (grid,), values, self.tensors, config)

        shape = shape_of(self.q, self.v)
        return fitting(self.run, kernel, self.run.config(name, self.q, self.v), shape, attempt)

    def _fitted(self, name: str) -> Config:
        config = self.run.config(name, self.q, self.v)
        return self.kernels[name].fitted.get((config, shape_of(self.q, self.v)), config)

    def _tiled(self, name: str, values: Values, config: Config) -> int:
        binding = self.run.bound.binding
        side = SIDES[name]
        width = binding.heads if side == "q" else binding.kv_heads
        return tiled(self.run, values, side, config, width)


SIDES = {"backward_kv": "kv", "backward_q": "q"}
"""Whose tiles each kernel owns."""

DELTA_ROWS = 64


@contextlib.contextmanager
def _beside(device: torch.device, ready: torch.cuda.Event | None) -> Iterator[int | None]:
    """Work that may start as soon as `ready` has come, beside what this stream was given since.

    The last programs of one kernel leave most of the GPU idle; those of the next fill it. None: no
    such stream.
    """
    if ready is None:
        yield None
        return
    main, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_event(ready)
    try:
        with torch.cuda.stream(side):
            yield side.cuda_stream
    finally:
        main.wait_stream(side)


@lru_cache
def _side_stream(device: torch.device) -> Any:
    stream: Any = torch.cuda.Stream
    return stream(device)


def on(device: torch.device) -> Any:
    """Kernels start on the current GPU, whichever holds their tensors."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


_NOTHING = contextlib.nullcontext()
