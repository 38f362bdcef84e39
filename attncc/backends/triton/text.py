"""Expressions as Triton source text, with shared subexpressions named."""

from __future__ import annotations

import keyword
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import assert_never

from attncc.ir import ops
from attncc.ir.expr import (
    KV_IDX,
    KV_LO,
    SIZES,
    Apply,
    Axis,
    Const,
    Expr,
    Index,
    Load,
    Scalar,
    Score,
    TensorParam,
    axes,
    children,
    kind,
)
from attncc.ir.ops import Kind, Op
from attncc.ir.rewrite import signed_terms
from attncc.passes.fold_scale import SCALE, uniform
from attncc.passes.signs import nonnegative, positive

WIDTH = 100
LONG = 64
"""A subexpression longer than this gets a line of its own."""
SHORT = 40
"""The same for bounds, which have few names in common but many terms."""
ROOT = 86
"""So does a whole expression longer than this."""

# How tightly Triton source binds: Python's levels, where & and | stand for `and` and `or`.
P_COMPARE, P_OR, P_XOR, P_AND, P_SHIFT, P_SUM, P_TERM, P_UNARY, P_ATOM = range(1, 10)

_INFIX: dict[Op, tuple[str, int]] = {
    ops.ADD: ("+", P_SUM),
    ops.SUB: ("-", P_SUM),
    ops.MUL: ("*", P_TERM),
    ops.LT: ("<", P_COMPARE),
    ops.LE: ("<=", P_COMPARE),
    ops.GT: (">", P_COMPARE),
    ops.GE: (">=", P_COMPARE),
    ops.EQ: ("==", P_COMPARE),
    ops.NE: ("!=", P_COMPARE),
    ops.AND: ("&", P_AND),
    ops.OR: ("|", P_OR),
    ops.BITAND: ("&", P_AND),
    ops.BITOR: ("|", P_OR),
    ops.BITXOR: ("^", P_XOR),
    ops.SHL: ("<<", P_SHIFT),
    ops.SHR: (">>", P_SHIFT),
}
_PREFIX: dict[Op, str] = {ops.NEG: "-", ops.INVERT: "~", ops.NOT: "~"}

_CALLS: dict[Op, str] = {
    ops.MIN: "tl.minimum",
    ops.MAX: "tl.maximum",
    ops.ABS: "tl.abs",
    ops.WHERE: "tl.where",
    ops.EXP: "tl.exp",
    ops.EXP2: "tl.exp2",
    ops.LOG: "tl.log",
    ops.LOG2: "tl.log2",
    ops.SQRT: "tl.sqrt",
    ops.RSQRT: "tl.rsqrt",
    ops.SIN: "tl.sin",
    ops.COS: "tl.cos",
    ops.SIGMOID: "tl.sigmoid",
    ops.TANH: "tanh",
    ops.SOFTPLUS: "softplus",
    ops.BIT_LENGTH: "bit_length",
}

HELPERS: dict[str, str] = {
    "floor_div": '''
@triton.jit
def floor_div(x, y):
    """x // y rounded down, as in Python; Triton's own rounds toward zero."""
    quotient = x // y
    return quotient - ((quotient * y != x) & ((x < 0) != (y < 0))).to(tl.int32)
''',
    "floor_mod": '''
@triton.jit
def floor_mod(x, y):
    """x % y with the sign of y, as in Python."""
    rest = x % y
    return rest + tl.where((rest != 0) & ((rest < 0) != (y < 0)), y, 0)
''',
    "nonzero": '''
@triton.jit
def nonzero(x):
    """A divisor for pairs that are masked out anyway."""
    return tl.where(x == 0, 1, x)
''',
    "as_int": '''
@triton.jit
def as_int(x):
    """A loaded integer, wide enough to compute with."""
    if x.dtype.is_int64():
        return x
    else:
        return x.to(tl.int32)
''',
    "softplus": '''
@triton.jit
def softplus(x):
    """log(1 + exp(x)) without overflow."""
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))
''',
    "bit_length": '''
@triton.jit
def bit_length(x):
    """How many bits |x| takes."""
    x = tl.abs(x)
    length = (x > 0).to(tl.int32)
    for shift in tl.static_range(1, 63):
        length += ((x.to(tl.int64) >> shift) > 0).to(tl.int32)
    return length
''',
}
"""Functions a kernel file holds when an expression in it needs them."""

