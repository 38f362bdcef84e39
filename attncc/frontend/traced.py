"""Values that stand for positions while a FlexAttention-style function runs once."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import CodeType
from typing import Any, NoReturn

import torch
from torch import Tensor

from attncc.errors import AttnccError, KindError, UnsupportedError
from attncc.ir import ops
from attncc.ir.expr import (
    FALSE,
    TRUE,
    Const,
    Expr,
    Index,
    Load,
    Scalar,
    Score,
    Span,
    TensorParam,
    walk,
)
from attncc.ir.expr import apply as applied
from attncc.ir.expr import kind as kind_of
from attncc.ir.ops import Kind, Op
from attncc.ir.show import show

DTYPES = {Kind.BOOL: torch.bool, Kind.INT: torch.int64, Kind.FLOAT: torch.float32}
TYPES: dict[Kind, type] = {Kind.BOOL: bool, Kind.INT: int, Kind.FLOAT: float}

INFINITY = applied(ops.NEG, applied(ops.LOG, Const(0.0)))
"""The language has no literal for it."""

OURS = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))
"""Folders whose frames are not the user's."""


class NeedsValue(BaseException):
    """A captured number is asked for its value; the trace begins again with it as a constant.

    No Exception, which a function may catch.
    """

    def __init__(self, names: set[str]) -> None:
        self.names = names


class Traced:
    """An expression that behaves as a 0-dim tensor, or a captured number, would."""

    def __init__(self, expr: Expr, is_number: bool = False) -> None:
        self.expr = expr
        self.is_number = is_number
        """Whether Python's own number stands here, in the function as it is."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What isinstance is told: a captured number passes for one.

        A position does not pass for a Tensor, as which torch would read its memory.
        """
        return TYPES[self.kind] if self.is_number else Traced

    @property
    def kind(self) -> Kind:
        return kind_of(self.expr)

    # -- what users ask of 0-dim tensors

    def __getattr__(self, name: str) -> Any:
        """Attributes of a 0-dim tensor, and its methods, by the table of functions."""
        if name.startswith("__"):
            raise AttributeError(name)
        if self.is_number:
            if not hasattr(TYPES[self.kind], name):
                raise AttributeError(f"a number has no attribute {name!r}")
            self._concrete()
        if name in ("dtype", "requires_grad", *FACTS):
            return {**FACTS, "dtype": DTYPES[self.kind], "requires_grad": False}[name]
        if name in ("T", "mT", "data", "real"):
            return self
        if name not in FUNCTIONS and not callable(getattr(Tensor, name, None)):
            raise AttributeError(f"a position has no attribute {name!r}")
        name = "where_method" if name == "where" else name
        return lambda *args, **kwargs: call(name, (self, *args), kwargs)

    def __getitem__(self, at: object) -> Traced:
        if at is Ellipsis or at == ():
            return self
        return refuse("a position is indexed, and has no axes", "index a captured tensor by it")

    # -- Python's own operators

    def __bool__(self) -> NoReturn:
        self._concrete("Python branches on")

    def __index__(self, *_: object) -> NoReturn:
        self._concrete()

    __int__ = __float__ = __complex__ = __round__ = __trunc__ = __divmod__ = __rdivmod__ = __index__
    item = tolist = __index__

    def __len__(self) -> NoReturn:
        refuse("a position has no length", "it is a number, as in a 0-dim tensor")

    def __iter__(self) -> NoReturn:
        refuse("a position has nothing to iterate over", "it is a number, as in a 0-dim tensor")

    def __hash__(self) -> int:
        return self._concrete() if self.is_number else id(self)

    def __repr__(self) -> str:
        return self._concrete() if self.is_number else f"<{show(self.expr)}>"

    def __format__(self, _: str) -> str:
        return repr(self)

    def _concrete(self, what: str = "Python asks for") -> NoReturn:
        need_numbers([self])
        varies = show(self.expr)
        varies = varies if len(varies) <= 60 else f"{varies[:60]}..."
        refuse(
            f"{what} the value of '{varies}', which is not known before the kernel runs",
            "write torch.where(condition, a, b), and &, | and ~ for and, or and not",
        )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return call(name_of(func), args, kwargs or {})


