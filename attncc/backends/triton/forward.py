"""Prints the forward kernel file of a Plan: out and lse for one query tile a program."""

from __future__ import annotations

from attncc.backends.triton.sections import (
    PLACES,
    File,
    Function,
    Spec,
    define,
    loop,
    positions,
    which_tile,
)
from attncc.backends.triton.text import indented
from attncc.ir.expr import Axis, Score, walk
from attncc.ir.program import Normalize

POSITIONS = ("b", "h", "q_idx", "kv_idx")
LAST = (
    *("batch", "heads", "q_len", "kv_len", "scale"),
    *("index_ptr", "start_ptr", "full_count_ptr", "partial_count_ptr"),
    *("count_stride_b", "count_stride_h"),
    *("order_ptr", "order_stride_b", "order_stride_h"),
    *("q_tiles", "kv_tiles", "swizzle"),
)
"""What every kernel may name after its own arguments: sizes, lists, order, grid."""


def forward_source(spec: Spec) -> str:
    """One readable, stand-alone file with the kernel `forward`."""
    file = File(spec)
    mods = Mods(file)
    attend = _attend(file, mods)
    kernel = _kernel(file, mods, attend)
    return file.text("forward", [attend.text, kernel.text])


class Mods:
    """The user's functions as both kernels call them."""

    def __init__(self, file: File) -> None:
        lowering = file.spec.lowering
        self.mask: Function | None = None
        if lowering.mask is not None:
            doc = "Which pairs are kept."
            self.mask = file.function("mask_mod", doc, [lowering.mask], POSITIONS)
        self.key_mask = self.mask
        self.score: Function | None = None
        if not lowering.plain:
            units = " in log2 units" if lowering.in_log2 else ""
            doc = f"The score{units}, of the raw q . k."
            leading = ("score", "scale", *POSITIONS)
            self.score = file.function("score_mod", doc, [lowering.score], leading, kept=True)
        self.rows = lowering.plan.row_terms_cancel and self.score is not None
        if self.rows:
            self._row_term(file)
        self.extra = merged(self.mask, self.score, self.row_term if self.rows else None)

    def _row_term(self, file: File) -> None:
        score = self.score
        assert score is not None
        if any(place in score.extra for place in PLACES):
            doc, leading = "The same, of single pairs.", score.leading
            score = file.function("score_at", doc, [file.spec.lowering.score], leading)
        extra = tuple(e for e in score.extra if e != "kv_len")
        own = score.call("0.0", "scale", "b", "h", "q_idx", "at")
        base = score.call("0.0", "scale", "b", "h", "at", "at")
        leading = ("scale", "b", "h", "q_idx", "q_lo", "kv_len")
        head = f"def row_term({', '.join((*leading, *extra))}):"
        doc = '"""What a row\'s scores lack when score_mod is given reference_row; it cancels."""'
        body = f"{doc}\nat = reference_row(q_lo, kv_len)\nown = {own}\n"
        body += f"own -= {base}\nreturn {in_log2_units(file.spec, 'own')}"
        text = f"@triton.jit\n{head}\n{indented(body)}\n"
        self.row_term = Function("row_term", leading, extra, text)
        reference = Function("reference_row", (), (), REFERENCE_ROW.lstrip())
        file.functions += [reference, self.row_term]

    def row_index(self, expanded: str) -> str:
        """What score_mod is given for q_idx."""
        return "reference_row(q_lo, kv_len)" if self.rows else expanded

    def row_term_at(self, q_idx: str) -> str:
        """The row term of a position beside its tile."""
        return self.row_term.call("scale", "b", "h", q_idx, "q_lo", "kv_len")


REFERENCE_ROW = '''
@triton.jit
def reference_row(q_idx, kv_len):
    """The nearest position that has a key; scores of queries beyond the keys stay small there."""
    return tl.minimum(q_idx, tl.maximum(kv_len, 1) - 1)
'''


def merged(*functions: Function | None) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for function in functions:
        if function is not None:
            names |= dict.fromkeys(name for name in function.extra if name not in PLACES)
    return tuple(names)


LOG2E = "1.4426950408889634"


