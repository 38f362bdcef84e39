"""What to say of a value of the wrong kind."""

from __future__ import annotations

from collections.abc import Callable

from attncc.errors import KindError
from attncc.frontend import tree
from attncc.ir import expr as ir
from attncc.ir import ops
from attncc.ir.expr import Span
from attncc.ir.ops import Form, Kind, Op


def indexed(tensor: ir.TensorParam) -> str:
    """How the tensor is usually read, for hints."""
    names = (_INDEX_NAMES.get(str(dim), "...") for dim in tensor.dims)
    return f"{tensor.name}[{', '.join(names)}]"


_INDEX_NAMES = {
    "batch": "b",
    "heads": "h",
    "kv_heads": "kv_head",
    "q_len": "q_idx",
    "kv_len": "kv_idx",
}


def check_index(index: ir.Expr, tensor: ir.TensorParam, span: Span) -> None:
    kind = ir.kind(index)
    if kind is Kind.INT:
        return
    what = "score" if isinstance(index, ir.Score) else f"a {kind.value}"
    raise KindError(
        f"{what} cannot index '{tensor.name}'; an index is an int",
        hint="write floor(x) or int(x)" if kind is Kind.FLOAT else "write int(x)",
        span=span,
    )


def wrong_kind(
    symbol: str,
    expects: str,
    args: tuple[ir.Expr, ...],
    parts: tuple[tree.Expr, ...],
    place: Callable[[Span], Span],
    op: Op | None = None,
) -> KindError:
    """An operator that refuses its arguments, the first one at fault underlined."""
    kinds = tuple(map(ir.kind, args))
    at = _at_fault(op, kinds)
    got = " and ".join(kind.value for kind in kinds)
    name = f"{symbol}()" if op is not None and op.form is Form.CALL else f"'{symbol}'"
    return KindError(
        f"{name} takes {expects}, not {got}",
        hint=_kind_hint(op, kinds, kinds[at]),
        span=place(parts[at].span),
    )


def _at_fault(op: Op | None, kinds: tuple[Kind, ...]) -> int:
    """The first argument that no neighbour could make right."""
    if op is None:
        return 0
    if op is ops.WHERE:
        return 0 if kinds[0] is not Kind.BOOL else 2
    for at, kind in enumerate(kinds):
        if op.kind((kind,) * op.arity) is None:
            return at
    return len(kinds) - 1


def _kind_hint(op: Op | None, kinds: tuple[Kind, ...], fault: Kind) -> str:
    if op is ops.INVERT and fault is Kind.BOOL:
        return "write 'not' for bools"
    if op in (ops.AND, ops.OR, ops.NOT) or (op is ops.WHERE and kinds[0] is not Kind.BOOL):
        return "write x != 0 to make a condition of a number"
    if op in (ops.BITAND, ops.BITOR, ops.BITXOR) and Kind.BOOL in kinds:
        return "both sides are bools or both are ints; write x != 0, or int(x)"
    if fault is Kind.FLOAT:
        return "write floor(x) or int(x) to make an int of a float"
    if op is ops.EQ or op is ops.NE or op is ops.WHERE:
        return "write int(x) to make a number of a bool, or x != 0 to make a bool of a number"
    return "write int(x) to make a number of a bool, or where(x, a, b) to choose by it"


def count(n: int, one: str, many: str = "") -> str:
    return f"{n} {one}" if n == 1 else f"{n} {many or one + 's'}"


def are(n: int) -> str:
    return "is" if n == 1 else "are"
