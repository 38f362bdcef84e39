"""Program files: every declaration of a text resolved, and paths told from texts."""

from __future__ import annotations

import graphlib
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path

from attncc.errors import ArgumentError, AttnccError, ProgramNameError, ProgramSyntaxError, suggest
from attncc.frontend import tree
from attncc.frontend.parser import MAX_TEXT, parse_tree
from attncc.frontend.programs import resolve_program
from attncc.frontend.resolver import Resolver
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
from attncc.ir.program import Program

SUFFIX = ".attn"


def parse(text: str, path: str = "") -> tuple[Program, ...]:
    """The programs of a text, in its order.

    path: named in error messages. Raises AttnccError, with line, column and a hint, for every
    mistake; a text without any program is one.
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    try:
        programs = _programs(parse_tree(text), text)
    except AttnccError as error:
        error.source, error.path = text, path
        raise
    except RecursionError:  # a caller's deep stack leaves less room than the limits reckon with
        message = "expressions nest too deeply for the stack that is left"
        raise ProgramSyntaxError(message, source=text, path=path) from None
    return tuple(replace(program, source=text) for program in programs)


def read(path: str | Path) -> tuple[Program, ...]:
    """The programs of a file; ArgumentError where it cannot be read."""
    try:
        if os.path.getsize(path) > 4 * MAX_TEXT:
            raise ArgumentError(
                f"{os.fspath(path)!r} is too large for a program",
                hint=f"the limit is {MAX_TEXT:,} characters",
            )
        text = Path(path).read_text("utf-8")
    except FileNotFoundError:
        raise ArgumentError(f"no file {os.fspath(path)!r}", hint=_nearby(Path(path))) from None
    except UnicodeDecodeError:
        raise ArgumentError(
            f"{os.fspath(path)!r} is not text", hint="a program file is UTF-8"
        ) from None
    except OSError as error:
        raise ArgumentError(f"cannot read {os.fspath(path)!r}: {error.strerror}") from None
    return parse(text, os.fspath(path))


def load(source: str | Path | Program, name: str | None = None) -> Program:
    """One program: of a path (a Path, or a str that ends in .attn), a text, or as it is.

    name: which of several. Raises ArgumentError where the choice is open or unknown.
    """
    if isinstance(source, Program):
        return source
    is_path = isinstance(source, Path) or ("\n" not in source and source.endswith(SUFFIX))
    programs = read(source) if is_path else parse(str(source))
    names = [program.name for program in programs]
    if name is None and len(programs) == 1:
        return programs[0]
    if name is None:
        raise ArgumentError(
            f"there are {len(names)} programs: {', '.join(names)}", hint="choose one: name=..."
        )
    if name not in names:
        hint = suggest(name, names) or f"there is {', '.join(names)}"
        raise ArgumentError(f"no program {name!r}", hint=hint)
    return programs[names.index(name)]


def _nearby(path: Path) -> str:
    if path.parent.is_dir():
        return suggest(path.name, sorted(entry.name for entry in path.parent.glob("*" + SUFFIX)))
    return f"there is no folder {os.fspath(path.parent)!r}"


def _programs(file: tree.File, text: str) -> tuple[Program, ...]:
    functions = _functions(file)
    resolver = Resolver()
    lines = text.split("\n")
    taken: dict[str, Span] = {}
    programs = []
    for node in file.declarations:
        if not isinstance(node, tree.Attention):
            continue
        check_free(node.name, taken)
        taken[node.name.name] = node.name.span
        programs.append(resolve_program(node, functions, resolver, lines))
    if not programs:
        raise ProgramSyntaxError(
            "the text declares no program",
            hint="write attention name(...): and below it, indented, mask = ...",
            span=Span(1, 1),
        )
    return tuple(programs)


def _functions(file: tree.File, library: str = "") -> Mapping[str, Function]:
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
        _check_definition(definition, functions)
    _check_recursion(own)
    return functions


def _imported(library: tree.Ident, name: tree.Ident) -> Function:
    if library.name != "std":
        raise ProgramNameError(
            f"unknown library {quoted(library.name)}",
            hint="the one library is std: from std import causal",
            span=library.span,
        )
    known = _standard()
    if name.name not in known:
        hint = suggest(name.name, known) or f"it has {', '.join(known)}"
        raise ProgramNameError(f"std has no {quoted(name.name)}", hint=hint, span=name.span)
    return known[name.name]


@cache
def _standard() -> Mapping[str, Function]:
    text = files("attncc.frontend").joinpath("std.attn").read_text("utf-8")
    return _functions(parse_tree(text), library="std")


def _check_definition(node: tree.Definition, functions: Mapping[str, Function]) -> None:
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
                    raise unknown_function(name, span, scope)


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
        how = "itself" if len(cycle) == 2 else " -> ".join(cycle[:8])
        raise ProgramSyntaxError(
            f"'{cycle[0]}' calls {how}: a def cannot recurse",
            hint="a def is written out where it is used; write the steps out, or use arithmetic",
            span=own[cycle[0]].name.span,
        ) from None