def in_log2_units(spec: Spec, value: str) -> str:
    """A score, or a difference of scores, as exponentials of base 2 take it."""
    if spec.lowering.in_log2 and not spec.lowering.plain:
        return value
    return f"{value} * (scale * {LOG2E})" if spec.lowering.plain else f"{value} * {LOG2E}"


def sides(spec: Spec, *names: str) -> list[str]:
    """Kernel arguments of the inputs: a descriptor each, or a pointer and three strides."""
    if spec.descriptors:
        return [f"{name}_desc" for name in names]
    return [a for n in names for a in (f"{n}_ptr", *strides(n))]


def strides(name: str) -> list[str]:
    """Names of a tensor's strides over batch, head and token."""
    return [f"{name}_stride_{axis}" for axis in "bhn"]


def tile_load(
    spec: Spec, name: str, start: str, rows: str, columns: str, *, head: str, length: str
) -> str:
    """Lines that load a [rows, columns] tile of a [B, H, N, D] input, zero outside it."""
    if spec.descriptors:
        return f"{name} = {name}_desc.load([b, {head}, {start}, 0]).reshape({rows}, {columns})\n"
    dim = "HEAD_DIM" if columns == "BLOCK_D" else "VALUE_DIM"
    return f"""\
n = tl.arange(0, {rows})
d = tl.arange(0, {columns})
at = tl.cast({start}, tl.int64) * {name}_stride_n
{name} = tl.load(
    {name}_ptr + at + n[:, None] * {name}_stride_n + d[None, :],
    mask=({start} + n < {length})[:, None] & (d < {dim})[None, :],
    other=0.0,
)
"""


def at_head(spec: Spec, name: str, head: str) -> str:
    """A line that moves a pointer to its batch and head; nothing for a descriptor."""
    if spec.descriptors:
        return ""
    return (
        f"{name}_ptr += b.to(tl.int64) * {name}_stride_b + {head}.to(tl.int64) * {name}_stride_h\n"
    )


STATE = ("acc", "l_i", "m_i")
TILE = ("b", "h", "kv_head", "q_idx", "q_lo", "kv_tile", "q_len", "kv_len", "scale")


def _attend(file: File, mods: Mods) -> Function:
    spec = file.spec
    softmax = spec.lowering.softmax
    doc = (
        "Fold one tile of keys into the running softmax (acc, l_i, m_i), in log2 units."
        if softmax
        else "Add one tile of keys to acc."
    )
    k = tile_load(spec, "k", "kv_lo", "BLOCK_N", "BLOCK_D", head="kv_head", length="kv_len")
    v = tile_load(spec, "v", "kv_lo", "BLOCK_N", "BLOCK_DV", head="kv_head", length="kv_len")
    body = f'"""{doc}"""\nkv_lo = kv_tile * BLOCK_N\nkv_idx = kv_lo + tl.arange(0, BLOCK_N)\n'
    body += k + score_lines(file, mods, 'tl.dot(q, k.T, input_precision="ieee")')
    body += _softmax_lines(file, mods) if softmax else _weight_lines(spec)
    body += v + 'acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")\n'
    body += f"return {', '.join(_state(spec))}"
    args = [*_state(spec), "q", *sides(spec, "k", "v"), *TILE, *mods.extra]
    return define("attend", args, body)


def _state(spec: Spec) -> tuple[str, ...]:
    return STATE if spec.lowering.softmax else STATE[:1]


def score_lines(file: File, mods: Mods, dot: str, *, transposed: bool = False) -> str:
    """Lines from the product of a tile of q and k to its `score`, and `keep` where MASKED."""
    before, keep = mask_lines(file, mods, transposed=transposed)
    masked = ["if MASKED:", *("    " + line for line in (*before, *keep))]
    scored = mod_lines(file, mods, transposed=transposed)
    return "\n".join([f"score = {dot}", *masked, *scored]) + "\n"


