"""Inputs for a program that has none: q, k, v, and captured tensors that fit their declaration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attncc.demo_data import Row, document_ids, packed_rows
from attncc.errors import ArgumentError, suggest
from attncc.ir.expr import TensorParam
from attncc.ir.ops import Kind
from attncc.ir.program import Program

MANY = 8
"""Ints that nothing is known of are smaller than this, so that equal ones meet."""

GIVEN = "given"


@dataclass(frozen=True, slots=True)
class Lengths:
    """The sizes of a call, as the command line gives them."""

    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    q_len: int = 1024
    kv_len: int = 1024
    head_dim: int = 64

    def sizes(self) -> dict[str, int]:
        """By the names that programs use."""
        return {name: getattr(self, name) for name in self.__slots__}

    def __str__(self) -> str:
        """`B1 H64/8 N32768 D128`"""
        heads = f"{self.heads}/{self.kv_heads}" if self.kv_heads != self.heads else self.heads
        n = f"{self.q_len}x{self.kv_len}" if self.kv_len != self.q_len else self.q_len
        return f"B{self.batch} H{heads} N{n} D{self.head_dim}"


@dataclass(frozen=True, slots=True)
class Captured:
    """Tensors by name, how each came about in words, and the documents of packed ones."""

    tensors: Mapping[str, Tensor]
    origins: Mapping[str, str]
    rows: tuple[Row, ...] = ()

    @property
    def given(self) -> dict[str, Tensor]:
        """Those that were not made up."""
        return {name: x for name, x in self.tensors.items() if self.origins[name] == GIVEN}


def captured(
    program: Program, lengths: Lengths, given: Mapping[str, Tensor], seed: int = 0
) -> Captured:
    """A value for every captured tensor: the given one, or one made from its declaration.

    Sorted ints are real packed documents; other ints, floats and bools are random. Raises
    ArgumentError for a given tensor that the program does not declare.
    """
    names = [tensor.name for tensor in program.tensors]
    for name in given:
        if name not in names:
            hint = suggest(name, names) or f"it has {', '.join(names) or 'none'}"
            raise ArgumentError(f"{program.name} captures no tensor {name!r}", hint=hint)
    sizes = {**_free_dims(program, lengths), **_given_dims(program, given), **lengths.sizes()}
    rows: tuple[Row, ...] = ()
    tensors, origins = dict(given), dict.fromkeys(given, GIVEN)
    for number, tensor in enumerate(program.tensors):
        if tensor.name in given:
            continue
        shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in tensor.dims)
        if tensor.sorted and tensor.kind is Kind.INT and not rows:
            rows = _rows(shape, seed)
        origins[tensor.name] = _origin(tensor)
        tensors[tensor.name] = _make(tensor, shape, lengths, rows, seed + number)
    return Captured(tensors, origins, rows)


def qkv(
    lengths: Lengths, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q [B, H, Q, D] and k, v [B, Hkv, KV, D]."""
    generator = torch.Generator(device).manual_seed(seed)
    n = lengths
    q_shape = n.batch, n.heads, n.q_len, n.head_dim
    kv_shape = n.batch, n.kv_heads, n.kv_len, n.head_dim
    q, k, v = (
        torch.randn(shape, generator=generator, device=device, dtype=dtype)
        for shape in (q_shape, kv_shape, kv_shape)
    )
    return q, k, v


def _make(
    tensor: TensorParam, shape: tuple[int, ...], lengths: Lengths, rows: tuple[Row, ...], seed: int
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    match tensor.kind:
        case Kind.INT if tensor.sorted:
            ids = torch.tensor([document_ids(row) for row in rows], dtype=torch.int64)
            return _fitted(ids, shape)
        case Kind.INT:
            # One number a sequence or head is a length most likely, one a token a class.
            per_token = any(dim in ("q_len", "kv_len") for dim in tensor.dims)
            low, high = (0, MANY) if per_token else (0, max(1, lengths.kv_len))
            return torch.randint(low, high, shape, generator=generator)
        case Kind.BOOL:
            return torch.rand(shape, generator=generator) < 0.5
        case Kind.FLOAT:
            values = torch.randn(shape, generator=generator)
            return values.sort(-1).values if tensor.sorted else values


def _rows(shape: tuple[int, ...], seed: int) -> tuple[Row, ...]:
    count = 1
    for size in shape[:-1]:
        count *= size
    return packed_rows(count, shape[-1] if shape else 1, seed)


def _fitted(ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Rows made for one tensor, for another: repeated or cut, and the last value held."""
    count = 1
    for size in shape[:-1]:
        count *= size
    if 0 in shape or ids.numel() == 0:
        return ids.new_zeros(shape)
    row = torch.arange(count) % ids.shape[0]
    column = torch.arange(shape[-1]).clamp(max=ids.shape[1] - 1)
    return ids[row][:, column].reshape(shape)


def _origin(tensor: TensorParam) -> str:
    if tensor.sorted and tensor.kind is Kind.INT:
        return "packed documents: the words of Python's library sources"
    return "random"


def _free_dims(program: Program, lengths: Lengths) -> dict[str, int]:
    """Dims with a name of the program's own: long enough for positions, floats for distances."""
    dims: dict[str, int] = {}
    for tensor in program.tensors:
        for dim in tensor.dims:
            if isinstance(dim, str):
                length = max(lengths.q_len, lengths.kv_len)
                if tensor.kind is Kind.FLOAT:
                    length = lengths.q_len + lengths.kv_len
                dims[dim] = max(length, dims.get(dim, 0))
    return dims


def _given_dims(program: Program, given: Mapping[str, Tensor]) -> dict[str, int]:
    return {
        dim: size
        for tensor in program.tensors
        if tensor.name in given
        for dim, size in zip(tensor.dims, given[tensor.name].shape, strict=False)
        if isinstance(dim, str)
    }
