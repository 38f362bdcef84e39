"""Copies of functions with their captured numbers replaced; the user's own are never changed."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

Number = bool | int | float

MANY = 16
"""Numbers of a longer list are data, and stay as they are."""


class Copies:
    """Makes copies whose closures, defaults, globals, partial arguments and attributes differ.

    number: what stands for a number of that name. tensor: told of each tensor and its name.
    """

    def __init__(
        self, number: Callable[[Number, str], object], tensor: Callable[[Tensor, str], None]
    ) -> None:
        self.number, self.tensor = number, tensor
        self.done: dict[int, tuple[object, Any]] = {}  # the object keeps its id its own

    def __call__(self, x: Any, name: str) -> Any:
        """The same of a value that the user calls by that name; itself where it holds nothing."""
        if type(x) in (bool, int, float):
            return self.number(x, name)
        if isinstance(x, Tensor):
            self.tensor(x, name)
            return x
        if id(x) not in self.done:
            self.done[id(x)] = x, x
            made = self._copy(x, name)
            self.done[id(x)] = x, made
        return self.done[id(x)][1]

    def _copy(self, x: Any, name: str) -> Any:
        match x:
            case type() | types.ModuleType():
                return x
            case functools.partial():
                names = _arguments(x.func)
                args = [self(value, one) for value, one in zip(x.args, names, strict=False)]
                given = {key: self(value, key) for key, value in x.keywords.items()}
                return functools.partial(self(x.func, name), *args, **given)
            case types.MethodType():
                return types.MethodType(self(x.__func__, name), self._object(x.__self__))
            case types.FunctionType():
                return self._function(x)
            case tuple() | list() if type(x) in (tuple, list):
                return type(x)(self._item(one, name, len(x)) for one in x)
            case dict() if type(x) is dict:
                return {
                    key: self._item(one, key if isinstance(key, str) else name, len(x))
                    for key, one in x.items()
                }
        call = type(x).__call__ if callable(x) else None
        if isinstance(call, types.FunctionType):
            own = self._object(x)
            return own if _is_library(call) else types.MethodType(self(call, name), own)
        for key, value in getattr(x, "__dict__", {}).items():
            if isinstance(value, Tensor):
                self.tensor(value, key)
        return x

    def _item(self, x: Any, name: str, count: int) -> Any:
        return x if type(x) in (bool, int, float) and count > MANY else self(x, name)

    def _object(self, x: Any) -> Any:
        """An object with other attributes; itself where it cannot be copied."""
        try:
            own = copy.copy(x)
        except Exception:
            return x
        if own is x or type(own) is not type(x) or not hasattr(x, "__dict__"):
            return x
        for key, value in vars(x).items():
            vars(own)[key] = self(value, key)
        return own

    def _function(self, mod: types.FunctionType) -> types.FunctionType:
        code, scope = mod.__code__, dict(mod.__globals__)
        cells = tuple(types.CellType() for _ in code.co_freevars)
        own = types.FunctionType(code, scope, mod.__name__, None, cells)
        own.__dict__.update(mod.__dict__)
        self.done[id(mod)] = mod, own  # before what it holds, which may be itself
        for name, cell, mine in zip(code.co_freevars, mod.__closure__ or (), cells, strict=True):
            try:
                held = cell.cell_contents
            except ValueError:  # nothing yet
                continue
            mine.cell_contents = self(held, name)
        if not _is_library(mod):
            for name in _names_in(code) & scope.keys():
                if not _is_foreign(scope[name], mod):
                    scope[name] = self(scope[name], name)
        defaults = mod.__defaults__ or ()
        named = code.co_varnames[: code.co_argcount][code.co_argcount - len(defaults) :]
        own.__defaults__ = tuple(map(self, defaults, named)) or None
        own.__kwdefaults__ = {key: self(x, key) for key, x in (mod.__kwdefaults__ or {}).items()}
        return own


def plain(mod: Any) -> types.FunctionType | None:
    """The function that a partial, a method or an object calls; None where it is not Python's."""
    while not isinstance(mod, types.FunctionType):
        match mod:
            case functools.partial():
                mod = mod.func
            case types.MethodType():
                mod = mod.__func__
            case _ if callable(mod) and isinstance(type(mod).__call__, types.FunctionType):
                mod = type(mod).__call__
            case _:
                return None
    return mod


def _arguments(func: Any) -> Iterator[str]:
    """Names of positional arguments, then any number of others."""
    function = plain(func)
    if function is not None:
        code = function.__code__
        names = code.co_varnames[: code.co_argcount]
        yield from names if function is func else names[1:]
    while True:
        yield "value"


def _is_library(x: types.FunctionType) -> bool:
    """Torch's own functions read no number of the user's but from closures."""
    return str(x.__module__ or "").split(".")[0] == "torch"


def _is_foreign(x: object, mod: types.FunctionType) -> bool:
    """A function of another module that captured nothing; its globals are that module's own."""
    function = isinstance(x, types.FunctionType) and not x.__closure__
    return function and x.__globals__ is not mod.__globals__  # type: ignore[attr-defined]


def _names_in(code: types.CodeType) -> set[str]:
    """Globals that a function, or one within it, may read."""
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*(_names_in(one) for one in inner))
