"""The defs and imports of a file, and the standard library."""

from __future__ import annotations

import graphlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from attncc.errors import ProgramNameError, ProgramSyntaxError, suggest
from attncc.frontend import tree
from attncc.frontend.parser import parse_tree
from attncc.frontend.scope import (
    BUILTIN_FUNCTIONS,
    BUILTIN_VALUES,
    Function,
    Scope,
    check_free,
    quoted,
    unknown_function,
    unknown_value,
)
from attncc.ir.expr import Span


def functions_of(file: tree.File, library: str = "") -> Mapping[str, Function]:
    """The defs and imports of a file; defs may stand in any order, but not call themselves."""
    functions: dict[str, Function] = {}
    taken: dict[str, Span] = {}
    own: dict[str, tree.Definition] = {}
    for node in file.declarations:
        match node:
            case tree.Import():
                for name in node.names:
                    check_free(name.alias, taken)
                    taken[name.alias.name] = name.alias.span
                    functions[name.alias.name] = _imported(node.library, name.name)
            case tree.Definition(name):
                check_free(name, taken)
                taken[name.name] = name.span
                own[name.name] = node
                functions[name.name] = Function(node, functions, library)
    for definition in own.values():
        _check_definition(definition, functions, library)
    _check_recursion(own)
    return functions


def _imported(library: tree.Ident, name: tree.Ident) -> Function:
    if library.name != "std":
        raise ProgramNameError(
            f"unknown library {quoted(library.name)}",
            hint="the one library is std: from std import causal",
            span=library.span,
        )
    known = standard()
    if name.name not in known:
        hint = suggest(name.name, known) or f"it has {', '.join(known)}"
        raise ProgramNameError(f"std has no {quoted(name.name)}", hint=hint, span=name.span)
    return known[name.name]


@cache
def standard() -> Mapping[str, Function]:
    text = Path(__file__).with_name("std.attn").read_text("utf-8")
    return functions_of(parse_tree(text), library="std")


def _check_definition(
    node: tree.Definition, functions: Mapping[str, Function], library: str
) -> None:
    """Names only: kinds are known where it is called."""
    taken: dict[str, Span] = {}
    for arg in node.args:
        check_free(arg, taken)
        taken[arg.name] = arg.span
    known = {**BUILTIN_VALUES, **dict.fromkeys(taken, BUILTIN_VALUES["score"])}
    scope = Scope(known, functions, inside=functions[node.name.name])
    for part in tree.walk(node.body):
        match part:
            case tree.Name(name, span) | tree.Subscript(tree.Ident(name, span)):
                if name not in known:
                    raise unknown_value(name, span, scope)
            case tree.Call(tree.Ident(name, span)):
                if name not in functions and name not in BUILTIN_FUNCTIONS:
                    raise unknown_function(name, span, scope, () if library else standard())


def _check_recursion(own: Mapping[str, tree.Definition]) -> None:
    calls = {
        name: [
            part.name.name
            for part in tree.walk(node.body)
            if isinstance(part, tree.Call) and part.name.name in own
        ]
        for name, node in own.items()
    }
    try:
        graphlib.TopologicalSorter(calls).prepare()
    except graphlib.CycleError as error:
        cycle = list(reversed(error.args[1]))
        how = "itself" if len(cycle) == 2 else f"itself: {' -> '.join(cycle[:8])}"
        raise ProgramSyntaxError(
            f"'{cycle[0]}' calls {how}: a def cannot recurse",
            hint="a def is written out where it is used; write the steps out, or use arithmetic",
            span=own[cycle[0]].name.span,
        ) from None
