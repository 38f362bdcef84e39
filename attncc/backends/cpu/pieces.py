"""A strip's keys cut into pieces that the fused kernel takes, each with a mask or without."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from attncc.backends.cpu.block import Block
from attncc.backends.cpu.schedule import Interval, Run, aligned, union

CLEAR = 512
"""Keys without a mask fewer than this are computed with their neighbours under one."""

BAND = 32
"""Queries that have keys of their own in a banded piece.

A window of 256, 8 heads, 2048 tokens, one core: 18.6 ms; 21.1 ms by 64 queries, 22.8 ms by 128.
"""


class Piece(NamedTuple):
    """Some keys of a run, all with a mask or all without.

    The strip's queries fall into `parts` of equal height; each part reads `width` keys, the first
    part those from `start` on, and each other part the keys `height` further than the part before.

    mask:   0 where a pair is kept and -inf where not, to broadcast against [rows, members, parts,
            height, width]; None where all are kept.
    empty:  the rows that keep no key of the piece, to broadcast against [rows, members, queries];
            None where there are none.
    causal: whether the mask keeps the keys up to the row's own number, no others.
    """

    start: int
    width: int
    parts: int = 1
    mask: Tensor | None = None
    empty: Tensor | None = None
    causal: bool = False


def pieces(block: Block) -> tuple[Piece, ...]:
    """All runs of a block, cut where masks begin and end."""
    return block.shared("pieces", partial(_pieces, block))


def _pieces(block: Block) -> tuple[Piece, ...]:
    return tuple(
        _masked(block, run, interval) if masked else Piece(interval[0], interval[1] - interval[0])
        for run in block.strip.runs
        for interval, masked in _cut(run)
    )


def _cut(run: Run) -> list[tuple[Interval, bool]]:
    """A run's intervals, and which of them have masks; short ones without join their neighbours."""
    found = []
    at = run.start
    for start, stop in union(run.masked, CLEAR):
        # What is left of a run at either end is clear too, if it is worth a call.
        start = start if start - at >= CLEAR else at
        stop = stop if run.stop - stop >= CLEAR else run.stop
        if at < start:
            found.append(((at, start), False))
        found.append(((start, stop), True))
        at = stop
    if at < run.stop:
        found.append(((at, run.stop), False))
    return found


def _masked(block: Block, run: Run, interval: Interval) -> Piece:
    """A piece with its mask, which is evaluated only where the schedule says it must be."""
    start, stop = interval
    zero = torch.zeros((), dtype=block.problem.q.dtype)
    parts = [
        (lo, hi, torch.where(block.keep(lo, hi), zero, -math.inf))
        for lo, hi in run.masked
        if start <= lo and hi <= stop
    ]
    heads = parts[0][2].shape[:2]
    mask = zero.new_zeros(*heads, block.strip.stop - block.strip.start, stop - start)
    for lo, hi, part in parts:
        mask[..., lo - start : hi - start] = part
    empty = mask.amax(-1) == -math.inf
    return _banded(start, mask, empty if bool(empty.any()) else None)


def _banded(start: int, mask: Tensor, empty: Tensor | None) -> Piece:
    """In parts where the mask is a band along the diagonal, if that saves a sixteenth."""
    rows, keys = mask.shape[2:]
    band = _band(mask == 0) if rows % BAND == 0 else None
    if band is None or band[1] - band[0] > keys * 15 // 16:
        causal = rows == keys and bool(((mask == 0) == torch.ones(rows, keys).tril()).all())
        return Piece(start, keys, 1, mask[:, :, None], empty, causal)
    first, width = band[0], band[1] - band[0]
    parts = [
        mask[:, :, at : at + BAND, first + at : first + at + width] for at in range(0, rows, BAND)
    ]
    same = all(torch.equal(part, parts[0]) for part in parts)
    return Piece(
        start + first, width, len(parts), torch.stack(parts[:1] if same else parts, 2), empty
    )


def _band(kept: Tensor) -> Interval | None:
    """The keys of the first BAND queries, if those of later queries are as much further on.

    kept: [rows, members, queries, keys].
    """
    rows, keys = kept.shape[2:]
    part, key = kept.flatten(0, 1).any(0).view(-1, BAND, keys).any(1).nonzero().unbind(-1)
    if not len(part):
        return None
    offset = key - part * BAND
    first, stop = int(offset.min()), int(offset.max()) + 1
    room = keys - (rows - BAND)  # what the last part leaves to the first
    first = min(first, room - aligned(stop - first))
    return (first, first + aligned(stop - first)) if first >= 0 and stop <= room else None
