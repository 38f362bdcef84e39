"""`attncc run`: a program on this machine, checked and timed."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from attncc.cli.request import DTYPES, Request, bound_plan, options, placed, request

if TYPE_CHECKING:
    from torch import Tensor

    from attncc.bench.problem import Problem

TRIES = 2.0
"""An error of up to this many times torch's own, in the same dtype, is rounding."""

ROUNDS, REP = 3, 40
"""Turns of each, and milliseconds a turn."""


@click.command()
@options(q_len=4096, heads=4)
@click.option("--dtype", type=click.Choice(DTYPES), help="[default: by device]")
@click.option("--device", help="cuda or cpu.  [default: the best there is]")
@click.option("--peers/--no-peers", default=True, help="Time torch's SDPA and FlexAttention too.")
def run(dtype: str | None, device: str | None, peers: bool, **asked: Any) -> None:
    """Run FILE's program: its tiles, its error against the dense interpreter, and its time."""
    import torch

    import attncc
    from attncc import report

    call = request(**asked)
    problem, (q, k, v) = placed(call, dtype, device, asked["seed"])
    _tell_documents(call)
    click.echo("\n".join(report.tiles(bound_plan(call, (128, 128)))))
    attn = attncc.compile(call.program)
    with torch.no_grad():
        _check(attn, q, k, v, problem.arguments)
    _time(problem, peers)


def _tell_documents(call: Request) -> None:
    for number, row in enumerate(call.captured.rows[:1]):
        names = ", ".join(f"{d.name} ({d.length})" for d in row[:8])
        more = f" and {len(row) - 8} more" if len(row) > 8 else ""
        click.echo(f"documents of row {number}, in words: {names}{more}")


def _check(attn: Any, q: Tensor, k: Tensor, v: Tensor, arguments: Mapping[str, Any]) -> None:
    """Exit code 1 where the result is further from float64 than rounding explains."""
    import torch

    exact = attn.reference(q, k, v, dtype=torch.float64, **arguments)
    plain = attn.reference(q, k, v, **arguments)
    out = attn(q, k, v, **arguments)
    ours = float((out.double() - exact).abs().max()) if out.numel() else 0.0
    theirs = float((plain.double() - exact).abs().max()) if out.numel() else 0.0
    allowed = TRIES * theirs + torch.finfo(q.dtype).eps
    good = ours <= allowed
    word = click.style("ok", fg="green") if good else click.style("WRONG", fg="red", bold=True)
    click.echo(
        f"\nlargest error against float64: {ours:.2e} (dense in {q.dtype}: {theirs:.2e})  {word}"
    )
    if not good:
        raise click.exceptions.Exit(1)


def _time(problem: Problem, peers: bool) -> None:
    import torch

    from attncc.bench import contest, table
    from attncc.bench.contestants import makers
    from attncc.bench.machine import describe

    names = ("attncc", "sdpa", "flex") if peers else ("attncc",)
    with torch.no_grad():
        found = contest.contest(problem, {name: makers()[name] for name in names})
        times = contest.timed(found, ROUNDS, REP)
    click.echo(f"\nforward on {describe(problem.device)['device']}, {problem.dtype}, median")
    reasons = {**found.left_out, **found.failed, **found.wrong}
    own = 0.0
    for name in names:
        title = f"  {table.TITLES[name]:<14}"
        if name not in times:
            click.echo(f"{title}not timed: {reasons[name]}")
            continue
        ms = median(times[name]["forward"])
        own = own or ms
        times_own = f"   {ms / own:.2f}x attncc's" if name != "attncc" else ""
        click.echo(f"{title}{ms:9.2f} ms{times_own}")
