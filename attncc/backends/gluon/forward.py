"""Prints the warp-specialised forward kernel of a Plan.

One warp brings tiles of q, k and v through tensor descriptors into rings in shared memory; two or
three warpgroups each own 64 of a tile's queries. A warpgroup starts the product of q with the next
keys before it adds the weighted values of the last ones, so tensor cores work under its softmax,
and the others' beside it. Programs stay, and take the next tile of work from a counter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from attncc.backends.gluon import dialect
from attncc.backends.gluon.hoist import Value, hoisted
from attncc.backends.triton.forward import LAST, Mods, in_log2_units, mask_lines, mod_lines
from attncc.backends.triton.sections import (
    File,
    Function,
    Loop,
    Spec,
    define,
    loop,
    positions,
    which_tile,
)
from attncc.backends.triton.text import indented
from attncc.ir.expr import Axis
from attncc.ir.plan import Blocks
from attncc.ir.program import Normalize

RING = '''
@gluon.jit
def bring(desc, ring, step, b, head, row, STAGES: gl.constexpr):
    """Fill a ring's slot with the tile at `row`, once it is free."""
    tiles, full, empty = ring
    slot = step % STAGES
    mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [b, head, row, 0], full.index(slot), tiles.index(slot))


@gluon.jit
def arrived(ring, step, STAGES: gl.constexpr):
    """The tile in a ring's slot, once it is there."""
    tiles, full, empty = ring
    mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
    return tile_in(ring, step, STAGES)


@gluon.jit
def tile_in(ring, step, STAGES: gl.constexpr):
    tile = ring[0].index(step % STAGES)
    return tile.reshape([tile.shape[2], tile.shape[3]])


@gluon.jit
def release(ring, step, STAGES: gl.constexpr):
    """One warpgroup has done with a ring's slot."""
    tiles, full, empty = ring
    mbarrier.arrive(empty.index(step % STAGES))


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, each for so many arrivals."""
    found = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for at in gl.static_range(COUNT):
        mbarrier.init(found.index(at), count=ARRIVALS)
    return found


@gluon.jit
def ring_of(desc, STAGES: gl.constexpr, READERS: gl.constexpr):
    """Slots for tiles, and barriers that say which are full and which are empty again."""
    tiles = gl.allocate_shared_memory(
        desc.dtype, [STAGES] + desc.block_type.shape, desc.layout
    )
    return tiles, barriers(STAGES, 1), barriers(STAGES, READERS)
'''

WORDS = """
@gluon.jit
def put(words, at, number):
    words.index(at).store(gl.full([1], number, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))


