"""`attncc explain`: what the compiler found out about a program, and its tiles at some lengths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attncc.cli.request import Request, options, request, tile

if TYPE_CHECKING:
    from attncc.tiles import BoundPlan


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

    click.echo(show_program(call.program))
    click.echo("\n".join(report.lines(bound.plan)))
    needs = report.captured(bound.plan)
    if needs:
        click.echo("captured tensors")
    for tensor, (declared, reads) in zip(call.program.tensors, needs.items(), strict=True):
        click.echo(f"  {declared}: {reads}; here {call.captured.origins[tensor.name]}")
    click.echo("")
    draw_terminal(call, bound)


def draw_terminal(call: Request, bound: BoundPlan) -> None:
    """The counts, and the tiles of the first sequence and head as text."""
    from attncc import picture

    n, counts = call.lengths, bound.counts
    click.echo(
        f"{n.q_len} queries x {n.kv_len} keys, {n.batch} x {n.heads} heads, "
        f"tiles of {bound.tile[0]} x {bound.tile[1]}"
    )
    total = counts.full + counts.partial + counts.empty
    visited = counts.full + counts.partial
    click.echo(
        f"tiles: {counts.full} full, {counts.partial} partial, {counts.empty} empty; "
        f"{visited / total:.1%} visited"
        if total
        else "no tiles"
    )
    click.echo(picture.text(grid(bound)))
    click.echo(picture.legend())


def grid(bound: BoundPlan) -> list[list[int]]:
    """The tiles of the first sequence and head."""
    found: list[list[int]] = bound.classes()[0, 0].tolist()
    return found


def _data(call: Request, bound: BoundPlan) -> dict[str, Any]:
    from attncc import report
    from attncc.ir.show import show_program

    counts = bound.counts
    return {
        "program": call.program.name,
        "text": show_program(call.program),
        "lengths": call.lengths.sizes(),
        "scalars": {p.name: bound.binding.scalars[p.name] for p in call.program.scalars},
        "tile": list(bound.tile),
        "counts": {"full": counts.full, "partial": counts.partial, "empty": counts.empty},
        "density": bound.density,
        "inputs": dict(call.captured.origins),
        "plan": report.data(bound.plan),
        "tiles": grid(bound),
    }


def _draw(call: Request, bound: BoundPlan, svg: Path | None, png: Path | None) -> None:
    from attncc import picture

    title = f"{call.program.name}, {call.lengths.q_len} x {call.lengths.kv_len}"
    tiles = grid(bound)
    if svg is not None:
        svg.write_text(picture.svg(tiles, title))
    if png is not None:
        picture.save_png(tiles, title, png)
