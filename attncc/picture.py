"""Pictures of a tile grid: in a terminal, as SVG, and as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from fractions import Fraction
from html import escape
from itertools import pairwise
from pathlib import Path

from attncc.errors import UnsupportedError


class Tile(IntEnum):
    """What a tile of pairs is."""

    EMPTY = 0
    PARTIAL = 1
    FULL = 2


Grid = Sequence[Sequence[int]]
"""Tile values: a row a query tile, a column a key tile."""

SIGNS = {Tile.EMPTY: "·", Tile.PARTIAL: "▒", Tile.FULL: "█"}
COLOURS = {Tile.EMPTY: "#f4f4f2", Tile.PARTIAL: "#8fbcd4", Tile.FULL: "#1f5a85"}
CELL = 10
"""Pixels a tile takes in an SVG."""


def text(grid: Grid, width: int = 64, height: int = 32) -> str:
    """The grid in block characters, two a tile so that tiles look square, one line a row of tiles.

    A larger grid is scaled down; a cell then stands for several tiles: full if all of them are,
    empty if all are, partial otherwise.
    """
    small = shrink(grid, height, width // 2)
    return "\n".join("".join(2 * SIGNS[Tile(tile)] for tile in row) for row in small)


def legend() -> str:
    """What the signs of `text` mean."""
    return "  ".join(f"{sign} {tile.name.lower()}" for tile, sign in reversed(SIGNS.items()))


def shrink(grid: Grid, rows: int, columns: int) -> Grid:
    """At most rows x columns cells, each the one value of the tiles it covers, or PARTIAL."""
    bands = _bands(len(grid), rows)
    strips = _bands(len(grid[0]) if grid else 0, columns)
    return [[_merge(grid, band, strip) for strip in strips] for band in bands]


def svg(grid: Grid, title: str) -> str:
    """The whole grid as an SVG document; runs of equal tiles are one rectangle."""
    width, height = CELL * (len(grid[0]) if grid else 0), CELL * len(grid)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" shape-rendering="crispEdges">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="{COLOURS[Tile.EMPTY]}"/>',
    ]
    parts += [_run(y, x, n, tile) for y, row in enumerate(grid) for x, n, tile in _runs(row)]
    return "\n".join([*parts, "</svg>", ""])


def save_png(grid: Grid, title: str, path: Path) -> None:
    """The grid as a PNG with axes and a legend; needs matplotlib."""
    try:
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise UnsupportedError(
            "a PNG needs matplotlib", hint="pip install 'attncc[plot]', or draw an SVG"
        ) from None

    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(grid, cmap=ListedColormap(list(COLOURS.values())), vmin=0, vmax=2, aspect="auto")
    axes.set(title=title, xlabel="key tile", ylabel="query tile")
    handles = [
        Patch(facecolor=colour, edgecolor="#999999", label=tile.name.lower())
        for tile, colour in COLOURS.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, format="png", dpi=120)


def _bands(size: int, limit: int) -> list[range]:
    """`size` positions in at most `limit` nearly equal ranges."""
    count = min(size, limit)
    edges = [int(Fraction(size * i, count)) for i in range(count + 1)] if count else []
    return [range(lo, hi) for lo, hi in pairwise(edges)]


def _merge(grid: Grid, band: range, strip: range) -> int:
    found = {grid[y][x] for y in band for x in strip}
    return found.pop() if len(found) == 1 else Tile.PARTIAL


def _runs(row: Sequence[int]) -> list[tuple[int, int, Tile]]:
    """(start, length, tile) of each run that is not empty."""
    runs: list[tuple[int, int, Tile]] = []
    for x, value in enumerate(row):
        if runs and runs[-1][2] == value and sum(runs[-1][:2]) == x:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, runs[-1][2])
        else:
            runs.append((x, 1, Tile(value)))
    return [run for run in runs if run[2] is not Tile.EMPTY]


def _run(y: int, x: int, length: int, tile: Tile) -> str:
    return (
        f'<rect x="{CELL * x}" y="{CELL * y}" width="{CELL * length}" height="{CELL}" '
        f'fill="{COLOURS[tile]}"/>'
    )
