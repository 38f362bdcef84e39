"""Prints the warp-specialised backward kernels of a Plan.

A program owns 128 keys of one key head: two warpgroups with 64 each, and a warp that brings blocks
of queries through tensor descriptors, of every query head that reads the keys. Products are
transposed, so weights and their gradients are operands of the next products as they lie in
registers. The gradients also go to shared memory, from which each warpgroup makes half of a block's
dq and adds it to a float32 buffer; one block late, so that neither waits for the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from attncc.backends.gluon import diagonals, dialect
from attncc.backends.gluon.forward import masked
from attncc.backends.gluon.hoist import Value
from attncc.backends.gluon.hoist_keys import beside, hoisted_keys
from attncc.backends.triton.backward import (
    ADD_PAIRS,
    BackwardMods,
    ds_lines,
    pair_args,
    pair_lines,
    probability_lines,
    slope_lines,
    sum_lines,
    weight_lines,
)
from attncc.backends.triton.forward import LAST, mask_lines, mod_lines, score_lines, strides
from attncc.backends.triton.lower import Reduction
from attncc.backends.triton.sections import (
    File,
    Function,
    Loop,
    Spec,
    define,
    loop,
    positions,
)
from attncc.backends.triton.text import indented
from attncc.ir.expr import KV_LAST, KV_LO, Axis, Expr, Load, axes, children
from attncc.ir.plan import Blocks, Order
from attncc.passes.fold_scale import ONE

NAMES = "backward", "round_dq"
"""The kernels of a file; one with a softmax begins with `delta`, and others with `clear`."""

COMMON = '''
@gluon.jit
def barriers(COUNT: gl.constexpr):
    """COUNT barriers, each for one arrival."""
    found = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for at in gl.static_range(COUNT):
        mbarrier.init(found.index(at), count=1)
    return found


@gluon.jit
def row_tile_of(q_tile, b, h, batch, heads, q_tiles):
    """The number of a block among all heads'; behind them all where no head has such queries."""
    end = batch * heads * q_tiles
    return gl.where(q_tile < q_tiles, (b * heads + h) * q_tiles + q_tile, end)
'''

PARTS = '''
@gluon.jit
def show(ds, ds_sm, my_ds, slot, CONSUMER: gl.constexpr):
    """Hand this warpgroup's half of ds to both."""
    ds_sm.index(slot * 2 + CONSUMER).store(ds)
    fence_async_shared()
    mbarrier.arrive(my_ds.index(slot))


@gluon.jit
def start_dq(
    ds_sm,
    k_sm,
    slot,
    nought,
    BLOCK_M: gl.constexpr,
    BLOCK_D: gl.constexpr,
    CONSUMER: gl.constexpr,
    QUARTER: gl.constexpr,
):
    """Start this warpgroup's half of ds k, [64, 64]: half the columns, or half the queries."""
    dq = gl.zeros([64, 64], gl.float32, QUARTER)
    for half in gl.static_range(2):
        ds = ds_sm.index(slot * 2 + half).slice(CONSUMER * (BLOCK_M - 64), 64, 1)
        k = k_sm.index(half + nought).reshape([64, BLOCK_D])
        k = k.slice(CONSUMER * (BLOCK_D - 64), 64, 1)
        dq = warpgroup_mma(ds.permute((1, 0)), k, dq, use_acc=half == 1, is_async=True)
    return dq


@gluon.jit
def add_dq(dq, dq_sum_ptr, block, CONSUMER: gl.constexpr, QUARTER: gl.constexpr):
    """Add to a block's sums, each thread four numbers at a time, in the order it holds them."""
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, QUARTER))[:, None]
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, QUARTER))[None, :]
    thread = row // 16 * 32 + row % 8 * 4 + column // 2 % 4
    pointers = dq_sum_ptr + (block.to(gl.int64) * 8192 + CONSUMER * 4096)
    pointers += column // 8 * 512 + thread * 4
    gl.inline_asm_elementwise(
        "red.relaxed.gpu.global.add.v4.f32 [$1], {$5, $6, $7, $8}; mov.b32 $0, 0;",
        "=r,l,l,l,l,f,f,f,f",
        [pointers.to(gl.int64, bitcast=True), dq],
        dtype=gl.int8,
        is_pure=False,
        pack=4,
    )
