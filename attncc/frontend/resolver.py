"""Syntax to IR: names become objects, kinds are checked, lets and defs are written out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import assert_never

from attncc.errors import (
    AttnccError,
    KindError,
    ProgramNameError,
    ProgramSyntaxError,
    ProgramValueError,
    suggest,
)
from attncc.frontend import tree
from attncc.frontend.functions import standard
from attncc.frontend.kind_errors import are, check_index, count, indexed, wrong_kind
from attncc.frontend.scope import (
    BUILTIN_FUNCTIONS,
    BUILTIN_VALUES,
    GRID_BASES,
    OUTPUT_VALUES,
    Function,
    Scope,
    Value,
    unknown_function,
    unknown_value,
)
from attncc.ir import expr as ir
from attncc.ir import ops
from attncc.ir.expr import Span
from attncc.ir.ops import OPS, Form, Kind, Op

MAX_DEPTH = 200
MAX_NODES = 20_000
MAX_WORK = 300_000
"""Nodes made for one text, defs written out; about two seconds."""

INFIX: Mapping[str, Op] = {op.symbol: op for op in OPS if op.form is Form.INFIX}
PREFIX: Mapping[str, Op] = {op.symbol: op for op in OPS if op.form is Form.PREFIX}
_ON_BOOLS: Mapping[Op, Op] = {ops.BITAND: ops.AND, ops.BITOR: ops.OR, ops.BITXOR: ops.NE}
MAX_POWER = 16


class Resolver:
    """Resolves the expressions of one text; counts what it makes, so that no text can explode."""

    def __init__(self) -> None:
        self._measures: dict[int, tuple[ir.Expr, int, int]] = {}  # the node keeps its id its own
        self._work = 0
        self._depth = 0
        self._calls: list[Function] = []
        self._call_span: Span | None = None

    def expr(self, node: tree.Expr, scope: Scope) -> ir.Expr:
        """The node's meaning; raises AttnccError with a span."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._too_large(node.span, f"more than {MAX_DEPTH} levels deep")
        result = self._expr(node, scope)
        self._depth -= 1
        return result

    def _expr(self, node: tree.Expr, scope: Scope) -> ir.Expr:
        match node:
            case tree.Literal(value, span):
                return ir.Const(value, self._span(span))
            case tree.Name(name, span):
                return self._value(name, span, scope)
            case tree.Attribute():
                return _coordinate(node, scope)
            case tree.Call(name):
                if name.name in scope.functions:
                    return self._expand(scope.functions[name.name], node, scope)
                return self._builtin(node, scope)
            case tree.Subscript():
                return self._load(node, scope)
            case tree.Unary(op, arg, span):
                return self._make(PREFIX[op], (self.expr(arg, scope),), node, (arg,))
            case tree.Binary("**"):
                return self._power(node, scope)
            case tree.Binary(op, left, right, span):
                args = (self.expr(left, scope), self.expr(right, scope))
                return self._make(INFIX[op], args, node, (left, right))
            case tree.Compare():
                return self._compare(node, scope)
            case _:
                assert_never(node)

    def measure(self, made: ir.Expr, span: Span) -> ir.Expr:
        """An expression made elsewhere, its size and depth noted like any other's."""
        parts = ir.children(made)
        for part in parts:
            if id(part) not in self._measures:
                self.measure(part, span)
        return self._measured(made, parts, span)

    def _span(self, span: Span) -> Span:
        """The place to blame: inside a library's def, the user's own call of it."""
        return self._call_span or span

    def _value(self, name: str, span: Span, scope: Scope) -> ir.Expr:
        value = scope.values.get(name)
        if value is None:
            raise unknown_value(name, self._span(span), scope)
        if isinstance(value, ir.TensorParam):
            raise KindError(
                f"'{value.name}' is a tensor, not a number",
                hint=f"index it: {indexed(value)}",
                span=self._span(span),
            )
        if name in BUILTIN_VALUES or value == OUTPUT_VALUES.get(name):
            return _placed(value, self._span(span))
        return value

    def _load(self, node: tree.Subscript, scope: Scope) -> ir.Expr:
        name, span = node.tensor.name, self._span(node.span)
        tensor = scope.values.get(name)
        if tensor is None:
            known = {n: v for n, v in scope.values.items() if isinstance(v, ir.TensorParam)}
            error = unknown_value(name, self._span(node.tensor.span), scope)
            close = suggest(name, known)
            raise ProgramNameError(error.message, hint=close or error.hint, span=error.span)
        if not isinstance(tensor, ir.TensorParam):
            raise KindError(
                f"'{name}' is not a tensor, so it cannot be indexed",
                hint=f"declare it with dims, e.g. {name}: float[heads]",
                span=self._span(node.tensor.span),
            )
        if len(node.at) != len(tensor.dims):
            dims = ", ".join(map(str, tensor.dims))
            raise KindError(
                f"'{tensor.name}' has {count(len(tensor.dims), 'dim')} [{dims}], "
                f"but {count(len(node.at), 'index', 'indices')} {are(len(node.at))} given",
                hint=f"write {indexed(tensor)}",
                span=span,
            )
        at = tuple(self.expr(part, scope) for part in node.at)
        for part, index in zip(node.at, at, strict=True):
            check_index(index, tensor, self._span(part.span))
        return self._measured(ir.Load(tensor, at, span), at, span)

    def _builtin(self, node: tree.Call, scope: Scope) -> ir.Expr:
        op = BUILTIN_FUNCTIONS.get(node.name.name)
        if op is None:
            span = self._span(node.name.span)
            raise unknown_function(node.name.name, span, scope, standard())
        many = op in (ops.MIN, ops.MAX)
        if len(node.args) != op.arity and not (many and len(node.args) > 2):
            takes = "two or more arguments" if many else count(op.arity, "argument")
            hint = f"write {op.symbol}({', '.join(('x', 'a', 'b')[: op.arity])})"
            if op is ops.WHERE:
                hint = "write where(condition, a, b)"
            raise ProgramSyntaxError(
                f"{op.symbol}() takes {takes}, not {len(node.args)}",
                hint=hint,
                span=self._span(node.span),
            )
        args = tuple(self.expr(arg, scope) for arg in node.args)
        if not many:
            return self._make(op, args, node, node.args)
        result = args[0]
        for at in range(1, len(args)):
            result = self._make(op, (result, args[at]), node, (node.args[0], node.args[at]))
        return result

    def _expand(self, function: Function, node: tree.Call, scope: Scope) -> ir.Expr:
        names = function.definition.args
        if len(node.args) != len(names):
            listed = ", ".join(name.name for name in names)
            raise ProgramSyntaxError(
                f"{function.name}() takes {count(len(names), 'argument')}, not {len(node.args)}",
                hint=f"write {node.name.name}({listed})",
                span=self._span(node.span),
            )
        if any(function is active for active in self._calls):  # checked when defined; be sure
            raise ProgramNameError(f"'{function.name}' calls itself", span=self._span(node.span))
        given = {
            name.name: self._argument(arg, scope)
            for name, arg in zip(names, node.args, strict=True)
        }
        inner = Scope({**BUILTIN_VALUES, **given}, function.functions, inside=function)
        outer = self._call_span
        self._call_span = outer or (node.span if function.library else None)
        self._calls.append(function)
        try:
            return self.expr(function.definition.body, inner)
        except AttnccError as error:
            raise self._blamed(error, function, node) from None
        finally:
            self._calls.pop()
            self._call_span = outer

    def _blamed(self, error: AttnccError, function: Function, node: tree.Call) -> AttnccError:
        """The error with the outermost call named, so that the reader knows which one it was."""
        if len(self._calls) == 1 and isinstance(error, KindError | ProgramValueError):
            where = f"in {function.library}'s" if function.library else f"line {node.span.line}: in"
            error.message += f" ({where} {node.name.name}(...))"
        return error

    def _argument(self, node: tree.Expr, scope: Scope) -> Value:
        if isinstance(node, tree.Name):
            value = scope.values.get(node.name)
            if isinstance(value, ir.TensorParam):
                return value
        return self.expr(node, scope)

    def _compare(self, node: tree.Compare, scope: Scope) -> ir.Expr:
        operands = tuple(self.expr(part, scope) for part in node.operands)
        result: ir.Expr | None = None
        for at, symbol in enumerate(node.ops):
            pair, parts = operands[at : at + 2], node.operands[at : at + 2]
            test = self._make(INFIX[symbol], pair, node, parts)
            result = test if result is None else self._make(ops.AND, (result, test), node, parts)
        assert result is not None
        return result

    def _power(self, node: tree.Binary, scope: Scope) -> ir.Expr:
        base = self.expr(node.left, scope)
        match node.right:
            case tree.Literal(int(n)) if not isinstance(n, bool) and 0 <= n <= MAX_POWER:
                pass
            case _:
                raise KindError(
                    f"'**' takes an int literal from 0 to {MAX_POWER} on its right",
                    hint="write exp2(y) for 2 ** y, exp(y * log(x)) for x ** y, "
                    "sqrt(x) for x ** 0.5",
                    span=self._span(node.right.span),
                )
        if ir.kind(base) is Kind.BOOL:
            raise wrong_kind("**", "a number", (base,), (node.left,), self._span)
        if n == 0:
            one: int | float = 1.0 if ir.kind(base) is Kind.FLOAT else 1
            return ir.Const(one, self._span(node.span))
        result = base
        for _ in range(n - 1):
            result = self._make(ops.MUL, (result, base), node, (node.left, node.left))
        return result

    def _make(
        self, op: Op, args: tuple[ir.Expr, ...], node: tree.Expr, parts: tuple[tree.Expr, ...]
    ) -> ir.Expr:
        """The operator applied, or an error that blames the argument at fault."""
        kinds = tuple(map(ir.kind, args))
        if op in _ON_BOOLS and all(kind is Kind.BOOL for kind in kinds):
            op = _ON_BOOLS[op]
        if op.kind(kinds) is None:
            raise wrong_kind(op.symbol, op.expects, args, parts, self._span, op)
        if op in (ops.DIV, ops.FLOORDIV, ops.MOD) and _constant(args[1]) == 0:
            raise ProgramValueError(
                f"'{op.symbol}' divides by zero",
                hint="the divisor is 0 for every pair; write the one you mean",
                span=self._span(parts[1].span),
            )
        span = self._span(node.span)
        return self._measured(ir.Apply(op, args, span), args, span)

    def _measured(self, made: ir.Expr, parts: tuple[ir.Expr, ...], span: Span) -> ir.Expr:
        """The node, its size and depth noted; raises where the whole grows too large."""
        measures = [self._measures.get(id(part), (part, 1, 1)) for part in parts]
        size = 1 + sum(measure[1] for measure in measures)
        depth = 1 + max((measure[2] for measure in measures), default=0)
        self._work += 1
        if size > MAX_NODES or self._work > MAX_WORK:
            limit = MAX_NODES if size > MAX_NODES else MAX_WORK
            raise self._too_large(span, f"more than {limit:,} operations, all written out")
        if depth > MAX_DEPTH:
            raise self._too_large(span, f"more than {MAX_DEPTH} levels deep")
        self._measures[id(made)] = (made, size, depth)
        return made

    def _too_large(self, span: Span, how: str) -> ProgramSyntaxError:
        return ProgramSyntaxError(
            f"an expression is {how}",
            hint="compute part of it outside and pass it as a captured tensor",
            span=self._span(span),
        )


