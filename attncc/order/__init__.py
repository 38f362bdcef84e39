"""Token order: q, k and v are viewed or permuted so that the pairs a mask keeps lie together.

Kernels, analyses and the dense interpreter know nothing of it: the program is rewritten over the
new positions, with every read and predicate at the original ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from attncc.binding import Binding
from attncc.capture import capturing, promise
from attncc.errors import ArgumentError, AttnccError, ProgramValueError
from attncc.ir.evaluate import Env, evaluate_unchecked
from attncc.ir.expr import Q_LEN, SIZES, Expr, Load, Scalar, conjunction, walk
from attncc.ir.ops import AND
from attncc.ir.plan import Plan
from attncc.ir.program import Program
from attncc.order import permuted, residues
from attncc.order.permuted import grid_order
from attncc.order.residues import Ready, Residues, Start
from attncc.passes import analyze
from attncc.passes.simplify import flatten
from attncc.plans import Recent, mask_arguments
from attncc.tiles import BoundPlan, Counts

Asked = str | tuple[int, ...] | list[int] | Tensor
"""What a call may ask for: "auto", "natural", "residues", "by(doc)"; tiles of a grid; positions."""

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
    """An order for calls of some lengths; why, in words, for `explain`."""

    why: str
    step: int = 0
    """Of residues."""
    shift: int = 0
    tile: tuple[int, ...] = ()
    """Of a grid of `sizes`."""
    sizes: tuple[int, ...] = ()
    order: Tensor | None = None
    by: str = ""
    """The tensor that tokens are sorted by."""


class Orders:
    """The orders that a program's tokens can have, and which serves a call."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.program: Program = plan.program
        fixed = self.program.order
        self.residues: Residues | None = residues.find(self.program, plan.mask)
        if fixed is not None and fixed.step is not None:
            alone = replace(self.program, mask=residues.multiple(fixed.step), order=None)
            same = residues.find(alone, analyze(alone).mask)
            step = same.step if same else fixed.step
            self.residues = residues.find(self.program, plan.mask, step)
        alike = self.program.kv_grid is None
        self.known = self.residues is not None or (alike and bool(self.program.grid))
        """Whether there is anything to choose."""
        self.chosen: Recent[Choice | str] = Recent()
        self.sorted: Recent[tuple[Tensor, Tensor, Tensor]] = Recent()

    def choose(self, binding: Binding, asked: Asked, device: str = "") -> Choice | None:
        """The order for a call; None for the natural one. Raises ArgumentError for what cannot be.

        device: "cuda" or "cpu", where it is not the binding's.
        """
        if isinstance(asked, Tensor):
            return self._given(asked, binding)
        if not isinstance(asked, str | tuple | list):
            raise ArgumentError(f"order is {asked!r}", hint=HINT)
        wanted = tuple(asked) if isinstance(asked, list) else asked
        if asked == "auto" and self.program.order is not None:
            wanted = self.program.order.asked
        if wanted == "natural" or (wanted == "auto" and not self.known):
            return None
        device = device or ("cuda" if binding.device.type == "cuda" else "cpu")
        scalars = self._scalars(binding)
        key = wanted, device, tuple(scalars.items())
        found = self.chosen.find(key)
        if found is None:
            empty = 0 in (scalars[name] for name in SIZE_NAMES)
            found = self._chosen(wanted, scalars, device) if not empty else None
            found = found or "natural"
            self.chosen.keep(key, found)
        return found if isinstance(found, Choice) else None

    def ready(self, start: Start, choice: Choice, binding: Binding, ordered: bool) -> Ready:
        """Runs a call; out and lse are as in the natural order."""
        values = {**binding.scalars, **binding.tensors}
        given = {p.name: values[p.name] for p in self.program.params}
        if choice.step:
            if ordered:
                raise ArgumentError(
                    "ordered=True, and this call's tokens are taken by residue, as views",
                    hint="leave ordered out: nothing is copied",
                )
            assert self.residues is not None
            return self.residues.ready(start, choice.step, choice.shift, given)
        orders = self.positions(choice, binding)
        with torch.inference_mode(False):  # inverses too may be saved for gradients
            return permuted.ready(start, self.program, self.plan.mask, given, orders, ordered)

    def positions(self, choice: Choice, binding: Binding) -> tuple[Tensor, Tensor]:
        """The queries' and the keys' positions in their new order, int64 [N] or [B, N]."""
        if choice.order is not None:
            return choice.order, choice.order
        lengths, device = (binding.q_len, binding.kv_len), binding.device
        with torch.inference_mode(False):  # they may be kept, and saved for gradients
            if choice.by:
                return self._sorted(binding.tensors[choice.by], *lengths)
            order = grid_order if capturing(device) else _kept_order
            of_q, of_kv = (order(choice.sizes, choice.tile, n, device) for n in lengths)
            return of_q, of_kv

    def check_ordered(self, ordered: bool) -> None:
        if ordered:
            raise ArgumentError(
                "ordered=True, and this call's tokens are in their natural order",
                hint="say which order they have: order=(8, 16)",
            )

    def attention_of(self, choice: Choice, binding: Binding) -> tuple[Program, Binding]:
        """The program over the new positions, and its arguments."""
        assert not choice.step
        orders = self.positions(choice, binding)
        program, names = permuted.permuted(self.program, self.plan.mask, orders[0].dim() == 2)
        tensors = {**binding.tensors, **dict(zip(names, orders, strict=True))}
        return program, replace(binding, tensors=tensors)

    def counts(self, choice: Choice, binding: Binding, tile: tuple[int, int]) -> Counts:
        """Tiles in the order, of all sequences and heads."""
        if choice.step:
            assert self.residues is not None
            return self.residues.counts(choice.step, choice.shift, binding, tile)
        program, own = self.attention_of(choice, binding)
        return BoundPlan(analyze(program), own, tile).counts

    def _sorted(self, tensor: Tensor, q_len: int, kv_len: int) -> tuple[Tensor, Tensor]:
        kept = not (tensor.is_inference() or capturing(tensor.device))
        key = (id(tensor), tensor._version, q_len, kv_len) if kept else None
        found = self.sorted.find(key)
        if found is None:
            of_kv = tensor[..., :kv_len].argsort(dim=-1, stable=True)
            same = q_len == kv_len
            of_q = of_kv if same else tensor[..., :q_len].argsort(dim=-1, stable=True)
            found = of_q, of_kv, tensor
            self.sorted.keep(key, found)
        return found[0], found[1]

    # -- choosing

    def _scalars(self, binding: Binding) -> dict[str, bool | int | float]:
        """What a choice depends on: the sizes, and scalars of the mask and the grid."""
        read = {*SIZE_NAMES, *mask_arguments(self.plan)[0]}
        for axis in self.program.grid:
            read |= {node.param.name for node in walk(axis.size) if isinstance(node, Scalar)}
        return {name: binding.scalars[name] for name in sorted(read)}

    def _value(self, expr: Expr, scalars: Mapping[str, bool | int | float]) -> int:
        return int(evaluate_unchecked(expr, Env({}, scalars)))

    def _chosen(self, asked: str | tuple[int, ...], scalars: Scalars, device: str) -> Choice | None:
        if isinstance(asked, tuple):
            return self._by_tile(asked, scalars)
        if asked == "residues" or (asked == "auto" and self.residues is not None):
            return self._by_residue(asked == "residues", scalars, device)
        if asked == "auto":
            return self._best_tile(scalars, device)
        if match := re.fullmatch(r"by\((\w+)\)", asked):
            return self._by_tensor(match[1], scalars)
        raise ArgumentError(
            f"order is {asked!r}",
            hint=HINT,
        )

    def _by_residue(self, asked: bool, scalars: Scalars, device: str) -> Choice | None:
        found = self.residues
        if found is None:
            raise self._refused(
                f"order is residues, and the mask of {self.program.name} keeps no such residues "
                "apart",
                "a mask with (q_idx - kv_idx) % step == 0 does",
            )
        step, apart = self._value(found.step, scalars), self._value(found.apart, scalars)
        if step == 1 and apart == 0:
            return None  # one class: the natural order
        q_len, kv_len = int(scalars["q_len"]), int(scalars["kv_len"])
        if not found.divides(step, q_len, kv_len) or not 0 <= apart < step:
            if not asked:
                return None
            raise ArgumentError(
                f"order is residues, and the mask keeps {apart} modulo {step}",
                hint="a step is from 1 to the lengths, and what it leaves from 0 to below it",
            )
        why = f"by residue: {step} classes of every {step}th token, as views; nothing is copied"
        choice = Choice(why, step=step, shift=found.sign * apart % step)
        if asked:
            return choice
        if step > residues.LARGEST or min(q_len, kv_len) // step < residues.SHORTEST:
            return None
        calls, copies = min(step, int(scalars["batch"])) - 1, 0.0
        if q_len % step or kv_len % step:
            choice, copies = replace(choice, why=choice.why.split(",")[0] + ", padded"), 1.0
        elif choice.shift:
            copies = 0.5
        copies = max(copies, 0.25 * (calls > 0))  # of four tensors, those that are copied
        heads = int(scalars["batch"]) * int(scalars["heads"])
        saved = self._visited(self.plan, scalars) * (1 - 1 / step) * TILES[device]
        saved -= copies * math.ceil((q_len + kv_len) / 2 / TILE) * COPY[device]
        return choice if saved * heads > calls * LAUNCH[device] else None

    def _by_tensor(self, name: str, scalars: Scalars) -> Choice:
        by = next((t for t in self.program.tensors if t.name == name), None)
        if by is None or not by.orders_tokens:
            raise ArgumentError(
                f"order is 'by({name})', and {name} is no int tensor of [tokens] or of "
                "[batch, tokens]",
                hint="name such a parameter of the program, as doc: int[batch, kv_len]",
            )
        tokens, most = scalars[str(by.dims[-1])], max(scalars["q_len"], scalars["kv_len"])
        if tokens < most:
            raise ArgumentError(f"order is by {name}, which has {tokens} of {most} tokens")
        return Choice(f"sorted by {name}, by copies", by=name)

    def _refused(self, what: str, hint: str) -> AttnccError:
        """Of an order that the program itself may have asked for."""
        fixed = self.program.order
        if fixed is None or fixed.span is None:
            return ArgumentError(what, hint=hint)
        return ProgramValueError(what, hint=hint, source=self.program.source, span=fixed.span)

    def _visited(self, plan: Plan, scalars: Scalars) -> float:
        """Tiles that a head visits, partial ones for more.

        Conditions that read tensors, which may be on a GPU, count as true.
        """
        parts = list(flatten(AND, plan.mask))
        known = [x for x in parts if not any(isinstance(node, Load) for node in walk(x))]
        if len(known) < len(parts):
            plan = analyze(replace(plan.program, mask=conjunction(tuple(known)), order=None))
        return _work(self._bound(plan, scalars, {}).counts)

    def _bound(self, plan: Plan, scalars: Scalars, tensors: Mapping[str, Tensor]) -> BoundPlan:
        """One sequence and head of a call, on the CPU."""
        q_len, kv_len, dim = (int(scalars[name]) for name in ("q_len", "kv_len", "head_dim"))
        own = {**scalars, "batch": 1, "heads": 1, "kv_heads": 1}
        return BoundPlan(plan, Binding(1, 1, 1, q_len, kv_len, dim, own, tensors), (TILE, TILE))

    def described(self, binding: Binding) -> list[str]:
        """What `explain` says of a call on a GPU: the order that it gets, and its tiles in it."""
        if not self.known and self.program.order is None:
            return []
        choice = self.choose(binding, "auto", "cuda")
        if choice is None:
            fixed = self.program.order is not None and self.program.order.name == "natural"
            return ["natural: the program says so" if fixed else NATURAL]
        counts = self.counts(choice, binding, (TILE, TILE))
        total = f"{counts.full} full, {counts.partial} partial, {counts.empty} empty"
        return [choice.why, f"tiles of {TILE} x {TILE} then: {total}"]

    # -- grids

    def _by_tile(self, tile: tuple[int, ...], scalars: Scalars) -> Choice:
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
        why = f"in tiles of {' x '.join(map(str, tile))} tokens, by copies"
        return Choice(why, tile=tile, sizes=sizes)

    def _grid(self, scalars: Scalars) -> tuple[int, ...]:
        return tuple(self._value(axis.size, scalars) for axis in self.program.grid)

    def _best_tile(self, scalars: Scalars, device: str) -> Choice | None:
        """The tile of 128 tokens that visits fewest tiles, where that pays for the copies."""
        grid = self._grid(scalars)
        reads = {node for node in walk(self.plan.mask) if isinstance(node, Load | Scalar)}
        if not candidates(len(grid)) or any(isinstance(node, Load) for node in reads):
            return None
        q_len, kv_len = int(scalars["q_len"]), int(scalars["kv_len"])
        rows = math.ceil(q_len / TILE)
        sampled = rows if Scalar(Q_LEN) in reads else min(rows, SAMPLED)
        if max(q_len, kv_len) <= TILE or sampled * math.ceil(kv_len / TILE) > MOST_TILES:
            return None
        picked = torch.linspace(0, rows - 1, sampled).long()[:, None] * TILE + torch.arange(TILE)
        picked = picked[picked < q_len].flatten()
        program, names = permuted.permuted(self.program, self.plan.mask)
        plan = analyze(program)

        def visited(orders: tuple[Tensor, Tensor]) -> Counts:
            tensors = dict(zip(names, (orders[0][picked], orders[1]), strict=True))
            return self._bound(plan, {**scalars, "q_len": len(picked)}, tensors).counts

        def in_tiles(tile: tuple[int, ...]) -> tuple[Tensor, Tensor]:
            cpu = torch.device("cpu")
            return _kept_order(grid, tile, q_len, cpu), _kept_order(grid, tile, kv_len, cpu)

        natural = visited((torch.arange(q_len), torch.arange(kv_len)))
        found = {tile: visited(in_tiles(tile)) for tile in candidates(len(grid))}
        best = min(found, key=lambda tile: _work(found[tile]))
        scale = rows / sampled
        saved = (_work(natural) - _work(found[best])) * scale * TILES[device]
        copied = (q_len + kv_len) / 2 / TILE * COPY[device]
        heads = int(scalars["batch"]) * int(scalars["heads"])
        if (saved - copied) * heads <= LAUNCH[device]:
            return None
        count, before = (round(scale * (of.full + of.partial)) for of in (found[best], natural))
        why = f"in tiles of {' x '.join(map(str, best))} tokens, by copies: "
        why += f"{count} tiles of {TILE} x {TILE} a head in place of {before}"
        return Choice(why, tile=best, sizes=grid)

    def _given(self, order: Tensor, binding: Binding) -> Choice:
        if order.dim() != 1 or order.dtype not in (torch.int32, torch.int64):
            raise ArgumentError(
                f"order is a {order.dtype} tensor of shape {tuple(order.shape)}",
                hint="int64 [tokens]: the positions in their new order",
            )
        if not binding.q_len == binding.kv_len == len(order):
            raise ArgumentError(
                f"order has {len(order)} positions, and there are {binding.q_len} queries and "
                f"{binding.kv_len} keys",
                hint="one order serves both, so they have the same length",
            )
        if order.device != binding.device:
            raise ArgumentError(f"order is on {order.device}, but q is on {binding.device}")
        with torch.inference_mode(False):
            own = order.clone() if order.is_inference() else order
            own = own.long()
            there = own.sort().values == torch.arange(len(own), device=own.device)
        message = "order does not hold each position once"
        if capturing(order.device):
            promise(there.all(), message)
        elif not bool(there.all()):
            raise ArgumentError(message, hint="a permutation of 0 to tokens - 1")
        return Choice("as given, by copies", order=own)


def order_key(order: Asked) -> Hashable:
    """Equal for equal orders; None where one cannot tell if it changed."""
    if not isinstance(order, Tensor):
        return tuple(order) if isinstance(order, list) else order
    return None if order.is_inference() else (_Same(order), order._version)


class _Same:
    """A tensor as a key, which keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.tensor is other.tensor

    def __hash__(self) -> int:
        return id(self.tensor)


HINT = (
    "'auto', 'natural', 'residues', 'by(doc)' of an int tensor, tiles of the program's axes such "
    "as (8, 16), or an int tensor of positions"
)

NATURAL = "natural: none pays for its copies or calls"

Scalars = Mapping[str, bool | int | float]

_kept_order = lru_cache(maxsize=64)(grid_order)


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


__all__ = ["Asked", "Choice", "Orders", "order_key"]
