"""The order of one plan's tokens, for those who keep tensors in it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from attncc.binding import Binding
from attncc.errors import ArgumentError
from attncc.order import TILE, Asked, Choice, Orders
from attncc.order.permuted import inverse
from attncc.tiles import BoundPlan, Counts


@dataclass(frozen=True)
class Placed:
    """The order of one plan's tokens: `permute` inputs once, and call with ordered=True."""

    orders: Orders
    asked: Asked
    binding: Binding

    @cached_property
    def choice(self) -> Choice | None:
        """None for the natural order."""
        return self.orders.choose(self.binding, self.asked)

    def __str__(self) -> str:
        return self.choice.why if self.choice is not None else "natural"

    def permute(self, x: Tensor, dim: int = 2) -> Tensor:
        """Tokens along `dim` in this order, as a copy; x itself where that is the natural one."""
        order = self._order(x, dim)
        return x if order is None else _along(x, dim, order)

    def unpermute(self, x: Tensor, dim: int = 2) -> Tensor:
        """What `permute` did, undone: for results of calls with ordered=True."""
        order = self._order(x, dim)
        return x if order is None else _along(x, dim, inverse(order))

    def counts(self, tile: tuple[int, int] = (TILE, TILE)) -> Counts:
        """Tiles in this order, of all sequences and heads."""
        if self.choice is not None:
            return self.orders.counts(self.choice, self.binding, tile)
        return BoundPlan(self.orders.plan, self.binding, tile).counts

    @cached_property
    def _positions(self) -> dict[int, Tensor]:
        assert self.choice is not None
        of_q, of_kv = self.orders.positions(self.choice, self.binding)
        return {self.binding.kv_len: of_kv, self.binding.q_len: of_q}

    def _order(self, x: Tensor, dim: int) -> Tensor | None:
        if self.choice is None:
            return None
        if self.choice.step:
            raise ArgumentError(
                "this plan's tokens are taken by residue, as views",
                hint="hand them in as they are: nothing is copied",
            )
        if x.shape[dim] not in self._positions:
            lengths = " or ".join(map(str, sorted(self._positions)))
            raise ArgumentError(f"x has {x.shape[dim]} tokens along axis {dim}, expected {lengths}")
        return self._positions[x.shape[dim]].to(x.device)


def _along(x: Tensor, dim: int, order: Tensor) -> Tensor:
    if order.dim() == 1:
        return x.index_select(dim, order)
    rest = [1] * x.dim()
    rest[0], rest[dim] = order.shape
    return x.gather(dim, order.view(rest).expand(x.shape))
