"""Results as a chart: speeds of a row's contestants as bars, forward beside backward."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from attncc.bench.table import DIRECTIONS, TITLES, digits, heading
from attncc.errors import ArgumentError, UnsupportedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = dict(
    zip(
        TITLES,
        (
            *("#0072b2", "#56b4e9", "#e69f00", "#d55e00", "#009e73"),
            *("#cc79a7", "#f0e442", "#999999", "#000000"),
        ),
        strict=True,
    )
)
"""Okabe and Ito's, which the colour-blind tell apart, and a grey."""

BAR = 0.17
"""Inches a bar is high, so that its number can be read."""

SVG = {"svg.fonttype": "none"}
"""Text stays text, which can be searched, and sets quicker than outlines."""


def check(path: Path) -> None:
    """Refuses what `save` cannot write, before anything is measured."""
    if path.suffix not in (".svg", ".png"):
        raise ArgumentError(f"--chart is {str(path)!r}", hint="it takes a .svg or a .png file")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UnsupportedError(
            "a chart needs matplotlib", hint="pip install 'attncc[plot]'"
        ) from None


def save(results: dict[str, Any], path: Path) -> None:
    """One group of bars a row, one panel a direction; the file's suffix says which kind."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = [row for row in results["rows"] if row["results"]]
    shown = [d for d in DIRECTIONS if any(d in f for row in rows for f in row["results"].values())]
    bars = sum(len(row["results"]) + 1 for row in rows)
    size = 4.5 + 4.0 * max(1, len(shown)), 1.6 + BAR * bars
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, max(1, len(shown)), sharey=True, squeeze=False)[0]
    for direction, axes in zip(shown, panels, strict=False):
        _panel(axes, rows, direction)
    names = [name for name in TITLES if any(name in row["results"] for row in rows)]
    handles = [Patch(color=COLOURS[name], label=TITLES[name]) for name in names]
    figure.suptitle(heading(results), fontsize=9)
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    with rc_context(SVG):
        figure.savefig(path, format=path.suffix[1:], dpi=150)


def _panel(axes: Axes, rows: list[dict[str, Any]], direction: str) -> None:
    """Bars from the top down, an empty place between rows."""
    at, middles = 0, []
    for row in rows:
        names = [name for name in TITLES if name in row["results"]]
        for place, name in enumerate(names):
            if direction in row["results"][name]:
                speed = row["results"][name][direction]["tflops"]
                bar = axes.barh(at + place, speed, 0.9, color=COLOURS[name], label=TITLES[name])
                axes.bar_label(bar, [digits(speed)], padding=2, fontsize=7)
        middles.append(at + (len(names) - 1) / 2)
        at += len(names) + 1
    labels = [f"{row['row']}\n{row['shape']}" for row in rows]
    axes.set_yticks(middles, labels, fontsize=8)
    axes.set_ylim(at - 1, -1)
    axes.set_title(f"{direction}, TFLOP/s", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
