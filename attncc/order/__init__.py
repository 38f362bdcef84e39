"""Token order: q, k and v are viewed or permuted so that the pairs a mask keeps lie together.

Kernels, analyses and the dense interpreter know nothing of it: the program is rewritten over the
new positions, with every read and predicate at the original ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from attncc.binding import Binding
from attncc.errors import ArgumentError
from attncc.ir.evaluate import Env, evaluate_unchecked
from attncc.ir.expr import Q_LEN, SIZES, Expr, Load, Scalar, walk
from attncc.ir.plan import Plan
from attncc.ir.program import Program
from attncc.order import permuted, residues
from attncc.order.permuted import grid_order, inverse
from attncc.order.residues import Call, Residues
from attncc.passes import analyze
from attncc.tiles import BoundPlan, Counts

Asked = Literal["auto", "natural", "residues"] | tuple[int, ...] | Tensor
"""What a call may ask for: tuples are tiles of a grid, a tensor is the order itself."""

TILE = 128
"""Tokens of a tile that orders are compared by."""

SIZE_NAMES = tuple(size.name for size in SIZES)

LAUNCH = {"cuda": 60.0, "cpu": 1000.0}
"""Microseconds that one more call takes."""

TILES = {"cuda": 0.014, "cpu": 80.0}
"""Microseconds that a head's tile of 128 x 128 takes: on an H100 all of its processors share it."""

MASKED = 1.4
"""Times as long a partial tile takes."""

COPY = {"cuda": 0.1, "cpu": 100.0}
"""Microseconds to copy 128 tokens of a head of q, k, v and out, there and back."""


@dataclass(frozen=True)
class Choice:
    """An order for one call; why, in words, for `explain`."""

    why: str
    step: int = 0
    """Of residues."""
    tile: tuple[int, ...] = ()
    """Of a grid of `sizes`."""
    sizes: tuple[int, ...] = ()
    order: Tensor | None = None