GATHER = '''
@triton.jit
def gather(pointers):
    """One element a pair, read in place; the pipeliner would stage it through shared memory."""
    if pointers.dtype.element_ty == tl.float32:
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];",
            "=f,l",
            [pointers.to(tl.int64)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.load(pointers)
'''
TANH_HALF = '''
@triton.jit
def tanh(x):
    """One hardware instruction: 2**-11 relative error, below what half types keep."""
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )
'''
TANH_EXACT = '''
@triton.jit
def tanh(x):
    """By exp2 of a negative number, so that nothing overflows."""
    e = tl.exp2(-2.8853900817779268 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    # Below 0.05 the difference cancels; the series' next term is under 2**-28 of the first there.
    x2 = x * x
    small = x * (1.0 - x2 * (1.0 / 3.0 - x2 * (2.0 / 15.0 - x2 * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.05, small, tl.where(x < 0, -t, t))
'''

# Names a kernel file uses for itself; a parameter of the same name gets an underscore.
_OWN = re.compile(
    r"triton|tl|b|h|bh|i|q|k|v|p|d|n|m|t\d+|kv_head|heads|kv_heads|batch|head_dim|score|mask|scale"
    r"|acc|out|lse|keep|head|width|rank|section|swizzle|safe|alpha|sink|delta|dout|dq|dk|dv|ds|dp|qk"
    r"|empty|range|float|int|min|max|tanh|.*_(mod|term|ptr|desc|idx|lo|hi|len|last|[ilo])|.*_count.*"
    r"|.*(stride|size|tile|capacity|index|order|attend|grad).*|[A-Z_]+|"
    + "|".join(HELPERS)
    + r"|row|chunk|inside|more|turn|(q|kv)_(low|high)_\d+|.*_entries"
    r"|at|columns|dlse|forward|g|gather|in_order|own|rows|start|summarize|top|total|whole|m_new|lse2"
    r"|.*_(head|keys|kv|list|lists|pairs|q|queries|row|slope|ds|at_\d+|(lo|hi)_\d+)"
    r"|(q|kv)_(int|float|terms|values|ends)"
    # of warp-specialised kernels
    r"|step|slot|phase|free|half|before|nought|zero|weights|slopes|after|full|stored|new|works?|words"
    r"|(row|column|head)_\d+|.*_(sm|ring|full|done|block|after)|in_a_row|barriers|show|fold|place|copied"
    r"|(fold|consume)_d[kv]"
    r"|add_dq|start_dq|round_dq|clear|backward|consume|produce|blocks_of|tiles_of|read_(key|query)"
    r"|bring|arrived|release|ring_of|put|look|give|take|weigh|begin|ask|asked|found|sigmoid|gl"
    r"|first|last|part|factor|counter|list_start|read_mask|gluon|tma|mbarrier|fence_async_shared"
    r"|warpgroup_mma(_wait)?|(done|ds)_\d|bh_count|heavy|dq_sum|(lse|delta)_rows|block|sums|within"
    r"|(un)?packed|kv_column|score_at|(first_)?diagonal|low|high|add_(diagonals|groups)|halves|apart|.*_sums"
)


def _is_own(name: str) -> bool:
    """No name of a file's own ends in an underscore, but that of what is not used."""
    return name == "_" or (not name.endswith("_") and _OWN.fullmatch(name) is not None)


class Names:
    """One checked identifier for each parameter, the same in every function of a file."""

    def __init__(self, params: Iterable[str]) -> None:
        self._names: dict[str, str] = {}
        taken: set[str] = set()
        for param in params:
            assert param.isidentifier(), param
            name = param
            while name in taken or keyword.iskeyword(name) or _is_own(name):
                name += "_"
            taken.add(name)
            self._names[param] = name

    def __getitem__(self, param: str) -> str:
        return self._names.get(param, param)

    def pointer(self, tensor: str) -> str:
        return f"{self[tensor]}_ptr"

    def stride(self, tensor: str, axis: int) -> str:
        return f"{self[tensor]}_stride_{axis}"

    def size(self, tensor: str, axis: int) -> str:
        return f"{self[tensor]}_size_{axis}"


