"""`attncc run`: a program on this machine, checked and timed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from attncc.cli.request import DTYPES, Request, bound_plan, options, placed, request

if TYPE_CHECKING:
    from torch import Tensor

    from attncc.peers import Inputs, Problem

TRIES = 2.0
"""An error of up to this many times torch's own, in the same dtype, is rounding."""


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
    _time(problem, (q, k, v), peers)


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


def _time(problem: Problem, qkv: Inputs, peers: bool) -> None:
    from attncc.cli.bench import contestants, measure
    from attncc.peers import device_name

    click.echo(f"\nforward on {device_name(problem.device)}, {qkv[0].dtype}, median")
    own = 0.0
    for name, make in contestants() if peers else contestants()[:1]:
        found = measure(make, problem, qkv, backward=False)
        if "why" in found:
            click.echo(f"  {name:<14}not timed: {found['why']}")
            continue
        own = own or found["forward_ms"]
        times = f"   {found['forward_ms'] / own:.2f}x attncc's" if name != "attncc" else ""
        click.echo(f"  {name:<14}{found['forward_ms']:9.2f} ms{times}")
