"""FlexAttention's interface: `from attncc.flex import flex_attention, create_block_mask`.

As torch.nn.attention.flex_attention, with attncc's kernels and analysis. A BlockMask holds the
mask's function and its lengths; blocks are worked out only where a caller reads them, since calls
find their own tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from attncc.api import Attention
from attncc.errors import ArgumentError, UnsupportedError, suggest
from attncc.frontend.mods import Mods, traced_mods
from attncc.ir.expr import Scalar, ScalarParam
from attncc.ir.ops import Kind
from attncc.plans import CallPlan
from attncc.tiles import EMPTY, FULL, PARTIAL

__all__ = [
    "AuxOutput",
    "AuxRequest",
    "BlockMask",
    "and_masks",
    "create_block_mask",
    "create_mask",
    "flex_attention",
    "noop_mask",
    "or_masks",
]

and_masks, or_masks, noop_mask = flex.and_masks, flex.or_masks, flex.noop_mask
AuxOutput, AuxRequest = flex.AuxOutput, flex.AuxRequest

Mod = Callable[..., Any]

SCALE = "softmax_scale"
"""The parameter that the argument `scale` is."""

BACKENDS = {"AUTO": None, "TRITON": "triton"}
"""Torch's names of kernels, and ours; its others are other projects' kernels."""

PROMISES = ("PRESCALE_QK", "ROWS_GUARANTEED_SAFE", "BLOCKS_ARE_CONTIGUOUS", "USE_TMA")
"""Options that change how torch's kernels compute, not what; attncc finds out by itself."""


