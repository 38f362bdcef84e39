"""A Binding: the lengths, scalar values and captured tensors of one call, checked."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from attncc.capture import capturing, promise
from attncc.errors import ArgumentError, suggest
from attncc.ir.expr import SIZES, ScalarParam, TensorParam
from attncc.ir.ops import Kind
from attncc.ir.program import Program
from attncc.ir.show import show_param

Number = bool | int | float

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)
DTYPES = {Kind.FLOAT: FLOATS, Kind.INT: INTS, Kind.BOOL: (torch.bool,)}
"""Dtypes a captured tensor of each kind may have; of q, k and v those of a float."""

SAFE = range(-(2**62), 2**62 + 1)
"""Ints that a position can be added to in 64 bits, as bounds of ranges do."""


@dataclass(frozen=True)
class Binding:
    """Everything a program needs besides q, k and v themselves.

    scalars: every scalar parameter and every size, by name.
    tensors: captured tensors by name, all on `device`.
    """

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    scalars: Mapping[str, Number] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    device: torch.device = torch.device("cpu")


def bind(
    program: Program, q: Tensor, k: Tensor, v: Tensor, arguments: Mapping[str, object]
) -> Binding:
    """Checks q [B, Hq, Q, D], k [B, Hkv, KV, D], v [B, Hkv, KV, Dv] and the program's arguments.

    Raises ArgumentError naming the argument, what it was and what was expected.
    """
    check_inputs(q, k, v)
    batch, heads, q_len, head_dim = q.shape
    sizes = _sizes(batch, heads, k.shape[1], q_len, k.shape[2], head_dim)
    return _bind(program, sizes, arguments, q.device)


def bind_lengths(
    program: Program,
    *,
    q_len: int,
    kv_len: int,
    batch: int = 1,
    heads: int = 1,
    kv_heads: int | None = None,
    head_dim: int = 64,
    arguments: Mapping[str, object] | None = None,
) -> Binding:
    """The same without q, k and v; on the device of the first captured tensor, or the CPU."""
    kv_heads = heads if kv_heads is None else kv_heads
    sizes = _sizes(batch, heads, kv_heads, q_len, kv_len, head_dim)
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ArgumentError(f"{name} is {value!r}, expected an int that is not negative")
    _check_heads(heads, kv_heads)
    arguments = arguments or {}
    devices = [value.device for value in arguments.values() if isinstance(value, Tensor)]
    return _bind(program, sizes, arguments, devices[0] if devices else torch.device("cpu"))


def _sizes(*values: int) -> dict[str, int]:
    return {size.name: value for size, value in zip(SIZES, values, strict=True)}


def _bind(
    program: Program, sizes: dict[str, int], arguments: Mapping[str, object], device: torch.device
) -> Binding:
    _check_names(program, arguments)
    scalars = {p.name: _scalar(p, arguments.get(p.name, p.default)) for p in program.scalars}
    known = dict(sizes)
    by_whom = dict.fromkeys(sizes, "q, k and v")
    tensors = {}
    for param in program.tensors:
        tensors[param.name] = _tensor(param, arguments[param.name], device)
        _check_dims(param, tensors[param.name], known, by_whom)
    return Binding(**sizes, scalars={**sizes, **scalars}, tensors=tensors, device=device)


# -- q, k and v


def check_inputs(q: object, k: object, v: object) -> None:
    """Shapes, dtypes and devices of q, k and v against each other."""
    for name, x, layout in (("q", q, "[B, Hq, Q, D]"), ("k", k, "[B, Hkv, KV, D]"), ("v", v, "")):
        layout = layout or "[B, Hkv, KV, Dv]"
        if not isinstance(x, Tensor):
            raise ArgumentError(f"{name} is {_kind_of(x)}, expected a tensor {layout}")
        if x.dim() != 4:
            raise ArgumentError(
                f"{name} has shape {_shape(x)}, expected {layout}",
                hint=f"add the missing axes: {name}[None] for the batch" if x.dim() < 4 else "",
            )
        if x.dtype not in FLOATS:
            raise ArgumentError(f"{name} is {_dtype(x)}, expected {_one_of(FLOATS)}")
    assert isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            hint = f"convert one: {name}.to(q.dtype)"
            raise ArgumentError(f"{name} is {_dtype(x)}, but q is {_dtype(q)}", hint=hint)
        if x.device != q.device:
            hint = f"move one: {name}.to(q.device)"
            raise ArgumentError(f"{name} is on {x.device}, but q is on {q.device}", hint=hint)
        if x.shape[0] != q.shape[0]:
            raise ArgumentError(f"{name} has batch {x.shape[0]}, but q has batch {q.shape[0]}")
    _check_pair(q, k, v)


def _check_pair(q: Tensor, k: Tensor, v: Tensor) -> None:
    if k.shape[3] != q.shape[3] or q.shape[3] == 0:
        raise ArgumentError(
            f"k has head dim {k.shape[3]}, but q has head dim {q.shape[3]}",
            hint="q and k share their last axis, of 1 or more; only v may differ",
        )
    for axis, what in ((1, "heads"), (2, "keys")):
        if k.shape[axis] != v.shape[axis]:
            raise ArgumentError(f"v has {v.shape[axis]} {what}, but k has {k.shape[axis]}")
    _check_heads(q.shape[1], k.shape[1])


def _check_heads(heads: int, kv_heads: int) -> None:
    if kv_heads == 0 or heads % kv_heads:
        raise ArgumentError(
            f"q has {heads} heads and k has {kv_heads}, which does not divide {heads}",
            hint="tensors are [batch, heads, tokens, head_dim]: is an axis swapped?",
        )


# -- names


def _check_names(program: Program, arguments: Mapping[str, object]) -> None:
    params = {param.name: param for param in program.params}
    for name in arguments:
        if name not in params:
            takes = ", ".join(params) or "no parameters"
            raise ArgumentError(
                f"{program.name} has no parameter {name!r}",
                hint=suggest(name, params) or f"it takes {takes}",
            )
    for name, param in params.items():
        needed = isinstance(param, TensorParam) or param.default is None
        if needed and name not in arguments:
            raise ArgumentError(
                f"{program.name} is missing its parameter {show_param(param)!r}",
                hint=f"pass it by name: {name}=...",
            )


# -- scalars


def _scalar(param: ScalarParam, value: object) -> Number:
    """The value as a Python number of the parameter's kind; an int is a float where one is due."""
    value = _unwrapped(param, value)
    match param.kind, value:
        case (Kind.BOOL, bool()):
            return value
        case (Kind.INT, int()) if not isinstance(value, bool):
            if value not in SAFE:
                raise ArgumentError(
                    f"{param.name} is {value}, expected an int from -2**62 to 2**62",
                    hint="for no bound at all, any number above the lengths serves",
                )
            return value
        case (Kind.FLOAT, int() | float()) if not isinstance(value, bool):
            return float(value)
    hints = {Kind.BOOL: "write True or False", Kind.INT: "write int(...)", Kind.FLOAT: ""}
    raise ArgumentError(
        f"{param.name} is {value!r}, {_kind_of(value)}, expected {_a(param.kind)}",
        hint=hints[param.kind],
    )


