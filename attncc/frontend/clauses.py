"""What each clause may be: its kind, and what it may depend on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from attncc.errors import KindError, ProgramNameError, ProgramValueError, suggest
from attncc.frontend import tree
from attncc.ir import expr as ir
from attncc.ir import ops
from attncc.ir.expr import Axis, Span
from attncc.ir.ops import Kind
from attncc.ir.program import Normalize, TokenOrder


def normalize_of(node: tree.Expr) -> Normalize:
    known = {choice.value: choice for choice in Normalize}
    name = node.name if isinstance(node, tree.Name) else ""
    if name in known:
        return known[name]
    raise ProgramNameError(
        "normalize is softmax, sigmoid or none",
        hint=suggest(name, known) or "write normalize = softmax, the default",
        span=node.span,
    )


ORDERS = "natural, residues, residues(step), tiles(8, 16) or by(doc)"


def order_of(
    node: tree.Expr,
    step: Callable[[tree.Expr], ir.Expr],
    axes: Sequence[str],
    tensors: Mapping[str, ir.TensorParam],
) -> TokenOrder:
    """step: makes an expression of what `residues` is of. axes: names of the program's."""
    match node:
        case tree.Name("natural" | "residues" as name):
            return TokenOrder(name, span=node.span)
        case tree.Call(tree.Ident("residues"), (arg,)):
            return TokenOrder("residues", step=_step(step(arg), arg.span), span=node.span)
        case tree.Call(tree.Ident("tiles"), args):
            return TokenOrder("tiles", tile=_tile(args, axes, node.span), span=node.span)
        case tree.Call(tree.Ident("by"), (tree.Name(name),)):
            _check_by(name, tensors, node.span)
            return TokenOrder("by", by=name, span=node.span)
    raise ProgramNameError(f"order is {ORDERS}", hint="write one of them", span=node.span)


def _step(value: ir.Expr, span: Span) -> ir.Expr:
    if ir.kind(value) is Kind.INT and not ir.axes(value) and first(value, ir.Load) is None:
        return value
    raise KindError(
        "the step of residues is not one int for all pairs",
        hint="write a number, or an int parameter",
        span=span,
    )


def _tile(args: tuple[tree.Expr, ...], axes: Sequence[str], span: Span) -> tuple[int, ...]:
    found = [arg.value for arg in args if isinstance(arg, tree.Literal)]
    ints = [n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0]
    if axes and len(ints) == len(args) == len(axes):
        return tuple(ints)
    named = f"axes ({', '.join(axes)})" if axes else "no axes"
    raise ProgramValueError(
        f"tiles takes an int above 0 for each axis, and the program has {named}",
        hint="write one number for each, slowest first; without axes, use by or leave order out",
        span=span,
    )


def _check_by(name: str, tensors: Mapping[str, ir.TensorParam], span: Span) -> None:
    tensor = tensors.get(name)
    if tensor is None or not tensor.orders_tokens:
        fit = [name for name, tensor in tensors.items() if tensor.orders_tokens]
        raise ProgramNameError(
            f"by({name}) needs an int tensor of [tokens] or [batch, tokens]",
            hint=suggest(name, fit) or "declare one, as doc: int[batch, kv_len]",
            span=span,
        )


def _mask(value: ir.Expr, span: Span) -> ir.Expr:
    if ir.kind(value) is not Kind.BOOL:
        raise KindError(
            f"mask is {a_kind(ir.kind(value))}; it must be a bool",
            hint="write a condition such as q_idx >= kv_idx, or x != 0",
            span=span,
        )
    if first(value, ir.Score) is not None:
        raise KindError(
            "mask reads score, which only the score clause can do",
            hint="mask by position; to drop pairs by score, use score = where(..., score, -1e30)",
            span=_place(value, ir.Score, span),
        )
    return value


def _score(value: ir.Expr, span: Span) -> ir.Expr:
    return _number("score", value, span)


def _scale(value: ir.Expr, span: Span) -> ir.Expr:
    if ir.axes(value) or first(value, ir.Load) is not None:
        raise KindError(
            "scale depends on positions, tensors or score; it is one number for all pairs",
            hint="put what varies into the score: score = score * ...",
            span=_varying(value, Axis.NONE, span),
        )
    return _number("scale", value, span)


def _sink(value: ir.Expr, span: Span) -> ir.Expr:
    if ir.axes(value) & (Axis.Q | Axis.KV):
        raise KindError(
            "sink depends on q_idx, kv_idx or score; it is one logit a head",
            hint="write e.g. sink = logit[h] with logit: float[heads]",
            span=_varying(value, Axis.B | Axis.H, span),
        )
    return _number("sink", value, span)


def _output(value: ir.Expr, span: Span) -> ir.Expr:
    if ir.axes(value) & Axis.KV:
        raise KindError(
            "output depends on kv_idx or score; it is made of a query's own result",
            hint="write e.g. output = gate[b, h, q_idx] * out",
            span=_varying(value, Axis.B | Axis.H | Axis.Q, span),
        )
    return _number("output", value, span)


CHECKS = {"mask": _mask, "score": _score, "scale": _scale, "sink": _sink, "output": _output}


def _number(clause: str, value: ir.Expr, span: Span) -> ir.Expr:
    """The value as a float; an int is promoted, as everywhere."""
    match ir.kind(value):
        case Kind.FLOAT:
            return value
        case Kind.INT:
            return ir.Apply(ops.FLOAT, (value,), span)
        case Kind.BOOL:
            hint = "write where(condition, a, b)"
            if clause == "score":
                hint = "a condition on pairs is a mask: write mask = ..."
            raise KindError(f"{clause} is a bool; it must be a number", hint=hint, span=span)


def first(value: ir.Expr, node: type[ir.Score] | type[ir.Load]) -> ir.Expr | None:
    return next((part for part in ir.walk(value) if isinstance(part, node)), None)


def _place(value: ir.Expr, node: type[ir.Score] | type[ir.Load], span: Span) -> Span:
    """The first such node, if it stands within the clause itself and not in a let above."""
    found = first(value, node)
    return _within(found, span)


def _varying(value: ir.Expr, allowed: Axis, span: Span) -> Span:
    leaves = (
        part
        for part in ir.walk(value)
        if (isinstance(part, ir.Index | ir.Score) and ir.axes(part) & ~allowed)
        or (isinstance(part, ir.Load) and not allowed)
    )
    return _within(next(leaves, None), span)


def _within(found: ir.Expr | None, span: Span) -> Span:
    place = found.span if found is not None else None
    inside = (
        place is not None
        and place.line == span.line
        and span.column <= place.column < span.column + span.length
    )
    return place if place is not None and inside else span


def a_kind(kind: Kind) -> str:
    return "an int" if kind is Kind.INT else f"a {kind.value}"