def _binary(name: str) -> None:
    def forward(self: Traced, other: object) -> Any:
        return call(name, (self, other), {})

    def backward(self: Traced, other: object) -> Any:
        return call(name, (other, self), {})

    setattr(Traced, f"__{name}__", forward)
    if name not in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(Traced, f"__r{name}__", backward)


for _name in (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"),
    *("lshift", "rshift", "lt", "le", "gt", "ge", "eq", "ne"),
):
    _binary(_name)
for _name in ("neg", "invert", "abs", "pos"):
    setattr(Traced, f"__{_name}__", lambda self, name=_name: call(name, (self,), {}))


FACTS = {"device": torch.device("cpu"), "shape": torch.Size(()), "ndim": 0, "is_cuda": False}
METHODS: dict[str, Callable[[Traced], object]] = {
    "dim": lambda x: 0,
    "numel": lambda x: 1,
    "size": lambda x: torch.Size(()),
    "is_floating_point": lambda x: x.kind is Kind.FLOAT,
}
"""What torch knows of a value without its value."""


def need_numbers(values: Iterable[Traced]) -> None:
    """Asks for the captured numbers that a value is made of, where it is made of nothing else."""
    names: set[str] = set()
    for value in values:
        for node in walk(value.expr):
            match node:
                case Scalar(param):
                    names.add(param.name)
                case Load() | Score() | Index():
                    return
    if names:
        raise NeedsValue(names)


class Captured:
    """A captured tensor of which some axes have been indexed."""

    def __init__(
        self,
        param: TensorParam,
        sizes: Sequence[int],
        at: Sequence[Expr | None],
        measured: Callable[[], None],
    ) -> None:
        """at: an index for each axis, or None where it is open. measured: told when sizes count."""
        self.param, self.sizes, self.at, self.measured = param, sizes, at, measured

    def __getitem__(self, index: object) -> Traced | Captured:
        given = list(index) if isinstance(index, tuple) else [index]
        at = list(self.at)
        free = [axis for axis, one in enumerate(at) if one is None]
        if Ellipsis in [x for x in given if x is Ellipsis]:
            here = next(i for i, x in enumerate(given) if x is Ellipsis)
            given[here : here + 1] = [slice(None)] * (len(free) - len(given) + 1)
        if len(given) > len(free):
            return refuse(
                f"{self.param.name} has {len(self.sizes)} axes, and is indexed by more",
                "give one index an axis",
            )
        for axis, one in zip(free, given, strict=False):
            if not (isinstance(one, slice) and one == slice(None)):
                at[axis] = self._index(one, self.sizes[axis])
        if None in at:
            return Captured(self.param, self.sizes, at, self.measured)
        return Traced(Load(self.param, tuple(x for x in at if x is not None)))

    def _index(self, one: object, size: int) -> Expr:
        if isinstance(one, (slice, type(None), list)):
            refuse(
                f"{self.param.name} is sliced by a position",
                "index every axis by one number: table[h, q_idx]",
            )
        expr = as_expr(one)
        if isinstance(expr, Const) and type(expr.value) is int and -size <= expr.value < 0:
            self.measured()
            return Const(expr.value + size)  # as Python counts from the end
        if kind_of(expr) is not Kind.INT:
            refuse(
                f"{self.param.name} is indexed by a {kind_of(expr).value}",
                "an index is an int: x.to(torch.int64)",
            )
        return expr

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._open()

    def _open(self, *_: object) -> NoReturn:
        count = list(self.at).count(None)
        refuse(
            f"{self.param.name} is used with {count} open {'axis' if count == 1 else 'axes'}",
            "index every axis: table[h, q_idx]",
        )

    __bool__ = __len__ = __iter__ = _open

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return call(name_of(func), args, kwargs or {})


