"""Prints the warp-specialised forward kernel of a Plan.

One warp brings tiles of q, k and v through tensor descriptors into rings in shared memory; two or
three warpgroups each own 64 of a tile's queries. A warpgroup starts the product of q with the next
keys before it adds the weighted values of the last ones, so tensor cores work under its softmax,
and the others' beside it. Programs stay and take the next tile of work from a counter.
"""

from __future__ import annotations

import re

from attncc.backends.gluon import dialect
from attncc.backends.triton.forward import (
    LAST,
    POSITIONS,
    Mods,
    score_lines,
)
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
from attncc.ir.program import Normalize

RINGS = ("q_full", "q_empty", "k_full", "k_empty", "v_full", "v_empty", "next_full", "next_empty")
"""Barriers: what is brought and what is free again, by stage."""
BUFFERS = ("q_tiles_sm", "k_sm", "v_sm", "out_sm", "next_sm")
WORK = ("work", "works", "b", "h", "kv_head", "q_tile", "q_lo", "q_idx", "kv_tile", "bh")


def forward_source(spec: Spec) -> str:
    """One readable, stand-alone file with the kernel `forward`."""
    return _Forward(spec).text()


class _Forward:
    def __init__(self, spec: Spec) -> None:
        self.file = File(spec)
        self.spec = spec
        self.softmax = spec.lowering.softmax
        self.mods = Mods(self.file)
        self.loop = loop(self.file, "q", "kv", "BLOCK_N")
        self.known = (*self.mods.extra, *self._sink_extra(), *LAST, *self.loop.extra)
        """What any function may be given beyond its own variables."""
        self.functions: list[Function] = []

    def text(self) -> str:
        which = self._which()
        tiles = self._tiles()
        weigh = self._weigh()
        attend = self._attend(weigh)
        consume = self._consume(which, tiles, weigh, attend)
        produce = self._produce(which, tiles)
        self._kernel(consume, produce)
        return dialect.text(self.file, "forward", self.functions)

    def _define(self, name: str, args: tuple[str, ...], body: str, *, kernel: bool = False) -> Function:
        function = define(name, args, body, kernel=kernel)
        self.functions.append(function)
        return function

    def _sink_extra(self) -> tuple[str, ...]:
        sink = self.spec.lowering.sink
        return () if sink is None else self.file.extras([sink])

    # -- which tiles

    def _which(self) -> Function:
        text = which_tile(self.spec.lowering.plan.query_order, "q").replace(
            "tl.program_id(0)", "work"
        )
        lines = text.split("\n")[1:]
        body = '"""Batch, head and query tile of a piece of work, `swizzle` heads at a time."""\n'
        body += "\n".join(lines) + "return b, h, q_tile"
        return self._define("which_tile", ("work", *LAST), body)

    def _tiles(self) -> Tiles:
        """Functions of the key tiles of a query tile: how many there are, and each one's number."""
        found = Tiles(self.loop)
        setup = self.loop.setup.split("\n")
        lines = ['"""How many key tiles are partial and unmasked, and what numbers them."""']
        if "q_lo" in self.loop.setup or "q_last" in self.loop.setup:
            lines.append("q_lo = q_tile * BLOCK_M")
        if "q_last" in self.loop.setup:
            lines.append("q_last = tl.minimum(q_lo + BLOCK_M, q_len) - 1")
        lines += setup
        lines.append(f"return {', '.join((found.partial_count, found.full_count, *found.names))}")
        args = ("b", "h", "kv_head", "q_tile", *self.known)
        found.count = self._define("tiles_of", args, "\n".join(lines))
        one = found.loop.partial[1]
        body = '"""The number of the i-th partial key tile."""\n' + _numbered(one)
        found.partial = self._define("partial_tile", ("i", *found.names), body)
        if found.loop.full is not None:
            body = '"""The number of the i-th unmasked key tile."""\n' + _numbered(
                found.loop.full[1]
            )
            found.full = self._define("full_tile", ("i", *found.names), body)
        return found

    # -- one tile of keys

    def _weigh(self) -> Function:
        spec, mods = self.spec, self.mods
        body = "kv_lo = kv_tile * BLOCK_N\nkv_idx = kv_lo + columns\n"
        body += score_lines(self.file, mods, "score").replace("score = score\n", "", 1)
        if self.softmax:
            doc = '"""Weights of a tile of scores beside the running softmax (l_i, m_i)."""\n'
            body += _softmax_lines(spec)
            body += "return p, l_i, m_i, alpha"
        else:
            doc = '"""Weights of a tile of scores."""\n'
            weight = "tl.sigmoid(score)" if spec.lowering.normalize is Normalize.SIGMOID else "score"
            body += f"p = {weight}\nif MASKED:\n    p = tl.where(keep, p, 0.0)\nreturn p"
        args = ("score", "l_i", "m_i", "columns", *POSITIONS[:2], "kv_head", "q_idx", "q_lo")
        return self._define("weigh", (*args, "kv_tile", *self.known), doc + body)

    def _attend(self, weigh: Function) -> Function:
        state = self._state
        body = f'''\
"""Start q with the next keys, add the last values under p, and weigh the new scores."""
after = step + 1
mbarrier.wait(k_full.index(after % STAGES), (after // STAGES) & 1)
k = k_sm.index(after % STAGES).reshape([BLOCK_N, BLOCK_D])
score = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
mbarrier.wait(v_full.index(step % STAGES), (step // STAGES) & 1)
v = v_sm.index(step % STAGES).reshape([BLOCK_N, BLOCK_DV])
acc = warpgroup_mma(p, v, acc, is_async=True)
score = warpgroup_mma_wait(1, deps=(score,))
mbarrier.arrive(k_empty.index(after % STAGES))
{self._weighed(weigh, "new")}
acc = warpgroup_mma_wait(0, deps=(acc,))
mbarrier.arrive(v_empty.index(step % STAGES))
'''
        if self.softmax:
            body += "acc = acc * gl.convert_layout(alpha, OUT_ROWS, assert_trivial=True)[:, None]\n"
        body += "p = gl.convert_layout(new.to(v_sm.dtype), WEIGHTS, assert_trivial=True)\n"
        body += f"return {', '.join(state)}, after"
        args = (*state, "step", "q", *BUFFERS, *RINGS, "zero", *weigh.extra)
        return self._define("attend", tuple(a for a in args if a not in ("score", "alpha")), body)

    @property
    def _state(self) -> tuple[str, ...]:
        return ("acc", "l_i", "m_i", "p") if self.softmax else ("acc", "p")

    def _weighed(self, weigh: Function, name: str, masked: str = "MASKED") -> str:
        targets = f"{name}, l_i, m_i, alpha" if self.softmax else name
        return weigh.assigned(targets, {"MASKED": masked})

    # -- partitions

    def _consume(self, which: Function, tiles: Tiles, weigh: Function, attend: Function) -> Function:
        state = ", ".join((*self._state, "step"))
        fold = f"kv_tile = {{tile}}\n{attend.assigned(state, {'MASKED': '{masked}'})}"
        body = f'''\
"""The part of a warpgroup: 64 queries of each tile of work."""
zero = gl.zeros([64, BLOCK_N], gl.float32, SCORES)
columns = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
work = gl.program_id(0)
step = 0
turn = 0
taken = 0
while work < works:
'''
        inner = f"{self._begin(which, tiles)}\n"
        inner += f'''\
q_lo = q_tile * BLOCK_M + CONSUMER * 64
rows = q_lo + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
'''
        if self.mods.rows or "q_idx" in weigh.extra:
            inner += "q_idx = rows\n"
            inner += "".join(
                f"{line}\n" for line in positions(self.file, Axis.Q, "q_idx", "q_len")
            )
        inner += "acc = gl.zeros([64, BLOCK_DV], gl.float32, OUT)\n"
        if self.softmax:
            inner += 'l_i = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORES))\n'
            inner += 'm_i = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))\n'
        keys = f'''\
mbarrier.wait(q_full, turn & 1)
q = q_tiles_sm.index(CONSUMER).reshape([64, BLOCK_D])

# -- the first keys
mbarrier.wait(k_full.index(step % STAGES), (step // STAGES) & 1)
k = k_sm.index(step % STAGES).reshape([BLOCK_N, BLOCK_D])
score = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
{tiles.numbered("0")}
score = warpgroup_mma_wait(0, deps=(score,))
mbarrier.arrive(k_empty.index(step % STAGES))
{self._weighed(weigh, "p", "True")}
p = gl.convert_layout(p.to(v_sm.dtype), WEIGHTS, assert_trivial=True)
for i in range(1, partial_count):
{indented(fold.format(tile=_called(tiles.partial), masked="True"))}
'''
        if tiles.full is not None:
            call = _called(tiles.full)
            keys += f'''\
for i in range(1 - tl.minimum(partial_count, 1), full_count):
{indented(fold.format(tile=call, masked="False"))}
'''
        keys += '''\
mbarrier.arrive(q_empty)

# -- the last values
mbarrier.wait(v_full.index(step % STAGES), (step // STAGES) & 1)
v = v_sm.index(step % STAGES).reshape([BLOCK_N, BLOCK_DV])
acc = warpgroup_mma(p, v, acc, is_async=True)
acc = warpgroup_mma_wait(0, deps=(acc,))
mbarrier.arrive(v_empty.index(step % STAGES))
step += 1
turn += 1
'''
        inner += f"if count > 0:\n{indented(keys)}\n{self._store()}\n"
        inner += '''\
# -- the next tile of work
mbarrier.wait(next_full.index(taken % 2), (taken // 2) & 1)
found = next_sm.index(taken % 2).load(gl.BlockedLayout([1], [32], [4], [0]))
mbarrier.arrive(next_empty.index(taken % 2))
work = gl.max(found, 0)
taken += 1
'''
        body += indented(inner) + "\ntma.store_wait(0)"
        args = ("q_tiles_sm", *BUFFERS, *RINGS, "out_desc", "lse_ptr", "lse2_ptr", "works")
        return self._define("consume", (*args, *self.known), body)

    def _begin(self, which: Function, tiles: Tiles) -> str:
        names = ", ".join(("partial_count", "full_count", *tiles.names))
        return f'''\
{which.assigned("b, h, q_tile", {})}
kv_head = h // GROUP
{tiles.count.assigned(names, {})}
count = partial_count + full_count'''

    def _store(self) -> str:
        text = ""
        factor = ""
        if self.softmax:
            text = "# -- a row that kept no key is 0 and its lse -inf\nempty = l_i == 0.0\n"
            factor = "1.0 / tl.where(empty, 1.0, l_i)"
            if self.spec.lowering.sink is not None:
                lines, (sink,) = self.file.printer.body([self.spec.lowering.sink])
                text += "\n".join([*lines, f"sink = {sink}", "sink *= 1.4426950408889634"]) + "\n"
                if self.mods.rows:
                    text += f"m_i += {self.mods.row_term.call(*self.mods.row_term.leading)}\n"
                text += """\
m_new = tl.maximum(m_i, sink)
alpha = tl.where(empty, 0.0, tl.exp2(m_i - m_new))
l_i = l_i * alpha + tl.exp2(sink - m_new)
m_i = m_new
"""
                factor = "alpha / l_i"
            text += f"factor = gl.convert_layout({factor}, OUT_ROWS, assert_trivial=True)\n"
            text += "acc = acc * factor[:, None]\nlse = m_i + tl.log2(l_i)\n"
            if self.mods.rows and self.spec.lowering.sink is None:
                text += f"lse += {self.mods.row_term.call(*self.mods.row_term.leading)}\n"
            text += """\
at = (b * heads + h).to(tl.int64) * q_len + rows
tl.store(lse2_ptr + at, tl.where(empty, float("inf"), lse), mask=rows < q_len)
lse = tl.where(empty, float("-inf"), lse * 0.6931471805599453)
tl.store(lse_ptr + at, lse, mask=rows < q_len)
"""
        return text + """\
out = out_sm.index(CONSUMER)
tma.store_wait(0)
out.reshape([64, BLOCK_DV]).store(acc.to(out_sm.dtype))
fence_async_shared()
tma.async_copy_shared_to_global(out_desc, [b, h, q_lo, 0], out)
"""

    def _produce(self, which: Function, tiles: Tiles) -> Function:
        def bring(name: str, stage: str, lo: str) -> str:
            ring = f"index({stage} % STAGES)"
            return f'''\
mbarrier.wait({name}_empty.{ring}, (({stage} // STAGES) & 1) ^ 1)
mbarrier.expect({name}_full.{ring}, {name}_desc.block_type.nbytes)
tma.async_copy_global_to_shared(
    {name}_desc, [b, kv_head, {lo}, 0], {name}_full.{ring}, {name}_sm.{ring}
)
'''

        keys = f'''\
{tiles.numbered("0")}
kv_lo = kv_tile * BLOCK_N
{bring("k", "step", "kv_lo")}\
mbarrier.wait(q_empty, (turn & 1) ^ 1)
mbarrier.expect(q_full, CONSUMERS * q_desc.block_type.nbytes)
for part in gl.static_range(CONSUMERS):
    q_lo = q_tile * BLOCK_M + part * 64
    tma.async_copy_global_to_shared(q_desc, [b, h, q_lo, 0], q_full, q_tiles_sm.index(part))
for i in range(1, count):
{indented(tiles.numbered("i"))}
    next_lo = kv_tile * BLOCK_N
    after = step + 1
{indented(bring("k", "after", "next_lo"))}
{indented(bring("v", "step", "kv_lo"))}
    kv_lo = next_lo
    step = after
{bring("v", "step", "kv_lo")}\
step += 1
turn += 1
'''
        inner = f'''\
{self._begin(which, tiles)}
if count > 0:
{indented(keys)}
# -- the next tile of work; the last to ask leaves the counter as it was
asked = gl.atomic_add(counter_ptr, 1, sem="relaxed")
if asked == works - 1:
    tl.store(counter_ptr, 0)
work = gl.num_programs(0) + asked
mbarrier.wait(next_empty.index(taken % 2), ((taken // 2) & 1) ^ 1)
next_sm.index(taken % 2).store(gl.full([1], work, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
mbarrier.arrive(next_full.index(taken % 2))
taken += 1
'''
        body = f'''\
"""The part of the warp that brings tiles, ahead of those that consume them."""
work = gl.program_id(0)
step = 0
turn = 0
taken = 0
while work < works:
{indented(inner)}'''
        args = ("q_desc", "k_desc", "v_desc", *BUFFERS, *RINGS, "counter_ptr", "works")
        return self._define("produce", (*args, *self.known), body)

    def _kernel(self, consume: Function, produce: Function) -> None:
        body = '''\
SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
q_tiles_sm = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS] + q_desc.block_type.shape, q_desc.layout)
k_sm = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
v_sm = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
out_sm = gl.allocate_shared_memory(out_desc.dtype, [CONSUMERS] + out_desc.block_type.shape, out_desc.layout)
next_sm = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
ONE: gl.constexpr = mbarrier.MBarrierLayout()
q_full = gl.allocate_shared_memory(gl.int64, [1], ONE)
q_empty = gl.allocate_shared_memory(gl.int64, [1], ONE)
k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], ONE)
k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], ONE)
v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], ONE)
v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], ONE)
next_full = gl.allocate_shared_memory(gl.int64, [2, 1], ONE)
next_empty = gl.allocate_shared_memory(gl.int64, [2, 1], ONE)
mbarrier.init(q_full, count=1)
mbarrier.init(q_empty, count=CONSUMERS)
for stage in gl.static_range(STAGES):
    mbarrier.init(k_full.index(stage), count=1)
    mbarrier.init(k_empty.index(stage), count=CONSUMERS)
    mbarrier.init(v_full.index(stage), count=1)
    mbarrier.init(v_empty.index(stage), count=CONSUMERS)
for stage in gl.static_range(2):
    mbarrier.init(next_full.index(stage), count=1)
    mbarrier.init(next_empty.index(stage), count=CONSUMERS)
fence_async_shared()
'''
        def part(function: Function, **renamed: str) -> str:
            given = ", ".join(renamed.get(a, a) for a in function.extra)
            return f"({function.name}, ({given}))"

        first, second = (part(consume, CONSUMER=str(at)) for at in range(2))
        body += f'''\
gl.warp_specialize(
    [
        {first},
        {second},
        {part(produce)},
    ],
    [4, 1],
    [REGISTERS, 24],
)
'''
        args = ("q_desc", "k_desc", "v_desc", "out_desc", "lse_ptr", "lse2_ptr", "counter_ptr")
        self._define("forward", (*args, "works", *self.known), body, kernel=True)


