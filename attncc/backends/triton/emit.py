"""The kernel files of a Plan, and what every kernel in them compiles to for a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from attncc import cache
from attncc.backends.triton import aot
from attncc.backends.triton.backward import backward_source
from attncc.backends.triton.classify import lists_source
from attncc.backends.triton.configs import KERNELS, Config, Shape, default, padded, padded_value
from attncc.backends.triton.forward import forward_source
from attncc.backends.triton.launch import traits
from attncc.backends.triton.lists import CHUNK, LIST_WARPS, SUMMARY_WARPS, WIDTH
from attncc.backends.triton.lower import lower
from attncc.backends.triton.sections import Spec
from attncc.backends.triton.text import Names
from attncc.errors import ArgumentError, suggest
from attncc.ir.expr import ScalarParam, TensorParam
from attncc.ir.ops import Kind
from attncc.ir.plan import Blocks, Plan

DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Triton's names of the dtypes of q, k and v, and their bytes."""
FILES = ("forward", "backward", "lists")
"""What the names of kernel files end in."""
FIXED = {
    "delta": Config(64, 64, 4, 3),
    "summarize": Config(128, 128, SUMMARY_WARPS, 1),
    "key_lists": Config(128, 128, LIST_WARPS, 1),
    "query_lists": Config(128, 128, LIST_WARPS, 1),
}
"""Schedules of the kernels that are not tuned."""
POINTERS = {Kind.BOOL: "*i1", Kind.INT: "*i64", Kind.FLOAT: "*fp32"}
NUMBERS = {Kind.BOOL: "u1", Kind.INT: "i32", Kind.FLOAT: "fp32"}


@dataclass(frozen=True, slots=True)
class Call:
    """What a compiled kernel is specialised on; the value dim is `head_dim` unless said."""

    dtype: str
    head_dim: int
    value_dim: int
    group: int = 1


@dataclass(frozen=True, slots=True)
class Row:
    """One kernel, compiled with one schedule."""

    kernel: str
    config: Config
    compiled: aot.Compiled


def spec(plan: Plan, dtype: str, target: aot.Target) -> Spec:
    """What decides the text of a plan's kernels on that target."""
    if dtype not in DTYPES:
        hint = suggest(dtype, DTYPES) or f"dtypes are {', '.join(DTYPES)}"
        raise ArgumentError(f"there is no dtype {dtype!r}", hint=hint)
    half = dtype != "fp32"
    ptx = target.gpu.backend == "cuda"
    return Spec(lower(plan), half=half, ptx=ptx, descriptors=half and target.descriptors)


def sources(found: Spec) -> dict[str, str]:
    """The text of each kernel file, by its name without the suffix."""
    texts = {
        f"{found.name}_forward": forward_source(found),
        f"{found.name}_backward": backward_source(found),
    }
    if found.lowering.plan.blocks is Blocks.LISTS:
        texts[f"{found.name}_lists"] = lists_source(found)
    return texts


def compile_all(plan: Plan, call: Call, target: aot.Target, only: str = "") -> Iterator[Row]:
    """Compile every kernel of the plan for a target, each with its default schedule.

    only: of the file whose name ends so: "forward", "backward" or "lists".
    """
    found = spec(plan, call.dtype, target)
    for stem, text in sources(found).items():
        if not stem.endswith(only):
            continue
        module = cache.load_module(cache.write_source(stem, text))
        for name in (*FIXED, *KERNELS):
            if hasattr(module, name):
                yield _compile(found, module, name, call, target)


def _compile(found: Spec, module: ModuleType, name: str, call: Call, target: aot.Target) -> Row:
    dims = padded(call.head_dim), _value_columns(call)
    ampere = target.gpu.backend == "cuda" and not target.descriptors
    shape = Shape(*dims, DTYPES[call.dtype], target.shared_limit, ampere)
    config = FIXED[name] if name in FIXED else default(name, shape, traits(found.lowering.plan))
    arguments = Arguments.of(found, call, config)
    warps, stages = config.num_warps, config.num_stages
    return Row(name, config, arguments.compiled(getattr(module, name), target, warps, stages))


