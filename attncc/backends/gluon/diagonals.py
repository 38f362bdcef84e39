"""Gradients of what is read by the distance of a pair: sums along diagonals of tiles.

A warpgroup's tile of ds lies in registers as wgmma leaves it: groups of 8 x 8 pairs, of which a
thread has two beside each other. Groups on one diagonal of groups are added in registers, 16 to 9;
those sums, [8 keys, 8 queries] a diagonal of groups, are added to memory. What is left, to add up
the diagonals within them, is done once for all tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attncc.backends.gluon import configs
from attncc.backends.triton.lower import Gradient
from attncc.binding import Binding
from attncc.ir.evaluate import Env, evaluate_unchecked
from attncc.ir.expr import Axis

GROUP = 8
"""Queries and keys of a group."""

AHEAD = 8
"""Groups before a key tile's first diagonal: its warps' keys, 48 before the last."""

FUNCTIONS = '''
@gluon.jit
def halves(x):
    """The groups of even number, and the odd ones."""
    x = x.reshape([4, 8, x.shape[2] // 2, 2, 4, 2])
    return gl.split(x.permute((0, 1, 2, 4, 5, 3)))


@gluon.jit
def apart(x):
    """Eight groups of queries."""
    even, odd = halves(x)
    e0, e1 = halves(even)
    o0, o1 = halves(odd)
    x0, x4 = halves(e0)
    x2, x6 = halves(e1)
    x1, x5 = halves(o0)
    x3, x7 = halves(o1)
    return x0, x1, x2, x3, x4, x5, x6, x7


@gluon.jit
def add_groups(pointers, low, high):
    """Add two neighboring diagonals of groups, each thread its four numbers."""
    sums = gl.join(low, high).permute((0, 1, 2, 3, 5, 4)).reshape([512])
    sums = gl.convert_layout(sums, gl.BlockedLayout([4], [32], [4], [0]), assert_trivial=True)
    gl.inline_asm_elementwise(
        "red.relaxed.gpu.global.add.v4.f32 [$1], {$5, $6, $7, $8}; mov.b32 $0, 0;",
        "=r,l,l,l,l,f,f,f,f",
        [pointers.to(gl.int64, bitcast=True), sums],
        dtype=gl.int8,
        is_pure=False,
        pack=4,
    )


@gluon.jit
def add_diagonals(ds, sums_ptr, diagonal):
    """Add 64 keys x 64 queries to sums by diagonals of groups, their first query's from 0."""
    # (warp, 2, 8 keys, 8, 4, 2 queries); a warp's 16 keys are two groups
    first, second = gl.split(ds.reshape([4, 2, 8, 8, 4, 2]).permute((0, 2, 3, 4, 5, 1)))
    a0, a1, a2, a3, a4, a5, a6, a7 = apart(first)
    b0, b1, b2, b3, b4, b5, b6, b7 = apart(second)
    number = gl.arange(0, 512, layout=gl.BlockedLayout([4], [32], [4], [0]))
    within = number % 128 - number // 128 * 128  # (2 diagonals, lane, 2), a warp 16 keys on
    pointers = sums_ptr + (diagonal.to(gl.int64) * 64 + within)
    add_groups(pointers - 128, gl.zeros_like(b0), b0)
    add_groups(pointers, a0 + b1, a1 + b2)
    add_groups(pointers + 128, a2 + b3, a3 + b4)
    add_groups(pointers + 256, a4 + b5, a5 + b6)
    add_groups(pointers + 384, a6 + b7, a7)
'''


def lines(name: str) -> str:
    """Lines that add a fold's `name`_ds."""
    return f"""\
{name}_sums = {name}_ptr + (b.to(tl.int64) * {name}_stride_b + h.to(tl.int64) * {name}_stride_h)
diagonal = first_diagonal + q_tile * (BLOCK_M // 8)
if BLOCK_M == 64:
    add_diagonals({name}_ds, {name}_sums, diagonal)
else:
    low, high = gl.split({name}_ds.reshape([64, 2, 64]).permute((0, 2, 1)))
    add_diagonals(low, {name}_sums, diagonal)
    add_diagonals(high, {name}_sums, diagonal + 8)
"""


FIRST = f"first_diagonal = (kv_tiles - kv_tile) * (BLOCK_N // 8) - CONSUMER * 8 + {AHEAD}\n"
"""The line that numbers the diagonal of a warpgroup's first key and query 0."""


def arguments(name: str) -> tuple[str, ...]:
    return f"{name}_ptr", f"{name}_stride_b", f"{name}_stride_h"


def buffer(gradient: Gradient, binding: Binding, rows: int, like: Tensor) -> Tensor:
    """Sums to add to, [B|1, H|1, pairs of diagonals, 8 keys, 4, 2 diagonals, 2], cleared.

    rows: queries of a tile.
    """
    varies = gradient.load.axes
    batch = binding.batch if varies & Axis.B else 1
    heads = binding.heads if varies & Axis.H else 1
    count = _key_groups(binding) + -(-binding.q_len // rows) * (rows // GROUP) + 2 * AHEAD
    return like.new_zeros(batch, heads, count // 2, GROUP, 4, 2, 2)


def _key_groups(binding: Binding) -> int:
    return -(-binding.kv_len // configs.BACKWARD_KEYS) * (configs.BACKWARD_KEYS // GROUP)


def collected(gradient: Gradient, sums: Tensor, binding: Binding, data: Tensor) -> Tensor:
    """The gradient of a captured tensor, float32, of the sums of its diagonals."""
    batch, heads = sums.shape[:2]
    # [B, H, 8 keys, queries]: what lies at (key, query) has the distance query - key
    lined = sums.permute(0, 1, 3, 2, 5, 4, 6).reshape(batch, heads, GROUP, -1)
    length = lined.shape[-1]
    total = lined.new_zeros(batch, heads, length + GROUP)
    for key in range(GROUP):
        total[..., GROUP - key : GROUP - key + length] += lined[:, :, key]
    begin = GROUP + GROUP * (_key_groups(binding) + AHEAD)  # of distance 0
    total = total[..., begin - binding.kv_len + 1 : begin + binding.q_len]
    device = binding.device
    b = torch.arange(batch, device=device)[:, None, None]
    h = torch.arange(heads, device=device)[None, :, None]
    positions = {"b": b, "h": h, "kv_head": h // (binding.heads // binding.kv_heads)}
    positions["q_idx"] = torch.arange(1 - binding.kv_len, binding.q_len, device=device)
    positions["kv_idx"] = torch.zeros((), dtype=torch.int64, device=device)
    env = Env(positions, binding.scalars, binding.tensors, device=device)
    at = tuple(
        evaluate_unchecked(index, env).expand(total.shape).clamp(0, max(size - 1, 0))
        for index, size in zip(gradient.load.at, data.shape, strict=True)
    )
    found = torch.zeros(data.shape, dtype=torch.float32, device=device)
    return found if 0 in data.shape else found.index_put_(at, total, accumulate=True)