def _unwrapped(param: ScalarParam, value: object) -> object:
    """numpy's numbers and 0-d tensors as Python's."""
    if isinstance(value, Tensor):
        _check_zero_dim(param, value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return value


def _check_zero_dim(param: ScalarParam, value: Tensor) -> None:
    if value.dim() > 0:
        raise ArgumentError(
            f"{param.name} is a tensor of shape {_shape(value)}, expected {_a(param.kind)}",
            hint=f"to read its elements, declare '{param.name}: {param.kind.value}[n]'",
        )
    if value.requires_grad and torch.is_grad_enabled():
        raise ArgumentError(
            f"{param.name} requires grad, but it is a scalar, which gets none",
            hint=f"declare '{param.name}: float[1] grad', write {param.name}[0], pass one",
        )
    if value.device.type != "cpu":
        raise ArgumentError(
            f"{param.name} is a tensor on {value.device}, expected {_a(param.kind)}",
            hint=f"pass {param.name}.item(), which waits for the device, or declare a tensor",
        )


# -- captured tensors


def _tensor(param: TensorParam, value: object, device: torch.device) -> Tensor:
    declared = show_param(param)
    if not isinstance(value, Tensor):
        raise ArgumentError(
            f"{param.name} is {_kind_of(value)}, expected a tensor, {declared!r}",
            hint=f"pass torch.as_tensor({param.name})",
        )
    if value.dtype not in DTYPES[param.kind]:
        raise ArgumentError(
            f"{param.name} is {_dtype(value)}, expected {_one_of(DTYPES[param.kind])} "
            f"for {declared!r}"
        )
    if value.device != device:
        raise ArgumentError(
            f"{param.name} is on {value.device}, but q is on {device}",
            hint=f"move it: {param.name}.to({str(device)!r})",
        )
    if value.requires_grad and not param.grad and torch.is_grad_enabled():
        raise ArgumentError(
            f"{param.name} requires grad, but is not declared to get one",
            hint=f"declare '{declared} grad', or pass {param.name}.detach()",
        )
    return value


def _check_dims(
    param: TensorParam, value: Tensor, known: dict[str, int], by_whom: dict[str, str]
) -> None:
    """Each axis against its declared dim; a free name is bound by the first tensor that has it."""
    declared = show_param(param)
    if value.dim() != len(param.dims):
        raise ArgumentError(
            f"{param.name} has shape {_shape(value)}, expected {len(param.dims)} axes, {declared!r}"
        )
    for axis, (size, dim) in enumerate(zip(value.shape, param.dims, strict=True)):
        expected = dim if isinstance(dim, int) else known.setdefault(dim, size)
        if isinstance(dim, str):
            by_whom.setdefault(dim, param.name)
        if size != expected:
            source = f" ({dim}, from {by_whom[dim]})" if isinstance(dim, str) else ""
            raise ArgumentError(
                f"{param.name} has shape {_shape(value)}: its axis {axis} has {size} elements, "
                f"expected {expected}{source}, {declared!r}"
            )
    if param.sorted:
        _check_sorted(param, value)


_known_sorted: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()
"""Tensor to the version at which it was found sorted, so that a repeated call does not sync."""


def _check_sorted(param: TensorParam, value: Tensor) -> None:
    """Nondecreasing along the last axis, in O(N), once a tensor object and version.

    Inference tensors have no version, so they are checked each time, as is every new view.
    """
    if capturing(value.device):
        rises = (value[..., 1:] >= value[..., :-1]).all()
        promise(rises, f"{param.name} is declared sorted, and is not in this replay")
        return
    version = None if value.is_inference() else value._version
    if version is not None and _known_sorted.get(value) == version:
        return
    falls = value[..., 1:] < value[..., :-1]
    if bool(falls.any()):
        at = tuple(falls.nonzero()[0].tolist())
        after = (*at[:-1], at[-1] + 1)
        raise ArgumentError(
            f"{param.name} is declared sorted, but {param.name}{list(at)} is {value[at].item()} "
            f"and {param.name}{list(after)} is {value[after].item()}",
            hint=f"sort it along its last axis, or drop 'sorted' from '{show_param(param)}'",
        )
    if version is not None:
        _known_sorted[value] = version


# -- words


def _shape(x: Tensor) -> str:
    return str(list(x.shape))


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _one_of(dtypes: tuple[torch.dtype, ...]) -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _a(kind: Kind) -> str:
    return f"{'an' if kind is Kind.INT else 'a'} {kind.value}"


def _kind_of(value: object) -> str:
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
