"""Attention in branches: results over parts of the keys as one, and columns added to the keys."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from attncc.errors import ArgumentError


def merge(branches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """out [B, H, Q, Dv] and lse [B, H, Q] of a softmax over the keys of all branches.

    branches: (out, lse) of each, as calls with return_lse=True give them, of one shape, dtype and
    device. A key in two branches counts twice; lse + log(w) counts a branch's keys w times. A row
    whose lse is -inf has no keys, and its out is not read; where all are -inf, out is 0.

    Computed in float32, or wider where an input is, and rounded once: out has the branches' dtype
    and layout. Differentiable in every out and lse. Raises ArgumentError.
    """
    outs, lses = _checked(tuple(branches))
    wide = torch.promote_types(torch.promote_types(outs[0].dtype, lses[0].dtype), torch.float32)
    if outs[0].is_cuda and wide is torch.float32:
        from attncc.backends.triton import merge as kernels

        return kernels.merge(outs, lses)
    stacked = torch.stack([lse.to(wide) for lse in lses])
    top = stacked.detach().amax(0)
    empty = top == -math.inf
    powers = torch.exp(stacked - torch.where(empty, 0, top))
    total = torch.where(empty, 1, powers.sum(0))
    mixed = sum(
        part.to(wide).masked_fill(weight == 0, 0) * weight
        for part, weight in zip(outs, (powers / total)[..., None], strict=True)
    )
    assert isinstance(mixed, Tensor)
    out = torch.empty_like(outs[0]).copy_(mixed)
    return out, torch.where(empty, -math.inf, top + total.log())


def append_columns(k: Tensor, v: Tensor, more_k: Tensor, more_v: Tensor) -> tuple[Tensor, Tensor]:
    """k [B, Hkv, KV + C, D] and v [B, Hkv, KV + C, Dv] with C columns after their own keys.

    Programs tell the columns by kv_idx >= tokens, with `tokens: int` for KV, and weigh a column
    that stands for n keys, as the mean of theirs does, by score + log(n). Raises ArgumentError.
    """
    for name, own, more in (("k", k, more_k), ("v", v, more_v)):
        shape = (*own.shape[:2], more_k.shape[2], *own.shape[3:]) if more_k.dim() == 4 else ()
        if more.shape != shape:
            raise ArgumentError(
                f"columns for {name} have shape {list(more.shape)}, but {name} {list(own.shape)}",
                hint="they share all axes but the tokens', of which both have as many",
            )
    return torch.cat([k, more_k.to(k.dtype)], 2), torch.cat([v, more_v.to(v.dtype)], 2)


def _checked(
    branches: tuple[tuple[Tensor, Tensor], ...],
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    if not branches:
        raise ArgumentError("there is no branch to merge", hint="merge([(out, lse), ...])")
    first = branches[0]
    for number, pair in enumerate(branches):
        if len(pair) != 2 or not all(isinstance(x, Tensor) for x in pair):
            raise ArgumentError(
                f"branch {number} is no pair (out, lse)", hint="call it with return_lse=True"
            )
        out, lse = pair
        if out.dim() != 4 or lse.shape != out.shape[:-1]:
            raise ArgumentError(
                f"branch {number} has out {list(out.shape)} and lse {list(lse.shape)}, "
                "expected [B, H, Q, Dv] and [B, H, Q]"
            )
        for what, x, like in (("out", out, first[0]), ("lse", lse, first[1])):
            if (x.shape, x.dtype, x.device) != (like.shape, like.dtype, like.device):
                raise ArgumentError(
                    f"branch {number} has {what} {_described(x)}, but branch 0 {_described(like)}"
                )
    outs, lses = zip(*branches, strict=True)
    return outs, lses


def _described(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)} on {x.device}"