class Printer:
    """Prints the expressions of one kernel file and remembers which helpers they need."""

    def __init__(
        self,
        names: Names,
        proved: frozenset[Expr],
        ptx: bool = False,
        bounds: bool = False,
        wide: bool = False,
        found: Collection[TensorParam] = (),
        columns: bool = False,
    ) -> None:
        """wide: int scalars, and what searches found, take 64 bits.
        found: what searches make, int32 and contiguous.
        columns: of what matters at kept pairs, kv_idx is kv_lo + kv_column.
        bounds: for expressions that bound others, whose ints take 64 bits, and whose nan means
        that nothing is known, so that min and max must keep it."""
        self.names = names
        self.proved = proved
        self.ptx = ptx
        self.bounds = bounds
        self.wide = wide
        self.found = frozenset(found)
        self.columns = columns
        self.helpers: set[str] = set()

    @property
    def int_type(self) -> str:
        return "tl.int64" if self.bounds else "tl.int32"

    def body(self, outputs: Sequence[Expr], *, kept: bool = False) -> tuple[list[str], list[str]]:
        """Assignments for shared and long subexpressions, and the text of each output.

        kept: the outputs matter at kept pairs alone. What those reach for sure is then in range in
        every tile that is not MASKED.
        """
        return _Body(self, outputs, SHORT if self.bounds else LONG, kept).run(outputs)


