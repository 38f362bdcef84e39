"""The command line: `attncc check | explain | emit | run | tune | bench | doctor`.

Commands import torch, Triton and the compiler where they use them, so that `--help` is quick.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from attncc.cli.bench import bench
from attncc.cli.check import check
from attncc.cli.doctor import doctor
from attncc.cli.emit import emit
from attncc.cli.explain import explain
from attncc.cli.run import run
from attncc.cli.tune import tune
from attncc.errors import AttnccError


class _Group(click.Group):
    """Commands in the order of a day's work; the user's mistakes end in a message and code 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

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


for command in (check, explain, emit, run, tune, bench, doctor):
    main.add_command(command)
