"""Prints the warp-specialised backward kernels of a Plan for heads of more than 128 columns.

A program owns 64 keys of one key head, and goes through blocks of 64 queries. dk and dv take the
registers of a warpgroup each, so its two warpgroups share out a block's products:

- that of dv makes scores and weights, and hands over `factor`, where ds = factor * (dp - delta);
- that of dk makes dp and ds, and hands over ds. Each then makes part of the columns of dq.

Weights are added to dv, and ds to the first warpgroup's part of dq, a block late: tensor cores work
on them while it weighs the next scores.

No wait is in a circle. Of block i, `factor` waits for q, and ds of i - 1; ds waits for dout and
`factor`. q is brought when ds of i - STAGES has been used, and then dout when `factor` of i -
STAGES + 1 has been handed over: all wait for earlier blocks alone. Few barriers do, since who hands
over `factor` has read q of i and ds of i - 2, and who hands over ds has read dout and `factor`.
"""

from __future__ import annotations

from attncc.backends.gluon import configs
from attncc.backends.gluon.backward import DESCRIPTORS, TILES_OF, Backward, Tiles
from attncc.backends.triton.backward import probability_lines, slope_lines, weight_lines
from attncc.backends.triton.forward import score_lines
from attncc.backends.triton.sections import Function, Spec, define
from attncc.ir.program import Normalize

PARTS = '''
@gluon.jit
def start_pairs(a, b, DIM: gl.constexpr, SCORES: gl.constexpr):
    """Start a product of keys and queries, [64, 64], without all columns that are padding."""
    zero = gl.zeros([64, 64], gl.float32, SCORES)
    b = b.permute((1, 0))
    if DIM > 192:
        return warpgroup_mma(a, b, zero, use_acc=False, is_async=True)
    else:
        begin = b.slice(0, 128, 0)
        pairs = warpgroup_mma(a.slice(0, 128, 1), begin, zero, use_acc=False, is_async=True)
        return warpgroup_mma(a.slice(128, 64, 1), b.slice(128, 64, 0), pairs, is_async=True)


@gluon.jit
def show(ds, ds_sm, ds_full, slot):
    """Hand a block's ds to both warpgroups."""
    ds_sm.index(slot).store(ds)
    fence_async_shared()
    mbarrier.arrive(ds_full.index(slot))


@gluon.jit
def start_dq(
    ds_sm,
    k_sm,
    slot,
    nought,
    BLOCK_D: gl.constexpr,
    FIRST: gl.constexpr,
    COLUMNS: gl.constexpr,
):
    """Start some columns of ds k, [64, COLUMNS]."""
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    k = k_sm.index(nought).reshape([64, BLOCK_D]).slice(FIRST, COLUMNS, 1)
    zero = gl.zeros([64, COLUMNS], gl.float32, PART)
    ds = ds_sm.index(slot).permute((1, 0))
    return warpgroup_mma(ds, k, zero, use_acc=False, is_async=True)


@gluon.jit
def add_dq(
    dq,
    dq_sum_ptr,
    block,
    BLOCK_D: gl.constexpr,
    FIRST: gl.constexpr,
    COLUMNS: gl.constexpr,
):
    """Add to a block's sums, each thread four numbers at a time, in the order it holds them."""
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, PART))[:, None]
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, PART))[None, :]
    thread = row // 16 * 32 + row % 8 * 4 + column // 2 % 4
    pointers = dq_sum_ptr + (block.to(gl.int64) * BLOCK_D + FIRST) * 64
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
"""The sums of a block lie in the order (8 columns, thread, 4), as `round_dq` reads them."""

COPIED = '''
@gluon.jit
def copied(x):
    """The same in other registers."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
    )
'''

FACTORS = """\
# Four numbers of a thread, then those of the next: no two threads share a bank.
FACTORS: gl.constexpr = gl.SharedLinearLayout(
    [
        [0, 1], [8, 0],
        [0, 2], [0, 4], [1, 0], [2, 0], [4, 0], [16, 0], [32, 0],
        [0, 8], [0, 16], [0, 32],
    ]
)
"""

LINES = ("k_sm", "v_sm", "q_sm", "dout_sm", "lse_sm", "delta_sm", "ds_sm", "factor_sm")
SIGNS = ("kv_full", "q_full", "q_done", "dout_full", "dout_done", "factor_full", "ds_full")


def backward_source(spec: Spec, columns: int) -> str:
    """The backward's file, for tiles of so many columns."""
    return (_Wide if configs.is_wide(columns) else Backward)(spec).text()


