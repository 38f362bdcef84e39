"""A packed batch of real documents: the word counts of Python's own library sources."""

from __future__ import annotations

import itertools
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Document:
    """One text file; `length` in words, cut where the row it was packed into was full."""

    name: str
    length: int


Row = tuple[Document, ...]


def packed_rows(batch: int, length: int, seed: int = 0) -> tuple[Row, ...]:
    """`batch` rows of documents that fill `length` tokens each, in an order the seed decides."""
    files = _library_files()
    random.Random(seed).shuffle(files)
    supply = _documents(files)
    return tuple(_fill(supply, length) for _ in range(batch))


def document_ids(row: Row) -> list[int]:
    """The number of its document for every token of a row: 0, 0, ..., 1, 1, ..."""
    return [number for number, document in enumerate(row) for _ in range(document.length)]


def _library_files() -> list[Path]:
    library = Path(sysconfig.get_path("stdlib"))
    own = Path(__file__).parent
    # An installation may keep its library in a zip file; this package has sources of its own.
    return sorted(library.glob("*.py")) or sorted(own.rglob("*.py"))


def _documents(files: list[Path]) -> Iterator[Document]:
    """The files again and again, each read when its turn comes; empty ones are left out."""
    for file in itertools.cycle(files):
        if words := len(file.read_bytes().split()):
            yield Document(file.name, words)


def _fill(supply: Iterator[Document], length: int) -> Row:
    row: list[Document] = []
    left = length
    while left > 0:
        document = next(supply)
        row.append(Document(document.name, min(document.length, left)))
        left -= document.length
    return tuple(row)
