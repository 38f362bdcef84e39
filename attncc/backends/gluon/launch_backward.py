"""Runs the warp-specialised backward: each row's delta, then all gradients, then dq rounded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attncc.backends.gluon import configs
from attncc.backends.gluon import launch as launch_forward
from attncc.backends.gluon.backward import NAMES
from attncc.backends.gluon.backward_wide import backward_source
from attncc.backends.gluon.launch import described
from attncc.backends.triton import gradients, launch
from attncc.backends.triton.arguments import Values
from attncc.backends.triton.configs import Config
from attncc.backends.triton.kernels import Kernel, load
from attncc.backends.triton.launch import Gradients, Run, strided
from attncc.backends.triton.prepared import Prepared, again, layout, start, stream_of
from attncc.backends.triton.sections import Spec
from attncc.ir.expr import Axis
from attncc.ir.plan import Blocks, Order, Plan
from attncc.tiles.host import reads_nothing, visited


def unsupported(plan: Plan, q: Tensor, v: Tensor, deterministic: bool) -> str:
    """Why no warp-specialised backward serves a call; empty where one does."""
    dtype = str(q.dtype).removeprefix("torch.")
    if reason := launch_forward.unsupported(q, v):
        return reason
    return configs.backward_unsupported(plan, dtype, q.shape[-1], v.shape[-1], deterministic)


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
    """As `triton.launch.backward`."""
    with launch.on(q.device):
        q, k, v, dout = launch.in_rows(run, q, k, v, dout)
        return _Backward(run, q, k, v, out, lse2, dout, dlse).gradients()


class _Backward:
    """The kernels of one backward, one after another."""

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
        self.lowering = run.lowering
        self.dim = configs.backward_columns(q.shape[-1], v.shape[-1])
        self.config = configs.backward(self.dim)
        if run.configs and "gluon_backward" in run.configs:
            self.config = run.configs["gluon_backward"]
        self.rows = self.config.block_m
        self.q_tiles = math.ceil(q.shape[2] / self.rows)
        batch, heads, q_len = q.shape[:3]
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        self.buffers = gradients.buffers(run, self.lowering, lse2)
        self.tensors = {"q": q, "k": k, "v": v, "out": out, "lse2": lse2, "dout": dout}
        self.tensors |= {"dq": dq, "dk": dk, "dv": dv, **self.buffers}
        self.tensors["dlse"] = lse2 if dlse is None else dlse.float().contiguous()
        # One block more: where programs add what they have before their first block.
        blocks = batch * heads * self.q_tiles + 1
        self.tensors["dq_sum"] = lse2.new_empty(blocks, self.rows * self.dim)
        if self.lowering.softmax:
            padded = lse2.new_empty(2, batch, heads, self.q_tiles * self.rows)
            self.tensors["lse_rows"], self.tensors["delta_rows"] = padded
            self.delta = padded[1, ..., :q_len]
        self.layout = self.has_dlse, *layout(q, k, v, out, dout, dq, dk, dv)

    def gradients(self) -> Gradients:
        tensors = self.tensors
        stream = stream_of(tensors["q"])
        begin = "delta" if self.lowering.softmax else "clear"
        self._again(begin, stream, lambda: self._first_of_blocks(begin))
        self._again("backward", stream, self._first_backward)
        self._again("round_dq", stream, lambda: self._first_of_blocks("round_dq"))
        captured = gradients.collected(self.run, self.lowering, self.buffers)
        if self.lowering.sink is not None:
            gradients.add_sink(self.run, captured, tensors["lse2"], self.delta)
        return Gradients(tensors["dq"], tensors["dk"], tensors["dv"], captured)

    def _again(self, what: str, stream: int | None, first: Callable[[], Prepared | None]) -> None:
        again(self.run.ready, (f"gluon {what}", *self.layout), self.tensors, stream, first)

    @property
    def _kernels(self) -> dict[str, Kernel]:
        run = self.run
        spec = launch.lowered(run.bound.plan, True, True, True, run.wide)
        key = "gluon backward", id(spec), self.dim
        found: dict[str, Kernel] = run._known(key, lambda: _loaded(spec, self.dim))
        return found

    def _values(self) -> Values:
        """What every kernel may name."""
        tensors = self.tensors
        values = launch.common(self.run, tensors["q"], tensors["v"])
        for name in ("out", "dout", "dq"):
            strided(values, name, tensors[name])
        values |= gradients.arguments(self.run, self.lowering, self.buffers)
        names = ("lse2", "dlse", "dq_sum", "lse_rows", "delta_rows")
        values |= {f"{name}_ptr": tensors[name] for name in names if name in tensors}
        values |= {"HAS_DLSE": self.has_dlse, "BLOCK_D": self.dim, "BLOCK_M": self.rows}
        return values | {"q_tiles": self.q_tiles}

    def _first_of_blocks(self, name: str) -> Prepared | None:
        """Starts a kernel that has a program for each block of queries."""
        batch, heads = self.tensors["q"].shape[:2]
        grid = self.q_tiles, batch * heads
        config = Config(1, 1, 4, 1)
        return start(self._kernels[name], grid, self._values(), self.tensors, config)

    def _heavy(self) -> int:
        """How many key tiles of every head should start before all others."""
        plan, binding = self.run.bound.plan, self.run.bound.binding
        ranges = plan.query_ranges
        if plan.blocks is Blocks.LISTS or ranges is None or not reads_nothing(ranges.visit):
            return 0
        if plan.key_order is Order.REVERSED:
            return 0
        tile = self.config.block_m, self.config.block_n
        return _heavy_first(visited(ranges.visit, Axis.KV, binding, tile))

    def _first_backward(self) -> Prepared | None:
        run, tensors = self.run, self.tensors
        values = self._values()
        grid = launch.tiled(run, values, "kv", self.config, run.bound.binding.kv_heads)
        values |= {
            "nought": 0,
            "heavy": self._heavy(),
            **configs.backward_constexprs(self.config, self.dim),
        }
        for name in ("q", "dout"):
            values[f"{name}_desc"] = described(tensors[name], self.rows, self.dim)
        for name in ("k", "v", "dk", "dv"):
            values[f"{name}_desc"] = described(tensors[name], configs.ROWS, self.dim)
        for name in ("lse_rows", "delta_rows"):
            if name in tensors:
                values[f"{name}_desc"] = _in_line(tensors[name], self.rows)
        return start(self._kernels["backward"], (grid,), values, tensors, Config(1, 1, 4, 1))


def _heavy_first(work: Tensor) -> int:
    """How many tiles at the beginning have far more work than most; [..., tiles]."""
    most = work.median(-1, keepdim=True).values * HEAVY
    return int((work > most).all(dim=(0, 1)).int().cumprod(0).sum()) if work.numel() else 0


HEAVY = 3
"""Times the work of the median."""


def _loaded(spec: Spec, columns: int) -> dict[str, Kernel]:
    names = ("delta" if spec.lowering.softmax else "clear", *NAMES)
    return load(f"{spec.name}_gluon_backward", backward_source(spec, columns), names)


def _in_line(x: Tensor, count: int) -> Any:
    """A descriptor of `count` numbers at a time of a contiguous tensor."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    shared = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return TensorDescriptor(x, [x.numel()], [1], [count], shared)