'''
"""The sums of a block, 8192 numbers, lie half by half in the order (8 columns, thread, 4)."""

_ROUND = '''\
"""dq = its sums times scale, rounded."""
BITS: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
block = tl.program_id(1) * q_tiles + tl.program_id(0)
b = tl.program_id(1) // heads
h = tl.program_id(1) % heads
dq_ptr += b.to(tl.int64) * dq_stride_b + h.to(tl.int64) * dq_stride_h
for part in gl.static_range(BLOCK_M * BLOCK_D // 4096):
    at = block.to(tl.int64) * (BLOCK_M * BLOCK_D) + part * 4096
    sums = tl.load(dq_sum_ptr + (at + gl.arange(0, 4096, layout=BITS))) * scale
    # (8 columns, warp, row, 2 columns, 8 rows, column) to rows and columns
    dq = sums.to(dq_ptr.dtype.element_ty).reshape([8, 4, 8, 4, 2, 2])
    dq = dq.permute((1, 4, 2, 0, 3, 5)).reshape([64, 64])
    dq = gl.convert_layout(dq, ROWS)
    rows = tl.program_id(0) * BLOCK_M + part * 64 // BLOCK_D * 64
    rows += gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))
    d = part * 64 % BLOCK_D + gl.arange(0, 64, layout=gl.SliceLayout(0, ROWS))
    n = rows.to(tl.int64)[:, None]
    keep = (rows < q_len)[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(dq_ptr + n * dq_stride_n + d[None, :], dq, mask=keep)
'''

_CLEAR = """\
block = tl.program_id(1) * q_tiles + tl.program_id(0)
clear = gl.arange(0, BLOCK_M * BLOCK_D, layout=gl.BlockedLayout([4], [32], [4], [0]))
clear_ptr = dq_sum_ptr + (block.to(tl.int64) * (BLOCK_M * BLOCK_D) + clear)
tl.store(clear_ptr, tl.cast(clear * 0, tl.float32))
"""

_DELTA = """\
ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
within = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, ROWS))
rows = tl.program_id(0) * BLOCK_M + within
b = tl.program_id(1) // heads
h = tl.program_id(1) % heads
d = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, ROWS))
keep = (rows < q_len)[:, None] & (d < VALUE_DIM)[None, :]
n = rows.to(tl.int64)[:, None]
out_ptr += b.to(tl.int64) * out_stride_b + h.to(tl.int64) * out_stride_h
dout_ptr += b.to(tl.int64) * dout_stride_b + h.to(tl.int64) * dout_stride_h
out = tl.load(out_ptr + n * out_stride_n + d[None, :], mask=keep, other=0.0).to(tl.float32)
dout = tl.load(dout_ptr + n * dout_stride_n + d[None, :], mask=keep, other=0.0).to(tl.float32)
total = tl.sum(out * dout, 1)
at = tl.program_id(1).to(tl.int64) * q_len + rows
if HAS_DLSE:
    total -= tl.load(dlse_ptr + at, mask=rows < q_len, other=0.0)
lse2 = tl.load(lse2_ptr + at, mask=rows < q_len, other=float("inf"))
tl.store(lse_rows_ptr + (block * BLOCK_M + within), lse2)
tl.store(delta_rows_ptr + (block * BLOCK_M + within), total)
"""

LINES = ("k_sm", "v_sm", "q_sm", "dout_sm", "lse_sm", "delta_sm", "ds_sm")
SIGNS = ("kv_full", "full", "my_done", "its_done", "my_ds", "its_ds")
"""Barriers: keys and a block of queries are there; a warpgroup has done with a block, or shown its
half of ds. Warpgroups and the producer wait for earlier blocks of one another only."""

COUNTS = ("full_count", "partial_count")


class Backward:
    """One readable, stand-alone file with `delta` or `clear`, `backward` and `round_dq`."""

    parts = PARTS
    """Functions that no parameter is in."""

    def __init__(self, spec: Spec) -> None:
        self.plain = File(spec)
        """Before anything was taken out of the mods."""
        self.spec = hoisted_keys(spec)
        self.file = File(self.spec)
        self.softmax = spec.lowering.softmax
        self.mods = BackwardMods(self.file)
        self.functions: list[Function] = [Function("", (), (), COMMON + self.parts)]
        self.rows = [v for v in self.spec.values if beside(v) == "[None, :]"]
        self.keys = [v for v in self.spec.values if beside(v) != "[None, :]"]
        # Without turns: sums of dq that many programs add to at once stay in the L2.
        self.loop = loop(self.plain, "kv", "q", "BLOCK_M", spread=False)
        own = {v.name for v in self.spec.values}
        self.gradients = [a for n in self._distances() for a in diagonals.arguments(n)]
        self.gradients += [f"{name}_ptr" for _, name, _, _ in self.mods.gradients]
        self.gradients += [a for a in pair_args(self.mods) if a not in self.gradients]
        known = (*self.mods.extra, *self.gradients, *LAST, *self.loop.extra)
        known += ("dq_sum_ptr", "nought", "heavy")
        reads = self._read("query", self.rows, "q_idx"), self._read("key", self.keys, "kv_idx")
        self.read_rows, self.read_keys = reads
        known += tuple(name for read in reads if read for name in read.extra)
        self.known = tuple(name for name in dict.fromkeys(known) if name not in own)
        """What any function may be given beyond its own variables."""
        self.shared = self._is_shared()
        """Whether a group's heads take turns at each block, instead of one going after the other.

        Programs of neighboring keys that begin at the same block, the last of all, then stay
        together: those with fewer blocks do not run ahead to later heads, and what they all read
        and add to stays in the L2. Where they begin apart, as with a window, they are together
        when they have the same number of blocks of each head.
        """

    def _distances(self) -> list[str]:
        """Gradients that are summed along diagonals."""
        return [name for g, name, _, _ in self.mods.gradients if g.by_distance]

    def _is_shared(self) -> bool:
        plan = self.spec.lowering.plan
        exprs = [value.expr for value in self.keys]
        if plan.blocks is Blocks.LISTS:
            exprs.append(plan.mask)
        elif plan.query_ranges is not None:
            segments = (*plan.query_ranges.visit, *plan.query_ranges.unmasked)
            exprs += [end for s in segments for end in (s.lo, s.hi)]
            if any(_moves(s.hi) for s in plan.query_ranges.visit):
                return False
        varies = any(axes(expr) & Axis.H for expr in exprs)
        return not (varies or list(self.mods.sums("kv")))

    def text(self) -> str:
        if any(not gradient.by_distance for gradient, *_ in self.mods.pairs()):
            self.file.functions.append(Function("add_pairs", (), (), ADD_PAIRS.lstrip()))
        if self._distances():
            self.functions.insert(1, Function("", (), (), diagonals.FUNCTIONS))
        kernels = [self._begin(), self._main(Tiles(self)), self._round()]
        parts = [f.text for f in (*self.functions, *kernels)]
        return dialect.text(self.file, "backward", parts)

    def define(self, name: str, args: Iterable[str], body: str) -> Function:
        function = define(name, tuple(args), body)
        self.functions.append(function)
        return function

    def _read(self, what: str, values: list[Value], position: str) -> Function | None:
        if not values:
            return None
        exprs = [value.expr for value in values]
        doc = f"What a {what} reads once."
        leading = ("scale", "b", "h", position)
        return self.file.function(f"read_{what}", doc, exprs, leading)

    @property
    def state(self) -> list[str]:
        return ["dk", "dv", *(name for name, _ in self.mods.sums("kv"))]

    # -- one block of queries

    def _fold(self) -> Function:
        state = ", ".join(self.state)
        after = self._after_scores()
        body = f'''\
"""Add a block of queries to {state}, and to dq what is left of the block before."""
slot = step % STAGES
phase = (step // STAGES) & 1
nought = step & nought  # what varies in a loop is not moved out of it, and spilled
{self._ahead(after)}\
k = k_sm.index(CONSUMER + nought).reshape([64, BLOCK_D])
v = v_sm.index(CONSUMER + nought).reshape([64, BLOCK_D])
q = q_sm.index(slot).reshape([BLOCK_M, BLOCK_D])
dout = dout_sm.index(slot).reshape([BLOCK_M, BLOCK_D])
mbarrier.wait(full.index(slot), phase)
zero = gl.zeros([64, BLOCK_M], gl.float32, SCORES)
qk = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
dp = warpgroup_mma(v, dout.permute((1, 0)), zero, use_acc=False, is_async=True)
{after}
# -- dq of the block before, which the other warpgroup has shown long ago
dv = warpgroup_mma(weights, dout, dv, is_async=True)
mbarrier.wait(its_ds.index(slot), phase)
dq = start_dq(ds_sm, k_sm, slot, nought, BLOCK_M, BLOCK_D, CONSUMER, QUARTER)
dk = warpgroup_mma(slopes, q, dk, is_async=True)
dv, dq = warpgroup_mma_wait(1, deps=(dv, dq))
add_dq(dq, dq_sum_ptr, tile_before, CONSUMER, QUARTER)
dk = warpgroup_mma_wait(0, deps=(dk,))
mbarrier.arrive(my_done.index(slot))
return {state}'''
        args = [*self.state, "step", "tile_before", *LINES, *SIGNS]
        args += ["columns", "first_diagonal", "b", "h", "kv_head", "q_tile"]
        args += [v.name for v in self.keys]
        return self.define("fold", [*args, *self.known], body)

    def _ahead(self, after: str) -> str:
        """Lines that find a block's positions, and read what its queries need."""
        text = ""
        if re.search(r"\b(q_lo|q_idx|rows)\b", after):
            text += "q_lo = q_tile * BLOCK_M\n"
        clamp = _lines(positions(self.plain, Axis.Q, "q_idx", "q_len", keys=True))
        if re.search(r"\b(q_idx|rows)\b", after):
            text += "rows = q_lo + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, SCORES))\n"
            text += f"q_idx = rows\n{clamp}"
        if self.read_rows:
            # A number of each query in turn, which one load reads.
            start = "q_tile * BLOCK_M"
            line = "gl.BlockedLayout([1], [32], [4], [0])"
            text += f"in_a_row = {start} + gl.arange(0, BLOCK_M, layout={line})\n"
            text += clamp.replace("q_idx", "in_a_row")
            names = ", ".join(v.name for v in self.rows)
            call = self.read_rows.call("scale", "b", "h", "in_a_row")
            text += f"{names} = {call}\n"
        return text

    def _after_scores(self) -> str:
        """Lines from the products qk and dp, still being made, to weights and slopes."""
        text = ""
        if self.softmax:
            text += "lse = lse_sm.index(slot).load(gl.SliceLayout(0, SCORES))\n"
            if self.mods.rows:
                text += f"lse -= {self.mods.row_term_at('reference_row(q_idx, kv_len)')}\n"
        for value in self.rows:
            given = f"gl.convert_layout({value.name}, gl.SliceLayout(0, SCORES))[None, :]"
            text += f"{value.name} = {given}\n"
        text += "qk = warpgroup_mma_wait(1, deps=(qk,))\n"
        body = self._weights()
        for value in self.keys:
            if value.name in body and beside(value):
                text += f"{value.name} = {value.name}{beside(value)}\n"
        if "kv_idx" in body:
            text += "kv_idx = columns\n"
        return text + body

    def _weights(self) -> str:
        spec, mods = self.spec, self.mods
        q, kv = "q_idx[None, :]", "kv_idx[:, None]"
        weighed = probability_lines(spec, "[None, :]") if self.softmax else weight_lines(spec)
        if self._refuses_once():
            before, keep = mask_lines(self.file, mods, transposed=True)
            text = "score = qk\n"
            text += f"if MASKED:\n{indented(_lines(before))}" if before else ""
            text += _lines(mod_lines(self.file, mods, transposed=True))
            text += weighed.split("if MASKED:")[0]
            text += masked([*keep, "p = tl.where(keep, p, 0.0)"])
        else:
            text = score_lines(self.file, mods, "qk", transposed=True) + weighed
        text += "weights = gl.convert_layout(p.to(q.dtype), WEIGHTS, assert_trivial=True)\n"
        early = self.softmax and mods.slope is not None and not mods.gradients
        if early:  # the scores are not needed any more when dp is there
            text += slope_lines(mods, q, kv, "p")
        if self.softmax:
            text += "delta = delta_sm.index(slot).load(gl.SliceLayout(0, SCORES))\n"
        text += """\
after = (step + 1) % STAGES
mbarrier.wait(its_done.index(after), (((step + 1) // STAGES) & 1) ^ 1)
dp = warpgroup_mma_wait(0, deps=(dp,))
"""
        text += ds_lines(spec, "[None, :]")
        text += sum_lines(mods, "kv", q, kv) + self._rows(q, kv)
        text += self._diagonals(q, kv) + pair_lines(mods, q, kv, by_distance=False)
        text += "" if early else slope_lines(mods, q, kv)
        return f"""\
{text}\
ds = ds.to(q.dtype)
slopes = gl.convert_layout(ds, WEIGHTS, assert_trivial=True)
show(ds, ds_sm, my_ds, after, CONSUMER)
"""

    def _refuses_once(self) -> bool:
        """Whether weights of 0 are all that masked pairs need, and more than keys decide."""
        plain = self.softmax and self.mods.slope is None and not self.mods.gradients
        return plain and self.mods.key_mask is not None

    def _rows(self, q: str, kv: str) -> str:
        """Lines that add the gradients of what is read once a query."""
        text = ""
        for gradient, name, factor, _ in self.mods.gradients:
            if gradient.reduction is Reduction.ROW:
                text += f"""\
{name}_ds = ds * {factor.call("qk", "scale", "b", "h", q, kv)}
if MASKED:
    {name}_ds = tl.where(keep, {name}_ds, 0.0)
{name}_at = {name}_ptr + ((b * heads + h).to(tl.int64) * q_len + rows)
tl.atomic_add({name}_at, tl.sum({name}_ds, 0), mask=rows < q_len, sem="relaxed")
"""
        return text

    def _diagonals(self, q: str, kv: str) -> str:
        """Lines that add gradients by distance."""
        text = ""
        for gradient, name, factor, _ in self.mods.gradients:
            if not gradient.by_distance:
                continue
            if gradient.factor == ONE and self.softmax:  # weights of masked pairs are 0
                text += f"{name}_ds = ds\n"
            else:
                text += f"{name}_ds = ds * {factor.call('qk', 'scale', 'b', 'h', q, kv)}\n"
                text += f"if MASKED:\n    {name}_ds = tl.where(keep, {name}_ds, 0.0)\n"
            text += diagonals.lines(name)
        return text

    # -- partitions

    def _main(self, tiles: Tiles) -> Function:
        consume = self._consume(tiles, self._fold())
        return self._kernel(consume, self._produce(tiles))

    def _each(self, tiles: Tiles, fold: Function) -> str:
        """Lines that fold all blocks of a query head into what a warpgroup owns."""
        sums = [name for name, _ in self.mods.sums("kv")]
        each = f"{tiles.found}\n"
        if self._distances():
            each = f"{diagonals.FIRST}{each}"
        if self.read_keys:
            each += "kv_idx = columns\n"
            each += _lines(positions(self.plain, Axis.KV, "kv_idx", "kv_len", keys=True))
            names = ", ".join(v.name for v in self.keys)
            each += f"{names} = {self.read_keys.call('scale', 'b', 'h', 'kv_idx')}\n"
        each += "".join(
            f"{name} = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORES))\n" for name in sums
        )

        def walk(start: str, end: str, tile: Function, masked: str) -> str:
            return f"""\
{self._blocks(start, end, tile)}\
    {fold.assigned(", ".join(self.state), {"MASKED": masked})}
    tile_before = row_tile_of(q_tile, b, h, batch, heads, q_tiles)
    step += 1
"""

        start = "0"
        if tiles.full is not None:
            # Keys that are not there must not reach dq.
            each += "start = tl.where(kv_tile * BLOCK_N + BLOCK_N > kv_len, 0, full_count)\n"
            each += walk("0", "start", tiles.full, "False")
            start = "start"
        each += walk(start, "full_count + partial_count", tiles.any, "True")
        for name in sums:
            at = "(b * heads + h).to(tl.int64) * kv_len + columns"
            each += f"tl.store({name}_ptr + {at}, {name}, mask=columns < kv_len)\n"
        return each

    def _consume(self, tiles: Tiles, fold: Function) -> Function:
        each = self._each(tiles, fold)
        body = f'''\
"""The part of a warpgroup: 64 of the tile's keys."""
{tiles.mine}
columns = gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
columns += kv_tile * BLOCK_N + CONSUMER * 64
dk = gl.zeros([64, BLOCK_D], gl.float32, SUMS)
dv = gl.zeros([64, BLOCK_D], gl.float32, SUMS)

# -- before the first block: nothing, which is added to a block of sums that nobody reads
show(gl.zeros([64, BLOCK_M], ds_sm.dtype, SCORES), ds_sm, my_ds, 0, CONSUMER)
tile_before = batch * heads * q_tiles
step = 0
mbarrier.wait(kv_full.index(0), 0)
{self._heads(each)}

# -- dq of the last block
mbarrier.wait(its_ds.index(step % STAGES), (step // STAGES) & 1)
dq = start_dq(ds_sm, k_sm, step % STAGES, 0, BLOCK_M, BLOCK_D, CONSUMER, QUARTER)
dq = warpgroup_mma_wait(0, deps=(dq,))
add_dq(dq, dq_sum_ptr, tile_before, CONSUMER, QUARTER)

# -- store both through this warpgroup's values, which it has done with
kv_lo = kv_tile * BLOCK_N + CONSUMER * 64
stored = v_sm.index(CONSUMER)
stored.reshape([64, BLOCK_D]).store(dv.to(stored.dtype))
fence_async_shared()
tma.async_copy_shared_to_global(dv_desc, [b, kv_head, kv_lo, 0], stored)
tma.store_wait(0)
stored.reshape([64, BLOCK_D]).store((dk * scale).to(stored.dtype))
fence_async_shared()
tma.async_copy_shared_to_global(dk_desc, [b, kv_head, kv_lo, 0], stored)
tma.store_wait(0)'''
        args = [*LINES, *SIGNS, "dk_desc", "dv_desc", *self.known]
        return self.define("consume", [a for a in args if a != "kv_head"], body)

    def _produce(self, tiles: Tiles) -> Function:
        names = ("lse", "delta") if self.softmax else ()
        size = "q_desc.block_type.nbytes + dout_desc.block_type.nbytes"
        if names:
            more = "lse_rows_desc.block_type.nbytes + delta_rows_desc.block_type.nbytes"
            size = f"(\n    {size}\n    + {more}\n)"
        rows = "".join(
            f"    tma.async_copy_global_to_shared({n}_rows_desc, [row_tile * BLOCK_M], "
            f"full.index(slot), {n}_sm.index(slot))\n"
            for n in names
        )
        block = ""
        if names:
            block = "    row_tile = row_tile_of(q_tile, b, h, batch, heads, q_tiles)\n"
        each = f"""\
{tiles.found}
{self._blocks("0", "full_count + partial_count", tiles.any)}\
    slot = step % STAGES
    free = ((step // STAGES) & 1) ^ 1
    mbarrier.wait(my_done.index(slot), free)
    mbarrier.wait(its_done.index(slot), free)
    mbarrier.expect(full.index(slot), SIZE)
    at = [b, h, q_tile * BLOCK_M, 0]
    tma.async_copy_global_to_shared(q_desc, at, full.index(slot), q_sm.index(slot))
    tma.async_copy_global_to_shared(dout_desc, at, full.index(slot), dout_sm.index(slot))
{block}{rows}    step += 1"""
        body = f'''\
"""The part of the warp that brings keys and values, then blocks of queries."""
{tiles.mine}
mbarrier.expect(
    kv_full.index(0), 2 * k_desc.block_type.nbytes + 2 * v_desc.block_type.nbytes
)
for half in gl.static_range(2):
    at = [b, kv_head, kv_tile * BLOCK_N + half * 64, 0]
    tma.async_copy_global_to_shared(k_desc, at, kv_full.index(0), k_sm.index(half))
    tma.async_copy_global_to_shared(v_desc, at, kv_full.index(0), v_sm.index(half))
SIZE: gl.constexpr = {size}
step = 0
{self._heads(each)}'''
        args = [*DESCRIPTORS, *LINES, *SIGNS, *self.known]
        return self.define("produce", [a for a in args if a != "kv_head"], body)

    def _heads(self, each: str) -> str:
        """A group's query heads: one after another, unless `_blocks` goes through them."""
        if self.shared:
            return f"h = kv_head * GROUP\n{each}"
        return f"for g in range(0, GROUP):\n    h = kv_head * GROUP + g\n{indented(each)}"

    def _blocks(self, start: str, end: str, tile: Function) -> str:
        """The head of a loop over blocks, and over heads where they share them."""
        if not self.shared:
            return f"for i in range({start}, {end}):\n    {tile.assigned('q_tile', {})}\n"
        end = f"({end})" if " " in end else end
        start = start if start == "0" else f"{start} * GROUP"
        found = tile.assigned("q_tile", {"i": "at // GROUP"})
        head = "h = kv_head * GROUP + at % GROUP"
        return f"for at in range({start}, {end} * GROUP):\n    {head}\n    {found}\n"

    # -- kernels

    def _kernel(self, consume: Function, produce: Function) -> Function:
        def part(function: Function, mine: int) -> str:
            names = {"my_done": f"done_{mine}", "its_done": f"done_{1 - mine}"}
            names |= {"my_ds": f"ds_{mine}", "its_ds": f"ds_{1 - mine}", "CONSUMER": str(mine)}
            given = ", ".join(names.get(a, a) for a in function.extra)
            return f"        ({function.name}, ({given})),\n"

        names = ["q", "dout", *(("lse_rows", "delta_rows") if self.softmax else ())]
        slots = "".join(
            f"{n.removesuffix('_rows')}_sm = tiles_of({n}_desc, STAGES)\n" for n in names
        )
        self.functions.append(Function("", (), (), TILES_OF))
        body = f"""\
SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
QUARTER: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
k_sm = tiles_of(k_desc, 2)
v_sm = tiles_of(v_desc, 2)
{slots}\
ds_sm = gl.allocate_shared_memory(
    q_desc.dtype,
    [2 * STAGES, 64, BLOCK_M],
    gl.NVMMASharedLayout.get_default_for([64, BLOCK_M], q_desc.dtype),
)
kv_full = barriers(1)
full = barriers(STAGES)
done_0 = barriers(STAGES)
done_1 = barriers(STAGES)
ds_0 = barriers(STAGES)
ds_1 = barriers(STAGES)
fence_async_shared()
gl.warp_specialize(
    [
{part(consume, 0)}{part(consume, 1)}{part(produce, 0)}    ],
    [4, 1],
    [REGISTERS, 24],
)
"""
        args = (*DESCRIPTORS, "dk_desc", "dv_desc", *self.known)
        return define("backward", args, body, kernel=True)

    def _begin(self) -> Function:
        name, doc, body = "clear", "Clear the sums of dq.", _CLEAR
        if self.softmax:
            name, body = "delta", _CLEAR + _DELTA
            doc = "delta = sum(out * dout) - dlse beside lse2, for whole blocks; clears sums of dq."
        args = ["out_ptr", *strides("out"), "dout_ptr", *strides("dout"), "dlse_ptr", "lse2_ptr"]
        args += ["lse_rows_ptr", "delta_rows_ptr", "dq_sum_ptr", "heads", "q_len", "q_tiles"]
        return define(name, args, f'"""{doc}"""\n{body}', kernel=True)

    def _round(self) -> Function:
        args = ["dq_sum_ptr", "dq_ptr", *strides("dq"), "scale", "heads", "q_len", "q_tiles"]
        return define("round_dq", args, _ROUND, kernel=True)


DESCRIPTORS = ("q_desc", "k_desc", "v_desc", "dout_desc", "lse_rows_desc", "delta_rows_desc")

TILES_OF = """
@gluon.jit
def tiles_of(desc, COUNT: gl.constexpr):
    return gl.allocate_shared_memory(desc.dtype, [COUNT] + desc.block_type.shape, desc.layout)
"""


class Tiles:
    """Functions that say which keys a program owns, and number their blocks of queries."""

    def __init__(self, printed: Backward) -> None:
        found = printed.loop
        numbers = _numbers(found)
        tile = "rank"
        if printed.spec.lowering.plan.key_order is Order.REVERSED:
            tile = "kv_tiles - 1 - rank"
        body = f'''\
"""Which keys are a program's: a tile of one key head, one head after another.

The first `heavy` tiles of all heads go before the rest.
"""
at = tl.program_id(0)
bh_count = batch * (heads // GROUP)
bh = at % bh_count
rank = at // bh_count
if rank >= heavy:
    at -= heavy * bh_count
    bh = at // (kv_tiles - heavy)
    rank = heavy + at % (kv_tiles - heavy)
b = bh // (heads // GROUP)
kv_head = bh % (heads // GROUP)
kv_tile = {tile}
return b, kv_head, kv_tile'''
        own = [a for a in printed.known if a != "kv_head"]
        place = printed.define("place", own, body)
        self.mine = place.assigned("b, kv_head, kv_tile", {})
        counts = ["0" if found.full is None else found.full[0], found.partial[0]]
        body = '"""How many blocks of queries one head\'s part of a tile visits, and which."""\n'
        if re.search(r"\bkv_(lo|last)\b", found.setup):
            body += "kv_lo = kv_tile * BLOCK_N\n"
        if re.search(r"\bkv_last\b", found.setup):
            body += "kv_last = tl.minimum(kv_lo + BLOCK_N, kv_len) - 1\n"
        body += f"{found.setup.strip()}\n"
        body += _lines(f"{n} = {c}" for n, c in zip(COUNTS, counts, strict=True) if n != c)
        returned = ", ".join((*COUNTS, *numbers))
        args = ("b", "h", "kv_head", "kv_tile", *own)
        blocks = printed.define("blocks_of", args, f"{body}return {returned}")
        self.found = blocks.assigned(returned, {})

        def numbering(name: str, doc: str, rank: str, tiles: list[str]) -> Function:
            body = f'"""{doc}"""\ni = {rank}\n'
            body += _lines(f"tile = {tile.format(tile='tile')}" for tile in tiles)
            return printed.define(name, ("i", *COUNTS, *numbers), f"{body}return tile")

        rank = "full_count + partial_count - 1 - i"
        doc = "The i-th block, counted from full ones on: the last partial one first."
        self.any = numbering("partial_block", doc, rank, found.partial[1])
        self.full: Function | None = None
        if found.full is not None:
            # Programs of a head then read the same block at the same time.
            doc = "The i-th unmasked block, the last one first."
            self.full = numbering("full_block", doc, "full_count - 1 - i", found.full[1])
            given = ("i", *self.full.extra, *self.any.extra)
            body = f'''\
"""The i-th block: full ones, then partial ones."""
if i < full_count:
    {self.full.assigned("tile", {})}
else:
    {self.any.assigned("tile", {})}
return tile'''
            self.any = printed.define("any_block", given, body)


def _moves(end: Expr) -> bool:
    """Whether an end moves with every key, not only where what is read there changes."""
    if isinstance(end, Load):
        return False
    return end in (KV_LO, KV_LAST) or any(map(_moves, children(end)))


def _numbers(found: Loop) -> tuple[str, ...]:
    """The names, set before, that number a loop's tiles."""
    texts = [*found.partial[1], *(found.full[1] if found.full else ())]
    targets = re.findall(r"^(\w+(?:, \w+)*) =", found.setup, re.MULTILINE)
    assigned = {name for names in targets for name in names.split(", ")} - {*COUNTS}
    words = dict.fromkeys(word for text in texts for word in re.findall(r"\w+", text))
    return tuple(word for word in words if word in assigned)


def _lines(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