@dataclass(frozen=True, slots=True)
class Arguments:
    """What is known of any argument that a kernel file may name: its type, or its value."""

    types: dict[str, str]
    constants: dict[str, Any]

    @classmethod
    def of(cls, found: Spec, call: Call, config: Config) -> Arguments:
        constants = {**_constants(call, config), **_unit_strides(found)}
        return cls(_signature(found, call, config), constants)

    def compiled(
        self, kernel: Any, target: aot.Target, num_warps: int, num_stages: int
    ) -> aot.Compiled:
        names = kernel.arg_names
        return aot.compile_for(
            kernel,
            {n: self.types[n] for n in names if n not in self.constants},
            {n: self.constants[n] for n in names if n in self.constants},
            target,
            num_warps=num_warps,
            num_stages=num_stages,
            aligned=frozenset(n for n in names if n.endswith(("_ptr", *_STRIDES))),
        )


_INPUTS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
_STRIDES = ("_stride_b", "_stride_h", "_stride_n")
_SIZES = ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim")


def _constants(call: Call, config: Config) -> dict[str, Any]:
    return {
        "GROUP": call.group,
        "HEAD_DIM": call.head_dim,
        "VALUE_DIM": call.value_dim,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": padded(call.head_dim),
        "BLOCK_DV": _value_columns(call),
        "HAS_DLSE": False,
        "FIXED_POINT": 0,
        "CHUNK": CHUNK,
        "WIDTH": WIDTH,
    }


def _signature(found: Spec, call: Call, config: Config) -> dict[str, str]:
    """Triton's type of every argument that a kernel file may name."""
    ints = (*_SIZES, "q_tiles", "kv_tiles", "q_entries", "kv_entries", "list_size", "swizzle")
    lists = ("index", "full_count", "partial_count", "order")
    types = dict.fromkeys(ints, "i32") | {"scale": "fp32"}
    types |= {f"{name}_ptr": "*i32" for name in lists} | {"index_ptr": "*i16", "start_ptr": "*i64"}
    for side in ("q", "kv"):
        types |= {f"{side}_int_ptr": "*i64", f"{side}_float_ptr": "*fp32"}
        types |= {f"{side}_stride_{of}": "i32" for of in ("b", "h", "term")}
    types |= {f"{name}_ptr": "*fp32" for name in ("lse", "lse2", "dlse", "delta")}
    for name in _INPUTS:
        types[f"{name}_ptr"] = f"*{call.dtype}"
        types[f"{name}_desc"] = _descriptor(name, call, config)
    types |= {name + end: "i32" for name in (*_INPUTS, "count", "order") for end in _STRIDES}
    for at, gradient in enumerate(found.lowering.gradients):
        types[f"grad_{at}_ptr"] = types[f"grad_{at}_top_ptr"] = "*fp32"
        types |= {f"grad_{at}_stride_{n}": "i32" for n in range(len(gradient.load.at))}
    return types | _parameters(found)


def _descriptor(name: str, call: Call, config: Config) -> str:
    rows = config.block_m if name in ("q", "dout") else config.block_n
    columns = _value_columns(call) if name in ("v", "dout") else padded(call.head_dim)
    return f"tensordesc<{call.dtype}[1, 1, {rows}, {columns}]>"


def _value_columns(call: Call) -> int:
    return padded_value(call.head_dim, call.value_dim, DTYPES[call.dtype])


def _parameters(found: Spec) -> dict[str, str]:
    """The program's own parameters, and what searches make."""
    plan = found.lowering.plan
    names = Names(param.name for param in plan.params)
    types = {names.pointer(search.tensor.name): "*i32" for search in plan.searches}
    for param in plan.program.params:
        match param:
            case ScalarParam(name, kind):
                types[names[name]] = NUMBERS[kind]
            case TensorParam(name, kind, dims):
                types[names.pointer(name)] = POINTERS[kind]
                for axis in range(len(dims)):
                    types[names.stride(name, axis)] = types[names.size(name, axis)] = "i32"
    return types


def _unit_strides(found: Spec) -> Mapping[str, int]:
    """Captured tensors are contiguous: a launch sees the 1, and makes a constant of it."""
    plan = found.lowering.plan
    names = Names(param.name for param in plan.params)
    return {names.stride(t.name, len(t.dims) - 1): 1 for t in plan.program.tensors if t.dims}
