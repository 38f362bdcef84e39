"""Masks of two programs joined by `and` or `or`, or one negated."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, replace
from typing import Any, Literal

from attncc.errors import ArgumentError
from attncc.frontend.mods import with_source
from attncc.frontend.scope import SIZE_NAMES, is_free
from attncc.ir import expr as ir
from attncc.ir import ops
from attncc.ir.expr import TRUE, Expr, ScalarParam
from attncc.ir.program import Param, Program
from attncc.ir.rewrite import mapped


def negated(program: Program) -> Program:
    """The program that keeps the other pairs; of masks alone."""
    _check_mask(program, "~")
    name = _name(f"not_{program.name}")
    return with_source(Program(name, program.params, ir.apply(ops.NOT, program.mask)))


def joined(
    op: Literal["and", "or"], first: Program, second: Program, same: Collection[str]
) -> tuple[Program, Mapping[str, str]]:
    """Both masks under `and` or `or`, and what the second's parameters are called in the result.

    same: names of parameters that have one value in both; those declared alike are shared, and
    any other name of the second that the first has is changed. `and` keeps the score, scale, sink
    and normalize of the side that has them.
    """
    if op == "or":
        _check_mask(first, "|")
        _check_mask(second, "|")
    elif not (_is_mask(first) or _is_mask(second)):
        raise ArgumentError(
            f"both {first.name} and {second.name} have more than a mask",
            hint="& joins masks, and keeps the score, scale, sink and normalize of one side",
        )
    shared = {p.name for p in second.params if p.name in same and p in first.params}
    names = _new_names(first, second, shared)
    params = {p: _renamed(p, names) for p in second.params}
    change = _changing(params)
    found = {f.name: getattr(second, f.name) for f in fields(second)}
    exprs: dict[str, Any] = {
        key: mapped(x, change) for key, x in found.items() if isinstance(x, Expr)
    }
    mask = ir.apply(ops.AND if op == "and" else ops.OR, first.mask, exprs["mask"])
    rest = replace(second, **exprs) if _is_mask(first) else first
    own = tuple(new for old, new in params.items() if old.name not in shared)
    program = replace(
        rest,
        name=_name(f"{first.name}_{op}_{second.name}"),
        params=(*first.params, *own),
        mask=mask,
        grid=(),  # coordinates are written out
        kv_grid=None,
        order=None,  # of one side's mask
        comment="",
    )
    return with_source(program), {p.name: params[p].name for p in second.params}


def _is_mask(program: Program) -> bool:
    rest = replace(program, params=(), mask=TRUE, grid=(), kv_grid=None, order=None)
    return rest == Program(program.name)


def _check_mask(program: Program, symbol: str) -> None:
    if not _is_mask(program):
        raise ArgumentError(
            f"{program.name} has more than a mask, which {symbol} would lose",
            hint=f"use {symbol} on masks alone, then & with the one that has the score",
        )


def _name(wanted: str) -> str:
    return wanted if is_free(wanted) else "masks"


def _free_dims(program: Program) -> set[str]:
    dims = {dim for tensor in program.tensors for dim in tensor.dims if isinstance(dim, str)}
    return dims - SIZE_NAMES


def _new_names(first: Program, second: Program, shared: Collection[str]) -> Mapping[str, str]:
    """Names of the second that mean something else in the first, and what they become."""
    taken = {p.name for p in first.params} | _free_dims(first)
    own = {p.name for p in second.params} | _free_dims(second)
    bound = {dim for t in second.tensors if t.name in shared for dim in t.dims}
    names: dict[str, str] = {}
    for name in sorted(own & taken):
        if name in shared or name in bound:
            continue
        at = 2
        while (found := f"{name[:60]}_{at}") in taken | own or found in names.values():
            at += 1
        names[name] = found
    return names


def _renamed(param: Param, names: Mapping[str, str]) -> Param:
    name = names.get(param.name, param.name)
    if isinstance(param, ScalarParam):
        return replace(param, name=name)
    dims = tuple(names.get(dim, dim) if isinstance(dim, str) else dim for dim in param.dims)
    return replace(param, name=name, dims=dims)


def _changing(params: Mapping[Param, Param]) -> Callable[[Expr], Expr]:
    def change(node: Expr) -> Expr:
        match node:
            case ir.Scalar(param) if param in params:
                new = params[param]
                assert isinstance(new, ScalarParam)
                return ir.Scalar(new)
            case ir.Load(tensor, at) if tensor in params:
                load = params[tensor]
                assert isinstance(load, ir.TensorParam)
                return ir.Load(load, at)
        return node

    return change
