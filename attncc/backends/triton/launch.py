"""Runs generated kernels: arguments by name, grids, and gradients of captured tensors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attncc.backends.triton import kernels
from attncc.backends.triton.arguments import Values, captured
from attncc.backends.triton.configs import Config, Shape, Traits, padded, smaller
from attncc.backends.triton.kernels import Kernel
from attncc.backends.triton.lists import key_lists, query_lists
from attncc.backends.triton.lower import Gradient, Reduction, lower
from attncc.backends.triton.schedules import choose
from attncc.backends.triton.sections import Spec
from attncc.binding import Binding
from attncc.ir.evaluate import Env, evaluate_unchecked
from attncc.ir.expr import TRUE, Axis, Score
from attncc.ir.plan import Blocks, Order, Plan
from attncc.tiles import BoundPlan

TINY = 1e-30
UNITS = 2.0**40
"""Fixed point of deterministic pair gradients: how many units the largest magnitude is."""

L2_SHARE = 0.5
"""How much of the L2 the heads in flight may fill with keys and values."""


@lru_cache(maxsize=256)
def lowered(plan: Plan, half: bool, ptx: bool, descriptors: bool, wide: bool) -> Spec:
    """The spec of a plan's kernels; one object for equal arguments."""
    return Spec(lower(plan), half, ptx, descriptors, wide)


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
    memo: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)
    """Kernels and schedules already looked up."""

    def spec(self, *inputs: Tensor) -> Spec:
        chosen = self.descriptors
        if chosen is None:
            chosen = inputs[0].is_cuda and _has_descriptors(inputs[0].device)
        able = chosen and all(map(describable, inputs))
        half = inputs[0].dtype in (torch.float16, torch.bfloat16)
        ptx = inputs[0].is_cuda and torch.version.hip is None
        spec: Spec = self._known(
            ("spec", half, ptx, able),
            lambda: lowered(self.bound.plan, half, ptx, bool(able), self.wide),
        )
        return spec

    def kernels(self, spec: Spec, load: Callable[[Spec], dict[str, Kernel]]) -> dict[str, Kernel]:
        """The kernels of a file; hashing a spec costs more than a launch, so by its identity."""
        found: dict[str, Kernel] = self._known((load.__name__, id(spec)), lambda: load(spec))
        return found

    def config(self, kernel: str, q: Tensor, v: Tensor) -> Config:
        if self.configs and kernel in self.configs:
            return self.configs[kernel]
        key = kernel, q.shape[-1], v.shape[-1], q.dtype
        found: Config = self._known(key, lambda: self._chosen(kernel, q, v))
        return found

    def _chosen(self, kernel: str, q: Tensor, v: Tensor) -> Config:
        plan, binding = self.bound.plan, self.bound.binding
        return choose(kernel, plan, binding, q, v, shape_of(q, v), traits(plan))

    def _known(self, key: Hashable, find: Callable[[], Any]) -> Any:
        if key not in self.memo:
            self.memo[key] = find()
        return self.memo[key]


def scale_of(plan: Plan, binding: Binding) -> float:
    """The factor that makes scores of products; worked out on the host."""
    expr = plan.program.scale
    if expr is None:
        return 1.0 / math.sqrt(max(binding.head_dim, 1))
    return float(evaluate_unchecked(expr, Env({}, binding.scalars, dtype=torch.float64)))


def traits(plan: Plan) -> Traits:
    """What of a plan moves its best schedule."""
    masked = plan.mask != TRUE
    short = masked and (plan.blocks is Blocks.LISTS or plan.query_order is Order.NATURAL)
    plain = not masked and plan.score == Score()
    return Traits(plain, short, listed=plan.blocks is Blocks.LISTS)


def shape_of(q: Tensor, v: Tensor) -> Shape:
    """What schedules depend on, of these inputs on their device."""
    dims = padded(q.shape[-1]), padded(v.shape[-1])
    return Shape(*dims, q.element_size(), _shared_limit(q.device))


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
    if x.numel() == 0 or x.data_ptr() % 16 or x.stride(-1) != 1:
        return False
    used = [s * itemsize for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1]
    return all(s % 16 == 0 and 0 < s < 2**40 for s in used)


