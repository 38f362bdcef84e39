"""A Program over tokens that stand elsewhere: positions in terms of new ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from attncc.ir.expr import Expr, Load, ScalarParam, TensorParam, children, rebuild
from attncc.ir.program import Param, Program
from attncc.ir.rewrite import postorder

Values = Mapping[Expr, Expr]


def over(program: Program, values: Values, params: tuple[Param, ...], mask: Expr) -> Program:
    """The program with `values` in place of positions and sizes, and `mask` for its mask.

    params: those that the values read, and that `mask` does. Captured tensors are read at original
    positions; sizes among their dims, checked before, become names of their own.
    """
    gone = {v.param.name for v in values if hasattr(v, "param")}
    taken = names(program) | {param.name for param in params}
    tensors = {tensor: _freed(tensor, gone, taken) for tensor in program.tensors}

    def moved(expr: Expr | None) -> Expr | None:
        return None if expr is None else _moved(expr, values, tensors)

    own = tuple(tensors[p] if isinstance(p, TensorParam) else p for p in program.params)
    score, kept = moved(program.score), moved(mask)
    assert score is not None and kept is not None
    return replace(
        program,
        params=(*own, *params),
        mask=kept,
        score=score,
        scale=moved(program.scale),
        sink=moved(program.sink),
        output=moved(program.output),
        grid=(),
        kv_grid=None,
        order=None,
        comment="",
        source="",
        span=None,
    )


def _freed(tensor: TensorParam, gone: set[str], taken: set[str]) -> TensorParam:
    dims = []
    for dim in tensor.dims:
        name = dim
        if dim in gone:
            name = f"{dim}_before"
            while name in taken:
                name += "_"
        dims.append(name)
    return replace(tensor, dims=tuple(dims))


def _moved(expr: Expr, values: Values, tensors: Mapping[TensorParam, TensorParam]) -> Expr:
    done: dict[int, Expr] = {}
    for node in postorder(expr):
        found = rebuild(node, tuple(done[id(child)] for child in children(node)))
        if isinstance(found, Load):
            found = Load(tensors.get(found.tensor, found.tensor), found.at, found.span)
        done[id(node)] = values.get(node, found)
    return done[id(expr)]


def names(program: Program) -> set[str]:
    """Of parameters and of dims."""
    dims = {dim for tensor in program.tensors for dim in tensor.dims if isinstance(dim, str)}
    return dims | {param.name for param in program.params}


def fresh(program: Program, *wanted: str) -> list[str]:
    """Names like these that no parameter and no dim has."""
    taken = names(program)
    found = []
    for name in wanted:
        while name in taken:
            name += "_"
        taken.add(name)
        found.append(name)
    return found


def scalar(name: str) -> ScalarParam:
    from attncc.ir.ops import Kind

    return ScalarParam(name, Kind.INT)