@dataclass
class Orders:
    """The orders that a program's tokens can have, and which serves a call."""

    plan: Plan
    chosen: dict[object, Choice | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.residues: Residues | None = residues.find(self.program, self.plan.mask)
        self.known = self.residues is not None or (
            bool(self.program.grid) and self.program.kv_grid is None
        )
        """Whether there is anything to choose."""

    @property
    def program(self) -> Program:
        return self.plan.program

    def choose(
        self, sizes: Mapping[str, int], arguments: Mapping[str, object], device: str, asked: Asked
    ) -> Choice | None:
        """The order for a call; None for the natural one. Raises ArgumentError for what cannot be.

        sizes: of the call, by the names of SIZES. device: "cuda" or "cpu".
        """
        if isinstance(asked, Tensor):
            return self._given(asked, sizes)
        if asked == "natural" or (asked == "auto" and not self.known):
            return None
        scalars = self._scalars(sizes, arguments)
        key = asked, device, tuple(scalars.items())
        if key not in self.chosen:
            self.chosen[key] = self._chosen(asked, sizes, scalars, device)
        return self.chosen[key]

    def run(
        self,
        call: Call,
        choice: Choice,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        arguments: Mapping[str, object],
        ordered: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """out and lse, as in the natural order."""
        if choice.step:
            if ordered:
                raise ArgumentError(
                    "ordered=True, and this call's tokens are taken by residue, as views",
                    hint="leave ordered out: nothing is copied",
                )
            assert self.residues is not None
            return self.residues.run(call, q, k, v, arguments, choice.step)
        orders = self.positions(choice, q.shape[2], k.shape[2], q.device)
        return permuted.run(call, self.program, self.plan.mask, q, k, v, arguments, orders, ordered)

    def positions(
        self, choice: Choice, q_len: int, kv_len: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """The queries' and the keys' positions, in their new order."""
        if choice.order is not None:
            return choice.order, choice.order
        found = [
            grid_order(choice.sizes, choice.tile, length, device) for length in (q_len, kv_len)
        ]
        return found[0], found[1]

    # -- choosing

    def _scalars(
        self, sizes: Mapping[str, int], arguments: Mapping[str, object]
    ) -> dict[str, bool | int | float]:
        """Values of sizes and of scalar parameters; what is wrong with them, binding tells."""
        found: dict[str, bool | int | float] = dict(sizes)
        for param in self.program.scalars:
            value = arguments.get(param.name, param.default)
            value = value.item() if hasattr(value, "item") else value
            if isinstance(value, bool | int | float):
                found[param.name] = value
        return found

    def _value(self, expr: Expr, scalars: Mapping[str, bool | int | float]) -> int | None:
        """An int of scalars; None where one is missing."""
        names = {node.param.name for node in walk(expr) if isinstance(node, Scalar)}
        if not names <= set(scalars):
            return None
        return int(evaluate_unchecked(expr, Env({}, scalars)))

    def _chosen(
        self,
        asked: str | tuple[int, ...],
        sizes: Mapping[str, int],
        scalars: dict[str, bool | int | float],
        device: str,
    ) -> Choice | None:
        if asked == "residues" or (asked == "auto" and self.residues is not None):
            return self._by_residue(asked == "residues", sizes, scalars, device)
        if asked == "auto":
            return self._best_tile(sizes, scalars, device)
        if isinstance(asked, tuple):
            return self._by_tile(asked, scalars)
        raise ArgumentError(
            f"order is {asked!r}",
            hint="'auto', 'natural', 'residues', tiles of the program's axes such as (8, 16), or "
            "an int tensor of positions",
        )

    def _by_residue(
        self,
        asked: bool,
        sizes: Mapping[str, int],
        scalars: Mapping[str, bool | int | float],
        device: str,
    ) -> Choice | None:
        found = self.residues
        if found is None:
            raise ArgumentError(
                f"order is 'residues', and the mask of {self.program.name} keeps no residues apart",
                hint="a mask with (q_idx - kv_idx) % step == 0 does",
            )
        step = self._value(found.step, scalars)
        q_len, kv_len = sizes["q_len"], sizes["kv_len"]
        if step is None or not found.divides(step, q_len, kv_len):
            if not asked:
                return None
            raise ArgumentError(
                f"order is 'residues', and the step is {step}",
                hint=f"a step is from 2 to {residues.LARGEST}, and at most the lengths",
            )
        why = f"by residue: {step} classes of every {step}th token, as views; nothing is copied"
        choice = Choice(why, step=step)
        if asked:
            return choice
        if min(q_len, kv_len) // step < residues.SHORTEST:
            return None
        visited = self._visited(self.plan, sizes, scalars)
        if visited is None:
            return choice
        heads = sizes["batch"] * sizes["heads"]
        saved = visited * heads * (1 - 1 / step) * TILES[device]
        calls = min(step, sizes["batch"]) - 1
        return choice if saved > calls * LAUNCH[device] else None

    def _visited(
        self, plan: Plan, sizes: Mapping[str, int], scalars: Mapping[str, bool | int | float]
    ) -> float | None:
        """Tiles that a head visits, partial ones for more.

        None where the mask reads tensors, which may be on a GPU.
        """
        if any(isinstance(node, Load) for node in walk(plan.mask)):
            return None
        bound = self._bound(plan, sizes, scalars, {})
        return _work(bound.counts)

    def _bound(
        self,
        plan: Plan,
        sizes: Mapping[str, int],
        scalars: Mapping[str, bool | int | float],
        tensors: Mapping[str, Tensor],
    ) -> BoundPlan:
        """One sequence and head of a call, on the CPU."""
        q_len, kv_len, dim = sizes["q_len"], sizes["kv_len"], sizes["head_dim"]
        own = {**scalars, **sizes, "batch": 1, "heads": 1, "kv_heads": 1}
        binding = Binding(1, 1, 1, q_len, kv_len, dim, own, tensors)
        return BoundPlan(plan, binding, (TILE, TILE))

    def described(self, binding: Binding) -> list[str]:
        """What `explain` says of a call on a GPU: the order that it gets, and its tiles in it."""
        sizes = {name: int(binding.scalars[name]) for name in SIZE_NAMES}
        choice = self.choose(sizes, binding.scalars, "cuda", "auto") if self.known else None
        if choice is None:
            return ["natural: none pays for its copies or calls"] if self.known else []
        lengths = sizes["q_len"], sizes["kv_len"]
        if choice.step:
            assert self.residues is not None
            counts = self.residues.counts(choice.step, binding, (TILE, TILE))
        else:
            program, names = permuted.permuted(self.program, self.plan.mask)
            orders = self.positions(choice, *lengths, binding.device)
            tensors = {**binding.tensors, **dict(zip(names, orders, strict=True))}
            own = replace(binding, tensors=tensors)
            counts = BoundPlan(analyze(program), own, (TILE, TILE)).counts
        total = f"{counts.full} full, {counts.partial} partial, {counts.empty} empty"
        return [choice.why, f"tiles of {TILE} x {TILE} then: {total}"]

    # -- grids

    def _grid(self, scalars: Mapping[str, bool | int | float]) -> tuple[int, ...] | None:
        found = [self._value(axis.size, scalars) for axis in self.program.grid]
        return None if None in found else tuple(n for n in found if n is not None)

    def _by_tile(
        self, tile: tuple[int, ...], scalars: Mapping[str, bool | int | float]
    ) -> Choice | None:
        if self.program.kv_grid is not None:
            raise ArgumentError(
                "order is tiles of axes, and queries and keys have axes of their own",
                hint="tiles are of axes that both have: axes (...)",
            )
        names = ", ".join(axis.name for axis in self.program.grid)
        if len(tile) != len(self.program.grid) or not tile:
            raise ArgumentError(
                f"order is tiles of {len(tile)} axes, and {self.program.name} has "
                f"{f'axes ({names})' if names else 'none'}",
                hint="one number for each of its axes, slowest first",
            )
        if not all(isinstance(n, int) and n > 0 for n in tile):
            raise ArgumentError(f"order is tiles of {tile}, expected ints above 0")
        sizes = self._grid(scalars)
        if sizes is None:
            return None  # which binding tells
        return Choice(f"in tiles of {' x '.join(map(str, tile))} tokens, by copies", 0, tile, sizes)

    def _best_tile(
        self,
        sizes: Mapping[str, int],
        scalars: Mapping[str, bool | int | float],
        device: str,
    ) -> Choice | None:
        """The tile of 128 tokens that visits fewest tiles, where that pays for the copies."""
        grid = self._grid(scalars)
        reads = {node for node in walk(self.plan.mask) if isinstance(node, Load | Scalar)}
        if grid is None or len(grid) < 2 or any(isinstance(node, Load) for node in reads):
            return None
        q_len, kv_len = sizes["q_len"], sizes["kv_len"]
        rows = math.ceil(q_len / TILE)
        sampled = rows if Scalar(Q_LEN) in reads else min(rows, SAMPLED)
        if min(sizes.values()) < 1 or sampled * math.ceil(kv_len / TILE) > MOST_TILES:
            return None
        picked = torch.linspace(0, rows - 1, sampled).long()[:, None] * TILE + torch.arange(TILE)
        picked = picked[picked < q_len].flatten()
        cpu = torch.device("cpu")
        program, names = permuted.permuted(self.program, self.plan.mask)
        plan = analyze(program)

        def visited(orders: tuple[Tensor, Tensor]) -> Counts:
            tensors = dict(zip(names, (orders[0][picked], orders[1]), strict=True))
            return self._bound(plan, {**sizes, "q_len": len(picked)}, scalars, tensors).counts

        def grid_orders(tile: tuple[int, ...]) -> tuple[Tensor, Tensor]:
            return grid_order(grid, tile, q_len, cpu), grid_order(grid, tile, kv_len, cpu)

        natural = visited((torch.arange(q_len), torch.arange(kv_len)))
        found = {tile: visited(grid_orders(tile)) for tile in candidates(len(grid))}
        best = min(found, key=lambda tile: _work(found[tile]), default=None)
        if best is None:
            return None
        scale = rows / sampled
        saved = (_work(natural) - _work(found[best])) * scale * TILES[device]
        copied = (q_len + kv_len) / 2 / TILE * COPY[device]
        if (saved - copied) * sizes["batch"] * sizes["heads"] <= LAUNCH[device]:
            return None
        count, before = (round(scale * (of.full + of.partial)) for of in (found[best], natural))
        why = f"in tiles of {' x '.join(map(str, best))} tokens, by copies: "
        why += f"{count} tiles of {TILE} x {TILE} a head in place of {before}"
        return Choice(why, 0, best, grid)

    def _given(self, order: Tensor, sizes: Mapping[str, int]) -> Choice:
        if order.dim() != 1 or order.dtype not in (torch.int32, torch.int64):
            raise ArgumentError(
                f"order is a {order.dtype} tensor of shape {tuple(order.shape)}",
                hint="int64 [tokens]: the positions in their new order",
            )
        if not sizes["q_len"] == sizes["kv_len"] == len(order):
            raise ArgumentError(
                f"order has {len(order)} positions, and there are {sizes['q_len']} queries and "
                f"{sizes['kv_len']} keys",
                hint="one order serves both, so they have the same length",
            )
        return Choice("given", order=order.long())


SAMPLED = 32
"""Rows of tiles by which orders are compared."""

MOST_TILES = 2**17
"""Tiles that are looked at to choose an order; where that takes more, there is none."""


def _work(counts: Counts) -> float:
    return counts.full + MASKED * counts.partial


def candidates(axes: int) -> list[tuple[int, ...]]:
    """Tiles of 128 tokens, near to cubes, the fastest axis the longest."""
    return CANDIDATES.get(axes, [])


CANDIDATES: dict[int, list[tuple[int, ...]]] = {
    2: [(8, 16), (4, 32)],
    3: [(4, 4, 8), (2, 8, 8), (1, 8, 16)],
}


__all__ = ["Asked", "Choice", "Orders", "inverse"]