class _Body:
    def __init__(self, printer: Printer, outputs: Sequence[Expr], long: int, kept: bool) -> None:
        self.printer = printer
        self.long = long
        self.sure = _reached(outputs) if kept else frozenset()
        self.columns = kept and printer.columns
        self.lines: list[str] = []
        self.named: dict[Expr, str] = {}
        self.shared = _repeated(outputs)

    def run(self, outputs: Sequence[Expr]) -> tuple[list[str], list[str]]:
        texts = [self._root(output) for output in outputs]
        return self.lines, texts

    def _root(self, expr: Expr) -> str:
        if expr in self.named or expr in self.shared:
            return self.text(expr)
        text, _ = self._print(expr)
        return text if len(text) <= ROOT else self._name(expr, text)

    def text(self, expr: Expr) -> str:
        return self._at(expr, 0)

    def _at(self, expr: Expr, precedence: int) -> str:
        """Text that binds at least as tightly as `precedence`."""
        if expr in self.named:
            return self.named[expr]
        text, own = self._print(expr)
        named = expr in self.shared or len(text) > self.long or self._is_found(expr)
        if isinstance(expr, Apply | Load) and named:
            return self._name(expr, text)
        return text if own >= precedence else f"({text})"

    def _name(self, expr: Expr | None, text: str) -> str:
        name = f"t{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        if expr is not None:
            self.named[expr] = name
        return name

    def _print(self, expr: Expr) -> tuple[str, int]:
        match expr:
            case Const(value):
                return _literal(value)
            case Index(name):
                return name, P_ATOM
            case Scalar(param):
                own = param is SCALE
                name = param.name if own else self.printer.names[param.name]
                if self.printer.wide and param.kind is Kind.INT and param not in SIZES:
                    return f"{name}.to(tl.int64)", P_ATOM
                return (f"{name} != 0", P_COMPARE) if param.kind is Kind.BOOL else (name, P_ATOM)
            case Score():
                return "score", P_ATOM
            case Load():
                return self._load(expr), P_COMPARE if expr.tensor.kind is Kind.BOOL else P_ATOM
            case Apply():
                return self._apply(expr)
            case _:
                assert_never(expr)

    def _is_found(self, expr: Expr) -> bool:
        return isinstance(expr, Load) and expr.tensor in self.printer.found

    def _found(self, load: Load) -> str:
        """What a search found: one int32 a position, row after row."""
        where = ""
        for dim, index in zip(load.tensor.dims, load.at, strict=True):
            text = self._at(index, P_SUM)
            if where:
                where = f"{atom(where)}.to(tl.int64) * {dim} + {text}"
            else:
                where = text
        pointer = self.printer.names.pointer(load.tensor.name)
        text = f"tl.load({pointer} + {where})" if where else f"tl.load({pointer})"
        return f"{text}.to(tl.int64)" if self.printer.wide else text

    def _load(self, load: Load) -> str:
        if self._is_found(load):
            return self._found(load)
        names = self.printer.names
        tensor = load.tensor.name
        where = names.pointer(tensor)
        far = -1 if load in self.printer.proved or load not in self.sure else _pair_axis(load)
        for axis, index in enumerate(load.at):
            if axis == far:
                continue
            text = self._at(index, P_TERM)
            if load not in self.printer.proved:
                last = f"{names.size(tensor, axis)} - 1"
                text = self._name(None, f"tl.minimum(tl.maximum({self.text(index)}, 0), {last})")
            # A pair's index stays 32-bit along the last axis, whose stride is 1 as a rule.
            pair = axes(index) & Axis.Q and axes(index) & Axis.KV and axis == len(load.at) - 1
            if not pair and not isinstance(index, Const) and not self.printer.bounds:
                text = f"{atom(text)}.to(tl.int64)"
            where += f" + {text} * {names.stride(tensor, axis)}"
        if far >= 0:
            where = self._name(None, where)
            self._moved(where, load, far)
        elif len(where) > ROOT:
            where = self._name(None, where)
        read = "gather" if self.printer.ptx and _scattered(load) else "tl.load"
        match load.tensor.kind:
            case Kind.INT:
                self.printer.helpers.add("as_int")
                return f"as_int({read}({where}))"
            case Kind.FLOAT:
                return f"{read}({where}).to(tl.float32)"
            case Kind.BOOL:
                return f"{read}({where}) != 0"
            case _:
                assert_never(load.tensor.kind)

    def _moved(self, pointer: str, load: Load, axis: int) -> None:
        """Lines that move a pointer along the axis that has an index of both positions.

        Where nothing is masked the index is in range. Moved by what varies with the query, then by
        what varies with the key, it takes no instruction a pair: constants are part of the load.
        """
        names, index = self.printer.names, load.at[axis]
        stride = names.stride(load.tensor.name, axis)
        last = f"{names.size(load.tensor.name, axis)} - 1"
        text = self.text(index)
        apart = _apart(index) or (("+", index),)
        steps = []
        for sign, part in apart:
            if part == KV_IDX and self.columns:
                # Places that are not negative, or LLVM leaves constants out of the loads.
                start, place = "kv_lo", "kv_column"
                if sign == "-":
                    start, place = "(kv_lo + BLOCK_N - 1)", "(BLOCK_N - 1 - kv_column)"
                steps.append(f"    {pointer} {sign}= {start}.to(tl.int64) * {stride}")
                steps.append(f"    {pointer} += {place} * {stride}")
            else:
                moved = f"{atom(self.text(part))}.to(tl.int64) * {stride}"
                steps.append(f"    {pointer} {sign}= {moved}")
        clamped = f"tl.minimum(tl.maximum({text}, 0), {last})"
        self.lines += ["if MASKED:", f"    {pointer} += {clamped} * {stride}", "else:", *steps]

    def _apply(self, expr: Apply) -> tuple[str, int]:
        op, args = expr.op, expr.args
        if special := _SPECIAL.get(op):
            return special(self, expr)
        if op is ops.MUL and expr.kind is Kind.FLOAT and (text := self._multiplied(expr)):
            return text, P_SUM
        if op in _INFIX:
            symbol, own = _INFIX[op]
            # Comparisons do not chain here, so both sides must bind tighter.
            left = self._number(expr, args[0], own + (own == P_COMPARE))
            right = self._number(expr, args[1], own + 1)
            return f"{left} {symbol} {right}", own
        if op in _PREFIX:
            return f"{_PREFIX[op]}{self._at(args[0], P_UNARY)}", P_UNARY
        name = _CALLS[op]
        if name in HELPERS:
            self.printer.helpers.add(name)
        parts = [self._number(expr, a, 0) for a in args]
        if self.printer.bounds and op in (ops.MIN, ops.MAX) and expr.kind is Kind.FLOAT:
            parts.append("propagate_nan=tl.PropagateNan.ALL")
        return f"{name}({', '.join(parts)})", P_ATOM

    def _number(self, expr: Apply, arg: Expr, precedence: int) -> str:
        """An argument, as a float where the operator computes in floats."""
        if expr.kind is Kind.FLOAT and kind(arg) is Kind.INT:
            return self._as_float(arg)
        return self._at(arg, precedence)

    def _as_float(self, arg: Expr) -> str:
        if isinstance(arg, Const):
            return repr(float(arg.value))
        if parts := self._columns_apart(arg):
            return self._name(None, " ".join(parts))
        return f"{atom(self._at(arg, P_ATOM))}.to(tl.float32)"

    def _columns_apart(self, arg: Expr) -> tuple[str, str, str] | None:
        """A sum with kv_idx as floats: what a tile's keys have in common, sign, constant rest."""
        signs = {part: sign for sign, part in _apart(arg)} if self.columns else {}
        if KV_IDX not in signs or not isinstance(arg, Apply):
            return None
        start = atom(self._at(_replaced(arg, KV_IDX, KV_LO), P_ATOM))
        return f"{start}.to(tl.float32)", signs[KV_IDX], "kv_column.to(tl.float32)"

    def _multiplied(self, expr: Apply) -> str | None:
        """Such a sum times one number for the tile, which is one instruction a key."""
        for x, y in (expr.args, expr.args[::-1]):
            if kind(x) is Kind.INT and uniform(y) and (parts := self._columns_apart(x)):
                start, sign, rest = parts
                factor = self._number(expr, y, P_TERM + 1)
                return f"{start} * {factor} {sign} {rest} * {factor}"
        return None

    def _floordiv(self, expr: Apply) -> tuple[str, int]:
        x, y = expr.args
        if expr.kind is Kind.FLOAT:
            return f"tl.floor({self._number(expr, x, P_TERM)} / {self._divisor(expr)})", P_ATOM
        if nonnegative(x) and positive(y):
            return f"{self._at(x, P_TERM)} // {self._at(y, P_TERM + 1)}", P_TERM
        self.printer.helpers.add("floor_div")
        return f"floor_div({self.text(x)}, {self._nonzero(y)})", P_ATOM

    def _mod(self, expr: Apply) -> tuple[str, int]:
        x, y = expr.args
        if expr.kind is Kind.FLOAT:
            left, right = self._number(expr, x, P_ATOM), self._divisor(expr)
            return f"{left} - tl.floor({left} / {right}) * {right}", P_SUM
        if nonnegative(x) and positive(y):
            return f"{self._at(x, P_TERM)} % {self._at(y, P_TERM + 1)}", P_TERM
        self.printer.helpers.add("floor_mod")
        return f"floor_mod({self.text(x)}, {self._nonzero(y)})", P_ATOM

    def _nonzero(self, divisor: Expr) -> str:
        if isinstance(divisor, Const | Scalar):  # checked when bound
            return self.text(divisor)
        self.printer.helpers.add("nonzero")
        return f"nonzero({self.text(divisor)})"

    def _divisor(self, expr: Apply) -> str:
        return self._number(expr, expr.args[1], P_TERM + 1)

    def _div(self, expr: Apply) -> tuple[str, int]:
        return f"{self._number(expr, expr.args[0], P_TERM)} / {self._divisor(expr)}", P_TERM

    def _floor(self, expr: Apply) -> tuple[str, int]:
        (x,) = expr.args
        if kind(x) is Kind.INT:
            return self._print(x)
        return f"tl.floor({self.text(x)}).to({self.printer.int_type})", P_ATOM

    def _int(self, expr: Apply) -> tuple[str, int]:
        (x,) = expr.args
        if kind(x) is Kind.INT:
            return self._print(x)
        return f"{atom(self._at(x, P_ATOM))}.to({self.printer.int_type})", P_ATOM

    def _float(self, expr: Apply) -> tuple[str, int]:
        (x,) = expr.args
        return (self._print(x)) if kind(x) is Kind.FLOAT else (self._as_float(x), P_ATOM)

    def _equal(self, expr: Apply) -> tuple[str, int]:
        x, y = expr.args
        symbol, own = _INFIX[expr.op]
        return f"{self._at(x, own + 1)} {symbol} {self._at(y, own + 1)}", own


