"""As triton/emit.py, with the warp-specialised kernels where a call would run them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from triton.experimental.gluon import language as gl

from attncc import cache
from attncc.backends.gluon import configs
from attncc.backends.gluon.backward_wide import backward_source
from attncc.backends.gluon.forward import forward_source
from attncc.backends.triton import aot, emit
from attncc.backends.triton.configs import Config, Shape
from attncc.backends.triton.emit import Arguments, Call, Row
from attncc.backends.triton.sections import Spec
from attncc.backends.triton.versions import Version
from attncc.errors import ArgumentError, UnsupportedError, suggest
from attncc.ir.plan import Plan

BACKENDS = ("gluon", "triton")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Torch's names of `emit.DTYPES`."""


def specialised(
    plan: Plan, call: Call, target: aot.Target, asked: str | None = None
) -> tuple[bool, bool]:
    """Whether the forward, and the backward, of such a call are warp-specialised.

    asked: the backend asked for, "gluon" or "triton"; by default each kernel's best. Raises
    ArgumentError where there is no such backend, UnsupportedError where it has no such forward.
    """
    if asked is not None and asked not in BACKENDS:
        hint = suggest(asked, BACKENDS) or "kernels come from gluon and triton"
        raise ArgumentError(f"there is no backend {asked!r} that has kernels", hint=hint)
    reasons = unsupported(plan, call, target)
    if asked == "gluon" and reasons[0]:
        raise UnsupportedError(
            f"the gluon backend has no such kernel: {reasons[0]}",
            hint="leave the backend to be chosen",
        )
    return asked != "triton" and not reasons[0], asked != "triton" and not reasons[1]


def unsupported(plan: Plan, call: Call, target: aot.Target) -> tuple[str, str]:
    """Why no warp-specialised forward, and backward, serves such calls; empty where one does."""
    if target.name != "sm_90":
        reason = f"it is for sm_90, not {target.name}"
        return reason, reason
    given = DTYPES.get(call.dtype, call.dtype), call.head_dim, call.value_dim
    backward = configs.backward_unsupported(plan, *given, deterministic=False)
    return configs.unsupported(*given), backward


def sources(
    plan: Plan,
    call: Call,
    target: aot.Target,
    asked: str | None = None,
    triton: Version | None = None,
) -> dict[str, str]:
    """The text of each kernel file, by its name without the suffix; see `specialised`.

    Where gluon is asked for, and has no such backward, there is none. triton: the version whose
    names are printed, by default the installed one.
    """
    found = emit.spec(plan, call.dtype, target)
    found = found if triton is None else replace(found, triton=triton)
    texts = emit.sources(found)
    forward, backward = specialised(plan, call, target, asked)
    own = {}
    if forward:
        own[f"{found.name}_gluon_forward"] = _forward(found, call, target)[0]
    if backward:
        columns = configs.backward_columns(call.head_dim, call.value_dim)
        own[f"{found.name}_gluon_backward"] = backward_source(found, columns)
    for file, mine in (("forward", forward), ("backward", backward)):
        if mine or asked == "gluon":
            texts.pop(f"{found.name}_{file}")
    return own | texts


def compile_all(
    plan: Plan, call: Call, target: aot.Target, only: str = "", asked: str | None = None
) -> Iterator[Row]:
    """As `triton.emit.compile_all`, of the files of `sources`."""
    files = sources(plan, call, target, asked)
    name = emit.spec(plan, call.dtype, target).name
    if f"{name}_gluon_forward" in files and "gluon_forward".endswith(only):
        yield _compiled_forward(plan, call, target)
    if f"{name}_gluon_backward" in files and "gluon_backward".endswith(only):
        yield from _compiled_backward(plan, call, target)
    for file in emit.FILES:
        if file.endswith(only) and f"{name}_{file}" in files:
            yield from emit.compile_all(plan, call, target, f"{name}_{file}")


def _forward(spec: Spec, call: Call, target: aot.Target) -> tuple[str, Config, Shape]:
    """The text of the forward, with its schedule."""
    columns = configs.columns(call.head_dim, call.value_dim)
    shape = Shape(*columns, emit.DTYPES[call.dtype], target.shared_limit)
    config = configs.default(shape, spec.lowering.plan)
    out_in_q, _ = configs.spare(config, shape)
    return forward_source(spec, config.block_m // configs.ROWS, out_in_q), config, shape


WARPS = 4
"""Those of its first consumer, with which a program is launched; others join them."""


def _compiled_forward(plan: Plan, call: Call, target: aot.Target) -> Row:
    spec = emit.spec(plan, call.dtype, target)
    text, config, shape = _forward(spec, call, target)
    module = cache.load_module(cache.write_source(f"{spec.name}_gluon_forward", text))
    tiles = {
        "q": (configs.ROWS, shape.block_d),
        "k": (config.block_n, shape.block_d),
        "v": (config.block_n, shape.block_dv),
        "out": (configs.ROWS, shape.block_dv),
    }
    types = {f"{name}_desc": _descriptor(call.dtype, *tile) for name, tile in tiles.items()}
    types |= {"works": "i32", "nought": "i32", "counter_ptr": "*i32"}
    constants = {"BLOCK_D": shape.block_d, "BLOCK_DV": shape.block_dv}
    constants |= configs.constexprs(config, shape)
    known = Arguments.of(spec, call, config)
    arguments = Arguments(known.types | types, known.constants | constants)
    compiled = arguments.compiled(module.forward, target, WARPS, config.num_stages)
    return Row("gluon_forward", config, compiled)


def _compiled_backward(plan: Plan, call: Call, target: aot.Target) -> Iterator[Row]:
    spec = emit.spec(plan, call.dtype, target)
    dim = configs.backward_columns(call.head_dim, call.value_dim)
    text = backward_source(spec, dim)
    module = cache.load_module(cache.write_source(f"{spec.name}_gluon_backward", text))
    config = configs.backward(dim)
    tiles = dict.fromkeys(("q", "dout"), (config.block_m, dim))
    tiles |= dict.fromkeys(("k", "v", "dk", "dv"), (configs.ROWS, dim))
    types = {f"{name}_desc": _descriptor(call.dtype, *tile) for name, tile in tiles.items()}
    line = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    for name in ("lse_rows", "delta_rows"):
        types[f"{name}_desc"] = f"tensordesc<fp32[{config.block_m}],{line!r}>"
        types[f"{name}_ptr"] = "*fp32"
    types |= {"dq_sum_ptr": "*fp32", "nought": "i32", "heavy": "i32"}
    for at, _ in enumerate(spec.lowering.gradients):
        types |= {f"grad_{at}_stride_{of}": "i32" for of in "bh"}
    constants = configs.backward_constexprs(config, dim)
    known = Arguments.of(spec, call, config)
    arguments = Arguments(known.types | types, known.constants | constants)
    for name in ("delta", "clear", "backward", "round_dq"):
        if hasattr(module, name):
            kernel = getattr(module, name)
            compiled = arguments.compiled(kernel, target, WARPS, config.num_stages)
            yield Row(name if name != "backward" else "gluon_backward", config, compiled)


def _descriptor(dtype: str, rows: int, columns: int) -> str:
    """The type of one for [1, 1, rows, columns] tiles, as wgmma reads them."""
    block = [1, 1, rows, columns]
    element = gl.bfloat16 if dtype == "bf16" else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(block, element)
    return f"tensordesc<{dtype}{block},{layout!r}>"
