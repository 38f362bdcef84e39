"""BlockMask: pairs kept by a mask_mod, or by lists of blocks; lists are made when read."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask as TorchBlockMask
from torch.nn.attention.flex_attention import noop_mask

from attncc.binding import bind_lengths
from attncc.bounds import strip_env
from attncc.errors import ArgumentError, UnsupportedError
from attncc.flex import tables
from attncc.flex.variants import variant
from attncc.frontend.mods import traced_mods
from attncc.ir.evaluate import evaluate
from attncc.ir.expr import Axis, axes
from attncc.plans import CallPlan
from attncc.tiles import EMPTY, FULL, PARTIAL

MaskMod = Callable[..., Any]

BLOCK = 128
"""The block size where none is asked for, as in torch."""

ANY_LENGTH = 1 << 30
"""Blocks of this size stand for a mask of any length, as in torch."""

ALL_AXES = Axis.B | Axis.H | Axis.Q | Axis.KV

SIGNS = {EMPTY: "  ", PARTIAL: "░░", FULL: "██"}


def sliced_mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> NoReturn:
    """The mask_mod of a part of a BlockMask, which has positions of its own."""
    raise ArgumentError(
        "the mask_mod of a sliced BlockMask is not known, since its positions begin elsewhere",
        hint="set it: part.mask_mod = one of the whole mask's, with the offset added to q_idx",
    )


class BlockMask:
    """Pairs that attention keeps, in the form torch's BlockMask has.

    Made by `create_block_mask`, it is the traced mask_mod: lists of blocks are worked out when they
    are read, and attention never reads them. Made of lists (here, by `from_kv_blocks` or by
    `from_block_mask`), it keeps every pair of full blocks, those that mask_mod keeps of partial
    ones, and none of other blocks.

    seq_lengths: (queries, keys). BLOCK_SIZE: (queries, keys) of a block.
    """

    seq_lengths: tuple[int, int]
    BLOCK_SIZE: tuple[int, int]
    outer: tuple[int, int]
    """(B, H), 1 where all are alike."""
    _table: Tensor | None
    """Kinds of blocks, int8 [B, H, rows, columns]; None where mask_mod alone says it."""

    def __init__(
        self,
        seq_lengths: tuple[int, int],
        kv_num_blocks: Tensor,
        kv_indices: Tensor,
        full_kv_num_blocks: Tensor | None = None,
        full_kv_indices: Tensor | None = None,
        q_num_blocks: Tensor | None = None,
        q_indices: Tensor | None = None,
        full_q_num_blocks: Tensor | None = None,
        full_q_indices: Tensor | None = None,
        BLOCK_SIZE: tuple[int, int] = (BLOCK, BLOCK),
        mask_mod: MaskMod = noop_mask,
    ) -> None:
        """kv_num_blocks [B, H, rows], kv_indices [B, H, rows, columns]; the lists of queries say
        nothing more."""
        if (full_kv_num_blocks is None) != (full_kv_indices is None):
            raise ArgumentError("full_kv_num_blocks and full_kv_indices come together, or not")
        partial = _with_four_axes(kv_num_blocks, kv_indices)
        full = None
        if full_kv_num_blocks is not None and full_kv_indices is not None:
            full = _with_four_axes(full_kv_num_blocks, full_kv_indices)
        self._begin(seq_lengths, BLOCK_SIZE, mask_mod, full is not None)
        self._device = kv_indices.device
        self._made |= {"kv": partial, "full_kv": full}
        columns = max(_blocks(seq_lengths[1], BLOCK_SIZE[1]), kv_indices.shape[-1])
        self._table = tables.kinds(partial, full, columns)
        self.outer = (self._table.shape[0], self._table.shape[1])

    def _begin(
        self, lengths: tuple[int, int], block: tuple[int, int], mask_mod: MaskMod, split: bool
    ) -> None:
        self.seq_lengths = (int(lengths[0]), int(lengths[1]))
        self.BLOCK_SIZE = (int(block[0]), int(block[1]))
        self._mask_mod = mask_mod
        self._split = split
        self._table = None
        self._made: dict[str, tables.Lists | None] = {}

    @classmethod
    def _of_mod(
        cls,
        mask_mod: MaskMod,
        outer: tuple[int, int],
        lengths: tuple[int, int],
        block: tuple[int, int],
        device: torch.device,
        split: bool,
    ) -> BlockMask:
        made = cls.__new__(cls)
        made._begin(lengths, block, mask_mod, split)
        made.outer, made._device = outer, device
        return made

    @classmethod
    def from_kv_blocks(
        cls,
        kv_num_blocks: Tensor,
        kv_indices: Tensor,
        full_kv_num_blocks: Tensor | None = None,
        full_kv_indices: Tensor | None = None,
        BLOCK_SIZE: int | tuple[int, int] = BLOCK,
        mask_mod: MaskMod | None = None,
        seq_lengths: tuple[int, int] | None = None,
        compute_q_blocks: bool = True,
    ) -> BlockMask:
        """Of lists; without seq_lengths, of as many queries as rows hold, and keys as columns."""
        block = _pair(BLOCK_SIZE)
        if seq_lengths is None:
            seq_lengths = kv_indices.shape[-2] * block[0], kv_indices.shape[-1] * block[1]
        return cls(
            seq_lengths,
            kv_num_blocks,
            kv_indices,
            full_kv_num_blocks,
            full_kv_indices,
            BLOCK_SIZE=block,
            mask_mod=noop_mask if mask_mod is None else mask_mod,
        )

    # -- what attention reads

    @property
    def mask_mod(self) -> MaskMod:
        return self._mask_mod

    @mask_mod.setter
    def mask_mod(self, mask_mod: MaskMod) -> None:
        """Another mask_mod for the partial blocks; which are listed stays as it is."""
        if self._table is None:
            self._table = self._kinds()
        self._mask_mod = mask_mod

    def pairs(self, q_len: int, kv_len: int, batch: int, heads: int) -> MaskMod:
        """The mask_mod of a call; raises ArgumentError where the mask is of other sizes."""
        if self.BLOCK_SIZE != (ANY_LENGTH, ANY_LENGTH) and self.seq_lengths != (q_len, kv_len):
            raise ArgumentError(
                f"block_mask is of {self.seq_lengths[0]} queries and {self.seq_lengths[1]} keys, "
                f"but query and key have {q_len} and {kv_len}",
                hint="create one of these lengths: create_block_mask(mask_mod, B, H, "
                f"{q_len}, {kv_len}); it costs nothing",
            )
        for what, own, size in zip("BH", self.outer, (batch, heads), strict=True):
            if own not in (1, size):
                raise ArgumentError(
                    f"block_mask has {what} = {own}, but query has {size}",
                    hint=f"create it with {what}={size}, or {what}=None for all alike",
                )
        if self._table is None:
            self._check_alike(batch, heads)
            return self._mask_mod
        rows, columns = self._table.shape[2:]
        if rows * self.BLOCK_SIZE[0] < q_len or columns * self.BLOCK_SIZE[1] < kv_len:
            raise ArgumentError(
                f"block_mask lists {rows} x {columns} blocks of {self.BLOCK_SIZE[0]} x "
                f"{self.BLOCK_SIZE[1]}, which do not cover {q_len} queries and {kv_len} keys"
            )
        return self._of_table

    @property
    def _of_table(self) -> MaskMod:
        assert self._table is not None
        found: MaskMod = tables.mask_of(self._table, self.BLOCK_SIZE, self._mask_mod)
        return found

    def _check_alike(self, batch: int, heads: int) -> None:
        """A mask for all sequences or heads alike must not depend on which it is."""
        if self.outer == (batch, heads):
            return
        varies = axes(variant(None, self._mask_mod).attention.program.mask)
        sides = (("B", Axis.B, batch), ("H", Axis.H, heads))
        for (what, axis, size), own in zip(sides, self.outer, strict=True):
            if varies & axis and own < size:
                raise ArgumentError(
                    f"mask_mod varies with {what.lower()}, but block_mask was created for one",
                    hint=f"create it with {what}={size}",
                )

    # -- what users read

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.outer, *self.seq_lengths)

    @property
    def device(self) -> torch.device:
        """Where lists are, or will be."""
        return self._device

    @property
    def has_lists(self) -> bool:
        """Whether lists decide, and not a mask_mod alone."""
        return self._table is not None

    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def kv_num_blocks(self) -> Tensor:
        return self._listed("kv")[0]

    @property
    def kv_indices(self) -> Tensor:
        return self._listed("kv")[1]

    @property
    def full_kv_num_blocks(self) -> Tensor | None:
        return self._listed("full_kv")[0] if self._split else None

    @property
    def full_kv_indices(self) -> Tensor | None:
        return self._listed("full_kv")[1] if self._split else None

    @property
    def q_num_blocks(self) -> Tensor:
        return self._listed("q")[0]

    @property
    def q_indices(self) -> Tensor:
        return self._listed("q")[1]

    @property
    def full_q_num_blocks(self) -> Tensor | None:
        return self._listed("full_q")[0] if self._split else None

    @property
    def full_q_indices(self) -> Tensor | None:
        return self._listed("full_q")[1] if self._split else None

    def _listed(self, name: str) -> tables.Lists:
        """Exact lists, as torch's: a block that reaches past the lengths is never full."""
        found = self._made.get(name)
        if found is None:
            kinds = self._kinds()
            if not self._split:
                kinds = kinds.clamp(max=PARTIAL)
            for prefix, kind in (("", PARTIAL), ("full_", FULL)):
                self._made.setdefault(f"{prefix}kv", tables.lists(kinds == kind))
                self._made.setdefault(f"{prefix}q", tables.lists((kinds == kind).mT))
            found = self._made[name]
            assert found is not None
        return found

    def _kinds(self) -> Tensor:
        """int8 [B, H, rows, columns]; of a mask_mod, partial blocks are looked at pair by pair."""
        if self._table is not None:
            return self._table
        found = self._plan(self.BLOCK_SIZE).exact_classes().clone()
        for axis in (2, 3):
            if self.seq_lengths[axis - 2] % self.BLOCK_SIZE[axis - 2]:
                found.narrow(axis, found.shape[axis] - 1, 1).clamp_(max=PARTIAL)
        return found.expand(*self.outer, *found.shape[2:]).to(self._device)

    def _plan(self, tile: tuple[int, int]) -> CallPlan:
        """The plan of the mask alone, at these lengths."""
        mask_mod = self._mask_mod if self._table is None else self._of_table
        of = variant(None, mask_mod)
        sizes = {"q_len": self.seq_lengths[0], "kv_len": self.seq_lengths[1]}
        sizes |= {"batch": self.outer[0], "heads": self.outer[1]}
        return of.attention.plan(tile=tile, **sizes, **of.arguments)  # type: ignore[arg-type]

    def to_dense(self) -> Tensor:
        """int32 [B, H, rows, columns]: 1 where a block is listed."""
        return (self._kinds() > EMPTY).to(torch.int32)

    def sparsity(self) -> float:
        """The percentage of blocks that hold no pair."""
        if self._table is None:
            counts = self._plan(self.BLOCK_SIZE).counts
            computed = counts.full + counts.partial
        else:
            computed = int((self._table > EMPTY).sum())
        return 100 * (1 - computed * math.prod(self.BLOCK_SIZE) / max(1, self.numel()))

    def to_string(self, grid_size: int | tuple[int, int] = (20, 20), limit: int = 4) -> str:
        """Pictures of the first heads: full, partly kept, and empty cells.

        A cell is one block or several, at most grid_size of them down and across; -1 for all.
        """
        size = _pair(grid_size)
        cells = [
            block * -(-_blocks(length, block) // (n if n > 0 else length))
            for length, block, n in zip(self.seq_lengths, self.BLOCK_SIZE, size, strict=True)
        ]
        if self._table is None:
            kinds = self._plan((cells[0], cells[1])).classify()
            kinds = kinds.expand(*self.outer, *kinds.shape[2:])
        else:
            steps = [cell // block for cell, block in zip(cells, self.BLOCK_SIZE, strict=True)]
            kinds = _coarse(self._table, steps[0], steps[1])
        pictures = []
        for at in range(min(limit, math.prod(self.outer))):
            b, h = divmod(at, self.outer[1])
            rows = ["".join(SIGNS[kind] for kind in row) for row in kinds[b, h].tolist()]
            pictures.append("\n".join([f"({b}, {h})", *rows, ""]))
        if math.prod(self.outer) > limit:
            pictures.append("...\nto_string(limit=N) shows more, block_mask[b, h] a certain one")
        return "\n".join(pictures)

    def __str__(self) -> str:
        picture = self.to_string().strip()
        return f"BlockMask(shape={self.shape}, sparsity={self.sparsity():.2f}%,\n{picture}\n)"

    def __repr__(self) -> str:
        name = getattr(self._mask_mod, "__name__", type(self._mask_mod).__name__)
        return f"BlockMask(shape={self.shape}, BLOCK_SIZE={self.BLOCK_SIZE}, mask_mod={name})"

    # -- others made of it

    def __getitem__(self, index: Any) -> BlockMask:
        """Lists of some sequences, heads and rows of blocks; set `mask_mod` before attention."""
        given = index if isinstance(index, tuple) else (index,)
        at = tuple(_kept_axis(one) for one in (*given, *[slice(None)] * 3)[:3])
        full = self._split
        return BlockMask(
            self.seq_lengths,
            self.kv_num_blocks[at],
            self.kv_indices[at],
            self._listed("full_kv")[0][at] if full else None,
            self._listed("full_kv")[1][at] if full else None,
            BLOCK_SIZE=self.BLOCK_SIZE,
            mask_mod=sliced_mask_mod,
        )

    def _adjust(self, new_q_len: int, new_kv_len: int) -> BlockMask:
        """The same over other lengths, from the upper left corner."""
        made = BlockMask._of_mod(
            self._mask_mod,
            self.outer,
            (new_q_len, new_kv_len),
            self.BLOCK_SIZE,
            self._device,
            self._split,
        )
        if self._table is not None:
            rows = _blocks(new_q_len, self.BLOCK_SIZE[0])
            columns = _blocks(new_kv_len, self.BLOCK_SIZE[1])
            made._table = self._table[:, :, :rows, :columns]
        return made

    def to(self, device: torch.device | str) -> BlockMask:
        """On another device; what mask_mod captured stays where it is, as in torch."""
        made = BlockMask._of_mod(
            self._mask_mod,
            self.outer,
            self.seq_lengths,
            self.BLOCK_SIZE,
            torch.device(device),
            self._split,
        )
        made._table = None if self._table is None else self._table.to(device)
        return made

    def as_torch(self) -> TorchBlockMask:
        """The same for torch's own flex_attention."""
        kinds = self._kinds() if self._split else self._kinds().clamp(max=PARTIAL)
        partial = tables.lists(kinds == PARTIAL)
        full = tables.lists(kinds == FULL) if self._split else (None, None)
        return TorchBlockMask.from_kv_blocks(
            partial[0],
            partial[1],
            full[0],
            full[1],
            BLOCK_SIZE=self.BLOCK_SIZE,
            mask_mod=self._mask_mod,
            seq_lengths=self.seq_lengths,
        )

    def as_tuple(self, flatten: bool = True) -> tuple[Any, ...]:
        """What torch's has."""
        own = self.as_torch()
        return own.as_tuple(True) if flatten else own.as_tuple(False)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


def _with_four_axes(counts: Tensor, indices: Tensor) -> tables.Lists:
    if indices.dim() < 2 or counts.shape != indices.shape[:-1]:
        raise ArgumentError(
            f"kv_num_blocks has shape {list(counts.shape)} and kv_indices {list(indices.shape)}",
            hint="expected [B, H, rows] and [B, H, rows, columns]",
        )
    while indices.dim() < 4:
        counts, indices = counts[None], indices[None]
    return counts, indices


def _kept_axis(index: Any) -> Any:
    """A number as a slice, so that the axis stays."""
    if isinstance(index, int):
        return slice(index, index + 1 or None)
    return index


def _coarse(table: Tensor, rows: int, columns: int) -> Tensor:
    """Cells of rows x columns blocks: full where all are, empty where all are."""
    low, high = table, table
    for axis, step in ((2, rows), (3, columns)):
        low = torch.stack([part.amin(axis) for part in torch.split(low, step, axis)], axis)
        high = torch.stack([part.amax(axis) for part in torch.split(high, step, axis)], axis)
    return torch.where(low == high, low, PARTIAL)


# -- made of functions, and of torch's


def create_block_mask(
    mask_mod: MaskMod,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: torch.device | str | None = None,
    BLOCK_SIZE: int | tuple[int, int] = BLOCK,
    _compile: bool = False,
    separate_full_blocks: bool = True,
    compute_dq_write_order: bool = False,
    dq_kv_order: bool = True,
) -> BlockMask:
    """The BlockMask of mask_mod(b, h, q_idx, kv_idx) -> bool, at any length: nothing is evaluated.

    B, H: None where all sequences, or heads, are alike; a mask_mod that varies with them is then an
    error. BLOCK_SIZE and separate_full_blocks shape the lists that users read: kernels choose their
    own tiles. _compile has nothing to compile. What mask_mod captured is read when attention runs.
    """
    if compute_dq_write_order:
        raise UnsupportedError(
            "create_block_mask has no dq_write_order",
            hint="torch.use_deterministic_algorithms(True) makes gradients repeatable",
        )
    if torch.compiler.is_compiling():
        plain = torch.compiler.disable(create_block_mask)  # type: ignore[no-untyped-call]
        found: BlockMask = plain(
            mask_mod, B, H, Q_LEN, KV_LEN, device, BLOCK_SIZE, False, separate_full_blocks
        )
        return found
    variant(None, mask_mod)  # mistakes show here
    return BlockMask._of_mod(
        mask_mod,
        (1 if B is None else B, 1 if H is None else H),
        (Q_LEN, KV_LEN),
        _pair(BLOCK_SIZE),
        _device(device),
        separate_full_blocks,
    )


def create_mask(
    mod_fn: Callable[..., Any],
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """bool [B, H, Q_LEN, KV_LEN] of a mask_mod, or of where a score_mod of 0 is not -inf."""
    scores = _arguments(mod_fn) == 5
    mods = traced_mods(mod_fn if scores else None, None if scores else mod_fn)
    shape = (1 if B is None else B, 1 if H is None else H, Q_LEN, KV_LEN)
    binding = bind_lengths(
        mods.program,
        batch=shape[0],
        heads=shape[1],
        q_len=Q_LEN,
        kv_len=KV_LEN,
        arguments=mods.arguments(),
    )
    if not binding.tensors:
        binding = replace(binding, device=_device(device))
    env = strip_env(binding, ALL_AXES, 0, Q_LEN)
    keep = evaluate(mods.program.mask, env)
    if scores:
        env = replace(env, score=torch.zeros((), device=binding.device))
        keep = keep & ~evaluate(mods.program.score, env, guard=keep).isneginf()
    return keep.expand(shape).contiguous().to(_device(device))


def from_block_mask(block_mask: TorchBlockMask | BlockMask) -> BlockMask:
    """Torch's BlockMask as attncc's: all of full blocks, what mask_mod keeps of partial ones.

    Kept with the object while its lists stay as they are, so that layers share one.
    """
    if isinstance(block_mask, BlockMask):
        return block_mask
    if not isinstance(block_mask, TorchBlockMask):
        raise ArgumentError(
            f"block_mask is {type(block_mask).__name__}, expected a BlockMask",
            hint="make one: create_block_mask(mask_mod, B, H, Q_LEN, KV_LEN)",
        )
    partial = block_mask.kv_num_blocks, block_mask.kv_indices
    full = block_mask.full_kv_num_blocks, block_mask.full_kv_indices
    given = [x for x in (*partial, *full) if x is not None]
    versions: tuple[object, ...] | None = None
    if not any(x.is_inference() for x in given):
        lengths, block = tuple(block_mask.seq_lengths), tuple(block_mask.BLOCK_SIZE)
        versions = (*((id(x), x._version) for x in given), lengths, block)
    had = _converted.get(block_mask)
    if had is not None and had[0] == versions and versions is not None:
        made = had[1]
        made._mask_mod = block_mask.mask_mod
        return made
    made = BlockMask(
        block_mask.seq_lengths,
        *partial,
        *full,
        BLOCK_SIZE=block_mask.BLOCK_SIZE,
        mask_mod=block_mask.mask_mod,
    )
    _converted[block_mask] = versions, made
    return made


_converted: weakref.WeakKeyDictionary[
    TorchBlockMask, tuple[tuple[object, ...] | None, BlockMask]
] = weakref.WeakKeyDictionary()


def _device(device: torch.device | str | None) -> torch.device:
    return torch.device(device or torch.accelerator.current_accelerator() or "cpu")


def _arguments(mod: Callable[..., Any]) -> int:
    """How many arguments a function must be given."""
    every = inspect.signature(mod).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in every)