def _placed(value: ir.Expr, span: Span) -> ir.Expr:
    """A builtin with the place it is used at."""
    match value:
        case ir.Index(name, axes):
            return ir.Index(name, axes, span)
        case ir.Scalar(param):
            return ir.Scalar(param, span)
        case ir.Score():
            return ir.Score(span)
        case _:
            return value


def _coordinate(node: tree.Attribute, scope: Scope) -> ir.Expr:
    found = scope.grid.get((node.base, node.name))
    if found is not None:
        return found
    names = [name for base, name in scope.grid if base == node.base]
    if node.base not in GRID_BASES:
        raise ProgramNameError(
            f"'{node.base}' has no coordinates", hint="write q.NAME or kv.NAME", span=node.span
        )
    if names:
        hint = suggest(node.name, names) or f"the axes are {', '.join(names)}"
    elif scope.inside is not None:
        hint = f"a def sees only its arguments: pass {node.base}.{node.name} as one"
    else:
        word = f"{node.base}_axes" if scope.grid else "axes"
        hint = f"declare the axes above: {word} (t: frames, {node.name}: width)"
    raise ProgramNameError(
        f"unknown axis '{node.name}' in {node.base}.{node.name}", hint=hint, span=node.span
    )


def _constant(expr: ir.Expr) -> int | float | None:
    """The value of arithmetic on literals, as far as it is plain."""
    match expr:
        case ir.Const(value):
            return value
        case ir.Apply(op, args) if op in _ARITHMETIC:
            values = [_constant(arg) for arg in args]
            if any(value is None for value in values):
                return None
            try:
                return _ARITHMETIC[op](*values)
            except OverflowError:
                return None
        case _:
            return None


_ARITHMETIC: Mapping[Op, Callable[..., int | float]] = {
    ops.ADD: lambda x, y: x + y,
    ops.SUB: lambda x, y: x - y,
    ops.MUL: lambda x, y: x * y,
    ops.NEG: lambda x: -x,
}