_SPECIAL: dict[Op, Callable[[_Body, Apply], tuple[str, int]]] = {
    ops.FLOORDIV: _Body._floordiv,
    ops.MOD: _Body._mod,
    ops.DIV: _Body._div,
    ops.FLOOR: _Body._floor,
    ops.INT: _Body._int,
    ops.FLOAT: _Body._float,
    ops.EQ: _Body._equal,
    ops.NE: _Body._equal,
}


def _scattered(load: Load) -> bool:
    """Whether pairs read through one index of both positions, such as q_idx - kv_idx."""
    return any(axes(index) & PAIR == PAIR for index in load.at)


PAIR = Axis.Q | Axis.KV


def _pair_axis(load: Load) -> int:
    """The one axis whose index has both positions; -1 where there is none, or there are two."""
    found = [axis for axis, index in enumerate(load.at) if axes(index) & PAIR == PAIR]
    return found[0] if len(found) == 1 else -1


def _reached(outputs: Iterable[Expr]) -> frozenset[Expr]:
    """Loads that are read whatever the values, with no condition before them."""
    found: set[Expr] = set()
    seen: set[int] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, Load):
            found.add(node)
        match node:
            case Apply(ops.AND | ops.OR | ops.WHERE, (condition, *_)):
                stack.append(condition)
            case _:
                stack += children(node)
    return frozenset(found)