def mod_lines(file: File, mods: Mods, *, transposed: bool = False) -> list[str]:
    """Lines that make the `score` of the raw one."""
    if mods.score is None:
        return []
    q, kv = SIDES[transposed]
    pair = (mods.row_index(f"q_idx{q}"), f"kv_idx{kv}")
    lines = [f"score = {mods.score.call('score', 'scale', 'b', 'h', *pair)}"]
    if not any(isinstance(node, Score) for node in walk(file.spec.lowering.score)):
        lines = ["whole = tl.zeros_like(score)", *lines, "score = whole + score"]
    return lines


def mask_lines(file: File, mods: Mods, *, transposed: bool = False) -> tuple[list[str], list[str]]:
    """Lines of a masked tile: those that keep its keys readable, and those that make `keep`."""
    q, kv = SIDES[transposed]
    clamp = positions(file, Axis.KV, "kv_idx", "kv_len", keys=transposed)
    mask = mods.key_mask if transposed else mods.mask
    before = ["inside = kv_idx < kv_len", *clamp]
    if mask is None:
        return before if clamp else [], [f"keep = {'inside' if clamp else '(kv_idx < kv_len)'}{kv}"]
    keep = [f"keep = {mask.call('b', 'h', f'q_idx{q}', f'kv_idx{kv}')}"]
    return before, [*keep, f"keep = keep & inside{kv}"]


SIDES = {False: ("[:, None]", "[None, :]"), True: ("[None, :]", "[:, None]")}
"""How a query and a key stand beside a tile of pairs, and of transposed ones."""


def _softmax_lines(file: File, mods: Mods) -> str:
    spec = file.spec
    plain = spec.lowering.plain
    # A kept pair may score -inf, but q . k alone cannot: only masks and mods need the guard.
    top, scaled = (in_log2_units(spec, value) for value in ("tl.max(score, 1)", "score"))
    always = "" if plain else 'safe = tl.where(m_new == float("-inf"), 0.0, m_new)\n'
    lines = f"""\
if MASKED:
    score = tl.where(keep, score, float("-inf"))
m_new = tl.maximum(m_i, {top})
"""
    if plain:
        lines += """\
safe = m_new
if MASKED:
    safe = tl.where(m_new == float("-inf"), 0.0, m_new)
"""
    return (
        lines
        + always
        + f"""\
alpha = tl.exp2(m_i - safe)
p = tl.exp2({scaled} - safe[:, None])
l_i = l_i * alpha + tl.sum(p, 1)
acc = acc * alpha[:, None]
m_i = m_new
"""
    )


def _weight_lines(spec: Spec) -> str:
    weight = "tl.sigmoid(score)" if spec.lowering.normalize is Normalize.SIGMOID else "score"
    return f"p = {weight}\nif MASKED:\n    p = tl.where(keep, p, 0.0)\n"


def _kernel(file: File, mods: Mods, attend: Function) -> Function:
    spec = file.spec
    lowering, plan = spec.lowering, spec.lowering.plan
    args = [*sides(spec, "q", "k", "v"), "out_ptr", *strides("out"), "lse_ptr", "lse2_ptr"]
    tiles = loop(file, "q", "kv", "BLOCK_N")
    args += [*mods.extra, *_sink_extra(file), *LAST, *tiles.extra]
    body = which_tile(plan.query_order, "q")
    body += "kv_head = h // GROUP\nq_lo = q_tile * BLOCK_M\n"
    if "q_last" in tiles.setup:
        body += "q_last = tl.minimum(q_lo + BLOCK_M, q_len) - 1\n"
    body += "\n# -- load q\n"
    body += at_head(spec, "q", "h") + at_head(spec, "k", "kv_head") + at_head(spec, "v", "kv_head")
    body += tile_load(spec, "q", "q_lo", "BLOCK_M", "BLOCK_D", head="h", length="q_len")
    body += "rows = q_lo + tl.arange(0, BLOCK_M)\n"
    if mods.rows or "q_idx" in attend.extra:
        body += "q_idx = rows\n"
        body += "".join(f"{line}\n" for line in positions(file, Axis.Q, "q_idx", "q_len"))
    body += "acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)\n"
    if lowering.softmax:
        body += "l_i = tl.zeros([BLOCK_M], tl.float32)\n"
        body += 'm_i = tl.full([BLOCK_M], float("-inf"), tl.float32)\n'
    body += f"\n{tiles.setup}\n"
    state = ", ".join(_state(spec))
    if tiles.full is not None:
        body += "# -- unmasked tiles\n" + walk_tiles(attend, state, "kv_tile", *tiles.full, False)
    body += "# -- partial tiles\n"
    ragged = spec.descriptors and lowering.plain and mods.mask is None
    body += walk_tiles(attend, state, "kv_tile", *tiles.partial, True, ragged=ragged)
    return define("forward", args, body + _store(file, mods), kernel=True)


