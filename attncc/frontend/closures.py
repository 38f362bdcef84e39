"""Copies of functions with their captured numbers replaced; the user's own are never changed."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Set
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

    def __call__(self, x: Any, name: str, used: Set[str] = frozenset()) -> Any:
        """The same of a value that the user calls by that name; itself where it holds nothing.

        used: the names in the code that has it; other attributes of objects are left alone.
        """
        if type(x) in (bool, int, float):
            return self.number(x, name)
        if isinstance(x, Tensor):
            self.tensor(x, name)
            return x
        if _is_plain(x):
            return self._object(x, used | _names_in_calls(x))
        if id(x) not in self.done:
            self.done[id(x)] = x, x
            self.done[id(x)] = x, self._copy(x, name, used)
        return self.done[id(x)][1]

    def _copy(self, x: Any, name: str, used: Set[str]) -> Any:
        match x:
            case functools.partial():
                names = _arguments(x.func)
                args = [self(value, one, used) for value, one in zip(x.args, names, strict=False)]
                given = {key: self(value, key, used) for key, value in x.keywords.items()}
                return functools.partial(self(x.func, name), *args, **given)
            case types.MethodType():
                names_used = _names_in(x.__func__.__code__)
                return types.MethodType(self(x.__func__, name), self(x.__self__, name, names_used))
            case types.FunctionType():
                return self._function(x)
            case tuple() | list() if type(x) in (tuple, list):
                return type(x)(self._item(one, name, used, len(x)) for one in x)
            case dict() if type(x) is dict and len(x) <= MANY:
                return {
                    key: self(one, key if isinstance(key, str) else name, used)
                    for key, one in x.items()
                }
        return x

    def _item(self, x: Any, name: str, used: Set[str], count: int) -> Any:
        return x if type(x) in (bool, int, float) and count > MANY else self(x, name, used)

    def _object(self, x: Any, used: Set[str]) -> Any:
        """An object with other attributes."""
        if id(x) not in self.done:
            own = object.__new__(type(x))
            vars(own).update(vars(x))
            self.done[id(x)] = x, own
        own = self.done[id(x)][1]
        for key in used & vars(x).keys():
            vars(own)[key] = self(vars(x)[key], key, used)
        for held in ("_parameters", "_buffers"):  # of a module
            for key, value in vars(x).get(held, {}).items():
                if key in used and isinstance(value, Tensor):
                    self.tensor(value, key)
        return own

    def _function(self, mod: types.FunctionType) -> types.FunctionType:
        code, scope = mod.__code__, dict(mod.__globals__)
        used = _names_in(code)
        cells = tuple(types.CellType() for _ in code.co_freevars)
        own = types.FunctionType(code, scope, mod.__name__, None, cells)
        own.__dict__.update(mod.__dict__)
        self.done[id(mod)] = mod, own  # before what it holds, which may be the function itself
        for name, cell, mine in zip(code.co_freevars, mod.__closure__ or (), cells, strict=True):
            try:
                held = cell.cell_contents
            except ValueError:  # nothing yet
                continue
            mine.cell_contents = self(held, name, used)
        if not _is_library(mod):
            for name in used & scope.keys():
                if not _is_foreign(scope[name], mod):
                    scope[name] = self(scope[name], name, used)
        defaults = mod.__defaults__ or ()
        named = code.co_varnames[: code.co_argcount][code.co_argcount - len(defaults) :]
        given = zip(defaults, named, strict=True)
        own.__defaults__ = tuple(self(x, name, used) for x, name in given) or None
        own.__kwdefaults__ = {
            key: self(x, key, used) for key, x in (mod.__kwdefaults__ or {}).items()
        }
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


def _is_plain(x: object) -> bool:
    """Whether an object is its attributes and nothing more, so that it can be made anew by them."""
    kind = type(x)
    if isinstance(x, type) or kind.__new__ is not object.__new__ or not hasattr(x, "__dict__"):
        return False
    return not any(vars(one).get("__slots__") for one in kind.__mro__)


def _names_in_calls(x: object) -> Set[str]:
    """Names in the code that calling an object runs first."""
    of = (getattr(type(x), name, None) for name in ("__call__", "forward"))
    return set().union(*(_names_in(f.__code__) for f in of if isinstance(f, types.FunctionType)))


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
