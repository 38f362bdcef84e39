"""What each grammar rule builds, bottom-up while parsing, so that depth costs no recursion."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from lark import Token, Transformer, v_args

from attncc.errors import ProgramSyntaxError, ProgramValueError
from attncc.frontend import tree
from attncc.ir.expr import Span

MAX_DEPTH = 200
MAX_NAME = 64
MAX_INT = 2**63 - 1

T = TypeVar("T")


@v_args(inline=True)
class Builder(Transformer[Token, tree.File]):
    """One method a rule of grammar.lark."""

    def start(self, *declarations: tree.Declaration) -> tree.File:
        return tree.File(declarations)

    def attention(
        self, name: Token, params: tuple[tree.Param, ...] | None, body: tuple[tree.Statement, ...]
    ) -> tree.Attention:
        return tree.Attention(ident(name), params or (), body)

    def definition(
        self, name: Token, args: tuple[tree.Ident, ...] | None, body: tree.Expr
    ) -> tree.Definition:
        return tree.Definition(ident(name), args or (), body)

    def import_(self, library: Token, *names: tree.Imported) -> tree.Import:
        return tree.Import(ident(library), names)

    def imported(self, name: Token, alias: Token | None) -> tree.Imported:
        return tree.Imported(ident(name), ident(alias or name))

    def names(self, *names: Token) -> tuple[tree.Ident, ...]:
        return tuple(map(ident, names))

    flags = names

    def _tuple(self, *parts: T) -> tuple[T, ...]:
        return parts

    params = dims = args = body = _tuple

    def default(self, value: tree.Expr) -> tree.Expr:
        return value

    def param(
        self,
        name: Token,
        kind: Token,
        dims: tuple[tree.Expr, ...] | None,
        flags: tuple[tree.Ident, ...],
        default: tree.Expr | None,
    ) -> tree.Param:
        return tree.Param(ident(name), ident(kind), dims or (), flags, default)

    def let(self, name: Token, value: tree.Expr) -> tree.Let:
        return tree.Let(ident(name), value)

    def clause(self, name: Token, value: tree.Expr) -> tree.Clause:
        return tree.Clause(ident(name), value)

    def axes(self, keyword: Token, *axes: tree.GridAxis) -> tree.Axes:
        return tree.Axes(axes, place(keyword), str(keyword))

    def axis(self, name: Token, size: tree.Expr) -> tree.GridAxis:
        return tree.GridAxis(ident(name), size)

    def binary(self, left: tree.Expr, op: Token, right: tree.Expr) -> tree.Binary:
        span = join(left.span, right.span)
        return tree.Binary(str(op), left, right, span, deeper(span, (left, right)))

    def unary(self, op: Token, arg: tree.Expr) -> tree.Expr:
        span = join(place(op), arg.span)
        match arg:
            case tree.Literal(value, _, True) if op == "-" and not isinstance(value, bool):
                return tree.Literal(-value, span, bare=False)
        return tree.Unary(str(op), arg, span, deeper(span, (arg,)))

    def compare(self, *parts: tree.Expr | Token) -> tree.Compare:
        operands = tuple(part for part in parts if not isinstance(part, Token))
        ops = tuple(str(part) for part in parts if isinstance(part, Token))
        span = join(operands[0].span, operands[-1].span)
        depth = deeper(span, operands) + len(ops) - 1  # a conjunction of pairs
        return tree.Compare(ops, operands, span, _limited(depth, span))

    def number(self, token: Token) -> tree.Literal:
        return tree.Literal(_number(token), place(token))

    def boolean(self, token: Token) -> tree.Literal:
        return tree.Literal(token == "true", place(token))

    def name(self, token: Token) -> tree.Name:
        return tree.Name(ident(token).name, place(token))

    def attribute(self, base: Token, name: Token) -> tree.Attribute:
        return tree.Attribute(ident(base).name, str(name), join(place(base), place(name)))

    def call(self, name: Token, args: tuple[tree.Expr, ...] | None, end: Token) -> tree.Call:
        span = join(place(name), place(end))
        return tree.Call(ident(name), args or (), span, deeper(span, args or ()))

    def subscript(self, name: Token, at: tuple[tree.Expr, ...], end: Token) -> tree.Subscript:
        span = join(place(name), place(end))
        return tree.Subscript(ident(name), at, span, deeper(span, at))

    def group(self, start: Token, inner: tree.Expr, end: Token) -> tree.Expr:
        span = join(place(start), place(end))
        if isinstance(inner, tree.Literal):
            return replace(inner, span=span, bare=False)
        return replace(inner, span=span)


def place(token: Token) -> Span:
    return Span(token.line or 1, token.column or 1, max(1, len(token)))


def join(first: Span, last: Span) -> Span:
    """From the start of one to the end of the other; of several lines, the start of the first."""
    if first.line != last.line:
        return first
    return Span(first.line, first.column, last.column + last.length - first.column)


def ident(token: Token) -> tree.Ident:
    if len(token) > MAX_NAME:
        raise ProgramSyntaxError(
            f"a name of {len(token)} characters",
            hint=f"names have at most {MAX_NAME}",
            span=place(token),
        )
    return tree.Ident(str(token), place(token))


def deeper(span: Span, parts: tuple[tree.Expr, ...]) -> int:
    return _limited(1 + max((part.depth for part in parts), default=0), span)


def _limited(depth: int, span: Span) -> int:
    if depth > MAX_DEPTH:
        raise ProgramSyntaxError(
            f"an expression of more than {MAX_DEPTH} levels (each term of a long chain is one)",
            hint="put the values in a captured tensor and index it",
            span=span,
        )
    return depth


def _number(token: Token) -> int | float:
    text = str(token)
    try:
        if len(text) > 400:
            raise ValueError
        whole = text.replace("_", "").isdigit()
        if whole or text[:2] in ("0x", "0X"):
            value = int(text, 10 if whole else 16)
            if value > MAX_INT:
                raise OverflowError
            return value
        number = float(text)
        if number == float("inf"):
            raise OverflowError
        return number
    except ValueError:
        raise ProgramSyntaxError(
            "this is not a number", hint="write 12, 0x1F, 0.5 or 1e-6", span=place(token)
        ) from None
    except OverflowError:
        raise ProgramValueError(
            "this number is too large",
            hint="an int is below 2**63, a float below 1.8e308",
            span=place(token),
        ) from None