class BlockMask:
    """A mask_mod for given lengths; what torch's BlockMask tells of blocks is found when read.

    shape: (B, H, Q_LEN, KV_LEN), of which B and H are 1 where the mask is the same for all.
    """

    def __init__(
        self,
        mask_mod: Mod,
        shape: tuple[int, int, int, int],
        device: torch.device,
        BLOCK_SIZE: tuple[int, int] = (128, 128),
        separate_full_blocks: bool = True,
    ) -> None:
        self.mask_mod = mask_mod
        self.shape = shape
        self.device = device
        self.BLOCK_SIZE = BLOCK_SIZE
        self.separate_full_blocks = separate_full_blocks

    @property
    def seq_lengths(self) -> tuple[int, int]:
        return self.shape[2], self.shape[3]

    @cached_property
    def _traced(self) -> Mods:
        return traced_mods(None, self.mask_mod)

    @cached_property
    def plan(self) -> CallPlan:
        """attncc's plan of the mask, whose tiles are the blocks; printed, it says why."""
        batch, heads, q_len, kv_len = self.shape
        attn = Attention(self._traced.program, self._traced.arguments)
        return attn.plan(batch=batch, heads=heads, q_len=q_len, kv_len=kv_len, tile=self.BLOCK_SIZE)

    @cached_property
    def _classes(self) -> Tensor:
        """int8 [B, H, q_blocks, kv_blocks]: EMPTY, PARTIAL or FULL; PARTIAL beyond the lengths."""
        found = self.plan.classify().to(self.device, copy=True)
        if self.shape[2] % self.BLOCK_SIZE[0]:
            found[..., -1:, :].clamp_(max=PARTIAL)
        if self.shape[3] % self.BLOCK_SIZE[1]:
            found[..., -1:].clamp_(max=PARTIAL)
        return found.expand(*self.shape[:2], *found.shape[2:])

    def _lists(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """int32 numbers of blocks, [B, H, rows], and which, [B, H, rows, columns], kept first."""
        index = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return kept.sum(-1, dtype=torch.int32), index.to(torch.int32)

    @property
    def _partial(self) -> Tensor:
        classes = self._classes
        return classes.eq(PARTIAL) if self.separate_full_blocks else classes.ne(EMPTY)

    @property
    def _full(self) -> Tensor | None:
        return self._classes.eq(FULL) if self.separate_full_blocks else None

    @property
    def kv_num_blocks(self) -> Tensor:
        return self._lists(self._partial)[0]

    @property
    def kv_indices(self) -> Tensor:
        return self._lists(self._partial)[1]

    @property
    def full_kv_num_blocks(self) -> Tensor | None:
        return None if self._full is None else self._lists(self._full)[0]

    @property
    def full_kv_indices(self) -> Tensor | None:
        return None if self._full is None else self._lists(self._full)[1]

    @property
    def q_num_blocks(self) -> Tensor:
        return self._lists(self._partial.mT)[0]

    @property
    def q_indices(self) -> Tensor:
        return self._lists(self._partial.mT)[1]

    @property
    def full_q_num_blocks(self) -> Tensor | None:
        return None if self._full is None else self._lists(self._full.mT)[0]

    @property
    def full_q_indices(self) -> Tensor | None:
        return None if self._full is None else self._lists(self._full.mT)[1]

    def as_torch(self) -> flex.BlockMask:
        """The same for torch's own flex_attention."""
        lists = self.kv_num_blocks, self.kv_indices, self.full_kv_num_blocks, self.full_kv_indices
        return flex.BlockMask.from_kv_blocks(
            *lists, BLOCK_SIZE=self.BLOCK_SIZE, mask_mod=self.mask_mod, seq_lengths=self.seq_lengths
        )

    def as_tuple(self, flatten: bool = True) -> tuple[Any, ...]:
        """As torch's."""
        own = self.as_torch()
        return own.as_tuple(True) if flatten else own.as_tuple(False)

    def numel(self) -> int:
        """Pairs, kept or not."""
        batch, heads, q_len, kv_len = self.shape
        return batch * heads * q_len * kv_len

    def sparsity(self) -> float:
        """Percent of pairs in no block; as torch's, blocks are whole beyond the lengths too."""
        counts = self.plan.counts
        visited = (counts.full + counts.partial) * self.BLOCK_SIZE[0] * self.BLOCK_SIZE[1]
        return 100.0 * (1.0 - visited / max(1, self.numel()))

    def to_dense(self) -> Tensor:
        """int32 [B, H, q_blocks, kv_blocks]: 1 where a block is not empty."""
        return self._classes.ne(EMPTY).to(torch.int32)

    def to_string(self, grid_size: object = None, limit: object = None) -> str:
        """The picture of the first sequence and head."""
        return str(self.plan)

    def to(self, device: torch.device | str) -> BlockMask:
        """Its blocks on another device; tensors that the mask captured stay where they are."""
        found = torch.device(device)
        return BlockMask(
            self.mask_mod, self.shape, found, self.BLOCK_SIZE, self.separate_full_blocks
        )

    def __getitem__(self, index: Any) -> flex.BlockMask:
        """Of some sequences, heads or rows of blocks, as torch has it."""
        return self.as_torch()[index]

    def __repr__(self) -> str:
        return f"BlockMask(shape={self.shape}, BLOCK_SIZE={self.BLOCK_SIZE})"

    __str__ = to_string


def create_block_mask(
    mask_mod: Mod,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: torch.device | str | None = None,
    BLOCK_SIZE: int | tuple[int, int] = 128,
    _compile: bool = False,
    separate_full_blocks: bool = True,
    compute_dq_write_order: bool = False,
    dq_kv_order: bool = True,
) -> BlockMask:
    """A BlockMask of mask_mod(b, h, q_idx, kv_idx); no pair is evaluated, nor memory taken.

    B, H: None where the mask is the same for all sequences, or heads. BLOCK_SIZE: of what the
    result tells of blocks; kernels choose their own tiles. Raises AttnccError, with the function's
    own line, for what has no meaning for one pair.
    """
    size = (BLOCK_SIZE, BLOCK_SIZE) if isinstance(BLOCK_SIZE, int) else tuple(BLOCK_SIZE)
    if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ArgumentError(f"BLOCK_SIZE is {BLOCK_SIZE!r}, expected an int above 0, or two")
    if device is None:
        device = torch.accelerator.current_accelerator() or "cpu"
    shape = (1 if B is None else B), (1 if H is None else H), Q_LEN, KV_LEN
    mask = BlockMask(mask_mod, shape, torch.device(device), size, separate_full_blocks)
    _ = mask._traced  # its mistakes are told here
    return mask


def create_mask(
    mod_fn: Mod,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """bool [B, H, Q_LEN, KV_LEN] of a mask_mod, as torch's: every pair evaluated."""
    return flex.create_mask(mod_fn, B, H, Q_LEN, KV_LEN, device)


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Mod | None = None,
    block_mask: BlockMask | flex.BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Mapping[str, Any] | None = None,
    *,
    return_aux: flex.AuxRequest | None = None,
) -> Any:
    """As torch's flex_attention, compiled or not; differentiable in captured tensors too.

    query [B, Hq, L, E], key [B, Hkv, S, E], value [B, Hkv, S, Ev]; enable_gqa where Hq != Hkv.
    block_mask: of `create_block_mask` here, or torch's own, whose unlisted blocks are left out.
    kernel_options: BACKEND "AUTO" or "TRITON"; promises, as ROWS_GUARANTEED_SAFE, change nothing;
    others are errors, for schedules are found by `attncc.from_mods(...).tune`.

    Returns out [B, Hq, L, Ev]; (out, lse) with return_lse, (out, AuxOutput) with return_aux.
    Raises ArgumentError, UnsupportedError, and for mods what `attncc.from_mods` does.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor) or x.dim() != 4:
            raise ArgumentError(f"{name} is expected to be a tensor [B, H, N, E]")
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ArgumentError(
            f"query has {query.shape[1]} heads, and key has {key.shape[1]}",
            hint="pass enable_gqa=True where query heads share key heads",
        )
    if return_lse and return_aux is not None:
        raise ArgumentError("return_lse and return_aux both ask for lse", hint="leave one out")
    if return_aux is not None and return_aux.max_scores:
        raise UnsupportedError(
            "max_scores are not kept by attncc's kernels", hint="AuxRequest(lse=True) is there"
        )
    backend = _backend(kernel_options or {})
    mask_mod = None if block_mask is None else _mask_mod(block_mask, query, key)
    mods = traced_mods(score_mod, mask_mod, "flex")
    program, arguments = mods.program, mods.arguments()
    if scale is not None:
        name = SCALE
        while name in arguments:
            name += "_"
        param = ScalarParam(name, Kind.FLOAT)
        program = replace(program, params=(*program.params, param), scale=Scalar(param))
        arguments[name] = float(scale)
    attn = Attention(program, lambda: arguments)
    if return_aux is None and not return_lse:
        return attn(query, key, value, backend=backend)
    out, lse = attn(query, key, value, backend=backend, return_lse=True)
    if return_lse:
        return out, lse
    return out, AuxOutput(lse=lse if return_aux is not None and return_aux.lse else None)


def _backend(options: Mapping[str, Any]) -> str | None:
    """What kernel_options ask for that has a meaning here."""
    backend = None
    for name, value in options.items():
        if name == "BACKEND":
            if value not in BACKENDS:
                raise UnsupportedError(
                    f"kernel_options BACKEND is {value!r}, a kernel that is not attncc's",
                    hint="AUTO takes the quickest of attncc's, TRITON its portable ones",
                )
            backend = BACKENDS[value]
        elif name not in PROMISES:
            hint = (
                "leave it out: attncc chooses schedules, and attncc.from_mods(...).tune tries them"
            )
            known = ("BACKEND", *PROMISES)
            raise UnsupportedError(
                f"kernel_options has {name}, which is of torch's kernels",
                hint=suggest(name, known) or hint,
            )
    return backend


def _mask_mod(mask: BlockMask | flex.BlockMask, query: Tensor, key: Tensor) -> Mod:
    """A mask's function for these tensors, lists of blocks included."""
    if not isinstance(mask, BlockMask | flex.BlockMask):
        raise ArgumentError(
            f"block_mask is {type(mask).__name__}, expected a BlockMask",
            hint="create_block_mask(mask_mod, B, H, Q_LEN, KV_LEN)",
        )
    for what, x, length in zip(("query", "key"), (query, key), mask.seq_lengths, strict=True):
        if x.shape[2] > length:
            raise ArgumentError(
                f"{what} has {x.shape[2]} tokens, and block_mask is for {length}",
                hint="make a block mask for these lengths",
            )
    for axis, what in ((0, "sequences"), (1, "heads")):
        if mask.shape[axis] not in (1, query.shape[axis]):
            raise ArgumentError(
                f"query has {query.shape[axis]} {what}, and block_mask has {mask.shape[axis]}",
                hint="1 (or None) serves all",
            )
    return mask.mask_mod if isinstance(mask, BlockMask) else _listed(mask)


_LISTED: WeakKeyDictionary[flex.BlockMask, tuple[tuple[int, ...], Mod]] = WeakKeyDictionary()


def _listed(mask: flex.BlockMask) -> Mod:
    """Pairs of full blocks, and those of partial ones that mask_mod keeps; no others."""
    parts = mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices
    versions = tuple(x._version for x in parts if x is not None)
    if mask not in _LISTED or _LISTED[mask][0] != versions:
        _LISTED[mask] = versions, _Listed(mask)
    return _LISTED[mask][1]


class _Fixed(int):
    """A number that a program has as a constant."""


class _Listed:
    """The mask_mod of torch's lists of blocks."""

    def __init__(self, mask: flex.BlockMask) -> None:
        self.rows, self.columns = map(_Fixed, mask.BLOCK_SIZE)
        self.mask_mod = mask.mask_mod
        self.every = mask.mask_mod is noop_mask
        kinds = _kinds(mask)
        self.by = [n > 1 for n in kinds.shape[:2]]
        at = tuple(slice(None) if varies else 0 for varies in self.by)
        self.kinds = kinds[at].contiguous()

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        outer = [x for x, varies in zip((b, h), self.by, strict=True) if varies]
        kind = self.kinds[(*outer, q_idx // self.rows, kv_idx // self.columns)]
        if self.every:
            return kind > 0
        return (kind == FULL) | ((kind == PARTIAL) & self.mask_mod(b, h, q_idx, kv_idx))


def _kinds(mask: flex.BlockMask) -> Tensor:
    """int8 [B, H, q_blocks, kv_blocks] of EMPTY, PARTIAL and FULL."""
    columns = -(-mask.seq_lengths[1] // mask.BLOCK_SIZE[1])
    kinds = _marked(mask.kv_num_blocks, mask.kv_indices, columns, PARTIAL)
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        full = _marked(mask.full_kv_num_blocks, mask.full_kv_indices, columns, FULL)
        kinds = torch.maximum(kinds, full)
    while kinds.dim() < 4:
        kinds = kinds[None]
    return kinds


def _marked(counts: Tensor, index: Tensor, columns: int, kind: int) -> Tensor:
    """`kind` at the first blocks of each list, EMPTY at the rest."""
    listed = torch.arange(index.shape[-1], device=index.device) < counts[..., None]
    # One column more takes what lies beyond a list's end.
    at = torch.where(listed, index, columns).long()
    found = torch.zeros((*index.shape[:-1], columns + 1), dtype=torch.int8, device=index.device)
    return found.scatter_(-1, at, kind)[..., :columns].contiguous()