@gluon.jit
def look(words, at):
    return gl.max(words.index(at).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
"""

PACKED = """
@gluon.jit
def packed(p, dtype: gl.constexpr):
    \"\"\"Weights rounded, two in a register; ptxas would swap halves carried around a loop.\"\"\"
    ROUND: gl.constexpr = "cvt.rn.bf16x2.f32" if dtype == gl.bfloat16 else "cvt.rn.f16x2.f32"
    low, high = gl.split(p.reshape([p.shape[0], p.shape[1] // 2, 2]))
    return gl.inline_asm_elementwise(
        ROUND + " $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def unpacked(p, dtype: gl.constexpr, WEIGHTS: gl.constexpr):
    \"\"\"The same as an operand of a product.\"\"\"
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [p], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
    )
    p = gl.join(low, high).reshape([p.shape[0], p.shape[1] * 2]).to(dtype, bitcast=True)
    return gl.convert_layout(p, WEIGHTS, assert_trivial=True)
"""

_ROWS = """\
q_lo = q_tile * BLOCK_M + CONSUMER * 64
rows = q_lo + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
"""

ASK = """
@gluon.jit
def ask(counter_ptr, works):
    \"\"\"The piece of work after the next; the last to ask leaves the counter as it was.\"\"\"
    asked = gl.atomic_add(counter_ptr, 1, sem="relaxed")
    if asked == works + gl.num_programs(0) - 1:
        tl.store(counter_ptr, 0)
    return gl.num_programs(0) + asked
"""

IN_A_ROW = "IN_A_ROW: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])\n"
"""A number of each key in turn, which one load reads; by pairs, each thread would read many."""

READ = ("scale", "b", "h", "kv_tile", "kv_len", "columns")
"""What reading a tile's keys ahead takes."""

NOTHING = Function("", (), (), "")

AGAIN = """\
# The same q: ptxas must not count on what it set before a loop that may be skipped.
q = tile_in(q_ring, turn * CONSUMERS + CONSUMER + {nought}, CONSUMERS * Q_STAGES)
"""
"""ptxas 12.8 does, of wgmma's descriptors; `sass.py` finds such kernels."""

RINGS = ("q_ring", "k_ring", "v_ring", "next_ring", "out_sm")
TILE = ("work", "b", "h", "kv_head", "q_tile", "partial_count", "full_count", "first")
"""What names a tile of work: a query tile, how many key tiles it has, and the first of them."""


def forward_source(spec: Spec, consumers: int, out_in_q: bool) -> str:
    """One readable, stand-alone file with the kernel `forward`.

    consumers: warpgroups, each with 64 queries of a tile.
    out_in_q:  the output leaves through the shared memory of q, of which there is no more.
    """
    return _Forward(spec, consumers, out_in_q).text()


class _Forward:
    def __init__(self, spec: Spec, consumers: int, out_in_q: bool) -> None:
        self.consumers, self.out_in_q = consumers, out_in_q
        self.plain = File(spec)
        """Before anything was taken out of the mods."""
        self.spec = hoisted(replace(spec, columns=True))
        self.file = File(self.spec)
        self.softmax = spec.lowering.softmax
        self.functions: list[Function] = []
        values = self.spec.values
        self.reads = [
            _Read(self.file, "read_row", "q_idx", [v for v in values if not v.of_keys]),
            _Read(
                self.file, "read_keys", "kv_idx", [v for v in values if v.of_keys and not v.masks]
            ),
            _Read(self.file, "read_mask", "kv_idx", [v for v in values if v.of_keys and v.masks]),
        ]
        self.mods = Mods(self.file)
        self.loop = _walk(self.file)
        self.own = tuple(value.name for value in values)
        known = (*self.mods.extra, *self._sink_extra(), *LAST, *self.loop.extra)
        known += ("nought", *(name for read in self.reads for name in read.extra))
        self.known = tuple(name for name in dict.fromkeys(known) if name not in (*self.own, *TILE))
        """What any function may be given beyond its own variables."""

    def text(self) -> str:
        tiles, weigh = self._place(), self._weigh()
        consume = self._consume(tiles, weigh, self._attend(weigh))
        self._kernel(consume, self._produce(tiles), len(tiles.names))
        return dialect.text(self.file, "forward", [RING, PACKED, *(f.text for f in self.functions)])

    def _define(self, name: str, args: Iterable[str], body: str, kernel: bool = False) -> Function:
        function = define(name, tuple(args), body, kernel=kernel)
        self.functions.append(function)
        return function

    def _sink_extra(self) -> tuple[str, ...]:
        sink = self.spec.lowering.sink
        return () if sink is None else self.file.extras([sink])

    # -- tiles of work

    def _place(self) -> Tiles:
        """Functions that say where a piece of work lies and which key tiles it has."""
        text = which_tile(self.spec.lowering.plan.query_order, "q")
        lines = text.replace("tl.program_id(0)", "at").strip().split("\n")[1:]
        numbers = _numbers(self.loop)
        counts = self.loop.partial[0], "0" if self.loop.full is None else self.loop.full[0]
        tiles = self._numbering(numbers)
        body = _doc(
            "A query tile and its key tiles, `swizzle` heads at a time; partial ones first."
        )
        body += _lines(["at = tl.minimum(work, works - 1)", *lines, "kv_head = h // GROUP"])
        if re.search(r"\bq_(lo|last)\b", self.loop.setup):
            body += "q_lo = q_tile * BLOCK_M\n"
        if re.search(r"\bq_last\b", self.loop.setup):
            body += "q_last = tl.minimum(q_lo + BLOCK_M, q_len) - 1\n"
        body += f"\n{self.loop.setup.strip()}\n"
        body += _lines(f"{n} = {c}" for n, c in zip(COUNTS, counts, strict=True) if n != c)
        body += f"""\

# -- a tile without keys is given one; its mask keeps none of them
first = 0
if partial_count + full_count > 0:
{indented(tiles.numbered("0", "first"))}
partial_count = tl.maximum(partial_count, 1 - tl.minimum(full_count, 1))
{_returned((*TILE, *numbers))}"""
        names = (*TILE, *numbers)
        place = self._define("place", ("work", "works", *self.known), body)
        slots = len(names)
        given = "".join(f"put(words, slot * {slots} + {i}, {n})\n" for i, n in enumerate(names))
        found = "".join(f"{n} = look(words, slot * {slots} + {i})\n" for i, n in enumerate(names))
        self.functions.append(Function("", (), (), WORDS))
        body = f"""\
{_doc("Tell the consumers their next tile of work.")}\
words, full, empty = next_ring
slot = turn % 2
mbarrier.wait(empty.index(slot), ((turn // 2) & 1) ^ 1)
{given}\
mbarrier.arrive(full.index(slot))"""
        give = self._define("give", ("next_ring", "turn", *names), body)
        body = f"""\
{_doc("The next tile of work, as the producer describes it.")}\
words, full, empty = next_ring
slot = turn % 2
mbarrier.wait(full.index(slot), (turn // 2) & 1)
{found}\
mbarrier.arrive(empty.index(slot))
{_returned(names)}"""
        take = self._define("take", ("next_ring", "turn"), body)
        return replace(tiles, place=place, give=give, take=take, names=names)

    def _numbering(self, numbers: tuple[str, ...]) -> Tiles:
        def define(name: str, doc: str, tiles: list[str]) -> Function:
            body = _doc(f"The number of the i-th {doc} key tile.") + _numbered(tiles)
            return self._define(name, ("i", *numbers, *COUNTS, "index_ptr"), body)

        partial = define("partial_tile", "partial", self.loop.partial[1])
        if self.loop.full is None:
            return Tiles(partial, None)
        return Tiles(partial, define("full_tile", "unmasked", self.loop.full[1]))

    # -- one tile of keys

    def _weigh(self) -> Function:
        spec = self.spec
        body = "kv_lo = kv_tile * BLOCK_N\nkv_idx = kv_lo + columns\n"
        for value in spec.values:
            line = f"{value.name} = {value.name}{value.suffix}\n"
            body += f"if MASKED:\n    {line}" if value.masks else line if value.suffix else ""
        before, keep = mask_lines(self.file, self.mods)
        # Positions kept readable would pass for the last key's.
        if spec.bounded and not positions(self.file, Axis.KV, "kv_idx", "kv_len"):
            before.remove("inside = kv_idx < kv_len")
            keep.remove("keep = keep & inside[None, :]")
        if before:
            body += f"if MASKED:\n{indented(_lines(before))}"
        if self.mods.score is not None and "kv_column" in self.mods.score.extra:
            body += "kv_column = columns[None, :]\n"
        body += _lines(mod_lines(self.file, self.mods))
        if self.softmax:
            doc = '"""Weights of a tile of scores beside the running softmax (l_i, m_i)."""\n'
            body += masked([*keep, 'score = tl.where(keep, score, float("-inf"))'])
            body += _softmax_lines(spec) + "return p, l_i, m_i, alpha"
        else:
            doc = '"""Weights of a tile of scores."""\n'
            sigmoid = spec.lowering.normalize is Normalize.SIGMOID
            body += f"p = {'tl.sigmoid(score)' if sigmoid else 'score'}\n"
            body += masked([*keep, "p = tl.where(keep, p, 0.0)"]) + "return p"
        args = ("score", "l_i", "m_i", *self.own, "columns", "b", "h", "kv_head", "q_idx", "q_lo")
        return self._define("weigh", (*args, "kv_tile", *self.known), doc + body)

    def _read_ahead(self, masked: str) -> str:
        """Lines that read what the mods need of a tile of keys, while its products are made."""
        text = ""
        for read in self.reads[1:]:
            if not read.values:
                continue
            if not text:
                text = "kv_idx = kv_tile * BLOCK_N + gl.arange(0, BLOCK_N, layout=IN_A_ROW)\n"
                text = IN_A_ROW + text
                text += _lines(positions(self.plain, Axis.KV, "kv_idx", "kv_len"))
            if read.name == "read_mask":
                unread = "".join(f"    {value.name} = columns\n" for value in read.values)
                text += f"if {masked}:\n{indented(read.lines)}\nelse:\n{unread}"
            else:
                text += f"{read.lines}\n"
        return text

    def _attend(self, weigh: Function) -> Function:
        body = f'''\
"""Start q with the next keys, add the last values under p, and weigh the new scores."""
k = arrived(k_ring, step + 1, STAGES)
score = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
v = arrived(v_ring, step, STAGES)
acc = warpgroup_mma(unpacked(p, q.dtype, WEIGHTS), v, acc, is_async=True)
{self._read_ahead("MASKED")}\
score = warpgroup_mma_wait(1, deps=(score,))
release(k_ring, step + 1, STAGES)
{self._weighed(weigh, "new")}
acc = warpgroup_mma_wait(0, deps=(acc,))
release(v_ring, step, STAGES)
'''
        if self.softmax:
            body += "acc = acc * gl.convert_layout(alpha, OUT_ROWS, assert_trivial=True)[:, None]\n"
        body += "p = packed(new, q.dtype)\n"
        body += f"return {', '.join(self.state)}, step + 1"
        args = dict.fromkeys((*self.state, "step", "q", *RINGS, "zero", "columns", *weigh.extra))
        read = [name for r in self.reads[1:] for name in (*r.extra, *READ)]
        keys = [v.name for r in self.reads[1:] for v in r.values]
        local = ("score", "alpha", *keys)
        return self._define("attend", [a for a in (*args, *read) if a not in local], body)

    @property
    def state(self) -> tuple[str, ...]:
        return ("acc", "l_i", "m_i", "p") if self.softmax else ("acc", "p")

    def _weighed(self, weigh: Function, name: str, masked: str = "MASKED") -> str:
        targets = f"{name}, l_i, m_i, alpha" if self.softmax else name
        return weigh.assigned(targets, {"MASKED": masked})

    # -- partitions

    def _begin(self, tiles: Tiles) -> Function:
        read = self.reads[0]
        body = f"""\
{_doc("Take a tile of work, start its first product, and read what its queries need.")}\
tile = take(next_ring, turn)
{_unpacked(tiles.names, "tile")}
q = arrived(q_ring, turn * CONSUMERS + CONSUMER, CONSUMERS * Q_STAGES)
k = arrived(k_ring, step, STAGES)
score = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
"""
        if read.values:
            body += f"{_ROWS}q_idx = rows\n"
            body += _lines(positions(self.plain, Axis.Q, "q_idx", "q_len"))
            body += f"{read.line}\n"
        body += f"return {', '.join(('tile', *(v.name for v in read.values), 'score'))}"
        args = (*RINGS, "turn", "step", "zero", *self.known)
        names = {*tiles.names, *(value.name for value in read.values)}
        return self._define("begin", [a for a in args if a not in names], body)

    def _consume(self, tiles: Tiles, weigh: Function, attend: Function) -> Function:
        begin = self._begin(tiles)
        read = ["tile", *(v.name for v in self.reads[0].values)]
        begun = f"{', '.join(read)}, score"
        # The tile that is stored still needs its own.
        after = [f"{name}_after" for name in read]
        following = begin.assigned(
            f"{', '.join(after)}, score", {"turn": "turn + 1", "step": "step + 1"}
        )
        release = "release(q_ring, turn * CONSUMERS + CONSUMER, CONSUMERS * Q_STAGES)\n"
        store = self._store()
        if self.out_in_q:
            end = f"""\
acc = warpgroup_mma_wait(0, deps=(acc,))
release(v_ring, step, STAGES)
{store}
tma.store_wait(0)
{release}{following}
"""
        else:
            end = f"""\
{following}
acc = warpgroup_mma_wait(1, deps=(acc,))
release(v_ring, step, STAGES)
{store}
"""
        body = f"""\
{_doc("The part of a warpgroup: 64 queries of each tile of work.")}\
zero = gl.zeros([64, BLOCK_N], gl.float32, SCORES)
columns = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
step = 0
turn = 0
{begin.assigned(begun, {})}
score = warpgroup_mma_wait(0, deps=(score,))
while tile[0] < works:
{indented(_unpacked(tiles.names, "tile"))}
    release(k_ring, step, STAGES)
{indented(self._rows(weigh))}
{indented(self._keys(tiles, weigh, attend))}
    {"" if self.out_in_q else release}
    # -- the last values, and the first product of the next tile of work
    v = arrived(v_ring, step, STAGES)
    acc = warpgroup_mma(unpacked(p, q.dtype, WEIGHTS), v, acc, is_async=True)
{indented(end)}
    score = warpgroup_mma_wait(0, deps=(score,))
{indented(_lines(f"{one} = {other}" for one, other in zip(read, after, strict=True)))}\
    step += 1
    turn += 1
tma.store_wait(0)"""
        args = (*RINGS, "out_desc", "lse_ptr", "lse2_ptr", "works", *self.known)
        return self._define("consume", args, body)

    def _rows(self, weigh: Function) -> str:
        """Lines that begin a query tile."""
        text = _ROWS
        if self.mods.rows or "q_idx" in weigh.extra:
            text += "q_idx = rows\n" + _lines(positions(self.plain, Axis.Q, "q_idx", "q_len"))
        text += "acc = gl.zeros([64, BLOCK_DV], gl.float32, OUT)\n"
        if self.softmax:
            text += "l_i = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORES))\n"
            text += 'm_i = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))\n'
        return text

    def _keys(self, tiles: Tiles, weigh: Function, attend: Function) -> str:
        """Lines that fold all key tiles of a query tile but the last values."""
        state = ", ".join((*self.state, "step"))

        def walk(start: str, count: str, tile: Function, masked: str, again: str = "") -> str:
            return f"""\
for i in range({start}, {count}):
{indented(again)}\
    {tile.assigned("kv_tile", {})}
    {attend.assigned(state, {"MASKED": masked})}
"""

        text = f"""\
q = arrived(q_ring, turn * CONSUMERS + CONSUMER, CONSUMERS * Q_STAGES)
kv_tile = first
{self._read_ahead("True")}\
{self._weighed(weigh, "p", "True")}
p = packed(p, q.dtype)
{walk("1", "partial_count", tiles.partial, "True")}"""
        if tiles.full is not None:
            start = "1 - tl.minimum(partial_count, 1)"
            if self.out_in_q:  # across the loop the descriptors of such a wide q would spill
                again = AGAIN.format(nought="(step & nought)")
                text += walk(start, "full_count", tiles.full, "False", again)
            else:
                text += AGAIN.format(nought="nought")
                text += walk(start, "full_count", tiles.full, "False")
        return text

    def _store(self) -> str:
        text = self._lse() if self.softmax else ""
        if self.out_in_q:
            text += "out = q_ring[0].index(CONSUMER)\n"
        else:
            text += "out = out_sm.index(CONSUMER)\ntma.store_wait(0)\n"
        text += """\
out.reshape([64, BLOCK_DV]).store(acc.to(out.dtype))
fence_async_shared()
tma.async_copy_shared_to_global(out_desc, [b, h, q_lo, 0], out)"""
        return text

    def _lse(self) -> str:
        """Lines that divide by the sum of weights, and store its logarithm."""
        text = "# -- a row that kept no key is 0 and its lse -inf\nempty = l_i == 0.0\n"
        factor, lse2 = "1.0 / tl.where(empty, 1.0, l_i)", "lse"
        if self.spec.lowering.sink is not None:
            lines, (sink,) = self.file.printer.body([self.spec.lowering.sink])
            text += _lines([*lines, f"sink = {sink}", "sink *= 1.4426950408889634"])
            text += """\
m_new = tl.maximum(m_i, sink)
alpha = tl.where(empty, 0.0, tl.exp2(m_i - m_new))
l_i = l_i * alpha + tl.exp2(sink - m_new)
m_i = m_new
"""
            factor = "alpha / l_i"
        text += f"factor = gl.convert_layout({factor}, OUT_ROWS, assert_trivial=True)\n"
        text += "acc = acc * factor[:, None]\nlse = m_i + tl.log2(l_i)\n"
        if self.mods.rows:
            lse2 = "lse2"
            text += f"lse2 = lse + {self.mods.row_term_at('reference_row(q_idx, kv_len)')}\n"
            text += f"lse += {self.mods.row_term_at('q_idx')}\n"
        return (
            text
            + f"""\
at = (b * heads + h).to(tl.int64) * q_len + rows
tl.store(lse2_ptr + at, tl.where(empty, float("inf"), {lse2}), mask=rows < q_len)
lse = tl.where(empty, float("-inf"), lse * 0.6931471805599453)
tl.store(lse_ptr + at, lse, mask=rows < q_len)
"""
        )

    def _produce(self, tiles: Tiles) -> Function:
        body = f"""\
{_doc("The part of the warp that brings tiles, ahead of those that consume them.")}\
work = gl.program_id(0)
after = ask(counter_ptr, works)
tile = {_called(tiles.place, {})}
step = 0
turn = 0
more = True
while more:
{indented(_unpacked(tiles.names, "tile"))}
    {_called(tiles.give, {})}
    bring(k_desc, k_ring, step, b, kv_head, first * BLOCK_N, STAGES)
    for part in gl.static_range(CONSUMERS):
        q_lo = q_tile * BLOCK_M + part * 64
        bring(q_desc, q_ring, turn * CONSUMERS + part, b, h, q_lo, CONSUMERS * Q_STAGES)

    more = work < works
    if more:
        tile = {_called(tiles.place, {"work": "after"})}  # read while the ring is full
        kv_tile = first
        for i in range(1, partial_count + full_count):
            last = kv_tile
{indented(tiles.numbered("i", "kv_tile"), 12)}
            bring(k_desc, k_ring, step + 1, b, kv_head, kv_tile * BLOCK_N, STAGES)
            bring(v_desc, v_ring, step, b, kv_head, last * BLOCK_N, STAGES)
            step += 1
        after = ask(counter_ptr, works)
        bring(v_desc, v_ring, step, b, kv_head, kv_tile * BLOCK_N, STAGES)
        step += 1
        turn += 1"""
        self.functions.append(Function("", (), (), ASK))
        args = ("q_desc", "k_desc", "v_desc", *RINGS, "counter_ptr", "works", *self.known)
        return self._define("produce", args, body)

    def _kernel(self, consume: Function, produce: Function, slots: int) -> None:
        def part(function: Function, **renamed: str) -> str:
            given = ", ".join(renamed.get(a, a) for a in function.extra)
            return f"({function.name}, ({given}))"

        consumers = [part(consume, CONSUMER=str(at)) for at in range(self.consumers)]
        parts = "".join(f"        {one},\n" for one in (*consumers, part(produce)))
        warps = [4] * (self.consumers - 1) + [1]
        registers = ["REGISTERS"] * (self.consumers - 1) + ["24"]
        out = ""
        if not self.out_in_q:
            shape = "[CONSUMERS] + out_desc.block_type.shape"
            out = f"out_sm = gl.allocate_shared_memory(out_desc.dtype, {shape}, out_desc.layout)\n"
        body = f"""\
SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
q_ring = ring_of(q_desc, CONSUMERS * Q_STAGES, 1)
k_ring = ring_of(k_desc, STAGES, CONSUMERS)
v_ring = ring_of(v_desc, STAGES, CONSUMERS)
{out}\
words = gl.allocate_shared_memory(
    gl.int32, [{2 * slots}, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
)
next_ring = words, barriers(2, 1), barriers(2, CONSUMERS)
fence_async_shared()
gl.warp_specialize(
    [
{parts}    ],
    {warps},
    [{", ".join(registers)}],
)
"""
        args = ("q_desc", "k_desc", "v_desc", "out_desc", "lse_ptr", "lse2_ptr", "counter_ptr")
        self._define("forward", (*args, "works", *self.known), body, kernel=True)


class _Read:
    """A function of the file that reads values ahead, and the line that calls it."""

    def __init__(self, file: File, name: str, position: str, values: Sequence[Value]) -> None:
        self.name, self.values = name, values
        self.names = ", ".join(value.name for value in values)
        self.extra: tuple[str, ...] = ()
        self.line = ""
        if values:
            docs = {"read_row": "What a query reads once.", "read_keys": "What a key reads."}
            doc = docs.get(name, "What the mask reads of a key.")
            exprs = [value.expr for value in values]
            leading = ("scale", "b", "h", position)
            function = file.function(name, doc, exprs, leading)
            self.extra = function.extra
            self.line = f"{self.names} = {function.call(*leading)}"

    @property
    def lines(self) -> str:
        """Reads of keys, each handed to the threads that have its pairs."""
        beside = "gl.convert_layout({0}, gl.SliceLayout(0, SCORES))"
        return "\n".join([self.line, *(f"{v.name} = {beside.format(v.name)}" for v in self.values)])


@dataclass(frozen=True, slots=True)
class Tiles:
    """Functions of a file that find tiles of work, and number their key tiles."""

    partial: Function
    full: Function | None
    place: Function = NOTHING
    give: Function = NOTHING
    take: Function = NOTHING
    names: tuple[str, ...] = ()
    """What `place` returns."""

    def numbered(self, i: str, target: str) -> str:
        """Lines that set `target` to the number of the i-th tile, partial ones first."""
        partial = self.partial.assigned(target, {"i": i})
        if self.full is None:
            return partial
        full = self.full.assigned(target, {"i": f"{i} - partial_count"})
        return f"if {i} < partial_count:\n    {partial}\nelse:\n    {full}"


def _walk(file: File) -> Loop:
    """How a query tile walks key tiles; what numbers them are integers, which a ring can hold."""
    if file.spec.lowering.plan.blocks is not Blocks.LISTS:
        return loop(file, "q", "kv", "BLOCK_N")
    setup = """\
# -- its tiles, from the lists
list_row = b * count_stride_b + h * count_stride_h + q_tile
full_count = tl.load(full_count_ptr + list_row)
partial_count = tl.load(partial_count_ptr + list_row)
list_start = tl.load(start_ptr + list_row).to(tl.int32)
"""
    full = ["tl.load(index_ptr + list_start + i).to(tl.int32)"]
    partial = ["tl.load(index_ptr + list_start + full_count + i).to(tl.int32)"]
    return Loop(setup, ("full_count", full), ("partial_count", partial))


def _numbers(found: Loop) -> tuple[str, ...]:
    """The names, set before, that number a loop's tiles."""
    texts = [*found.partial[1], *(found.full[1] if found.full else ())]
    targets = re.findall(r"^(\w+(?:, \w+)*) =", found.setup, re.MULTILINE)
    assigned = {name for names in targets for name in names.split(", ")} - {*COUNTS}
    words = dict.fromkeys(word for text in texts for word in re.findall(r"\w+", text))
    return tuple(word for word in words if word in assigned)


def _called(function: Function, renamed: dict[str, str]) -> str:
    return f"{function.name}({', '.join(renamed.get(a, a) for a in function.extra)})"


def _unpacked(names: Sequence[str], value: str) -> str:
    line = f"{', '.join(names)} = {value}"
    return line if len(line) < 88 else f"{_tupled(names)} = {value}"


def _returned(names: Sequence[str]) -> str:
    line = f"return {', '.join(names)}"
    return line if len(line) < 92 else f"return {_tupled(names)}"


def _tupled(names: Sequence[str]) -> str:
    return "(\n" + "".join(f"    {name},\n" for name in names) + ")"


def _doc(text: str) -> str:
    return f'"""{text}"""\n'


COUNTS = ("partial_count", "full_count")


def _numbered(tiles: list[str]) -> str:
    return "\n".join([*(f"tile = {tile.format(tile='tile')}" for tile in tiles), "return tile"])


def _lines(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def masked(lines: Sequence[str]) -> str:
    """Lines that refuse pairs of a MASKED tile, behind a branch that is always taken.

    ptxas would else find all pairs' masks before their scores are there, more than it has
    predicates for, and keep them as bits: 5 instructions a pair in place of 2.
    """
    return f"if MASKED:\n    if nought == 0:\n{indented(_lines(lines), 8)}"


def _softmax_lines(spec: Spec) -> str:
    plain = spec.lowering.plain
    top, scaled = (in_log2_units(spec, value) for value in ("tl.max(score, 1)", "score"))
    safe = 'safe = tl.where(m_new == float("-inf"), 0.0, m_new)'
    safe = f"safe = m_new\nif MASKED:\n    {safe}" if plain else safe
    return f"""\
m_new = tl.maximum(m_i, {top})
{safe}
alpha = tl.exp2(m_i - safe)
p = tl.exp2({scaled} - safe[:, None])
l_i = l_i * alpha + tl.sum(p, 1)
m_i = m_new
"""
