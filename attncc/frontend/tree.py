"""The syntax tree: what was written, with its place, before names mean anything."""

from __future__ import annotations

from dataclasses import dataclass

from attncc.ir.expr import Span


@dataclass(frozen=True, slots=True)
class Ident:
    """A name where it is declared."""

    name: str
    span: Span


@dataclass(frozen=True, slots=True)
class Literal:
    """A number or bool. `bare`: written without sign or parentheses, so that '-' may join it."""

    value: bool | int | float
    span: Span
    bare: bool = True
    depth: int = 1


@dataclass(frozen=True, slots=True)
class Name:
    name: str
    span: Span
    depth: int = 1


@dataclass(frozen=True, slots=True)
class Attribute:
    """`q.t`: the coordinate of a token along an axis."""

    base: str
    name: str
    span: Span
    depth: int = 1


@dataclass(frozen=True, slots=True)
class Call:
    name: Ident
    args: tuple[Expr, ...]
    span: Span
    depth: int


@dataclass(frozen=True, slots=True)
class Subscript:
    tensor: Ident
    at: tuple[Expr, ...]
    span: Span
    depth: int


@dataclass(frozen=True, slots=True)
class Unary:
    op: str
    arg: Expr
    span: Span
    depth: int


@dataclass(frozen=True, slots=True)
class Binary:
    op: str
    left: Expr
    right: Expr
    span: Span
    depth: int


@dataclass(frozen=True, slots=True)
class Compare:
    """`a < b <= c`: one operand more than there are operators."""

    ops: tuple[str, ...]
    operands: tuple[Expr, ...]
    span: Span
    depth: int


Expr = Literal | Name | Attribute | Call | Subscript | Unary | Binary | Compare


@dataclass(frozen=True, slots=True)
class Param:
    name: Ident
    kind: Ident
    dims: tuple[Expr, ...]
    flags: tuple[Ident, ...]
    default: Expr | None


@dataclass(frozen=True, slots=True)
class Let:
    name: Ident
    value: Expr


@dataclass(frozen=True, slots=True)
class Clause:
    """`mask = ...`, `score = ...` and the like."""

    name: Ident
    value: Expr


@dataclass(frozen=True, slots=True)
class GridAxis:
    name: Ident
    size: Expr


@dataclass(frozen=True, slots=True)
class Axes:
    axes: tuple[GridAxis, ...]
    span: Span
    word: str = "axes"


Statement = Let | Clause | Axes


@dataclass(frozen=True, slots=True)
class Attention:
    name: Ident
    params: tuple[Param, ...]
    body: tuple[Statement, ...]


@dataclass(frozen=True, slots=True)
class Definition:
    name: Ident
    args: tuple[Ident, ...]
    body: Expr


@dataclass(frozen=True, slots=True)
class Imported:
    name: Ident
    alias: Ident


@dataclass(frozen=True, slots=True)
class Import:
    library: Ident
    names: tuple[Imported, ...]


Declaration = Attention | Definition | Import


@dataclass(frozen=True, slots=True)
class File:
    declarations: tuple[Declaration, ...]


def children(node: Expr) -> tuple[Expr, ...]:
    """The expressions directly inside this one."""
    match node:
        case Call(_, parts) | Subscript(_, parts) | Compare(_, parts):
            return parts
        case Unary(_, arg):
            return (arg,)
        case Binary(_, left, right):
            return (left, right)
        case _:
            return ()


def walk(node: Expr) -> list[Expr]:
    """Every node, parents first, in the order of the text."""
    found: list[Expr] = []
    stack = [node]
    while stack:
        found.append(stack.pop())
        stack.extend(reversed(children(found[-1])))
    return found