def described(x: Tensor, rows: int, columns: int) -> Any:
    """A descriptor of [1, 1, rows, columns] tiles of a [B, H, N, D] tensor."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    strides = list(x.stride())
    for axis in range(2, -1, -1):  # the stride of a size-1 axis is free; it must still be legal
        if x.shape[axis] == 1:
            above = strides[axis + 1] * x.shape[axis + 1]
            strides[axis] = max(16, above + -above % 16)
    return TensorDescriptor(x, list(x.shape), strides, [1, 1, rows, columns])


def unit_rows(x: Tensor) -> Tensor:
    """The tensor with its last axis contiguous, copied only if it was not."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def strided(values: Values, name: str, x: Tensor) -> None:
    """A [B, H, N, D] tensor as `name`_ptr and three strides."""
    values[f"{name}_ptr"] = x
    for axis, letter in enumerate("bhn"):
        values[f"{name}_stride_{letter}"] = x.stride(axis)


def common(run: Run, spec: Spec, q: Tensor, v: Tensor) -> Values:
    """Arguments that every kernel may name: sizes, scalars, captured tensors."""
    binding = run.bound.binding
    values = captured(run.bound.plan, binding)
    values |= {
        "scale": run.scale,
        "GROUP": binding.heads // binding.kv_heads,
        "HEAD_DIM": q.shape[-1],
        "VALUE_DIM": v.shape[-1],
        "BLOCK_D": padded(q.shape[-1]),
        "BLOCK_DV": padded(v.shape[-1]),
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
    values["swizzle"] = _swizzle(run, order, width)
    if plan.blocks is Blocks.LISTS:
        bound = run.bound.retiled((config.block_m, config.block_n))
        lists = key_lists(bound) if side == "q" else query_lists(bound)
        values |= {
            "index_ptr": lists.index,
            "start_ptr": lists.start,
            "full_count_ptr": lists.full_count,
            "partial_count_ptr": lists.partial_count,
            "order_ptr": lists.order,
        }
        _head_strides(values, "count", lists.full_count)
        _head_strides(values, "order", lists.order)
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
    group = max(1, width // binding.kv_heads)
    bytes_a_head = 2 * binding.kv_len * binding.head_dim * 2
    fit = int(L2_SHARE * _l2_bytes(binding.device)) // max(bytes_a_head, 1)
    return max(1, min(fit * group, binding.batch * width))


def launch(kernel: Kernel, grid: tuple[int, ...], values: Values, config: Config | None) -> None:
    """Starts one kernel with the arguments it names."""
    if 0 in grid:
        return
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages} if config else {}
    kernel.function[grid](**{name: values[name] for name in kernel.arguments}, **options)


def fitting(
    run: Run, kernel: Kernel, config: Config, shape: Shape, attempt: Callable[[Config], None]
) -> None:
    """Makes an attempt with a default schedule, or with the next smaller one that the GPU takes.

    A program's own loads take shared memory that no estimate knows. A schedule that was asked for
    is tried as it is.
    """
    from triton.runtime.errors import OutOfResources

    found: Config | None = kernel.fitted.get((config, shape), config)
    while found is not None:
        try:
            attempt(found)
        except OutOfResources:
            found = None if run.configs else smaller(found)
            if found is None:
                raise
            torch.cuda.synchronize()  # lists for other tiles may be made on another stream now
            kernel.fitted[config, shape] = found
        else:
            return


def forward(run: Run, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Q, Dv] laid out as q is, and lse [B, Hq, Q] float32, unwritten if not softmax."""
    q, k, v = map(unit_rows, (q, k, v))
    spec = run.spec(q, k, v)
    out = _like(q, v.shape[-1])
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    kernel = run.kernels(spec, kernels.forward)["forward"]

    def attempt(config: Config) -> None:
        values = common(run, spec, q, v)
        grid = tiled(run, values, "q", config, run.bound.binding.heads)
        inputs(values, spec, config, q=q, k=k, v=v)
        strided(values, "out", out)
        values["lse_ptr"] = lse
        launch(kernel, (grid,), values, config)

    fitting(run, kernel, run.config("forward", q, v), shape_of(q, v), attempt)
    return out, lse


def _like(q: Tensor, columns: int) -> Tensor:
    """An empty [B, H, N, columns] tensor whose axes lie in memory in the order of q's."""
    order = sorted(range(3), key=lambda axis: q.stride(axis), reverse=True)
    out = q.new_empty([q.shape[axis] for axis in order] + [columns])
    back = [order.index(axis) for axis in range(3)]
    return out.permute(*back, 3)


def inputs(values: Values, spec: Spec, config: Config, **tensors: Tensor) -> None:
    """Input tensors as descriptors of their kernel's tiles, or as pointers and strides."""
    for name, x in tensors.items():
        if spec.descriptors:
            rows = config.block_m if name in ("q", "dout") else config.block_n
            values[f"{name}_desc"] = described(x, rows, padded(x.shape[-1]))
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
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
) -> Gradients:
    """Gradients of out and lse with respect to q, k, v and captured tensors."""
    q, k, v, dout = map(unit_rows, (q, k, v, dout))
    spec = run.spec(q, k, v, dout)
    loaded = run.kernels(spec, kernels.backward)
    binding = run.bound.binding
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    values = common(run, spec, q, v)
    for name, x in (("dq", dq), ("dk", dk), ("dv", dv), ("out", out)):
        strided(values, name, x)
    values |= {"lse_ptr": lse, "delta_ptr": torch.empty_like(lse)}
    if spec.lowering.softmax:
        _launch_delta(loaded["delta"], values, dout, dlse)
    buffers = _buffers(run, spec, values, lse)
    pairs = any(_is_pair(gradient) for gradient in spec.lowering.gradients)
    sides = (("backward_kv", "kv", binding.kv_heads), ("backward_q", "q", binding.heads))
    shape = shape_of(q, v)
    for name, side, heads in sides:  # makes the lists of both, here and in order
        config = run.config(name, q, v)
        tiled(run, dict(values), side, loaded[name].fitted.get((config, shape), config), heads)
    ready = torch.cuda.current_stream(q.device).record_event() if q.is_cuda else None
    for name, side, heads in sides:

        def attempt(config: Config, name: str = name, side: str = side, heads: int = heads) -> None:
            mine = dict(values)
            grid = tiled(run, mine, side, config, heads)
            inputs(mine, spec, config, q=q, k=k, v=v, dout=dout)
            if side == "q" and run.deterministic and pairs:
                launch(loaded[name], (grid,), {**mine, "FIXED_POINT": 1}, config)
            launch(loaded[name], (grid,), mine, config)

        with _beside(q.device, ready if side == "q" else None):
            fitting(run, loaded[name], run.config(name, q, v), shape, attempt)
    captured = _captured(run, spec, values, buffers)
    if spec.lowering.sink is not None:
        _add_sink(run, captured, lse, values["delta_ptr"])
    return Gradients(dq, dk, dv, captured)


