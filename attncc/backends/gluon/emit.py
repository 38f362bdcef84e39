"""As triton/emit.py, with the warp-specialised forward where a call would run it."""

from __future__ import annotations

from collections.abc import Iterator

from triton.experimental.gluon import language as gl

from attncc import cache
from attncc.backends import gluon
from attncc.backends.gluon import configs
from attncc.backends.gluon.forward import forward_source
from attncc.backends.triton import aot, emit
from attncc.backends.triton.configs import Config, Shape
from attncc.backends.triton.emit import Arguments, Call, Row
from attncc.errors import ArgumentError, UnsupportedError, suggest
from attncc.ir.plan import Plan

BACKENDS = ("gluon", "triton")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Torch's names of `emit.DTYPES`."""


def backend(call: Call, target: aot.Target, asked: str | None = None) -> str:
    """Whose forward a call gets: that of the backend asked for, else the one that would be chosen.

    Raises ArgumentError where there is no such backend, UnsupportedError where it has no kernel.
    """
    if asked is not None and asked not in BACKENDS:
        hint = suggest(asked, BACKENDS) or "kernels come from gluon and triton"
        raise ArgumentError(f"there is no backend {asked!r} that has kernels", hint=hint)
    reason = unsupported(call, target)
    if asked == "gluon" and reason:
        raise UnsupportedError(
            f"the gluon backend has no such kernel: {reason}", hint="leave the backend to be chosen"
        )
    chosen = "gluon" if gluon.CHOSEN and not reason else "triton"
    return asked or chosen


def unsupported(call: Call, target: aot.Target) -> str:
    """Why no warp-specialised kernel serves calls on that GPU; empty where one does."""
    if target.name != "sm_90":
        return f"it is for sm_90, not {target.name}"
    dtype = DTYPES.get(call.dtype, call.dtype)
    return configs.unsupported(dtype, call.head_dim, call.value_dim)


def sources(plan: Plan, call: Call, target: aot.Target, asked: str | None = None) -> dict[str, str]:
    """The text of each kernel file, by its name without the suffix; see `backend`."""
    found = emit.spec(plan, call.dtype, target)
    texts = emit.sources(found)
    if backend(call, target, asked) == "triton":
        return texts
    texts.pop(f"{found.name}_forward")
    return {f"{found.name}_gluon_forward": _forward(plan, call, target)[0], **texts}


def compile_all(
    plan: Plan, call: Call, target: aot.Target, only: str = "", asked: str | None = None
) -> Iterator[Row]:
    """As `triton.emit.compile_all`, with the forward of a backend; see `backend`."""
    own = backend(call, target, asked) == "gluon"
    if own and "gluon_forward".endswith(only):
        yield _compiled(plan, call, target)
    for file in emit.FILES:
        if file.endswith(only) and not (own and file == "forward"):
            yield from emit.compile_all(plan, call, target, file)


def _forward(plan: Plan, call: Call, target: aot.Target) -> tuple[str, Config, Shape]:
    """The text of the forward, with its schedule."""
    columns = configs.columns(call.head_dim, call.value_dim)
    shape = Shape(*columns, emit.DTYPES[call.dtype], target.shared_limit)
    config = configs.default(shape, plan)
    out_in_q, _ = configs.spare(config, shape)
    spec = emit.spec(plan, call.dtype, target)
    return forward_source(spec, config.block_m // configs.ROWS, out_in_q), config, shape


def _compiled(plan: Plan, call: Call, target: aot.Target) -> Row:
    text, config, shape = _forward(plan, call, target)
    spec = emit.spec(plan, call.dtype, target)
    module = cache.load_module(cache.write_source(f"{spec.name}_gluon_forward", text))
    tiles = {
        "q": (configs.ROWS, shape.block_d),
        "k": (config.block_n, shape.block_d),
        "v": (config.block_n, shape.block_dv),
        "out": (configs.ROWS, shape.block_dv),
    }
    types = {f"{name}_desc": _descriptor(call.dtype, *tile) for name, tile in tiles.items()}
    types |= {"works": "i32", "counter_ptr": "*i32"}
    constants = {"BLOCK_D": shape.block_d, "BLOCK_DV": shape.block_dv}
    constants |= configs.constexprs(config, shape)
    known = Arguments.of(spec, call, config)
    arguments = Arguments(known.types | types, known.constants | constants)
    # A program is launched with the warps of its first consumer; others join them.
    compiled = arguments.compiled(module.forward, target, 4, config.num_stages)
    return Row("gluon_forward", config, compiled)


def _descriptor(dtype: str, rows: int, columns: int) -> str:
    """The type of one for [1, 1, rows, columns] tiles, as wgmma reads them."""
    block = [1, 1, rows, columns]
    element = gl.bfloat16 if dtype == "bf16" else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(block, element)
    return f"tensordesc<{dtype}{block},{layout!r}>"
