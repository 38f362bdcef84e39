"""Results as tables on a terminal, and notes on who is missing from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

TITLES = {
    "attncc": "attncc",
    "tuned": "attncc, tuned",
    "flex": "FlexAttention",
    "flex_flash": "FlexAttention, FLASH",
    "cudnn": "cuDNN",
    "flash": "FA2",
    "sdpa": "SDPA, masked",
    "varlen": "torch varlen",
    "fa4": "FA4",
}
"""Contestants as tables name them, and their order."""

DIRECTIONS = ("forward", "backward")

Found = dict[str, Any]
Column = tuple[str, Callable[[Found], float | None]]


def columns() -> list[Column]:
    """What a line says of a contestant; a column that is empty throughout is left out."""
    found: list[Column] = []
    for field, unit in (("tflops", "TFLOP/s"), ("ms", "ms")):
        found += [(f"{d}\n{unit}", _timing(d, field)) for d in DIRECTIONS]
    costs = {
        "first call\ncold, s": "cold_s",
        "first call\nwarm, s": "warm_s",
        "plan\nms": "plan_ms",
        "peak\nMiB": "peak_MiB",
        "host, fwd\nµs": "forward_host_us",
        "host, bwd\nµs": "backward_host_us",
    }
    return found + [(title, _cost(name)) for title, name in costs.items()]


def _timing(direction: str, field: str) -> Callable[[Found], float | None]:
    return lambda found: found.get(direction, {}).get(field)


def _cost(name: str) -> Callable[[Found], float | None]:
    return lambda found: found.get(name)


def rendered(results: dict[str, Any]) -> RenderableType:
    """A table for each shape, then notes."""
    rows = results["rows"]
    shapes = dict.fromkeys((row["shape"], row["dtype"]) for row in rows)
    tables = [_table(s, [r for r in rows if (r["shape"], r["dtype"]) == s]) for s in shapes]
    return Group(Text(heading(results)), *tables, *map(Text, notes(rows)))


def heading(results: dict[str, Any]) -> str:
    """The machine, and how its times came about."""
    machine = results["machine"]
    versions = ", ".join(f"{n} {machine[n]}" for n in ("torch", "triton", "cuda") if n in machine)
    return (
        f"{machine['device']}, {versions}; TFLOP/s over kept pairs, median of "
        f"{results['rounds']} interleaved rounds"
    )


def _table(shape: tuple[str, str], rows: list[Found]) -> Table:
    found = [found for row in rows for found in row["results"].values()]
    shown = [column for column in columns() if any(column[1](f) is not None for f in found)]
    table = Table(title=", ".join(shape), title_justify="left", title_style="bold")
    table.add_column("")
    for title, _ in shown:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(Text(f"{row['row']}, {row['density']:.1%} kept", "bold"))
        for name in (name for name in TITLES if name in row["results"]):
            cells = [_cell(title, value, name, row) for title, value in shown]
            table.add_row(f"  {TITLES[name]}", *cells)
        table.add_section()
    return table


def _cell(title: str, value: Callable[[Found], float | None], name: str, row: Found) -> Text:
    """The number; the best of a row's speeds in bold."""
    number = value(row["results"][name])
    if number is None:
        return Text("")
    others = [x for found in row["results"].values() if (x := value(found)) is not None]
    best = title.endswith("TFLOP/s") and number == max(others)
    return Text(digits(number), "bold" if best else "")


def digits(number: float) -> str:
    """Three of them that count."""
    return f"{number:.0f}" if number >= 100 else f"{number:#.3g}"


def notes(rows: list[Found]) -> Iterator[str]:
    """Who does not take part, where, and why; equal reasons once."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for kind, word in (("wrong", "WRONG: "), ("failed", "failed: "), ("left_out", "")):
            for name, why in row[kind].items():
                place = f"{row['row']}, {row['shape']}"
                reasons.setdefault((name, word + why), []).append(place)
    for (name, why), where in reasons.items():
        places = "; ".join(where[:2]) + (f" and {len(where) - 2} more" if len(where) > 2 else "")
        everywhere = len(where) == len(rows)
        yield f"{TITLES[name]} {why}" + ("" if everywhere else f" ({places})")