@contextlib.contextmanager
def _beside(device: torch.device, ready: torch.cuda.Event | None) -> Iterator[None]:
    """Work that may start as soon as `ready` has come, beside what this stream was given since.

    The last programs of one kernel leave most of the GPU idle; those of the next fill it. None: no
    such stream.
    """
    if ready is None:
        yield
        return
    main, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_event(ready)
    with torch.cuda.stream(side):
        yield
    main.wait_stream(side)


@lru_cache
def _side_stream(device: torch.device) -> Any:
    stream: Any = torch.cuda.Stream
    return stream(device)


def _launch_delta(kernel: Kernel, values: Values, dout: Tensor, dlse: Tensor | None) -> None:
    batch, heads, q_len = dout.shape[:3]
    block = 64
    mine = dict(values)
    strided(mine, "dout", dout)
    mine |= {"dlse_ptr": values["lse_ptr"] if dlse is None else dlse.float().contiguous()}
    mine |= {"HAS_DLSE": dlse is not None, "BLOCK_M": block}
    launch(kernel, (math.ceil(q_len / block), batch * heads), mine, None)


def _buffers(run: Run, spec: Spec, values: Values, lse: Tensor) -> list[Tensor]:
    """One float32 tensor a captured gradient, for the kernels to fill, added to their arguments."""
    binding = run.bound.binding
    values["FIXED_POINT"] = 2 if run.deterministic else 0
    buffers = []
    for at, gradient in enumerate(spec.lowering.gradients):
        data = binding.tensors[gradient.load.tensor.name]
        match gradient.reduction:
            case Reduction.ROW:
                buffer = torch.zeros_like(lse)
            case Reduction.COLUMN:
                buffer = lse.new_zeros(binding.batch, binding.heads, binding.kv_len)
            case _:
                shape = [max(n, 1) for n in data.shape]
                dtype = torch.int64 if run.deterministic else torch.float32
                buffer = torch.zeros(shape, dtype=dtype, device=lse.device)
                for axis in range(buffer.dim()):
                    values[f"grad_{at}_stride_{axis}"] = buffer.stride(axis)
                values[f"grad_{at}_top_ptr"] = lse.new_full((1,), TINY)
        values[f"grad_{at}_ptr"] = buffer
        buffers.append(buffer)
    return buffers


