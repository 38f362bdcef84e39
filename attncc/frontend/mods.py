"""FlexAttention-style Python functions to Programs.

A function runs on values that stand for positions (`traced.py`), as a copy whose captured numbers
are parameters (`closures.py`), all but those that Python itself asks for, to branch or to count.
That serves if, with the numbers put back, it is what the function as it is comes to; which does
where it is not.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attncc.binding import SAFE
from attncc.errors import ArgumentError, AttnccError, KindError, ProgramSyntaxError
from attncc.frontend import traced
from attncc.frontend.closures import Copies, Number, plain
from attncc.frontend.files import parse
from attncc.frontend.resolver import MAX_DEPTH, MAX_NODES
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
from attncc.ir.expr import FALSE, TRUE, Apply, Const, Expr, ScalarParam, Score, TensorParam
from attncc.ir.ops import Kind
from attncc.ir.program import Param, Program
from attncc.ir.rewrite import Rewriter, mapped, postorder
from attncc.passes.fold_constants import RULES

Mod = Callable[..., Any]
Value = Callable[[], Tensor] | Number
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
    of = score_mod, mask_mod, frozenset(sorted)
    run, mask, score = _general(*of) or _trace(*of, numbers=False)
    used = {p for e in (mask, score) for n in ir.walk(e) for p in _param(n)}
    params = tuple(param for param in run.params if param in used)
    if unknown := set(sorted) - {param.name for param in params}:
        raise ArgumentError(
            f"sorted names {', '.join(unknown)}, which no function captures",
            hint=f"they capture {', '.join(param.name for param in params) or 'nothing'}",
        )
    program = with_source(Program(name or _name(mask_mod, score_mod), params, mask, score))
    return Mods(program, {param.name: run.values[param.name] for param in params})


@functools.lru_cache(maxsize=64)
def with_source(program: Program) -> Program:
    """The program read from its own text, which errors then show.

    Raises ProgramSyntaxError where it is larger than the language allows.
    """
    for expr in (program.mask, program.score):
        _check_size(expr)
    (parsed,) = parse(str(program))
    assert parsed == program, "a program is what its text says"
    return parsed


def _check_size(expr: Expr) -> None:
    """By what it is written out: shared parts count as often as they are used."""
    measures: dict[int, tuple[int, int]] = {}
    for node in postorder(expr):
        below = [measures[id(child)] for child in ir.children(node)]
        nodes = 1 + sum(size for size, _ in below)
        levels = 1 + max((depth for _, depth in below), default=0)
        measures[id(node)] = nodes, levels
        if nodes > MAX_NODES or levels > MAX_DEPTH:
            how = f"{MAX_DEPTH} levels" if levels > MAX_DEPTH else f"{MAX_NODES:,} operations"
            raise ProgramSyntaxError(
                f"the functions make an expression of more than {how}, all written out",
                hint="compute part of it outside, and index a tensor",
            )


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


# -- runs

_Found = tuple["_Run", Expr, Expr]
"""A run, and the mask and the score it found."""


def _general(score_mod: Mod | None, mask_mod: Mod | None, sorted: frozenset[str]) -> _Found | None:
    """With numbers as parameters; None where that is not what the functions come to."""
    of = score_mod, mask_mod, sorted
    try:
        found = _trace(*of, numbers=True)
    except Exception:  # Python's own functions need Python's own numbers
        return None
    if found[0].has_numbers and _with_values(found) != _with_values(_trace(*of, numbers=False)):
        return None
    return found


def _trace(
    score_mod: Mod | None, mask_mod: Mod | None, sorted: frozenset[str], numbers: bool
) -> _Found:
    """Runs the functions until none asks for what a run before took for a parameter."""
    fixed: set[str] = set()
    sized: set[str] = set()
    while True:
        run = _Run(numbers, fixed, sorted, sized)
        try:
            mask, score = run.mask(mask_mod), run.score(score_mod)
        except NeedsValue as asked:
            fixed |= asked.names
            continue
        if run.sized <= sized:
            break
        sized |= run.sized
    for expr in (mask, score):
        _check_size(expr)
    kept, score = _split(score)
    if kept is not None:
        mask = kept if mask == TRUE else ir.apply(ops.AND, mask, kept)
    return run, mask, score


def _with_values(found: _Found) -> tuple[Expr, ...]:
    """Mask and score, the numbers put back."""
    run, *exprs = found

    def value(node: Expr) -> Expr:
        if isinstance(node, ir.Scalar):
            number = run.values[node.param.name]
            assert isinstance(number, Number)
            return as_expr(number)
        return node

    return tuple(Rewriter(RULES)(mapped(expr, value)) for expr in exprs)


MINUS_INFINITY = ir.apply(ops.LOG, Const(0.0)), ir.apply(ops.NEG, INFINITY)


def _split(score: Expr) -> tuple[Expr | None, Expr]:
    """Where the score is not -inf, None for everywhere, and what it is there.

    A condition that reads the score itself is no mask, and stays.
    """
    if score in MINUS_INFINITY:
        return FALSE, Const(0.0)
    match score:
        case Apply(ops.WHERE, (condition, x, y)) if not _reads_score(condition):
            (where_x, x), (where_y, y) = _split(x), _split(y)
            if where_x is where_y is None:
                return None, score
            kept = _either(condition, where_x, where_y)
            if where_y == FALSE:
                return kept, x
            return kept, y if where_x == FALSE else ir.apply(ops.WHERE, condition, x, y)
        case Apply(ops.ADD, (x, y)):
            (where_x, x), (where_y, y) = _split(x), _split(y)
            if where_x is where_y is None:
                return None, score
            kept = ir.conjunction(tuple(part for part in (where_x, where_y) if part is not None))
            if Const(0.0) in (x, y):
                return kept, as_float(y if x == Const(0.0) else x)
            return kept, ir.apply(ops.ADD, x, y)
    return None, score


def _either(condition: Expr, x: Expr | None, y: Expr | None) -> Expr:
    """Where the branch that a condition chooses is kept."""
    other = ir.apply(ops.NOT, condition)
    here = condition if x is None else FALSE if x == FALSE else ir.apply(ops.AND, condition, x)
    there = other if y is None else FALSE if y == FALSE else ir.apply(ops.AND, other, y)
    if FALSE in (here, there):
        return there if here == FALSE else here
    return ir.apply(ops.OR, here, there)


def _reads_score(expr: Expr) -> bool:
    return any(isinstance(node, Score) for node in ir.walk(expr))


class _Run(traced.Trace):
    """One run of the functions.

    numbers: whether captured ones are parameters, all but those named in `fixed`.
    sizes:   names of tensors whose sizes are constants.
    """

    def __init__(
        self, numbers: bool, fixed: set[str], sorted: frozenset[str], sizes: set[str]
    ) -> None:
        self.numbers, self.fixed, self.sorted, self.sizes = numbers, fixed, sorted, sizes
        self.params: list[Param] = []
        self.values: dict[str, Value] = {}
        self.known: dict[tuple[str, str], Traced] = {}
        """Stand-ins of numbers, by name and value."""
        self.names: dict[int, str] = {}
        """What captured tensors are called, by their ids."""
        self.tensors: dict[int, tuple[Tensor, TensorParam]] = {}
        self.made: dict[int, tuple[Tensor, _Made]] = {}
        """Tensors that the functions made."""
        self.measured: set[int] = set()
        """Ids of tensors whose sizes the functions asked for."""

    @property
    def has_numbers(self) -> bool:
        """Whether any was found, for a parameter or a constant."""
        return any(isinstance(value, Number) for value in self.values.values())

    @property
    def sized(self) -> set[str]:
        """Names of the tensors whose sizes the functions asked for."""
        return {p.name for key, (_, p) in self.tensors.items() if key in self.measured}

    # -- the functions

    def mask(self, mod: Mod | None) -> Expr:
        if mod is None:
            return TRUE
        found = self._result("mask_mod", mod, ("b", "h", "q_idx", "kv_idx"), POSITIONS)
        if ir.kind(found) is Kind.FLOAT:
            raise _of_function(
                mod,
                "mask_mod gave a float, expected a bool",
                "return a condition, such as q_idx >= kv_idx; a float belongs to score_mod",
                KindError,
            )
        return as_bool(found)

    def score(self, mod: Mod | None) -> Expr:
        if mod is None:
            return Score()
        names = "score", "b", "h", "q_idx", "kv_idx"
        found = self._result("score_mod", mod, names, (Score(), *POSITIONS))
        if ir.kind(found) is Kind.BOOL:
            raise _of_function(
                mod,
                "score_mod gave a bool, expected a float",
                "return a score; a condition belongs to mask_mod",
                KindError,
            )
        return as_float(found)

    def _result(
        self, what: str, mod: Mod, names: tuple[str, ...], positions: Sequence[Expr]
    ) -> Expr:
        given = list(map(Traced, positions))
        try:
            inspect.signature(mod).bind(*given)
        except TypeError as error:
            called = f"{what}({', '.join(names)})"
            raise _of_function(mod, f"{what} cannot be called so: {error}", called) from None
        except ValueError:  # it has none to be looked at
            pass
        own = Copies(self._number, self._named)(mod, "value")
        own = own if self.numbers else mod
        with tracing(self), _Mode(self), torch.enable_grad():
            try:
                found = own(*given)
                if found is not None:
                    return as_expr(found)
            except (AttnccError, NeedsValue):
                raise
            except Exception as error:
                message = f"{what} fails on positions: {type(error).__name__}: {error}"
                raise traced.located(message, error) from error
        raise _of_function(mod, f"{what} returned None", "return its value")

    # -- captured numbers

    def _number(self, value: Number, name: str) -> Any:
        finite = value in SAFE if type(value) is int else abs(value) < float("inf")
        if not self.numbers or not finite:
            return value
        key = name, repr(value)
        if key not in self.known:
            name = self._free(name)
            self.values[name] = value
            if name in self.fixed:
                return value
            param = ScalarParam(name, Kind(type(value).__name__))
            self.params.append(param)
            self.known[key] = Traced(ir.Scalar(param), is_number=True)
        return self.known[key]

    def _free(self, name: str) -> str:
        """The name itself, or with a number, that no parameter has."""
        from attncc.api import RESERVED  # it imports this module

        stem = re.sub(r"\W", "_", name, flags=re.ASCII).strip("_") or "value"
        stem = stem if is_free(stem) and stem not in RESERVED else f"{stem[:50]}_value"
        stem = stem if is_free(stem) else "value"
        at, found = 1, stem
        while found in self.values:
            at += 1
            found = f"{stem}_{at}"
        return found

    # -- captured tensors

    def _named(self, x: Tensor, name: str) -> None:
        self.names.setdefault(id(x), name)

    def read(self, x: object) -> Traced | Captured:
        assert isinstance(x, Tensor)
        made = self._made(x)
        with torch._C.DisableTorchFunction():  # what follows is not the functions' own
            if not made.captured and x.dim() == 0:
                return Traced(as_expr(x.item()))
            if id(x) not in self.tensors:
                self.tensors[id(x)] = x, self._tensor(x, made)
            _, param = self.tensors[id(x)]
            if x.dim() == 0:
                return Traced(ir.Load(param, (Const(0),)))
            return Captured(param, x.shape, [None] * x.dim(), lambda: self.measured.add(id(x)))

    def _made(self, x: Tensor) -> _Made:
        """How a tensor came about; a captured one is its own source."""
        found = self.made.get(id(x))
        return _Made(lambda: x, (x,)) if found is None else found[1]

    def _tensor(self, x: Tensor, made: _Made) -> TensorParam:
        name = self._free(self.names.get(id(x), "") or "table")
        shape = tuple(x.shape) or (1,)
        dims: tuple[ir.Dim, ...] = (f"{name}_len",)
        if len(shape) > 1:
            dims = tuple(f"{name}_{at}" for at in range(len(shape)))
        if name in self.sizes and 0 not in shape:
            dims = shape
        kind = kind_of_dtype(x.dtype)
        grad = x.requires_grad and kind is Kind.FLOAT
        param = TensorParam(name, kind, dims, name in self.sorted, grad)
        self.params.append(param)
        self.values[name] = _Now(made) if x.dim() else _Now(made, lambda one: one.reshape(1))
        return param

    def ran(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a torch function of no position, and remember how its tensors were made."""
        name = name_of(func)
        if name.startswith(RANDOM):
            refuse(f"torch's {name} is random", "draw outside, and index what was drawn")
        given = [x for x in flattened([args, kwargs]) if isinstance(x, Tensor)]
        writes = name.endswith("_") and not name.startswith("__") and name != "requires_grad_"
        if given and (writes or name in WRITES or kwargs.get("out") is not None):
            refuse(f"{name} writes in place", "make a new value, outside of the function")
        sources = tuple(dict.fromkeys(s for x in given for s in self._made(x).sources))
        if sources and name in VALUES:
            refuse(
                "Python asks for the value of a captured tensor, which may be another in each call",
                "use torch.where and index by positions, or capture the number: x.item() outside",
            )
        if name in ("size", "__len__", "numel", "nelement") or func == Tensor.shape.__get__:  # type: ignore[attr-defined]
            self.measured |= {id(x) for x in given}
        found = func(*args, **kwargs)
        parts = found if isinstance(found, (tuple, list)) else [found]
        for at, one in enumerate(parts):
            if isinstance(one, Tensor) and not any(one is x for x in given):
                again = functools.partial(self._again, func, args, kwargs)
                how = again if one is found else functools.partial(_part, again, at)
                self.made[id(one)] = one, _Made(how, sources)
                self.names[id(one)] = next((self.names.get(id(x), "") for x in given), "")
        return found

    def _again(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A function's value now, of what its tensors hold now."""
        return func(*self._now(args), **self._now(kwargs))

    def _now(self, x: Any) -> Any:
        if type(x) in (tuple, list):
            return type(x)(map(self._now, x))
        if type(x) is dict:
            return {key: self._now(value) for key, value in x.items()}
        return self._made(x).how() if isinstance(x, Tensor) and self._made(x).captured else x


@dataclass(frozen=True)
class _Made:
    """How a tensor is made again, and of which captured ones."""

    how: Callable[[], Any]
    sources: tuple[Tensor, ...]

    @property
    def captured(self) -> bool:
        return bool(self.sources)


class _Now:
    """A tensor's value now; the same object while what it is made of stays, as plans go by that."""

    def __init__(self, made: _Made, last: Callable[[Tensor], Tensor] | None = None) -> None:
        self.made, self.last = made, last
        self.kept: tuple[tuple[int, ...], Tensor] | None = None

    def __call__(self) -> Tensor:
        sources = self.made.sources
        if any(x.requires_grad or x.is_inference() for x in sources):
            return self._value()
        versions = tuple(x._version for x in sources)
        if self.kept is None or self.kept[0] != versions:
            self.kept = versions, self._value()
        return self.kept[1]

    def _value(self) -> Tensor:
        found: Tensor = self.made.how()
        return found if self.last is None else self.last(found)


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

WRITES = frozenset(
    (
        *("__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__"),
        *("__ifloordiv__", "__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__"),
        *("__ilshift__", "__irshift__"),
    )
)

VALUES = frozenset(
    (
        *("item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "__array__"),
        *("__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__"),
    )
)
"""Functions that make Python's own values of tensors."""


def _part(whole: Callable[[], Any], at: int) -> Any:
    return whole()[at]


def _of_function(
    mod: Mod, what: str, hint: str, error: type[AttnccError] = ArgumentError
) -> AttnccError:
    """An error that shows the line a function begins at."""
    function = plain(mod)
    if function is None:
        return error(what, hint=hint)
    return traced.at_line(error, what, hint, function.__code__)
