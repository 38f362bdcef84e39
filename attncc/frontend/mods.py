"""FlexAttention-style Python functions to Programs.

A function runs once, on values that stand for positions (`traced.py`). So do captured numbers: a
copy of the function is made whose closure holds stand-ins for them, and only those that Python
itself asks for the value of, to branch or to count, are constants of the Program.
"""

from __future__ import annotations

import copy
import functools
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from attncc.errors import ArgumentError, KindError
from attncc.frontend import traced
from attncc.frontend.scope import is_free
from attncc.frontend.traced import (
    INFINITY,
    Captured,
    NeedsValue,
    Traced,
    as_bool,
    as_expr,
    as_float,
    flattened,
    kind_of_dtype,
    name_of,
    refuse,
    tracing,
)
from attncc.ir import expr as ir
from attncc.ir import ops
from attncc.ir.expr import TRUE, Apply, Const, Expr, ScalarParam, Score, TensorParam
from attncc.ir.ops import Kind
from attncc.ir.program import Param, Program

Mod = Callable[..., Any]
Value = Callable[[], Tensor] | bool | int | float
"""What a parameter is at each call: a number, or what gives a tensor."""

POSITIONS = ir.B, ir.H, ir.Q_IDX, ir.KV_IDX


@dataclass(frozen=True)
class Mods:
    """A Program, and what the functions it was made of had captured."""

    program: Program
    values: Mapping[str, Value]

    def arguments(self) -> dict[str, object]:
        """Every parameter's value now."""
        return {name: x() if callable(x) else x for name, x in self.values.items()}


def traced_mods(
    score_mod: Mod | None,
    mask_mod: Mod | None,
    name: str | None = None,
    sorted: Sequence[str] = (),
) -> Mods:
    """The Program of score_mod(score, b, h, q_idx, kv_idx) and mask_mod(b, h, q_idx, kv_idx)."""
    for what, mod in (("score_mod", score_mod), ("mask_mod", mask_mod)):
        if mod is not None and not callable(mod):
            raise ArgumentError(f"{what} is {type(mod).__name__}, expected a function, or None")
    fixed: set[str] = set()
    while True:
        run = _Run(fixed, frozenset(sorted))
        try:
            mask, score = run.mask(mask_mod), run.score(score_mod)
            break
        except NeedsValue as asked:
            fixed |= asked.names
    while (split := _masked(score)) is not None:
        score, kept = split
        mask = kept if mask == TRUE else ir.apply(ops.AND, mask, kept)
    exprs = mask, score
    used = {p for e in exprs for n in ir.walk(e) for p in _param(n)}
    params = tuple(param for param in run.params if param in used)
    if unknown := set(sorted) - {param.name for param in params}:
        raise ArgumentError(
            f"sorted names {', '.join(unknown)}, which no function captures",
            hint=f"they capture {', '.join(param.name for param in params) or 'nothing'}",
        )
    program = Program(name or _name(mask_mod, score_mod), params, mask, score)
    return Mods(program, {param.name: run.values[param.name] for param in params})


def _param(node: Expr) -> tuple[Param, ...]:
    match node:
        case ir.Scalar(param) | ir.Load(param):
            return (param,)
    return ()


def _name(*mods: Mod | None) -> str:
    """The first name among the functions' that a program can have."""
    for mod in mods:
        while isinstance(mod, functools.partial):
            mod = mod.func
        name = getattr(mod, "__name__", type(mod).__name__ if mod is not None else "")
        if is_free(name):
            return str(name)
    return "mods"


def _masked(score: Expr) -> tuple[Expr, Expr] | None:
    """The score at the pairs kept, and which they are, where others get -inf."""
    minus = ir.apply(ops.LOG, Const(0.0)), ir.apply(ops.NEG, INFINITY)
    match score:
        case Apply(ops.WHERE, (condition, x, y)) if y in minus:
            return x, condition
        case Apply(ops.WHERE, (condition, x, y)) if x in minus:
            return y, ir.apply(ops.NOT, condition)
    return None


