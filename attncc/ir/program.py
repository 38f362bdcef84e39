"""A Program: one attention variant as the user declared it, resolved and well-kinded."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from attncc.ir.expr import TRUE, Expr, ScalarParam, Score, Span, TensorParam

Param = ScalarParam | TensorParam


class Normalize(Enum):
    """How scores become weights: softmax over the row, or sigmoid(score) or the score itself."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class GridAxis:
    """One axis of an N-D token grid, slowest first; `size` reads no position and no tensor."""

    name: str
    size: Expr


@dataclass(frozen=True, slots=True)
class TokenOrder:
    """The order that tokens are computed in: natural, residues, residues(step), tiles or by."""

    name: str
    step: Expr | None = None
    tile: tuple[int, ...] = ()
    by: str = ""
    span: Span | None = field(default=None, compare=False, repr=False)

    @property
    def asked(self) -> str | tuple[int, ...]:
        """What a call passes to ask for it."""
        return self.tile or (f"by({self.by})" if self.by else self.name)


@dataclass(frozen=True, slots=True)
class Program:
    """The meaning of an attention variant; `attncc.backends.dense` says what each field does.

    mask:  bool over (b, h, q_idx, kv_idx); reads no score.
    score: float over (score, b, h, q_idx, kv_idx).
    scale: float over scalars and sizes, or None for 1 / sqrt(head_dim).
    sink:  float over (b, h), an extra logit in the softmax denominator, or None.
    output: float over (b, h, q_idx) and RESULTS, each element of out that a call returns, or None.
    order: how tokens stand while they are computed, which changes no result; None leaves it open.
    """

    name: str
    params: tuple[Param, ...] = ()
    mask: Expr = TRUE
    score: Expr = Score()
    scale: Expr | None = None
    sink: Expr | None = None
    normalize: Normalize = Normalize.SOFTMAX
    grid: tuple[GridAxis, ...] = ()
    """Of queries, and of keys too where `kv_grid` is None."""
    kv_grid: tuple[GridAxis, ...] | None = None
    output: Expr | None = None
    order: TokenOrder | None = None
    comment: str = field(default="", compare=False)
    """The comment lines above the declaration, without their '#'."""
    source: str = field(default="", compare=False, repr=False)
    """The text it was read from, for error messages."""
    span: Span | None = field(default=None, compare=False, repr=False)

    @property
    def scalars(self) -> tuple[ScalarParam, ...]:
        return tuple(p for p in self.params if isinstance(p, ScalarParam))

    @property
    def tensors(self) -> tuple[TensorParam, ...]:
        return tuple(p for p in self.params if isinstance(p, TensorParam))

    def __str__(self) -> str:
        """The program in the language."""
        from attncc.ir.show import show_program  # it imports this module

        return show_program(self)
