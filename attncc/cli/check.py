"""`attncc check`: are these files programs?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attncc.errors import AttnccError

if TYPE_CHECKING:
    from attncc.ir.program import Program


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object a file.")
def check(files: tuple[Path, ...], as_json: bool) -> None:
    """Parse FILES, and print the programs in them or what is wrong; exit code 1 if any is."""
    results = [_check(path) for path in files]
    for path, result in zip(files, results, strict=True):
        if as_json:
            click.echo(json.dumps({"file": str(path), **_record(result)}))
        else:
            _tell(path, result)
    if any(isinstance(result, AttnccError) for result in results):
        sys.exit(1)


def _check(path: Path) -> tuple[Program, ...] | AttnccError:
    from attncc.frontend import read

    try:
        return read(path)
    except AttnccError as error:
        return error


def _tell(path: Path, result: tuple[Program, ...] | AttnccError) -> None:
    from attncc.ir.show import show_program

    if isinstance(result, AttnccError):
        click.echo(f"{click.style('error:', fg='red', bold=True)} {result}", err=True)
        return
    for program in result:
        click.echo(show_program(program))
    click.echo(f"{path}: {click.style('ok', fg='green')}, {_listed(result)}")


def _listed(programs: tuple[Program, ...]) -> str:
    names = ", ".join(program.name for program in programs)
    return f"{len(programs)} program{'s' * (len(programs) > 1)} ({names})"


def _record(result: tuple[Program, ...] | AttnccError) -> dict[str, Any]:
    from attncc.ir.show import show_param, show_program

    if isinstance(result, AttnccError):
        at = result.span
        where = {"line": at.line, "column": at.column, "length": at.length} if at else {}
        error = {"kind": type(result).__name__, "message": result.message, "hint": result.hint}
        return {"ok": False, "error": {**error, **where}}
    programs = [
        {
            "name": program.name,
            "parameters": [show_param(param) for param in program.params],
            "text": show_program(program),
        }
        for program in result
    ]
    return {"ok": True, "programs": programs}