def _is_pair(gradient: Gradient) -> bool:
    return gradient.reduction is Reduction.PAIR


def _captured(run: Run, spec: Spec, values: Values, buffers: list[Tensor]) -> dict[str, Tensor]:
    """Each captured tensor's gradient, summed over the places that read it."""
    total: dict[str, Tensor] = {}
    for at, gradient in enumerate(spec.lowering.gradients):
        name, buffer = gradient.load.tensor.name, buffers[at]
        data = run.bound.binding.tensors[name]
        if not _is_pair(gradient):
            buffer = _scattered(run, gradient, buffer, data)
        elif run.deterministic:
            buffer = (buffer.double() * (values[f"grad_{at}_top_ptr"] / UNITS)).float()
        buffer = buffer[tuple(slice(n) for n in data.shape)]  # an empty tensor had a place-holder
        total[name] = total[name] + buffer if name in total else buffer
    return total


def _scattered(run: Run, gradient: Gradient, sums: Tensor, data: Tensor) -> Tensor:
    """Sums a [B, H, N] buffer into the elements that its rows or columns read; no atomics."""
    token = Axis.KV if gradient.reduction is Reduction.COLUMN else Axis.Q
    for dim, axis in enumerate((Axis.B, Axis.H, token)):
        if not gradient.load.axes & axis:
            sums = sums.sum(dim, keepdim=True)
    env = _positions(run, token)
    at = tuple(
        evaluate_unchecked(index, env).expand(sums.shape).clamp(0, max(size - 1, 0))
        for index, size in zip(gradient.load.at, data.shape, strict=True)
    )
    result = torch.zeros(data.shape, dtype=torch.float32, device=data.device)
    return result if 0 in data.shape else result.index_put_(at, sums, accumulate=True)


def _positions(run: Run, token: Axis) -> Env:
    """Positions that broadcast to [B, H, N] for one token axis."""
    binding = run.bound.binding
    device = binding.device
    b = torch.arange(binding.batch, device=device)[:, None, None]
    h = torch.arange(binding.heads, device=device)[None, :, None]
    positions = {"b": b, "h": h, "kv_head": h // (binding.heads // binding.kv_heads)}
    name, length = ("q_idx", binding.q_len) if token is Axis.Q else ("kv_idx", binding.kv_len)
    positions[name] = torch.arange(length, device=device)
    return Env(positions, binding.scalars, binding.tensors, device=device)


def _add_sink(run: Run, captured: dict[str, Tensor], lse: Tensor, delta: Tensor) -> None:
    """Adds the gradient through the sink, a logit whose value is 0 for every row."""
    program, binding = run.bound.plan.program, run.bound.binding
    wanted = [t.name for t in program.tensors if t.grad and binding.tensors[t.name].numel()]
    assert program.sink is not None
    with torch.enable_grad():
        leaves = {n: binding.tensors[n].detach().float().requires_grad_() for n in wanted}
        env = _positions(run, Axis.Q)
        env = Env(
            env.positions, binding.scalars, {**binding.tensors, **leaves}, device=binding.device
        )
        sink = evaluate_unchecked(program.sink, env).expand(*lse.shape[:2], 1)
    if not sink.requires_grad:
        return
    probability = torch.where(lse == -math.inf, 0.0, torch.exp(sink.detach() - lse))
    dsink = -(probability * delta).sum(-1, keepdim=True)
    grads = torch.autograd.grad(sink, list(leaves.values()), dsink, allow_unused=True)
    for name, grad in zip(leaves, grads, strict=True):
        if grad is not None:
            captured[name] = captured[name] + grad if name in captured else grad
