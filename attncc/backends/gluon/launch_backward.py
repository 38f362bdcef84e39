"""Runs the warp-specialised backward: each row's delta, then all gradients, then dq rounded."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from attncc.backends.gluon import configs, diagonals
from attncc.backends.gluon import launch as launch_forward
from attncc.backends.gluon.backward import NAMES
from attncc.backends.gluon.backward_wide import backward_source
from attncc.backends.gluon.launch import described, schedule
from attncc.backends.triton import gradients, launch
from attncc.backends.triton.arguments import Values
from attncc.backends.triton.configs import Config
from attncc.backends.triton.kernels import Kernel, load
from attncc.backends.triton.launch import Gradients, Run, strided
from attncc.backends.triton.lower import Gradient
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
        has_dlse = dlse is not None
        key = "gluon backward", has_dlse, layout(q, k, v, dout)
        if key not in run.ready:
            q, k, v, dout = launch.in_rows(run, q, k, v, dout)
            key = "gluon backward", has_dlse, layout(q, k, v, dout)
        kernels: _Backward = run.prepared(key, lambda: _Backward(run, q, v, has_dlse))
        return kernels.gradients(q, k, v, out, lse2, dout, dlse)


class _Backward:
    """The kernels of one layout's backward, one after another."""

    def __init__(self, run: Run, q: Tensor, v: Tensor, has_dlse: bool) -> None:
        self.run, self.has_dlse = run, has_dlse
        self.lowering = run.lowering
        self.dim = configs.backward_columns(q.shape[-1], v.shape[-1])
        self.config = schedule(run, "gluon_backward", q, v)
        self.rows = self.config.block_m
        batch, heads, self.q_len = q.shape[:3]
        self.q_tiles = math.ceil(self.q_len / self.rows)
        # One block more: where programs add what they have before their first block.
        self.sums = batch * heads * self.q_tiles + 1, self.rows * self.dim
        self.padded = batch, heads, self.q_tiles * self.rows
        self.ready: dict[Hashable, Prepared | None] = {}

    def gradients(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse2: Tensor,
        dout: Tensor,
        dlse: Tensor | None,
    ) -> Gradients:
        lowering = self.lowering
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        tensors = {"q": q, "k": k, "v": v, "out": out, "lse2": lse2, "dout": dout}
        tensors |= {"dq": dq, "dk": dk, "dv": dv, "dq_sum": lse2.new_empty(self.sums)}
        tensors["dlse"] = lse2 if dlse is None else launch.in_line(dlse)
        begin = "clear"
        if lowering.softmax:
            begin, rows = "delta", lse2.new_empty(self.padded)
            tensors |= {"lse_rows": rows, "delta_rows": torch.empty_like(rows)}
        buffers = self._buffers(lse2) if lowering.gradients else {}
        tensors |= buffers
        stream = stream_of(q)
        for name, first in (
            (begin, lambda: self._first_of_blocks(begin, tensors)),
            ("backward", lambda: self._first_backward(tensors)),
            ("round_dq", lambda: self._first_of_blocks("round_dq", tensors)),
        ):
            again(self.ready, name, tensors, stream, first)
        captured = self._captured(buffers) if buffers else {}
        if lowering.sink is not None:
            delta = tensors["delta_rows"][..., : self.q_len]
            gradients.add_sink(self.run, captured, lse2, delta)
        return Gradients(dq, dk, dv, captured)

    @property
    def _by_distance(self) -> dict[str, Gradient]:
        found = enumerate(self.lowering.gradients)
        return {f"grad_{at}": gradient for at, gradient in found if gradient.by_distance}

    def _buffers(self, lse2: Tensor) -> dict[str, Tensor]:
        """What the kernel adds gradients of captured tensors to."""
        run, binding = self.run, self.run.bound.binding
        found = enumerate(self.lowering.gradients)
        without = [at for at, gradient in found if gradient.by_distance]
        made = gradients.buffers(run, self.lowering, lse2, without)
        for name, gradient in self._by_distance.items():
            made[name] = diagonals.buffer(gradient, binding, self.rows, lse2)
        return made

    def _captured(self, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        run, binding, ours = self.run, self.run.bound.binding, self._by_distance
        rest = {name: x for name, x in buffers.items() if name not in ours}
        total = gradients.collected(run, self.lowering, rest)
        for name, gradient in ours.items():
            of = gradient.load.tensor.name
            found = diagonals.collected(gradient, buffers[name], binding, binding.tensors[of])
            total[of] = total[of] + found if of in total else found
        return total

    @property
    def _kernels(self) -> dict[str, Kernel]:
        run = self.run
        spec = launch.lowered(run.bound.plan, True, True, True, run.wide)
        return run.kernels(spec, _loaded, self.dim)

    def _values(self, tensors: dict[str, Tensor]) -> Values:
        """What every kernel may name."""
        values = launch.common(self.run, tensors["q"], tensors["v"])
        for name in ("out", "dout", "dq"):
            strided(values, name, tensors[name])
        ours = self._by_distance
        sums = {name: x for name, x in tensors.items() if name.startswith("grad_")}
        rest = {name: x for name, x in sums.items() if name not in ours}
        values |= gradients.arguments(self.run, self.lowering, rest)
        for name in ours:
            values[f"{name}_ptr"] = sums[name]
            for axis, letter in enumerate("bh"):
                stride = sums[name].stride(axis) if sums[name].shape[axis] > 1 else 0
                values[f"{name}_stride_{letter}"] = stride
        names = ("lse2", "dlse", "dq_sum", "lse_rows", "delta_rows")
        values |= {f"{name}_ptr": tensors[name] for name in names if name in tensors}
        values |= {"HAS_DLSE": self.has_dlse, "BLOCK_D": self.dim, "BLOCK_M": self.rows}
        return values | {"q_tiles": self.q_tiles}

    def _first_of_blocks(self, name: str, tensors: dict[str, Tensor]) -> Prepared | None:
        """Starts a kernel that has a program for each block of queries."""
        batch, heads = tensors["q"].shape[:2]
        grid = self.q_tiles, batch * heads
        config = Config(1, 1, 4, 1)
        return start(self._kernels[name], grid, self._values(tensors), tensors, config)

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

    def _first_backward(self, tensors: dict[str, Tensor]) -> Prepared | None:
        run = self.run
        values = self._values(tensors)
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
