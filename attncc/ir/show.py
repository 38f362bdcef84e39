"""Expressions and Programs back to text, with no parenthesis that Python lets go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_never

from attncc.ir import ops
from attncc.ir.expr import (
    KV_IDX,
    Q_IDX,
    TRUE,
    Apply,
    Const,
    Expr,
    Index,
    Load,
    Scalar,
    ScalarParam,
    Score,
    TensorParam,
)
from attncc.ir.grid import coordinate
from attncc.ir.ops import Form
from attncc.ir.program import Normalize, Param, Program, TokenOrder

WIDTH = 100

Names = Mapping[Expr, str]


def show(expr: Expr, names: Names | None = None) -> str:
    """The expression as text that parses to an equal one; `names` stand for subexpressions."""
    return _show(expr, names or {})[0]


def show_program(program: Program) -> str:
    """The whole declaration, its comment above it, ending in a line end."""
    names = _coordinates(program)
    lines = [f"# {line}".rstrip() for line in program.comment.split("\n") if program.comment]
    lines += _header(program)
    grids = {"axes": program.grid}
    if program.kv_grid is not None:
        grids = {"q_axes": program.grid, "kv_axes": program.kv_grid}
    for word, grid in grids.items():
        if grid:
            axes = ", ".join(f"{axis.name}: {show(axis.size)}" for axis in grid)
            lines.append(f"    {word} ({axes})")
    lines += [f"    {name} = {text}" for name, text in _clauses(program, names)]
    return "\n".join(lines) + "\n"


def show_param(param: Param) -> str:
    """`window: int = 1024` or `doc: int[batch, kv_len] sorted`."""
    match param:
        case ScalarParam(name, kind, default):
            given = "" if default is None else f" = {_literal(default)}"
            return f"{name}: {kind.value}{given}"
        case TensorParam(name, kind, dims):
            flags = " sorted" * param.sorted + " grad" * param.grad
            return f"{name}: {kind.value}[{', '.join(map(str, dims))}]{flags}"
        case _:
            assert_never(param)


def _header(program: Program) -> list[str]:
    params = [show_param(param) for param in program.params]
    line = f"attention {program.name}({', '.join(params)}):"
    if len(line) <= WIDTH:
        return [line]
    return [f"attention {program.name}(", *(f"        {param}," for param in params), "):"]


def _clauses(program: Program, names: Names) -> list[tuple[str, str]]:
    plain = program.score == Score()
    found: list[tuple[str, str]] = []
    if program.mask != TRUE or plain:
        found.append(("mask", show(program.mask, names)))
    if not plain:
        found.append(("score", show(program.score, names)))
    if program.scale is not None:
        found.append(("scale", show(program.scale)))
    if program.sink is not None:
        found.append(("sink", show(program.sink)))
    if program.normalize is not Normalize.SOFTMAX:
        found.append(("normalize", program.normalize.value))
    if program.output is not None:
        found.append(("output", show(program.output, names)))
    if program.order is not None:
        found.append(("order", _order(program.order)))
    return found


def _order(order: TokenOrder) -> str:
    args = [show(order.step)] if order.step is not None else list(map(str, order.tile))
    args += [order.by] * bool(order.by)
    return f"{order.name}({', '.join(args)})" if args else order.name


def _coordinates(program: Program) -> dict[Expr, str]:
    """q.x for what `axes` made of it; a single axis is the position itself."""
    kv_grid = program.grid if program.kv_grid is None else program.kv_grid
    return {
        coordinate(grid, axis.name, index): f"{base}.{axis.name}"
        for base, index, grid in (("q", Q_IDX, program.grid), ("kv", KV_IDX, kv_grid))
        if len(grid) > 1
        for axis in grid
    }


def _show(expr: Expr, names: Names) -> tuple[str, int]:
    """The text and how tightly it binds."""
    if names and expr in names:
        return names[expr], ops.P_ATOM
    match expr:
        case Const(value):
            text = _literal(value)
            return text, ops.P_UNARY if text.startswith("-") else ops.P_ATOM
        case Index(name):
            return name, ops.P_ATOM
        case Scalar(param):
            return param.name, ops.P_ATOM
        case Score():
            return "score", ops.P_ATOM
        case Load(tensor, at):
            return f"{tensor.name}[{_listed(at, names)}]", ops.P_ATOM
        case Apply():
            return _apply(expr, names), expr.op.precedence
        case _:
            assert_never(expr)


def _apply(expr: Apply, names: Names) -> str:
    op, args = expr.op, expr.args
    match op.form:
        case Form.CALL:
            return f"{op.symbol}({_listed(_flat(expr, names), names)})"
        case Form.PREFIX:
            inner = _prefixed(expr, names)
            return f"not {inner}" if op is ops.NOT else f"{op.symbol}{inner}"
        case Form.INFIX:
            # a < b < c chains, so a comparison is no operand of another without parentheses
            loosest = op.precedence + (op.precedence == ops.P_COMPARE)
            left = _within(args[0], loosest, names)
            right = _within(args[1], op.precedence + 1, names)
            return f"{left} {op.symbol} {right}"
        case _:
            assert_never(op.form)


def _prefixed(expr: Apply, names: Names) -> str:
    """The operand of a prefix; -(1) is not the literal -1, and --x is hard on the eyes."""
    (arg,) = expr.args
    text = _within(arg, expr.op.precedence, names)
    literal = isinstance(arg, Const) and not isinstance(arg.value, bool)
    signed = expr.op is not ops.NOT and text.startswith(("-", "~"))
    return f"({text})" if literal or signed else text


def _flat(expr: Apply, names: Names) -> tuple[Expr, ...]:
    """min(min(a, b), c) is written min(a, b, c)."""
    if expr.op not in (ops.MIN, ops.MAX):
        return expr.args
    parts = list(expr.args[:0:-1])
    first = expr.args[0]
    while isinstance(first, Apply) and first.op is expr.op and first not in names:
        parts += first.args[:0:-1]
        first = first.args[0]
    return (first, *reversed(parts))


def _listed(parts: tuple[Expr, ...], names: Names) -> str:
    return ", ".join(_show(part, names)[0] for part in parts)


def _within(expr: Expr, loosest: int, names: Names) -> str:
    text, precedence = _show(expr, names)
    return text if precedence >= loosest else f"({text})"


def _literal(value: bool | int | float) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