class Tiles:
    """The key tiles of a query tile, as the functions of a file number them."""

    count: Function
    partial: Function
    full: Function | None = None

    def __init__(self, found: Loop) -> None:
        self.loop = found
        self.partial_count = found.partial[0]
        self.full_count = "0" if found.full is None else found.full[0]
        texts = [*found.partial[1], *(found.full[1] if found.full else ())]
        assigned = set(re.findall(r"^(\w+(?:, \w+)*) =", found.setup, re.MULTILINE))
        assigned = {name for names in assigned for name in names.split(", ")}
        words = dict.fromkeys(word for text in texts for word in re.findall(r"\w+", text))
        self.names = tuple(w for w in words if w in assigned and w not in _COUNTS)

    def numbered(self, i: str) -> str:
        """Lines that set kv_tile to the number of the i-th tile, partial ones first."""
        partial = self.partial.assigned("kv_tile", {"i": i})
        if self.full is None:
            return partial
        full = self.full.assigned("kv_tile", {"i": f"{i} - partial_count"})
        return f"if {i} < partial_count:\n    {partial}\nelse:\n    {full}"


def _called(function: Function) -> str:
    return f"{function.name}({', '.join(function.extra)})"


_COUNTS = ("partial_count", "full_count")


def _numbered(tiles: list[str]) -> str:
    lines = [f"tile = {tile.format(tile='tile')}" for tile in tiles]
    return "\n".join([*lines, "return tile"])


def _softmax_lines(spec: Spec) -> str:
    plain = spec.lowering.plain
    top = "tl.max(score, 1) * (scale * 1.4426950408889634)" if plain else "tl.max(score, 1)"
    scaled = "score * (scale * 1.4426950408889634)" if plain else "score"
    if plain:
        safe = """\
safe = m_new
if MASKED:
    safe = tl.where(m_new == float("-inf"), 0.0, m_new)
"""
    else:
        safe = 'safe = tl.where(m_new == float("-inf"), 0.0, m_new)\n'
    return f"""\
if MASKED:
    score = tl.where(keep, score, float("-inf"))
m_new = tl.maximum(m_i, {top})
{safe}\
alpha = tl.exp2(m_i - safe)
p = tl.exp2({scaled} - safe[:, None])
l_i = l_i * alpha + tl.sum(p, 1)
m_i = m_new
"""