class _Run(traced.Trace):
    """One run of the functions, numbers named in `fixed` being constants."""

    def __init__(self, fixed: set[str], sorted: frozenset[str]) -> None:
        self.fixed, self.sorted = fixed, sorted
        self.params: list[Param] = []
        self.values: dict[str, Value] = {}
        self.names: dict[int, str] = {}
        """What captured tensors are called, by their ids."""
        self.tensors: dict[int, tuple[Tensor, TensorParam]] = {}
        self.made: dict[int, tuple[Tensor, Callable[[], Any], bool]] = {}
        """Tensors that the functions made: how, and whether of captured ones."""

    # -- the functions

    def mask(self, mod: Mod | None) -> Expr:
        if mod is None:
            return TRUE
        found = self._result("mask_mod", mod, [Traced(index) for index in POSITIONS])
        if ir.kind(found) is Kind.FLOAT:
            raise KindError(
                f"mask_mod gave {_kind(found)}, expected a bool",
                hint="return a condition, such as q_idx >= kv_idx; a float belongs to score_mod",
            )
        return as_bool(found)

    def score(self, mod: Mod | None) -> Expr:
        if mod is None:
            return Score()
        found = self._result("score_mod", mod, [Traced(Score()), *map(Traced, POSITIONS)])
        if ir.kind(found) is Kind.BOOL:
            raise KindError(
                "score_mod gave a bool, expected a float",
                hint="return a score; a condition belongs to mask_mod",
            )
        return as_float(found)

    def _result(self, what: str, mod: Mod, positions: list[Traced]) -> Expr:
        mod = self._standing_in(mod, "")
        with tracing(self), _Mode(self):
            found = mod(*positions)
            if found is None:
                refuse(f"{what} returned None", "return its value")
            return as_expr(found)

    # -- captured numbers

    def _standing_in(self, x: Any, name: str, depth: int = 0) -> Any:
        """The same with stand-ins for the numbers it holds; never the user's own object changed."""
        if type(x) in (int, float) and name and depth:
            return self._number(x, name)
        if isinstance(x, Tensor):
            self.names.setdefault(id(x), name)
            return x
        if depth > DEEPEST or _is_library(x):
            return x
        deeper = depth + 1
        match x:
            case functools.partial():
                args = [self._standing_in(a, "arg", deeper) for a in x.args]
                given = {k: self._standing_in(a, k, deeper) for k, a in x.keywords.items()}
                return functools.partial(self._standing_in(x.func, name, deeper), *args, **given)
            case types.MethodType():
                own = self._standing_in(x.__self__, name, deeper)
                return types.MethodType(x.__func__, own)
            case types.FunctionType():
                return self._function(x, deeper)
            case tuple() | list() if type(x) in (tuple, list):
                return type(x)(self._standing_in(one, name, deeper) for one in x)
        if callable(x) and not isinstance(x, type) and hasattr(x, "__dict__"):
            own = copy.copy(x)
            for key, value in vars(x).items():
                object.__setattr__(own, key, self._standing_in(value, key, deeper))
            for key, value in getattr(x, "_parameters", {}).items():
                self._standing_in(value, key, deeper)
            for key, value in getattr(x, "_buffers", {}).items():
                self._standing_in(value, key, deeper)
            return own
        return x

    def _function(self, mod: types.FunctionType, depth: int) -> types.FunctionType:
        code = mod.__code__
        cells = []
        for name, cell in zip(code.co_freevars, mod.__closure__ or (), strict=True):
            try:
                held = cell.cell_contents
            except ValueError:  # nothing yet
                cells.append(cell)
                continue
            # A function that calls itself holds itself.
            cells.append(
                cell if held is mod else types.CellType(self._standing_in(held, name, depth))
            )
        outer = {
            name: self._standing_in(mod.__globals__[name], name, depth)
            for name in _names_in(code)
            if name in mod.__globals__ and mod.__globals__[name] is not mod
        }
        defaults = mod.__defaults__ or ()
        named = code.co_varnames[: code.co_argcount][code.co_argcount - len(defaults) :]
        given = tuple(
            self._standing_in(x, name, depth) for name, x in zip(named, defaults, strict=True)
        )
        own = types.FunctionType(
            code, {**mod.__globals__, **outer}, mod.__name__, given, tuple(cells)
        )
        for name, x in (mod.__kwdefaults__ or {}).items():
            own.__kwdefaults__ = (own.__kwdefaults__ or {}) | {
                name: self._standing_in(x, name, depth)
            }
        return own

    def _number(self, value: int | float, name: str) -> Any:
        kind = Kind.INT if type(value) is int else Kind.FLOAT
        for param in self.params:
            if isinstance(param, ScalarParam) and _stem(param.name) == _stem(name):
                known = self.values[param.name]
                if type(known) is type(value) and known == value:
                    return Traced(ir.Scalar(param), is_number=True)
        name = self._free(name)
        if name in self.fixed or abs(value) == float("inf") or value != value:
            self.values.setdefault(name, value)  # the name is taken
            return value
        param = ScalarParam(name, kind)
        self.params.append(param)
        self.values[name] = value
        return Traced(ir.Scalar(param), is_number=True)

    def _free(self, name: str) -> str:
        """The name itself, or with a number, that no parameter has."""
        stem = re.sub(r"\W", "_", name).strip("_") or "value"
        stem = stem if is_free(stem) else f"{stem}_value"
        at, found = 1, stem
        while found in self.values:
            at += 1
            found = f"{stem}_{at}"
        return found

    # -- captured tensors

    def read(self, x: object) -> Traced | Captured:
        assert isinstance(x, Tensor)
        _, how, captured = self.made.get(id(x), (x, None, True))
        if not captured and x.dim() == 0:
            return Traced(as_expr(x.item()))
        if id(x) not in self.tensors:
            self.tensors[id(x)] = x, self._tensor(x, how)
        _, param = self.tensors[id(x)]
        if x.dim() == 0:
            return Traced(ir.Load(param, (Const(0),)))
        return Captured(param, x.shape, [None] * x.dim())

    def _tensor(self, x: Tensor, how: Callable[[], Any] | None) -> TensorParam:
        name = self._free(self.names.get(id(x), "") or "table")
        axes = max(1, x.dim())
        dims = tuple(f"{name}_{at}" for at in range(axes)) if axes > 1 else (f"{name}_len",)
        kind = kind_of_dtype(x.dtype)
        grad = x.requires_grad and kind is Kind.FLOAT
        param = TensorParam(name, kind, dims, name in self.sorted, grad)
        self.params.append(param)

        def value() -> Tensor:
            found: Tensor = x if how is None else how()
            return found.reshape(1) if found.dim() == 0 else found

        self.values[name] = value
        return param

    def ran(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a torch function of no position, and remember how its tensors were made."""
        name = name_of(func)
        if name.startswith(RANDOM):
            refuse(f"torch's {name} is random", "draw outside, and index what was drawn")
        given = [x for x in flattened([args, kwargs]) if isinstance(x, Tensor)]
        writes = name.endswith("_") and not name.startswith("__") and name != "requires_grad_"
        if given and (writes or name == "__setitem__" or re.match("__i[a-z]+__$", name)):
            refuse(f"{name} writes in place", "make a new value, outside of the function")
        found = func(*args, **kwargs)
        captured = any(self.made.get(id(x), (x, None, True))[2] for x in given)
        parts = found if isinstance(found, (tuple, list)) else [found]
        for at, one in enumerate(parts):
            if isinstance(one, Tensor) and not any(one is x for x in given):
                again = functools.partial(self._again, func, args, kwargs)
                how = again if one is found else functools.partial(_part, again, at)
                self.made[id(one)] = one, how, captured
        return found

    def _again(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A function's value now, of what its tensors hold now."""
        return func(*self._now(args), **self._now(kwargs))

    def _now(self, x: Any) -> Any:
        if type(x) in (tuple, list):
            return type(x)(map(self._now, x))
        if type(x) is dict:
            return {key: self._now(value) for key, value in x.items()}
        if isinstance(x, Tensor) and id(x) in self.made:
            _, how, captured = self.made[id(x)]
            return how() if captured else x
        return x


class _Mode(TorchFunctionMode):
    """Sends functions of positions to the trace, reads of captured tensors among them."""

    def __init__(self, run: _Run) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(type(x) in (Traced, Captured) for x in flattened([args, kwargs])):
            return traced.call(name_of(func), args, kwargs)
        return self.run.ran(func, args, kwargs)


RANDOM = ("rand", "bernoulli", "multinomial", "dropout", "normal", "poisson")

DEEPEST = 8
"""Functions in functions in which numbers are looked for."""


def _part(whole: Callable[[], Any], at: int) -> Any:
    return whole()[at]


def _stem(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


def _kind(expr: Expr) -> str:
    return f"{'an' if ir.kind(expr) is Kind.INT else 'a'} {ir.kind(expr).value}"


def _is_library(x: Any) -> bool:
    """Torch's own functions have no numbers of the user's."""
    if isinstance(x, types.FunctionType) and x.__closure__:
        return False
    return str(getattr(x, "__module__", "") or "").split(".")[0] == "torch"


def _names_in(code: types.CodeType) -> set[str]:
    """Globals that a function, or one within it, may read."""
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*(_names_in(one) for one in inner))
