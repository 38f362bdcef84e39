"""Which functions trace to one Program: by their code and what they captured."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LIBRARIES = ("torch", "math", "operator", "functools")
"""Modules whose names are taken to mean the same in every call."""

UNSAFE = frozenset(("eval", "exec", "globals", "locals", "vars", "__import__", "open", "input"))
"""Builtins that reach what no name in the code shows."""


@dataclass(frozen=True)
class Fingerprint:
    """key: equal for functions that trace alike, whatever their captured `tensors` hold."""

    key: Hashable
    tensors: tuple[Tensor, ...]


class _Unknown(Exception):
    """Something captured may change without a trace in the key."""


def fingerprint(*mods: object) -> Fingerprint | None:
    """None where a function holds an object whose state cannot be told, such as a module.

    Looked at: code, closures, defaults, globals that the code names, arguments of partials, and
    the same of every function among those. Numbers count by value; tensors by shape, strides,
    dtype, device, whether they require a gradient, and which of them are one.
    """
    reader = _Reader()
    try:
        key = tuple(reader.parts(mods))
    except _Unknown:
        return None
    return Fingerprint(key, tuple(reader.tensors))


class _Reader:
    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.numbers: dict[int, int] = {}
        """Of tensors and functions met before, by their ids."""

    def parts(self, values: Any) -> Iterator[Hashable]:
        return (self.part(value) for value in values)

    def part(self, x: Any) -> Hashable:
        kind = type(x)
        if kind in (bool, int, str, bytes, type(None), torch.dtype, torch.device):
            return kind, x
        if kind is float or kind is complex:
            return kind, repr(x)  # 0.0 and -0.0 differ, nan does not
        if kind is Tensor or kind is torch.nn.Parameter:
            return self.tensor(x)
        if kind in (tuple, list, torch.Size):
            return (kind, *self.parts(x))
        if kind is dict:
            return (kind, *self.parts(x), *self.parts(x.values()))
        match x:
            case types.FunctionType():
                return self.function(x)
            case types.BuiltinFunctionType() if x.__self__ is None or _is_library(x.__self__):
                return x
            case functools.partial() if kind is functools.partial:
                return kind, *self.parts((x.func, x.args, x.keywords))
            case types.ModuleType() if _is_library(x):
                return x
        raise _Unknown

    def tensor(self, x: Tensor) -> Hashable:
        if id(x) in self.numbers:
            return self.numbers[id(x)]
        self.numbers[id(x)] = len(self.numbers)
        self.tensors.append(x)
        if x.layout is not torch.strided:
            raise _Unknown
        return Tensor, x.shape, x.stride(), x.dtype, x.device, x.requires_grad

    def function(self, x: types.FunctionType) -> Hashable:
        if id(x) in self.numbers:
            return self.numbers[id(x)]
        self.numbers[id(x)] = len(self.numbers)
        code = x.__code__
        held: list[object] = [x.__defaults__, x.__kwdefaults__, x.__dict__ or None]
        for cell in x.__closure__ or ():
            try:
                held.append(cell.cell_contents)
            except ValueError:
                raise _Unknown from None
        if not str(x.__module__ or "").startswith("torch."):
            names = names_read(code)
            if names is None:
                raise _Unknown
            held += [x.__globals__[name] for name in names if name in x.__globals__]
        return (code, *self.parts(held))


@functools.lru_cache(maxsize=1024)
def names_read(code: types.CodeType) -> tuple[str, ...] | None:
    """Globals that the code reads; None where it may read what has no name there, or writes."""
    found: dict[str, None] = {}
    for step in dis.get_instructions(code):
        if step.opname in ("IMPORT_NAME", "STORE_GLOBAL", "DELETE_GLOBAL"):
            return None
        if step.opname in ("STORE_DEREF", "DELETE_DEREF") and step.argval in code.co_freevars:
            return None
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            found[step.argval] = None
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            names = names_read(inner)
            if names is None:
                return None
            found |= dict.fromkeys(names)
    return None if UNSAFE & found.keys() else tuple(found)


def _is_library(x: object) -> bool:
    return isinstance(x, types.ModuleType) and x.__name__.split(".")[0] in (*LIBRARIES, "builtins")
