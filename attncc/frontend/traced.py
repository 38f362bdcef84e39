"""Values that stand for positions while a FlexAttention-style function runs once."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from attncc.errors import AttnccError, KindError, UnsupportedError
from attncc.ir import ops
from attncc.ir.expr import Axis, Const, Expr, Load, Scalar, Score, Span, TensorParam, walk
from attncc.ir.expr import apply as applied
from attncc.ir.expr import axes as axes_of
from attncc.ir.expr import kind as kind_of
from attncc.ir.ops import Kind, Op

DTYPES = {Kind.BOOL: torch.bool, Kind.INT: torch.int64, Kind.FLOAT: torch.float32}
TYPES: dict[Kind, type] = {Kind.BOOL: bool, Kind.INT: int, Kind.FLOAT: float}

INFINITY = applied(ops.NEG, applied(ops.LOG, Const(0.0)))
"""The language has no literal for it."""

OURS = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))
"""Folders whose frames are not the user's."""


class NeedsValue(Exception):
    """A captured number is asked for its value; the trace begins again with it as a constant."""

    def __init__(self, names: set[str]) -> None:
        self.names = names


class Traced:
    """An expression that behaves as a 0-dim tensor, or a captured number, would."""

    def __init__(self, expr: Expr, is_number: bool = False) -> None:
        self.expr = expr
        self.is_number = is_number

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

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.kind]

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def shape(self) -> torch.Size:
        return torch.Size(())

    ndim = 0

    def dim(self) -> int:
        return 0

    def numel(self) -> int:
        return 1

    def __getattr__(self, name: str) -> Any:
        """Methods of tensors, by the table of functions."""
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in FUNCTIONS and not hasattr(Tensor, name):
            raise AttributeError(f"a position has no attribute {name!r}")
        return lambda *args, **kwargs: call(name, (self, *args), kwargs)

    def __getitem__(self, at: object) -> Traced:
        if at is Ellipsis or at == ():
            return self
        return refuse("a position is indexed, and has no axes", "index a captured tensor by it")

    # -- Python's own operators

    def __bool__(self) -> NoReturn:
        self._concrete("Python branches on a value that varies with the pair")

    def __index__(self) -> NoReturn:
        self._concrete("Python asks for the value of a position")

    __int__ = __float__ = __index__

    def __len__(self) -> NoReturn:
        refuse("a position has no length", "it is a number, as in a 0-dim tensor")

    def __iter__(self) -> NoReturn:
        refuse("a position has nothing to iterate over", "it is a number, as in a 0-dim tensor")

    def item(self) -> NoReturn:
        self._concrete("Python asks for the value of a position")

    def tolist(self) -> NoReturn:
        self.item()

    def __hash__(self) -> int:
        return id(self)

    def _concrete(self, what: str) -> NoReturn:
        names = {x.param.name for x in walk(self.expr) if isinstance(x, Scalar)}
        fixed = not any(isinstance(x, (Load, Score)) for x in walk(self.expr))
        if names and fixed and axes_of(self.expr) == Axis.NONE:
            raise NeedsValue(names)
        refuse(
            f"{what}, and is not known before the kernel runs",
            "write torch.where(condition, a, b), or & and | for conditions",
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


class Captured:
    """A captured tensor of which some axes have been indexed."""

    def __init__(self, param: TensorParam, sizes: Sequence[int], at: Sequence[Expr | None]) -> None:
        self.param, self.sizes, self.at = param, sizes, at
        """at: an index for each axis, or None where it is open."""

    def __getitem__(self, index: object) -> Traced | Captured:
        given = list(index) if isinstance(index, tuple) else [index]
        at = list(self.at)
        free = [axis for axis, one in enumerate(at) if one is None]
        if Ellipsis in [x for x in given if x is Ellipsis]:
            here = next(i for i, x in enumerate(given) if x is Ellipsis)
            given[here : here + 1] = [slice(None)] * (len(free) - len(given) + 1)
        if len(given) > len(free):
            return refuse(
                f"{self.param.name} has {len(self.sizes)} axes, and is indexed by more", ""
            )
        for axis, one in zip(free, given, strict=False):
            if not (isinstance(one, slice) and one == slice(None)):
                at[axis] = self._index(one, self.sizes[axis])
        if None in at:
            return Captured(self.param, self.sizes, at)
        return Traced(Load(self.param, tuple(x for x in at if x is not None)))

    def _index(self, one: object, size: int) -> Expr:
        if isinstance(one, (slice, type(None), list)):
            refuse(
                f"{self.param.name} is sliced by a position",
                "index every axis by one number: table[h, q_idx]",
            )
        expr = as_expr(one)
        if isinstance(expr, Const) and isinstance(expr.value, int) and expr.value < 0:
            return Const(expr.value + size)  # as Python counts from the end
        if kind_of(expr) is not Kind.INT:
            refuse(
                f"{self.param.name} is indexed by a {kind_of(expr).value}",
                "an index is an int: x.to(torch.int64)",
            )
        return expr

    def __getattr__(self, name: str) -> Any:
        refuse(
            f"{self.param.name} still has {self.at.count(None)} open axes",
            "index every axis: table[h, q_idx]",
        )


# -- errors


def frame_of_user() -> Any:
    """The innermost frame of code that is neither torch's nor ours; None where there is none."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((*OURS, "<frozen")):
        frame = frame.f_back  # type: ignore[assignment]
    return frame


def refuse(what: str, hint: str, error: type[AttnccError] = UnsupportedError) -> NoReturn:
    """Raise with the user's own line."""
    frame = frame_of_user()
    if frame is None:
        raise error(what, hint=hint)
    path = frame.f_code.co_filename
    positions = list(frame.f_code.co_positions())
    line, end, column, last = positions[frame.f_lasti // 2]
    line, column = line or frame.f_lineno, column or 0
    length = last - column if last is not None and end == line else 1
    raise error(
        what,
        hint=hint,
        source="".join(linecache.getlines(path)),
        span=Span(line, column + 1, max(1, length)),
        path=path,
    )


# -- kinds


def as_expr(x: object) -> Expr:
    """An operand as an expression."""
    if type(x) is Traced:
        return x.expr
    if type(x) is Captured:
        refuse(f"{x.param.name} is used with open axes", "index every axis: table[h, q_idx]")
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

RAW: dict[str, Callable[..., object]] = {}
"""The same of functions that take their arguments as they come."""


def _pair(op: Op) -> Handler:
    def handler(x: Expr, y: Expr) -> Expr:
        return applied(op, *(as_number(z) for z in (x, y)))

    return handler


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
    if kind_of(x) is Kind.BOOL:
        both = applied(ops.AND, condition, x)
        return applied(ops.OR, both, applied(ops.AND, applied(ops.NOT, condition), y))
    return applied(ops.WHERE, condition, x, y)


def _masked_fill(x: Expr, mask: Expr, value: Expr) -> Expr:
    return _where(mask, value, x)


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
    if isinstance(y, Const):
        exponent = y.value
        if exponent in range(1, LARGEST_POWER + 1):
            found = x = as_float(x) if isinstance(exponent, float) else x
            for _ in range(1, int(exponent)):
                found = applied(ops.MUL, found, x)
            return found
        simple = {0: lambda z: Const(1), 0.5: _of_float(ops.SQRT), -0.5: _of_float(ops.RSQRT)}
        if exponent in simple:
            return simple[exponent](x)
        if exponent in range(-LARGEST_POWER, 0):
            return applied(ops.DIV, Const(1.0), _pow(as_float(x), Const(-int(exponent))))
    if isinstance(x, Const) and x.value > 0:
        if Kind.INT is kind_of(x) is kind_of(y):
            if x.value == 2:
                return applied(ops.SHL, Const(1), y)
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


FUNCTIONS |= {
    "add": _add,
    "sub": _sub,
    "subtract": _sub,
    "rsub": lambda x, y: _sub(y, x),
    "mul": _mul,
    "multiply": _mul,
    "truediv": lambda x, y: _div(Traced(x), Traced(y)),
    "true_divide": lambda x, y: _div(Traced(x), Traced(y)),
    "floordiv": _pair(ops.FLOORDIV),
    "floor_divide": _pair(ops.FLOORDIV),
    "mod": _pair(ops.MOD),
    "remainder": _pair(ops.MOD),
    "pow": _pow,
    "float_power": lambda x, y: _pow(as_float(x), y),
    "and": _bits(ops.AND, ops.BITAND),
    "or": _bits(ops.OR, ops.BITOR),
    "xor": _bits(ops.NE, ops.BITXOR),
    "lshift": _pair(ops.SHL),
    "rshift": _pair(ops.SHR),
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
    "minimum": _pair(ops.MIN),
    "maximum": _pair(ops.MAX),
    "fmin": _pair(ops.MIN),
    "fmax": _pair(ops.MAX),
    "min": _pair(ops.MIN),
    "max": _pair(ops.MAX),
    "where": _where,
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
    "logsigmoid": lambda x: applied(ops.NEG, applied(ops.SOFTPLUS, applied(ops.NEG, as_float(x)))),
    "silu": lambda x: applied(ops.MUL, as_float(x), applied(ops.SIGMOID, as_float(x))),
    "relu": lambda x: applied(ops.MAX, as_number(x), Const(TYPES[kind_of(as_number(x))](0))),
    "sin": _of_float(ops.SIN),
    "cos": _of_float(ops.COS),
    "floor": _floored,
    "ceil": _ceiled,
    "trunc": _truncated,
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
    "all": _same,
    "any": _same,
    "squeeze": _same,
    "view": _same,
    "reshape": _same,
    "expand": _same,
    "broadcast_to": _same,
    "cpu": _same,
    "cuda": _same,
}


def name_of(func: Any) -> str:
    """`add` for torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__ and aten's."""
    name = str(getattr(func, "__name__", func)).split(".")[0]
    return name


def call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A torch function of positions."""
    plain = name.removeprefix("__").removesuffix("__") if name.startswith("__") else name
    if plain not in FUNCTIONS and plain not in RAW and name.startswith("__r"):
        plain, args = plain[1:], (args[1], args[0])
    kwargs = {k: x for k, x in kwargs.items() if k not in ("out", "inplace") or x}
    if plain.startswith("i") and plain[1:] in FUNCTIONS and name.startswith("__"):
        plain = plain[1:]  # x += 1 makes a new value of a position
    if plain == "getitem":
        return active().read(args[0])[args[1]]
    if plain == "setitem" or (plain.endswith("_") and not name.startswith("__")):
        refuse(f"{plain} writes in place", f"write {plain.rstrip('_')}, which makes a new value")
    if plain in RAW:
        return Traced(RAW[plain](*args, **kwargs))  # type: ignore[arg-type]
    handler = FUNCTIONS.get(plain)
    if handler is None:
        _unknown(plain, args)
    given = [as_expr(x) for x in args]
    try:
        return Traced(handler(*given, **{k: as_expr(x) for k, x in kwargs.items()}))
    except TypeError:
        refuse(f"torch's {plain} with these arguments", "write it with arithmetic and torch.where")
    except AssertionError:
        kinds = ", ".join(kind_of(x).value for x in given)
        refuse(f"torch's {plain} of {kinds}", "convert one: x.to(torch.float32)", KindError)


def _unknown(name: str, args: tuple[Any, ...]) -> NoReturn:
    for x in args:
        if type(x) is Traced and x.is_number:
            x._concrete("")
    refuse(
        f"torch's {name} has no meaning for one pair of positions",
        "use arithmetic, comparisons, torch.where, pointwise functions, captured tensors",
    )


# -- the trace under way


class Trace:
    """What a run of a function reads of captured tensors."""

    def read(self, x: object) -> Traced | Captured:
        raise NotImplementedError


_ACTIVE: list[Trace] = []


def active() -> Trace:
    return _ACTIVE[-1]


class tracing:
    """While entered, functions of positions are traced to `trace`."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def __enter__(self) -> None:
        _ACTIVE.append(self.trace)

    def __exit__(self, *_: object) -> None:
        _ACTIVE.pop()


def flattened(values: object) -> Iterator[object]:
    """What lists, tuples and dicts hold."""
    if type(values) in (list, tuple):
        for one in values:  # type: ignore[attr-defined]
            yield from flattened(one)
    elif type(values) is dict:
        yield from flattened(list(values.values()))
    else:
        yield values
