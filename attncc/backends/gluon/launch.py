"""Runs warp-specialised kernels."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from attncc.backends.gluon import configs
from attncc.backends.gluon.forward import forward_source
from attncc.backends.triton import launch
from attncc.backends.triton.configs import Config, Shape
from attncc.backends.triton.kernels import Kernel, load
from attncc.backends.triton.launch import Run
from attncc.backends.triton.prepared import Prepared, again, layout, start, stream_of
from attncc.backends.triton.schedules import choose
from attncc.backends.triton.sections import Spec


def unsupported(q: Tensor, v: Tensor) -> str:
    """Why no warp-specialised kernel serves a call; empty where one does."""
    if not (q.is_cuda and _is_hopper(q.device)):
        return f"it is for sm_90, and q is on {q.device}"
    if 0 in q.shape or 0 in v.shape:
        return "there is nothing to attend"
    return configs.unsupported(str(q.dtype).removeprefix("torch."), q.shape[-1], v.shape[-1])


@lru_cache
def _is_hopper(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


def forward(run: Run, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `triton.launch.forward`."""
    with launch.on(q.device):
        stream = stream_of(q)
        key = "gluon forward", stream, layout(q, k, v)
        if key not in run.ready:
            q, k, v = launch.in_rows(run, q, k, v)
            key = "gluon forward", stream, layout(q, k, v)
        out = launch.like(q, v.shape[-1])
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        lse2 = torch.empty_like(lse)
        tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "lse2": lse2}
        again(run.ready, key, tensors, stream, lambda: _first_forward(run, tensors))
    return out, lse, lse2


def schedule(run: Run, kernel: str, q: Tensor, v: Tensor) -> Config:
    """The schedule that was asked for, or that `attn.tune` found for such calls, or the default."""
    if run.configs and kernel in run.configs:
        return run.configs[kernel]
    plan, binding, shape = run.bound.plan, run.bound.binding, shape_of(kernel, q, v)
    usual = configs.usual(kernel, shape, plan, binding.kv_len)
    fits = partial(configs.fits, kernel, shape=shape, plan=plan)
    return choose(kernel, plan, binding, q, v, usual, fits)


def shape_of(kernel: str, q: Tensor, v: Tensor) -> Shape:
    """What a kernel's schedules depend on, of these inputs."""
    dims = q.shape[-1], v.shape[-1]
    if kernel == "gluon_backward":
        columns = configs.backward_columns(*dims)
        return Shape(columns, columns, q.element_size())
    return Shape(*configs.columns(*dims), q.element_size())


def _loaded(spec: Spec, consumers: int, out_in_q: bool) -> dict[str, Kernel]:
    text = forward_source(spec, consumers, out_in_q)
    return load(f"{spec.name}_gluon_forward", text, ("forward",))


def _first_forward(run: Run, tensors: dict[str, Tensor]) -> Prepared | None:
    q, k, v, out = (tensors[name] for name in ("q", "k", "v", "out"))
    spec = launch.lowered(run.bound.plan, True, True, True, run.wide)
    shape = shape_of("gluon_forward", q, v)
    dims = shape.block_d, shape.block_dv
    config = schedule(run, "gluon_forward", q, v)
    values = launch.common(run, q, v)
    values["BLOCK_D"], values["BLOCK_DV"] = dims
    works = launch.tiled(run, values, "q", config, run.bound.binding.heads)
    values |= configs.constexprs(config, shape) | {"works": works, "nought": 0}
    consumers = values["CONSUMERS"]
    out_in_q, _ = configs.spare(config, shape)
    kernel = run.kernels(spec, _loaded, consumers, out_in_q)["forward"]
    values |= {f"{name}_ptr": tensors[name] for name in ("lse", "lse2")}
    values["q_desc"] = described(q, configs.ROWS, dims[0])
    values["k_desc"] = described(k, config.block_n, dims[0])
    values["v_desc"] = described(v, config.block_n, dims[1])
    values["out_desc"] = described(out, configs.ROWS, dims[1])
    values["counter_ptr"] = torch.zeros(1, dtype=torch.int32, device=q.device)
    grid = min(works, run.programs or _processors(q.device))
    return start(kernel, (grid,), values, tensors, Config(1, 1, 4, config.num_stages))


def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def described(x: Tensor, rows: int, columns: int) -> Any:
    """A descriptor of [1, 1, rows, columns] tiles of a [B, H, N, D] tensor, as wgmma reads them."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    block = [1, 1, rows, columns]
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[x.dtype]
    shared = gl.NVMMASharedLayout.get_default_for(block, dtype)
    plain = launch.described(x, rows, columns)
    return TensorDescriptor(x, plain.shape, plain.strides, block, shared)
