"""The command line: `attncc check | explain | emit | run | tune | bench | doctor`.

A command is imported when it is asked for, and imports torch and Triton where it uses them.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import click

from attncc.errors import AttnccError

COMMANDS = ("check", "explain", "emit", "run", "tune", "bench", "doctor")
"""In the order of a day's work; each is a function in a file of its name."""


class _Group(click.Group):
    """Commands imported on demand; the user's mistakes end in a message and code 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"attncc.cli.{name}"), name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AttnccError as error:
            click.echo(f"{click.style('error:', fg='red', bold=True)} {error}", err=True)
            sys.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="attncc")
def main() -> None:
    """Compile a few lines of attention to a checked, readable kernel."""