for _name in (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul"),
    *("lshift", "rshift", "lt", "le", "gt", "ge", "eq", "ne", "neg", "invert", "abs"),
):
    setattr(Captured, f"__{_name}__", Captured._open)
    setattr(Captured, f"__r{_name}__", Captured._open)


# -- errors


def refuse(what: str, hint: str, error: type[AttnccError] = UnsupportedError) -> NoReturn:
    """Raise with the user's own line, which is under way."""
    frame = sys._getframe(1)
    while frame is not None and _is_ours(frame.f_code):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        raise error(what, hint=hint)
    raise _at(error, what, hint, frame.f_code, frame.f_lasti)


def located(what: str, error: BaseException) -> AttnccError:
    """What an exception means, with the user's line that it left last."""
    hint = "the function runs once, on values that behave as 0-dim tensors"
    place = None
    trace = error.__traceback__
    while trace is not None:
        if not _is_ours(trace.tb_frame.f_code):
            place = trace.tb_frame.f_code, trace.tb_lasti
        trace = trace.tb_next
    if place is None:
        return UnsupportedError(what, hint=hint)
    return _at(UnsupportedError, what, hint, *place)


def at_line(error: type[AttnccError], what: str, hint: str, code: CodeType) -> AttnccError:
    """An error that shows where a function begins."""
    line = linecache.getline(code.co_filename, code.co_firstlineno)
    indent = len(line) - len(line.lstrip())
    span = Span(code.co_firstlineno, indent + 1, max(1, len(line.strip())))
    return _with_text(error, what, hint, code.co_filename, span)


def _is_ours(code: CodeType) -> bool:
    return code.co_filename.startswith((*OURS, "<frozen"))


