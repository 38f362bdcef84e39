"""Puts the tables of results files into the README: python -m benchmarks.readme."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.table import rendered

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"

PLACE = re.compile(r"(?s)<!-- table: (\S+) -->\n(.*?)<!-- end of table -->")
"""Where a table goes: the file it is made of, then what stands there now."""


def filled(text: str) -> str:
    """The text with every table as its file has it; a place whose file is missing stays."""
    return PLACE.sub(_filled, text)


def _filled(place: re.Match[str]) -> str:
    path = ROOT / place[1]
    if not path.exists():
        return place[0]
    return f"<!-- table: {place[1]} -->\n\n{rendered(path)}\n<!-- end of table -->"


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
