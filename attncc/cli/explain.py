"""`attncc explain`: what the compiler found out about a program, and its tiles at some lengths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attncc.cli.request import Request, options, request, tile

if TYPE_CHECKING:
    from attncc.tiles import BoundPlan

MOST_PAIRS = 1 << 26
"""Evaluated one by one to see what the classification lost; a second or two on two cores."""


@click.command()
@options(q_len=4096)
@click.option("--tile", "shape", default="128x128", show_default=True, help="Queries x keys.")
@click.option("--json", "as_json", is_flag=True, help="The same as one JSON object.")
@click.option("--svg", type=click.Path(path_type=Path), help="Draw the tiles to a file.")
@click.option("--png", type=click.Path(path_type=Path), help="The same; needs matplotlib.")
def explain(shape: str, as_json: bool, svg: Path | None, png: Path | None, **asked: Any) -> None:
    """Say which tiles of FILE's program are computed, how that is known, and draw them."""
    from attncc.cli.request import bound_plan

    call = request(**asked)
    bound = bound_plan(call, tile(shape))
    if as_json:
        click.echo(json.dumps(_data(call, bound), indent=2))
    else:
        _tell(call, bound)
    if svg is not None or png is not None:
        _draw(call, bound, svg, png)


def _tell(call: Request, bound: BoundPlan) -> None:
    from attncc import report
    from attncc.ir.show import show_program
    from attncc.order import Orders

    click.echo(show_program(call.program))
    click.echo("\n".join(report.lines(bound.plan)))
    click.echo(report.backend(bound))
    needs = report.captured(bound.plan)
    if needs:
        click.echo("captured tensors")
    for tensor, (declared, reads) in zip(call.program.tensors, needs.items(), strict=True):
        click.echo(f"  {declared}: {reads}; here {call.captured.origins[tensor.name]}")
    click.echo("")
    click.echo("\n".join(report.tiles(bound)))
    click.echo(_lost(bound))
    if found := Orders(bound.plan).described(bound.binding):
        click.echo("\n".join(("order of tokens on a GPU", *(f"  {line}" for line in found))))


def _lost(bound: BoundPlan) -> str:
    """How far the classification is from the exact one, where that is cheap to know."""
    binding = bound.binding
    if binding.q_len * binding.kv_len * binding.batch * binding.heads > MOST_PAIRS:
        return "not compared with the exact classification, which evaluates every pair"
    exact, counts = bound.exact_counts(), bound.counts
    full, empty = exact.full - counts.full, exact.empty - counts.empty
    if not full and not empty:
        return "as tight as evaluating every pair"
    return f"of the partial tiles, {empty} are empty and {full} full in fact: intervals lose them"


def _data(call: Request, bound: BoundPlan) -> dict[str, Any]:
    from attncc import report
    from attncc.ir.show import show_program
    from attncc.order import Orders

    counts = bound.counts
    return {
        "program": call.program.name,
        "text": show_program(call.program),
        "lengths": call.lengths.sizes(),
        "scalars": {p.name: bound.binding.scalars[p.name] for p in call.program.scalars},
        "tile": list(bound.tile),
        "counts": {"full": counts.full, "partial": counts.partial, "empty": counts.empty},
        "density": [bound.density.low, bound.density.high],
        "inputs": dict(call.captured.origins),
        "plan": report.data(bound.plan),
        "backend": report.backend(bound),
        "token_order": Orders(bound.plan).described(bound.binding),
        "tiles": report.grid(bound),
    }


def _draw(call: Request, bound: BoundPlan, svg: Path | None, png: Path | None) -> None:
    from attncc import picture, report

    title = f"{call.program.name}, {call.lengths.q_len} x {call.lengths.kv_len}"
    tiles = report.grid(bound)
    if svg is not None:
        svg.write_text(picture.svg(tiles, title))
    if png is not None:
        picture.save_png(tiles, title, png)