def _at(
    error: type[AttnccError], what: str, hint: str, code: CodeType, instruction: int
) -> AttnccError:
    """An error that shows what of its line a function was at."""
    line, end, column, last = list(code.co_positions())[instruction // 2]
    line = line or code.co_firstlineno
    text = linecache.getline(code.co_filename, line).encode()
    column = len(text[: column or 0].decode(errors="ignore"))  # Python counts bytes
    last = len(text[: last or 0].decode(errors="ignore")) if end == line else 0
    return _with_text(
        error, what, hint, code.co_filename, Span(line, column + 1, max(1, last - column))
    )


def _with_text(
    error: type[AttnccError], what: str, hint: str, path: str, span: Span
) -> AttnccError:
    source = "".join(linecache.getlines(path))
    return error(what, hint=hint, source=source, span=span, path=path)


# -- kinds


def as_expr(x: object) -> Expr:
    """An operand as an expression."""
    if type(x) is Traced:
        return x.expr
    if type(x) is Captured:
        x._open()
    if isinstance(x, Tensor):
        found = active().read(x)
        if isinstance(found, Captured):
            refuse(
                f"a tensor of shape {tuple(x.shape)} is used as a number",
                "index it by positions: table[h, q_idx]",
            )
        return found.expr
    if isinstance(x, bool):
        return Const(x)
    if hasattr(x, "item") and getattr(x, "ndim", None) == 0:
        return as_expr(x.item())
    if isinstance(x, int):
        return Const(int(x))
    if isinstance(x, float):
        return number(x)
    refuse(f"{type(x).__name__} is no number", "use ints, floats, bools and tensors")


def number(x: float) -> Expr:
    """A float constant."""
    if x in (float("inf"), float("-inf")):
        return INFINITY if x > 0 else applied(ops.LOG, Const(0.0))
    if x != x:
        refuse("nan is used as a number", "mask the pair out instead")
    return Const(float(x))


def as_int(x: Expr) -> Expr:
    return x if kind_of(x) is Kind.INT else applied(ops.INT, x)


def as_float(x: Expr) -> Expr:
    if isinstance(x, Const):
        return number(float(x.value))
    return x if kind_of(x) is Kind.FLOAT else applied(ops.FLOAT, x)


def as_bool(x: Expr) -> Expr:
    match kind_of(x):
        case Kind.BOOL:
            return x
        case Kind.INT:
            return applied(ops.NE, x, Const(0))
        case Kind.FLOAT:
            return applied(ops.NE, x, Const(0.0))


AS = {Kind.BOOL: as_bool, Kind.INT: as_int, Kind.FLOAT: as_float}


def as_number(x: Expr) -> Expr:
    return as_int(x) if kind_of(x) is Kind.BOOL else x


def alike(x: Expr, y: Expr) -> tuple[Expr, Expr]:
    """Both of the kind that torch promotes them to."""
    kinds = kind_of(x), kind_of(y)
    kind = next(k for k in (Kind.FLOAT, Kind.INT, Kind.BOOL) if k in kinds)
    return AS[kind](x), AS[kind](y)


# -- torch's functions

Handler = Callable[..., Expr]
FUNCTIONS: dict[str, Handler] = {}
"""By torch's names, `__add__` without its underscores; arguments are expressions."""

RAW: dict[str, Callable[..., Expr]] = {}
"""The same of functions that take their arguments as they come."""


def _division(op: Op) -> Handler:
    def handler(x: Expr, y: Expr) -> Expr:
        if isinstance(y, Const) and y.value == 0:
            refuse("a division by zero", "the divisor is 0 for every pair; write the one you mean")
        return applied(op, as_number(x), as_number(y))

    return handler


def _extreme(logic: Op, op: Op) -> Handler:
    def handler(x: Expr, y: Expr) -> Expr:
        bools = kind_of(x) is kind_of(y) is Kind.BOOL
        return applied(logic, x, y) if bools else applied(op, as_number(x), as_number(y))

    return handler


def _shift_left(x: Expr, n: Expr) -> Expr:
    """Torch's: nothing is left of 64 bits shifted by 64, or by less than 0."""
    x, n = as_number(x), as_number(n)
    shifted = applied(ops.SHL, x, n)
    if isinstance(n, Const) and n.value in range(64):
        return shifted
    inside = applied(ops.AND, applied(ops.GE, n, Const(0)), applied(ops.LT, n, Const(64)))
    return applied(ops.WHERE, inside, shifted, Const(0))


def _shift_right(x: Expr, n: Expr) -> Expr:
    """Torch's: the sign is left where the count is below 0, as where it is above 63."""
    x, n = as_number(x), as_number(n)
    shifted = applied(ops.SHR, x, n)
    if isinstance(n, Index) or (isinstance(n, Const) and n.value >= 0):
        return shifted
    negative = applied(ops.LT, n, Const(0))
    return applied(ops.WHERE, negative, applied(ops.SHR, x, Const(63)), shifted)


def _one(op: Op) -> Handler:
    return lambda x: applied(op, as_number(x))


def _of_float(op: Op) -> Handler:
    return lambda x: applied(op, as_float(x))


def _compare(op: Op) -> Handler:
    return lambda x, y: applied(op, *(as_number(z) for z in alike(x, y)))


def _equal(op: Op) -> Handler:
    return lambda x, y: applied(op, *alike(x, y))


def _bits(logic: Op, bits: Op) -> Handler:
    def handler(x: Expr, y: Expr) -> Expr:
        x, y = alike(x, y)
        if kind_of(x) is Kind.FLOAT:
            refuse("bits of a float", "compare it first: (x > 0) & y", KindError)
        return applied(logic if kind_of(x) is Kind.BOOL else bits, x, y)

    return handler


def _logic(op: Op) -> Handler:
    return lambda x, y: applied(op, as_bool(x), as_bool(y))


def _invert(x: Expr) -> Expr:
    return applied(ops.NOT if kind_of(x) is Kind.BOOL else ops.INVERT, x)


def _floored(x: Expr) -> Expr:
    return x if kind_of(x) is not Kind.FLOAT else as_float(applied(ops.FLOOR, x))


def _ceiled(x: Expr) -> Expr:
    if kind_of(x) is not Kind.FLOAT:
        return x
    return as_float(applied(ops.NEG, applied(ops.FLOOR, applied(ops.NEG, x))))


def _truncated(x: Expr) -> Expr:
    return x if kind_of(x) is not Kind.FLOAT else as_float(applied(ops.INT, x))


def _add(x: Expr, y: Expr, alpha: Expr = Const(1)) -> Expr:
    if (kind_of(x), kind_of(y)) == (Kind.BOOL, Kind.BOOL):
        return applied(ops.OR, x, y)
    return applied(ops.ADD, as_number(x), _times(y, alpha))


def _sub(x: Expr, y: Expr, alpha: Expr = Const(1)) -> Expr:
    return applied(ops.SUB, as_number(x), _times(y, alpha))


def _times(x: Expr, factor: Expr) -> Expr:
    return as_number(x) if factor == Const(1) else _mul(x, factor)


def _mul(x: Expr, y: Expr) -> Expr:
    if (kind_of(x), kind_of(y)) == (Kind.BOOL, Kind.BOOL):
        return applied(ops.AND, x, y)
    return applied(ops.MUL, as_number(x), as_number(y))


def _div(x: object, y: object, rounding_mode: str | None = None) -> Expr:
    a, b = (as_number(as_expr(z)) for z in (x, y))
    _division(ops.DIV)(a, b)
    if rounding_mode == "floor":
        return applied(ops.FLOORDIV, a, b)
    if rounding_mode == "trunc":
        if Kind.FLOAT in (kind_of(a), kind_of(b)):
            return _truncated(applied(ops.DIV, a, b))
        whole = applied(ops.FLOORDIV, *(applied(ops.ABS, z) for z in (a, b)))
        zero = Const(0)
        apart = applied(ops.NE, applied(ops.LT, a, zero), applied(ops.LT, b, zero))
        return applied(ops.WHERE, apart, applied(ops.NEG, whole), whole)
    return applied(ops.DIV, a, b)


def _where(condition: Expr, x: Expr, y: Expr) -> Expr:
    x, y = alike(x, y)
    condition = as_bool(condition)
    if kind_of(x) is not Kind.BOOL:
        return applied(ops.WHERE, condition, x, y)
    if y == FALSE:
        return applied(ops.AND, condition, x)
    if x == TRUE:
        return applied(ops.OR, condition, y)
    other = applied(ops.NOT, condition)
    if y == TRUE:
        return applied(ops.OR, other, x)
    second = applied(ops.AND, other, y)
    return second if x == FALSE else applied(ops.OR, applied(ops.AND, condition, x), second)


def _masked_fill(x: Expr, mask: Expr, value: Expr) -> Expr:
    return _where(mask, AS[kind_of(x)](value), x)


def _rounded(x: Expr) -> Expr:
    """Halves to the even neighbour."""
    if kind_of(x) is not Kind.FLOAT:
        return x
    below = applied(ops.FLOOR, x)
    above = applied(ops.ADD, below, Const(1))
    rest, half = applied(ops.SUB, x, as_float(below)), Const(0.5)
    even = applied(ops.EQ, applied(ops.MOD, below, Const(2)), Const(0))
    down = applied(
        ops.OR, applied(ops.LT, rest, half), applied(ops.AND, applied(ops.EQ, rest, half), even)
    )
    return as_float(applied(ops.WHERE, down, below, above))


def _fmod(x: Expr, y: Expr) -> Expr:
    """The remainder with the dividend's sign."""
    x, y = alike(as_number(x), as_number(y))
    rest = _division(ops.MOD)(applied(ops.ABS, x), applied(ops.ABS, y))
    negative = applied(ops.LT, x, AS[kind_of(x)](Const(0)))
    return applied(ops.WHERE, negative, applied(ops.NEG, rest), rest)


def _clamp(x: object, min: object = None, max: object = None) -> Expr:
    found = as_number(as_expr(x))
    if min is not None:
        found = applied(ops.MAX, found, as_number(as_expr(min)))
    if max is not None:
        found = applied(ops.MIN, found, as_number(as_expr(max)))
    return found


LARGEST_POWER = 16


def _pow(x: Expr, y: Expr) -> Expr:
    x, y = as_number(x), as_number(y)
    if not isinstance(y, Const):
        need_numbers([Traced(y)])
        need_numbers([Traced(x)])
    else:
        exponent = y.value
        if exponent in range(1, LARGEST_POWER + 1):
            found = x = as_float(x) if isinstance(exponent, float) else x
            for _ in range(1, int(exponent)):
                found = applied(ops.MUL, found, x)
            return found
        if exponent == 0:
            return Const(1.0 if Kind.FLOAT in (kind_of(x), kind_of(y)) else 1)
        roots = {0.5: ops.SQRT, -0.5: ops.RSQRT}
        if exponent in roots:
            return applied(roots[exponent], as_float(x))
        if exponent in range(-LARGEST_POWER, 0):
            if kind_of(x) is kind_of(y) is Kind.INT:
                refuse("an int to a negative power", "make it a float: x.float()")
            return applied(ops.DIV, Const(1.0), _pow(as_float(x), Const(-int(exponent))))
    if isinstance(x, Const) and x.value > 0:
        if Kind.INT is kind_of(x) is kind_of(y):
            if x.value == 2:
                return _shift_left(Const(1), y)
        elif x.value == 2:
            return applied(ops.EXP2, as_float(y))
        else:
            return applied(ops.EXP2, applied(ops.MUL, y, applied(ops.LOG2, as_float(x))))
    refuse("this power", "a constant exponent, or a positive constant base: torch.exp2(y * c)")


def _sign(x: Expr) -> Expr:
    x = as_number(x)
    zero, one = (Const(TYPES[kind_of(x)](n)) for n in (0, 1))
    below = applied(ops.WHERE, applied(ops.LT, x, zero), applied(ops.NEG, one), zero)
    return applied(ops.WHERE, applied(ops.GT, x, zero), one, below)


def _to(x: object, *args: object, **kwargs: object) -> Expr:
    expr = as_expr(x)
    for one in (*args, *kwargs.values()):
        if isinstance(one, torch.dtype):
            return _cast(expr, one)
        if isinstance(one, (Tensor, Traced)):
            return _cast(expr, one.dtype)
    return expr


def _cast(expr: Expr, dtype: torch.dtype) -> Expr:
    return AS[kind_of_dtype(dtype)](expr)


def kind_of_dtype(dtype: torch.dtype) -> Kind:
    if dtype == torch.bool:
        return Kind.BOOL
    return Kind.FLOAT if dtype.is_floating_point else Kind.INT


def _filled(value: object) -> Callable[..., Expr]:
    """`zeros_like`, `new_ones` and others; all are 0-dim here."""

    def handler(
        x: object, size: object = (), *rest: object, dtype: object = None, **_: object
    ) -> Expr:
        if size not in ((), torch.Size(())) and size != []:
            refuse(f"a tensor of shape {size} is made in the function", "make it outside, once")
        kind = kind_of(as_expr(x)) if dtype is None else kind_of_dtype(dtype)  # type: ignore[arg-type]
        return AS[kind](as_expr(rest[0] if value is None else value))

    return handler


def _full_like(x: object, fill_value: object, dtype: object = None, **_: object) -> Expr:
    return _filled(fill_value)(x, dtype=dtype)


def _same(x: object, *_: object, **__: object) -> Expr:
    return as_expr(x)


def _shaped(x: object, *sizes: object, **_: object) -> Expr:
    if any(size not in ((), [], torch.Size(())) for size in sizes):
        refuse("a position is given a shape", "it stays a number, as in a 0-dim tensor")
    return as_expr(x)


FUNCTIONS |= {
    "add": _add,
    "sub": _sub,
    "subtract": _sub,
    "rsub": lambda x, y: _sub(y, x),
    "mul": _mul,
    "multiply": _mul,
    "truediv": lambda x, y: _div(Traced(x), Traced(y)),
    "true_divide": lambda x, y: _div(Traced(x), Traced(y)),
    "floordiv": _division(ops.FLOORDIV),
    "floor_divide": _division(ops.FLOORDIV),
    "mod": _division(ops.MOD),
    "remainder": _division(ops.MOD),
    "fmod": _fmod,
    "pow": _pow,
    "float_power": lambda x, y: _pow(as_float(x), y),
    "and": _bits(ops.AND, ops.BITAND),
    "or": _bits(ops.OR, ops.BITOR),
    "xor": _bits(ops.NE, ops.BITXOR),
    "lshift": _shift_left,
    "rshift": _shift_right,
    "logical_and": _logic(ops.AND),
    "logical_or": _logic(ops.OR),
    "logical_xor": _logic(ops.NE),
    "logical_not": lambda x: applied(ops.NOT, as_bool(x)),
    "invert": _invert,
    "bitwise_not": _invert,
    "lt": _compare(ops.LT),
    "le": _compare(ops.LE),
    "gt": _compare(ops.GT),
    "ge": _compare(ops.GE),
    "eq": _equal(ops.EQ),
    "ne": _equal(ops.NE),
    "neg": _one(ops.NEG),
    "pos": lambda x: x,
    "abs": _one(ops.ABS),
    "minimum": _extreme(ops.AND, ops.MIN),
    "maximum": _extreme(ops.OR, ops.MAX),
    "where": _where,
    "where_method": lambda x, condition, y: _where(condition, x, y),
    "masked_fill": _masked_fill,
    "exp": _of_float(ops.EXP),
    "exp2": _of_float(ops.EXP2),
    "log": _of_float(ops.LOG),
    "log2": _of_float(ops.LOG2),
    "log10": lambda x: applied(ops.MUL, applied(ops.LOG, as_float(x)), Const(0.4342944819032518)),
    "log1p": lambda x: applied(ops.LOG, applied(ops.ADD, as_float(x), Const(1.0))),
    "expm1": lambda x: applied(ops.SUB, applied(ops.EXP, as_float(x)), Const(1.0)),
    "sqrt": _of_float(ops.SQRT),
    "rsqrt": _of_float(ops.RSQRT),
    "reciprocal": lambda x: applied(ops.DIV, Const(1.0), as_float(x)),
    "square": lambda x: _mul(x, x),
    "tanh": _of_float(ops.TANH),
    "sigmoid": _of_float(ops.SIGMOID),
    "softplus": _of_float(ops.SOFTPLUS),
    "log_sigmoid": lambda x: applied(ops.NEG, applied(ops.SOFTPLUS, applied(ops.NEG, as_float(x)))),
    "silu": lambda x: applied(ops.MUL, as_float(x), applied(ops.SIGMOID, as_float(x))),
    "relu": lambda x: applied(ops.MAX, as_number(x), Const(TYPES[kind_of(as_number(x))](0))),
    "sin": _of_float(ops.SIN),
    "cos": _of_float(ops.COS),
    "floor": _floored,
    "ceil": _ceiled,
    "trunc": _truncated,
    "round": _rounded,
    "fix": _truncated,
    "sign": _sign,
    "float": as_float,
    "double": as_float,
    "half": as_float,
    "bfloat16": as_float,
    "int": as_int,
    "long": as_int,
    "short": as_int,
    "bool": as_bool,
    "contiguous": lambda x: x,
    "clone": lambda x: x,
    "detach": lambda x: x,
}
for _alias, _of in {
    "bitwise_and": "and",
    "bitwise_or": "or",
    "bitwise_xor": "xor",
    "bitwise_left_shift": "lshift",
    "bitwise_right_shift": "rshift",
    "absolute": "abs",
    "negative": "neg",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "not_equal": "ne",
    "special_expit": "sigmoid",
    "logsigmoid": "log_sigmoid",
    "min": "minimum",
    "max": "maximum",
    "fmin": "minimum",
    "fmax": "maximum",
    "clamp_min": "maximum",
    "clamp_max": "minimum",
}.items():
    FUNCTIONS[_alias] = FUNCTIONS[_of]
RAW |= {
    "div": _div,
    "divide": _div,
    "clamp": _clamp,
    "clip": _clamp,
    "to": _to,
    "type": _to,
    "type_as": _to,
    "zeros_like": _filled(0),
    "ones_like": _filled(1),
    "full_like": _full_like,
    "new_zeros": _filled(0),
    "new_ones": _filled(1),
    "new_full": _filled(None),
    "new_tensor": lambda x, value, **_: as_expr(value),
    "all": lambda x: as_bool(as_expr(x)),
    "any": lambda x: as_bool(as_expr(x)),
    "squeeze": _same,
    "view": _shaped,
    "reshape": _shaped,
    "expand": _shaped,
    "broadcast_to": _shaped,
    "cpu": _same,
    "cuda": _same,
}


def name_of(func: Any) -> str:
    """`add` for torch.add, Tensor.add and aten's, `__add__` and `__radd__` for operators."""
    if func is Tensor.where:  # which takes its arguments in another order than torch.where
        return "where_method"
    return str(getattr(func, "__name__", func)).split(".")[0]


def call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A torch function of positions."""
    plain = name.removeprefix("__").removesuffix("__") if name.startswith("__") else name
    if plain not in FUNCTIONS and plain not in RAW and name.startswith("__r"):
        plain, args = plain[1:], (args[1], args[0])
    if plain.startswith("i") and plain[1:] in FUNCTIONS and name.startswith("__"):
        plain = plain[1:]  # x += 1 makes a new value of a position
    if plain == "getitem":
        return active().read(args[0])[args[1]]
    kwargs = {k: x for k, x in kwargs.items() if x is not None and (k, x) != ("inplace", False)}
    leaves = list(flattened([args, kwargs]))
    stands = [x for x in leaves if type(x) is Traced]
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    known = plain in FUNCTIONS or plain in RAW
    if not known or any(x.dim() > 0 for x in tensors):
        need_numbers(stands)
    if plain in METHODS and type(args[0]) is Traced:
        return METHODS[plain](args[0])
    if plain == "setitem" or (plain.endswith("_") and not name.startswith("__")) or "out" in kwargs:
        refuse(f"{plain} writes in place", f"write {plain.rstrip('_')}, which makes a new value")
    if not known:
        refuse(
            f"torch's {plain} has no meaning for one pair of positions",
            "use arithmetic, comparisons, torch.where, pointwise functions, captured tensors",
        )
    numbers = not tensors and all(x.is_number for x in stands) and Captured not in map(type, leaves)
    return Traced(_applied(plain, args, kwargs), is_number=numbers)


def _applied(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Expr:
    """A function of the tables, applied."""
    try:
        if name in RAW:
            return RAW[name](*args, **kwargs)
        given = [as_expr(x) for x in args]
        return FUNCTIONS[name](*given, **{k: as_expr(x) for k, x in kwargs.items()})
    except TypeError:
        refuse(f"torch's {name} with these arguments", "write it with arithmetic and torch.where")
    except AssertionError:
        kinds = ", ".join(x.kind.value for x in args if type(x) is Traced)
        refuse(f"torch's {name} of {kinds}", "convert one: x.to(torch.float32)", KindError)


# -- the trace under way


class Trace:
    """What a run of a function reads of captured tensors."""

    def read(self, x: object) -> Traced | Captured:
        raise NotImplementedError


_ACTIVE: ContextVar[Trace] = ContextVar("trace")


def active() -> Trace:
    return _ACTIVE.get()


class tracing:
    """While entered, functions of positions are traced to `trace`."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def __enter__(self) -> None:
        self.before = _ACTIVE.set(self.trace)

    def __exit__(self, *_: object) -> None:
        _ACTIVE.reset(self.before)


def flattened(values: object) -> Iterator[object]:
    """What lists, tuples and dicts hold."""
    if type(values) in (list, tuple):
        for one in values:  # type: ignore[attr-defined]
            yield from flattened(one)
    elif type(values) is dict:
        yield from flattened(list(values.values()))
    else:
        yield values
