"""A Plan: what the passes decided about a Program, for any lengths and scalar values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from attncc.ir.expr import (
    FALSE,
    KV_IDX,
    Q_IDX,
    TRUE,
    Axis,
    B,
    Expr,
    H,
    Index,
    Load,
    Score,
    TensorParam,
)
from attncc.ir.program import Param, Program


@dataclass(frozen=True, slots=True)
class Note:
    """One sentence that `explain` prints: which pass says it, and what it found or gave up on."""

    by: str
    text: str


@dataclass(frozen=True, slots=True)
class Segment:
    """Positions lo <= i < hi; ints over the other axis' tile bounds, b, h and scalars."""

    lo: Expr
    hi: Expr


@dataclass(frozen=True, slots=True)
class Ranges:
    """What one tile of rows needs of the other axis, as unions of segments (which may overlap).

    Over Q_LO and Q_LAST for query tiles (segments of keys), or KV_LO and KV_LAST for key tiles
    (segments of queries). Segments are within [0, length); an empty one has hi <= lo.
    visit:    covers every position that some row of the tile keeps.
    unmasked: holds only positions that every row of the tile keeps.
    complete: no conjunct of the mask was left out, so tiles outside both are the only partial ones.
    left_out: the conjuncts that were, or that are bounded but not tightly.
    """

    visit: tuple[Segment, ...]
    unmasked: tuple[Segment, ...]
    complete: bool
    left_out: tuple[Expr, ...] = ()


@dataclass(frozen=True, slots=True)
class Search:
    """Where in a tensor declared sorted a value belongs: ranges read it as `tensor`.

    of:    the sorted tensor at the position that ranges bound; every element along it is compared.
    value: an int that does not read that position, evaluated at each of the other axis.
    past:  finds the first position whose element is > value; else, >= value.
    tensor: of dims batch, heads and q_len or kv_len, those of them that the search varies with.

    Where all elements or none lie before the value, the result is FAR past them or before them:
    reads beyond a tensor's ends are clamped, as if those elements went on.
    """

    tensor: TensorParam
    of: Load
    value: Expr
    past: bool


READ_AT: dict[str, Index] = {"batch": B, "heads": H, "q_len": Q_IDX, "kv_len": KV_IDX}
"""The index along each dim of what a search makes."""

FAR = 2**30
"""Beyond any position, and small enough to add positions to in 32 bits."""


@dataclass(frozen=True, slots=True)
class Summary:
    """A one-token-axis subexpression, read by the tile test as its exact minimum and maximum.

    low and high are Loads' tensors of dims (batch | 1, heads | 1, tiles), indexed by B (or 0), H
    (or 0), and Q_TILE or KV_TILE; of a bool, low is "all of them" and high "any of them". `axis`
    is Axis.Q or Axis.KV. Floats are kept wide enough for any dtype, and nan as -inf and inf.
    """

    expr: Expr
    axis: Axis
    low: TensorParam
    high: TensorParam


@dataclass(frozen=True, slots=True)
class TileTest:
    """Bool expressions over tile bounds and summaries: must implies FULL, not may implies EMPTY."""

    summaries: tuple[Summary, ...] = ()
    must: Expr = FALSE
    may: Expr = TRUE


class Blocks(Enum):
    """Where kernels get their tiles from."""

    RANGES = "ranges"
    """Tier 1: closed-form loop bounds."""
    LISTS = "lists"
    """Tier 2: lists made by the tile test, within the ranges where there are any."""


class Order(Enum):
    """Which row tiles start first; heavy ones should."""

    NATURAL = "natural"
    REVERSED = "reversed"
    BY_WORK = "by work"


@dataclass(frozen=True, slots=True)
class Plan:
    """Each pass fills fields; defaults are what is true of any program."""

    program: Program
    mask: Expr = TRUE
    """The program's mask, simplified."""
    score: Expr = Score()
    """The program's score, simplified."""
    key_ranges: Ranges | None = None
    """Per query tile; None where tier 1 says nothing."""
    query_ranges: Ranges | None = None
    """Per key tile."""
    searches: tuple[Search, ...] = ()
    """What the ranges read besides the program's own parameters."""
    tiles: TileTest = TileTest()
    blocks: Blocks = Blocks.LISTS
    query_order: Order = Order.NATURAL
    """Order of query tiles (forward, dq)."""
    key_order: Order = Order.NATURAL
    """Order of key tiles (dk, dv)."""
    row_terms_cancel: bool = False
    """The score is Score() + r(b, h, q_idx) + c(b, h, kv_idx) under a softmax: r may be dropped."""
    proved_loads: frozenset[Expr] = frozenset()
    """Loads in range at every position within the lengths, whatever the arguments."""
    notes: tuple[Note, ...] = ()

    @property
    def params(self) -> tuple[Param, ...]:
        """The program's parameters, and what searches make."""
        return (*self.program.params, *(search.tensor for search in self.searches))
