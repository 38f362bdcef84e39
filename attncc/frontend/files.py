"""Program files: every declaration of a text resolved, and paths told from texts."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from attncc.errors import ArgumentError, AttnccError, ProgramSyntaxError, suggest
from attncc.frontend import tree
from attncc.frontend.functions import functions_of
from attncc.frontend.parser import MAX_TEXT, parse_tree
from attncc.frontend.programs import resolve_program
from attncc.frontend.resolver import Resolver
from attncc.frontend.scope import check_new
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
    functions = functions_of(file)
    resolver = Resolver()
    lines = text.split("\n")
    taken: dict[str, Span] = {}
    programs = []
    for node in file.declarations:
        if not isinstance(node, tree.Attention):
            continue
        check_new(node.name, taken)
        taken[node.name.name] = node.name.span
        programs.append(resolve_program(node, functions, resolver, lines))
    if not programs:
        raise ProgramSyntaxError(
            "the text declares no program",
            hint="write attention name(...): and below it, indented, mask = ...",
            span=Span(1, 1),
        )
    return tuple(programs)