def _apart(index: Expr) -> tuple[tuple[str, Expr], ...]:
    """Signed sums that make up an index, of the query alone and of the key alone; else none."""
    found: dict[Axis, tuple[str, Expr]] = {}
    for sign, term in signed_terms(index):
        side = axes(term) & Axis.KV
        if side and axes(term) & Axis.Q:
            return ()
        if side in found:
            own, before = found[side]
            found[side] = own, Apply(ops.ADD if sign == own else ops.SUB, (before, term))
        else:
            found[side] = sign, term
    return tuple(found[side] for side in (Axis.NONE, Axis.KV) if side in found)


def _replaced(expr: Expr, old: Expr, new: Expr) -> Expr:
    """A sum with one of its terms replaced."""
    if expr == old:
        return new
    match expr:
        case Apply(ops.ADD | ops.SUB | ops.NEG as op, args):
            return Apply(op, tuple(_replaced(arg, old, new) for arg in args))
        case _:
            return expr


def atom(text: str) -> str:
    """Text that a method call or an operator may follow."""
    return text if text.isidentifier() or (text.endswith(")") and _closed(text)) else f"({text})"


def _closed(text: str) -> bool:
    """Whether the last parenthesis closes the first one, so that `text` is a call or a group."""
    depth = 0
    for at, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0 and char == ")" and at < len(text) - 1 and text[at + 1] != ".":
            return False
        if depth == 0 and char in " +-*/%<>=&|^~":
            return False
    return True


def _literal(value: bool | int | float) -> tuple[str, int]:
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")', P_ATOM
    return repr(value).replace("e+", "e"), P_UNARY if value < 0 else P_ATOM


def _repeated(outputs: Sequence[Expr]) -> set[Expr]:
    """Compound subexpressions that occur more than once."""
    counts: Counter[Expr] = Counter()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if not isinstance(node, Apply | Load):
            continue
        counts[node] += 1
        if counts[node] == 1:
            stack.extend(children(node))
    return {node for node, count in counts.items() if count > 1}


def call(prefix: str, args: Sequence[str], suffix: str = "", indent: int = 0) -> str:
    """`prefix(args)suffix`, broken where it is too long."""
    return laid_out(f"{' ' * indent}{prefix}({', '.join(args)}){suffix}")


def laid_out(text: str) -> str:
    """Lines that are too long, broken inside their last brackets as ruff does."""
    return "\n".join(part for line in text.split("\n") for part in _broken(line))


def _broken(line: str) -> list[str]:
    if len(line) <= WIDTH or line.lstrip().startswith(("#", '"')) or '"""' in line:
        return [line]
    pad = line[: len(line) - len(line.lstrip())]
    suffix = next((end for end in ("):", "),", ")") if line.endswith(end)), None)
    if suffix is None:
        return [line]
    opening = _opening(line, len(line) - len(suffix))
    head, inner = line[: opening + 1], line[opening + 1 : len(line) - len(suffix)]
    if len(pad) + 4 + len(inner) <= WIDTH:
        return [head, f"{pad}    {inner}", f"{pad}{suffix}"]
    arguments = _arguments(inner)
    # A comma would make a tuple of a group, which nothing calls.
    comma = "," if len(arguments) > 1 or re.search(r"[\w)\]]\($", head) else ""
    lines = [part for arg in arguments for part in _broken(f"{pad}    {arg}{comma}")]
    return [head, *lines, f"{pad}{suffix}"]


def _opening(line: str, closing: int) -> int:
    """Where the bracket that closes at `closing` opens."""
    depth = 0
    for at in range(closing, -1, -1):
        depth += (line[at] in ")]") - (line[at] in "([")
        if depth == 0:
            return at
    raise AssertionError(f"unbalanced brackets: {line}")


def _arguments(inner: str) -> list[str]:
    """The parts between commas outside brackets."""
    parts, depth, start = [], 0, 0
    for at, char in enumerate(inner):
        depth += (char in "([") - (char in ")]")
        if char == "," and depth == 0:
            parts.append(inner[start:at].strip())
            start = at + 1
    return [*parts, inner[start:].strip()]


def indented(text: str, by: int = 4) -> str:
    """Every non-empty line moved right."""
    pad = " " * by
    return "\n".join(pad + line if line else line for line in text.split("\n"))