def walk_tiles(
    fold: Function,
    state: str,
    name: str,
    count: str,
    tiles: list[str],
    masked: bool,
    renamed: dict[str, str] | None = None,
    *,
    ragged: bool = False,
) -> str:
    """A loop that folds `count` tiles, each numbered by the last of `tiles`.

    ragged: one tile at most, so there is nothing to overlap; loads begun before such a loop, and
    values moved out of it, would spill (80 bytes on sm_90, D 128, 128x64 tiles).

    A loop even where there is one tile at most. An `if` in its place takes fewer registers, but a
    kernel that had it read past its shared memory on an H100 (Triton 3.6, 17 keys, value dim 16,
    unaligned rows); whether the `if` was the cause is not settled.
    """
    lines = [f"{name} = {tile.format(tile=name)}" for tile in tiles]
    lines.append(fold.assigned(state, {**(renamed or {}), "MASKED": str(masked)}))
    body = indented("\n".join(lines))
    options = ", num_stages=1, disable_licm=True" if ragged else ""
    return f"for i in tl.range(0, {count}{options}):\n{body}\n\n"


def _sink_extra(file: File) -> tuple[str, ...]:
    sink = file.spec.lowering.sink
    return () if sink is None else file.extras([sink])


def _store(file: File, mods: Mods) -> str:
    spec = file.spec
    text = ""
    if spec.lowering.softmax:
        text = "# -- store; a row that kept no key is 0 and its lse -inf\nempty = l_i == 0.0\n"
        if spec.lowering.sink is not None:
            lines, (sink,) = file.printer.body([spec.lowering.sink])
            text += "\n".join([*lines, f"sink = {sink}", "sink *= 1.4426950408889634"]) + "\n"
            text += SINK_LINES
        text += "acc = acc / tl.where(empty, 1.0, l_i)[:, None]\n"
        if spec.lowering.sink is not None:
            text += "acc = tl.where(empty[:, None], 0.0, acc)\n"
        text += "lse = m_i + tl.log2(l_i)\n"
        lse2 = "lse"
        if mods.rows:
            lse2 = "lse2"
            text += f"lse2 = lse + {mods.row_term_at('reference_row(q_idx, kv_len)')}\n"
            text += f"lse += {mods.row_term_at('q_idx')}\n"
        text += f"""\
lse_ptr += bh.to(tl.int64) * q_len
lse2_ptr += bh.to(tl.int64) * q_len
tl.store(lse2_ptr + rows, tl.where(empty, float("inf"), {lse2}), mask=rows < q_len)
lse = tl.where(empty, float("-inf"), lse * 0.6931471805599453)
tl.store(lse_ptr + rows, lse, mask=rows < q_len)
"""
    else:
        text = "# -- store\n"
    return (
        text
        + """\
out_ptr += b.to(tl.int64) * out_stride_b + h.to(tl.int64) * out_stride_h
out_ptr += tl.cast(q_lo, tl.int64) * out_stride_n
n = tl.arange(0, BLOCK_M)
d = tl.arange(0, BLOCK_DV)
tl.store(
    out_ptr + n[:, None] * out_stride_n + d[None, :],
    acc.to(out_ptr.dtype.element_ty),
    mask=(rows < q_len)[:, None] & (d < VALUE_DIM)[None, :],
)"""
    )


SINK_LINES = """\
m_new = tl.maximum(m_i, sink)
alpha = tl.where(empty, 0.0, tl.exp2(m_i - m_new))
l_i = l_i * alpha + tl.exp2(sink - m_new)
acc = acc * alpha[:, None]
m_i = m_new
"""
