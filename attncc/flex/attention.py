"""flex_attention: FlexAttention's call, by attncc."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest
from torch.nn.attention.flex_attention import BlockMask as TorchBlockMask

from attncc.binding import check_inputs
from attncc.errors import ArgumentError, UnsupportedError
from attncc.flex.block_mask import BlockMask, from_block_mask
from attncc.flex.variants import variant

BACKENDS = {"AUTO": None, "TRITON": "triton"}

PROMISES = frozenset(
    ("ROWS_GUARANTEED_SAFE", "BLOCKS_ARE_CONTIGUOUS", "PRESCALE_QK", "FORCE_USE_FLEX_ATTENTION")
)
"""Options that allow something which is not needed here: results are the same without."""


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Any] | None = None,
    block_mask: BlockMask | TorchBlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Mapping[str, Any] | None = None,
    *,
    return_aux: AuxRequest | None = None,
) -> Any:
    """torch.nn.attention.flex_attention.flex_attention by attncc's kernels, eager or compiled.

    query [B, Hq, Q, D], key [B, Hkv, KV, D], value [B, Hkv, KV, Dv]; Hq != Hkv needs enable_gqa,
    and a batch of 1 in key and value serves all of query's where there is a block_mask. Out
    [B, Hq, Q, Dv]; with return_lse (out, lse), with return_aux (out, AuxOutput), lse [B, Hq, Q].

    score_mod, block_mask: as in torch, functions made anew in each call included. kernel_options:
    BACKEND "AUTO" or "TRITON"; options that allow a shortcut are taken, and change nothing; those
    that choose a schedule are an error. Differentiable on the CPU too. Under torch.compile the call
    is a graph break.

    Raises ArgumentError, BoundsError, UnsupportedError.
    """
    if torch.compiler.is_compiling():
        plain = torch.compiler.disable(flex_attention)  # type: ignore[no-untyped-call]
        return plain(
            query,
            key,
            value,
            score_mod,
            block_mask,
            scale,
            enable_gqa,
            return_lse,
            kernel_options,
            return_aux=return_aux,
        )
    backend = _backend(kernel_options)
    if return_lse and return_aux is not None:
        raise ArgumentError(
            "return_lse and return_aux are both given",
            hint="write return_aux=AuxRequest(lse=True) alone",
        )
    if return_aux is not None and return_aux.max_scores:
        raise UnsupportedError(
            "flex_attention has no max_scores", hint="ask for AuxRequest(lse=True)"
        )
    key, value = _broadcast(query, key, value, block_mask is not None)
    check_inputs(query, key, value)
    _check_heads(query, key, enable_gqa)
    of = variant(score_mod, _mask_mod(query, key, block_mask))
    if scale is not None and scale != 1 / math.sqrt(query.shape[3]):
        of = of.scaled(float(scale))
    wants_lse = return_lse or (return_aux is not None and return_aux.lse)
    if not wants_lse:
        out = of.attention(query, key, value, backend=backend, **of.arguments)  # type: ignore[call-overload]
        return out if return_aux is None else (out, AuxOutput())
    out, lse = of.attention(query, key, value, return_lse=True, backend=backend, **of.arguments)  # type: ignore[call-overload]
    return (out, lse) if return_aux is None else (out, AuxOutput(lse=lse))


def _mask_mod(
    query: Tensor, key: Tensor, block_mask: BlockMask | TorchBlockMask | None
) -> Callable[..., Any] | None:
    if block_mask is None:
        return None
    mask = from_block_mask(block_mask)
    batch, heads, q_len, _ = query.shape
    found = mask.pairs(q_len, key.shape[2], batch, heads)
    if mask.has_lists and mask.device != query.device:
        raise ArgumentError(
            f"block_mask is on {mask.device}, but query is on {query.device}",
            hint=f"move it: block_mask.to({str(query.device)!r})",
        )
    return found


def _broadcast(query: Tensor, key: Tensor, value: Tensor, has_mask: bool) -> tuple[Tensor, Tensor]:
    """Key and value of one sequence for all of query's."""
    tensors = all(isinstance(x, Tensor) and x.dim() == 4 for x in (query, key, value))
    if not tensors or not has_mask or not key.shape[0] == value.shape[0] == 1 != query.shape[0]:
        return key, value
    return key.expand(query.shape[0], -1, -1, -1), value.expand(query.shape[0], -1, -1, -1)


def _check_heads(query: Tensor, key: Tensor, enable_gqa: bool) -> None:
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ArgumentError(
            f"query has {query.shape[1]} heads and key has {key.shape[1]}",
            hint="write enable_gqa=True where several heads of query share one of key",
        )


def _backend(options: Mapping[str, Any] | None) -> str | None:
    """The backend that kernel_options ask for; raises where they ask for what is not here."""
    for name, value in (options or {}).items():
        plain = name.removeprefix("fwd_").removeprefix("bwd_")
        if name == "BACKEND":
            if value not in BACKENDS:
                raise UnsupportedError(
                    f"kernel_options has BACKEND = {value!r}",
                    hint="leave it out, or write 'AUTO' or 'TRITON'",
                )
        elif plain not in PROMISES:
            raise UnsupportedError(
                f"kernel_options has {name}, which chooses how torch's kernels run",
                hint="leave it out: attncc chooses by shape, and tuned schedules are kept by "
                "attncc.from_mods(score_mod, mask_mod).tune(q, k, v)",
            )
    return BACKENDS[(options or {}).get("BACKEND", "AUTO")]