class _Wide(Backward):
    parts = PARTS

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        if not self.softmax:
            self.functions.append(Function("", (), (), COPIED))
        assert not self.mods.gradients, "captured tensors have no gradients here"

    @property
    def state(self) -> list[str]:
        return ["dv", "weights"]

    # -- one block of queries

    def _fold(self) -> Function:
        after = self._after_scores()
        # Not before dv is there: its product reads the last weights, whose registers these take.
        rounded = "p.to(q.dtype)" if self.softmax else "copied(new)"
        body = f'''\
"""Weigh a block of queries; add the one before to dv, and to the last columns of dq."""
slot = step % STAGES
before = tl.maximum(step - 1, 0)  # of the first, whose weights are 0: itself
nought = step & nought  # what varies in a loop is not moved out of it, and spilled
{self._ahead(after)}\
k = k_sm.index(nought).reshape([64, BLOCK_D])
q = q_sm.index(slot).reshape([BLOCK_M, BLOCK_D])
dout = dout_sm.index(before % STAGES).reshape([BLOCK_M, BLOCK_D])
mbarrier.wait(q_full.index(slot), (step // STAGES) & 1)
qk = start_pairs(k, q, HEAD_DIM, SCORES)
mbarrier.wait(dout_full.index(before % STAGES), (before // STAGES) & 1)
dv = warpgroup_mma(weights, dout, dv, is_async=True)
{after}
# -- the warpgroup of dk has read the last ones when it shows its ds
mbarrier.wait(ds_full.index(slot), (step // STAGES) & 1)
factor_sm.store(factor)
mbarrier.arrive(factor_full.index(0))
dv = warpgroup_mma_wait(0, deps=(dv,))
mbarrier.arrive(dout_done.index(before % STAGES), pred=step > 0)
weights = gl.convert_layout({rounded}, WEIGHTS, assert_trivial=True)
dq = start_dq(ds_sm, k_sm, slot, nought, BLOCK_D, 128, REST)
dq = warpgroup_mma_wait(0, deps=(dq,))
add_dq(dq, dq_sum_ptr, tile_before, BLOCK_D, 128, REST)
return dv, weights'''
        args = [*self.state, "step", "tile_before", *LINES, *SIGNS]
        args += ["columns", "b", "h", "kv_head", "q_tile", *(v.name for v in self.keys)]
        return self.define("fold_dv", [*args, *self.known], body)

    def _weights(self) -> str:
        """Lines from scores to weights and factors."""
        spec, mods = self.spec, self.mods
        text = score_lines(self.file, mods, "qk", transposed=True)
        text += probability_lines(spec, "[None, :]") if self.softmax else weight_lines(spec)
        if not self.softmax:  # p and factor together would take too many registers
            text += "new = p.to(q.dtype)\n"
        match spec.lowering.normalize:
            case Normalize.SOFTMAX:
                text += "factor = p\n"
            case Normalize.SIGMOID:
                text += "factor = p * (1.0 - p)\n"
            case _:
                text += "factor = gl.full([64, BLOCK_M], 1.0, gl.float32, SCORES)\n"
                text += "if MASKED:\n    factor = tl.where(keep, factor, 0.0)\n"
        return text + slope_lines(mods, "q_idx[None, :]", "kv_idx[:, None]", "factor")

    def _fold_dk(self) -> Function:
        delta, less = "", "dp"
        if self.softmax:
            delta = "delta = delta_sm.index(slot).load(gl.SliceLayout(0, SCORES))\n"
            less = "(dp - delta[None, :])"
        body = f'''\
"""Add a block of queries to dk, and to the first columns of dq."""
slot = step % STAGES
phase = (step // STAGES) & 1
after = (step + 1) % STAGES
nought = step & nought
v = v_sm.index(nought).reshape([64, BLOCK_D])
q = q_sm.index(slot).reshape([BLOCK_M, BLOCK_D])
dout = dout_sm.index(slot).reshape([BLOCK_M, BLOCK_D])
mbarrier.wait(dout_full.index(slot), phase)
dp = start_pairs(v, dout, VALUE_DIM, SCORES)
{delta}\
dp = warpgroup_mma_wait(0, deps=(dp,))
mbarrier.wait(factor_full.index(0), step & 1)
ds = factor_sm.load(SCORES) * {less}
ds = ds.to(q.dtype)
slopes = gl.convert_layout(ds, WEIGHTS, assert_trivial=True)
show(ds, ds_sm, ds_full, after)
dq = start_dq(ds_sm, k_sm, after, nought, BLOCK_D, 0, 128)
mbarrier.wait(q_full.index(slot), phase)
dk = warpgroup_mma(slopes, q, dk, is_async=True)
dq = warpgroup_mma_wait(1, deps=(dq,))
add_dq(dq, dq_sum_ptr, row_tile, BLOCK_D, 0, 128)
dk = warpgroup_mma_wait(0, deps=(dk,))
mbarrier.arrive(q_done.index(slot))
return dk'''
        args = ["dk", "step", "row_tile", *LINES, *SIGNS, *self.known]
        return self.define("fold_dk", args, body)

    # -- partitions

    def _main(self, tiles: Tiles) -> Function:
        if self.spec.lowering.normalize is Normalize.NONE and self.mods.slope is None:
            # ptxas 12.8 waits for each wgmma by itself where all factors are 1.
            tiles.full = None
        parts = (
            self._consume(tiles, self._fold()),
            self._consume_dk(tiles, self._fold_dk()),
            self._produce(tiles),
        )
        self.functions.append(Function("", (), (), TILES_OF))
        return self._launch(parts)

    def _part(self, name: str, body: str) -> Function:
        args = [*DESCRIPTORS, "dk_desc", "dv_desc", *LINES, *SIGNS, *self.known]
        return self.define(name, [a for a in args if a != "kv_head"], body)

    def _consume(self, tiles: Tiles, fold: Function) -> Function:
        body = f'''\
"""The part of the warpgroup of dv."""
{tiles.mine}
columns = kv_tile * BLOCK_N + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
dv = gl.zeros([64, BLOCK_D], gl.float32, SUMS)
weights = gl.zeros([64, BLOCK_M], ds_sm.dtype, WEIGHTS)
tile_before = batch * heads * q_tiles
step = 0
mbarrier.wait(kv_full.index(0), 0)
{self._heads(self._each(tiles, fold))}

# -- what is left of the last block
if step > 0:
    before = step - 1
    dout = dout_sm.index(before % STAGES).reshape([BLOCK_M, BLOCK_D])
    mbarrier.wait(dout_full.index(before % STAGES), (before // STAGES) & 1)
    dv = warpgroup_mma(weights, dout, dv, is_async=True)
    dv = warpgroup_mma_wait(0, deps=(dv,))
mbarrier.wait(ds_full.index(step % STAGES), (step // STAGES) & 1)
dq = start_dq(ds_sm, k_sm, step % STAGES, 0, BLOCK_D, 128, REST)
dq = warpgroup_mma_wait(0, deps=(dq,))
add_dq(dq, dq_sum_ptr, tile_before, BLOCK_D, 128, REST)

# -- store through dout, which both warpgroups have done with
stored = dout_sm.index(0)
stored.reshape([64, BLOCK_D]).store(dv.to(stored.dtype))
fence_async_shared()
tma.async_copy_shared_to_global(dv_desc, [b, kv_head, kv_tile * BLOCK_N, 0], stored)
tma.store_wait(0)'''
        return self._part("consume_dv", body)

    def _consume_dk(self, tiles: Tiles, fold: Function) -> Function:
        each = f"""\
{tiles.found}
{self._blocks("0", "full_count + partial_count", tiles.any)}\
    row_tile = row_tile_of(q_tile, b, h, batch, heads, q_tiles)
    {fold.assigned("dk", {})}
    step += 1"""
        body = f'''\
"""The part of the warpgroup of dk."""
{tiles.mine}
dk = gl.zeros([64, BLOCK_D], gl.float32, SUMS)
# Before the first block: nothing, which is added to a block of sums that nobody reads.
show(gl.zeros([64, BLOCK_M], ds_sm.dtype, SCORES), ds_sm, ds_full, 0)
step = 0
mbarrier.wait(kv_full.index(0), 0)
{self._heads(each)}

# -- store through the values, which nobody else reads
stored = v_sm.index(0)
stored.reshape([64, BLOCK_D]).store((dk * scale).to(stored.dtype))
fence_async_shared()
tma.async_copy_shared_to_global(dk_desc, [b, kv_head, kv_tile * BLOCK_N, 0], stored)
tma.store_wait(0)'''
        return self._part("consume_dk", body)

    def _produce(self, tiles: Tiles) -> Function:
        each = f"""\
{tiles.found}
{self._blocks("0", "full_count + partial_count", tiles.any)}\
    slot = step % STAGES
    free = ((step // STAGES) & 1) ^ 1
    at = [b, h, q_tile * BLOCK_M, 0]
    row_tile = row_tile_of(q_tile, b, h, batch, heads, q_tiles)
{self._bring("q", "lse")}\
{self._bring("dout", "delta")}\
    step += 1"""
        body = f'''\
"""The part of the warp that brings keys and values, then blocks of queries."""
{tiles.mine}
at = [b, kv_head, kv_tile * BLOCK_N, 0]
mbarrier.expect(kv_full.index(0), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
tma.async_copy_global_to_shared(k_desc, at, kv_full.index(0), k_sm.index(0))
tma.async_copy_global_to_shared(v_desc, at, kv_full.index(0), v_sm.index(0))
step = 0
{self._heads(each)}'''
        return self._part("produce", body)

    def _bring(self, tile: str, row: str) -> str:
        """Lines that bring a block's part, once the warpgroup that reads it last has done so."""
        size, more = f"{tile}_desc.block_type.nbytes", ""
        if self.softmax:
            size += f" + {row}_rows_desc.block_type.nbytes"
            more = f"""\
    tma.async_copy_global_to_shared(
        {row}_rows_desc, [row_tile * BLOCK_M], {tile}_full.index(slot), {row}_sm.index(slot)
    )
"""
        return f"""\
    mbarrier.wait({tile}_done.index(slot), free)
    mbarrier.expect({tile}_full.index(slot), {size})
    tma.async_copy_global_to_shared({tile}_desc, at, {tile}_full.index(slot), {tile}_sm.index(slot))
{more}"""

    # -- kernel

    def _launch(self, parts: tuple[Function, ...]) -> Function:
        given = "".join(f"        ({f.name}, ({', '.join(f.extra)})),\n" for f in parts)
        names = ["q", "dout", *(("lse_rows", "delta_rows") if self.softmax else ())]
        slots = "".join(
            f"{n.removesuffix('_rows')}_sm = tiles_of({n}_desc, STAGES)\n" for n in names
        )
        body = f"""\
SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
REST: gl.constexpr = 64 if HEAD_DIM <= 192 else 128
{FACTORS}\
k_sm = tiles_of(k_desc, 1)
v_sm = tiles_of(v_desc, 1)
{slots}\
ds_sm = gl.allocate_shared_memory(
    q_desc.dtype,
    [STAGES, 64, BLOCK_M],
    gl.NVMMASharedLayout.get_default_for([64, BLOCK_M], q_desc.dtype),
)
factor_sm = gl.allocate_shared_memory(gl.float32, [64, BLOCK_M], FACTORS)
kv_full = barriers(1)
q_full = barriers(STAGES)
q_done = barriers(STAGES)
dout_full = barriers(STAGES)
dout_done = barriers(STAGES)
factor_full = barriers(1)
ds_full = barriers(STAGES)
fence_async_shared()
gl.warp_specialize(
    [
{given}    ],
    [4, 1],
    [REGISTERS, 24],
)
"""
        args = (*DESCRIPTORS, "dk_desc", "dv_desc", *self.known)
        return define("backward", args, body, kernel=True)
