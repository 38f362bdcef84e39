"""Prints the backward kernel file of a Plan: delta, then dk and dv by key tile, dq by query tile.

No kernel adds to another's output, so gradients of q, k, v and of per-row and per-column captured
tensors are bitwise repeatable; only Reduction.PAIR gradients use atomics.
"""

from __future__ import annotations

from attncc.backends.triton.forward import (
    LAST,
    POSITIONS,
    Mods,
    at_head,
    in_log2_units,
    merged,
    score_lines,
    sides,
    strides,
    tile_load,
    walk_tiles,
)
from attncc.backends.triton.lower import Gradient, Reduction
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


def backward_source(spec: Spec) -> str:
    """One readable, stand-alone file with the kernels `delta`, `backward_kv` and `backward_q`."""
    file = File(spec)
    mods = BackwardMods(file)
    functions = [_delta()] if spec.lowering.softmax else []
    fold = _fold(file, mods, "kv")
    functions += [fold, _kernel_kv(file, mods, fold)]
    fold = _fold(file, mods, "q")
    functions += [fold, _kernel_q(file, mods, fold)]
    if mods.pairs():
        file.functions.append(Function("add_pairs", (), (), ADD_PAIRS.lstrip()))
    return file.text("backward", [function.text for function in functions])


class BackwardMods(Mods):
    """The forward's functions, the score's slope, and one function a captured gradient."""

    def __init__(self, file: File) -> None:
        super().__init__(file)
        lowering = file.spec.lowering
        leading = ("score", "scale", *POSITIONS)
        if lowering.key_mask is not None and lowering.key_mask != lowering.mask:
            doc = "Which pairs are kept, by what is read of a key."
            self.key_mask = file.function("key_mask_mod", doc, [lowering.key_mask], POSITIONS)
            self.extra = merged(self.key_mask, self.mask, self.score)
        self.slope: Function | None = None
        if lowering.slope is not None:
            doc = "d(score) / d(q . k * scale), of the raw q . k."
            slope = [lowering.slope]
            self.slope = file.function("score_slope", doc, slope, leading, kept=True)
        self.gradients: list[tuple[Gradient, str, Function, Function | None]] = []
        for at, gradient in enumerate(lowering.gradients):
            self._gradient(file, at, gradient, leading)
        functions = [self.slope, *(f for _, _, *fs in self.gradients for f in fs)]
        self.extra = tuple(dict.fromkeys((*self.extra, *merged(*functions))))

    def _gradient(self, file: File, at: int, gradient: Gradient, leading: tuple[str, ...]) -> None:
        tensor = gradient.load.tensor.name
        doc = f"d(score) / d({tensor}), of the raw q . k."
        factor = file.function(f"grad_{at}_mod", doc, [gradient.factor], leading, kept=True)
        index = None
        if gradient.reduction is Reduction.PAIR:
            doc = f"Where {tensor} is read."
            index = file.function(f"grad_{at}_index", doc, gradient.load.at, POSITIONS)
        self.gradients.append((gradient, f"grad_{at}", factor, index))

    def sums(self, side: str) -> list[tuple[str, Function]]:
        """Gradients that this kernel sums into one number a row of its own."""
        mine = Reduction.COLUMN if side == "kv" else Reduction.ROW
        return [(name, f) for g, name, f, _ in self.gradients if g.reduction is mine]

    def pairs(self) -> list[tuple[Gradient, str, Function, Function]]:
        """Gradients that the query-tile kernel adds pair by pair."""
        return [(g, n, f, i) for g, n, f, i in self.gradients if i is not None]


def _delta() -> Function:
    args = ["out_ptr", *strides("out"), "dout_ptr", *strides("dout"), "dlse_ptr", "delta_ptr"]
    args += ["heads", "q_len"]
    body = '''"""delta = sum(out * dout) - dlse, one number a query."""
rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
b = tl.program_id(1) // heads
h = tl.program_id(1) % heads
d = tl.arange(0, BLOCK_DV)
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
tl.store(delta_ptr + at, total, mask=rows < q_len)'''
    return define("delta", args, body, kernel=True)


def _state(mods: BackwardMods, side: str) -> list[str]:
    sums = [name for name, _ in mods.sums(side)]
    return (["dk", "dv"] if side == "kv" else ["dq"]) + sums


def _fold(file: File, mods: BackwardMods, side: str) -> Function:
    spec = file.spec
    state = ", ".join(_state(mods, side))
    mine, other = (("k", "v"), ("q", "dout")) if side == "kv" else (("q", "dout"), ("k", "v"))
    rows = ["lse2_ptr", "delta_ptr"] if side == "kv" else ["lse", "delta"]
    where = ["q_tile", "kv_idx"] if side == "kv" else ["kv_tile", "q_idx", "q_lo"]
    args = [*_state(mods, side), *mine, *sides(spec, *other), *rows, "b", "h", "kv_head", *where]
    args += ["q_len", "kv_len", "scale", *mods.extra, *pair_args(mods)]
    if side == "kv":
        body = f'"""Add one tile of queries to {state}; tiles are [keys, queries]."""\n'
        body += _kv_tile(file, mods)
    else:
        body = f'"""Add one tile of keys to {state}."""\n' + _q_tile(file, mods)
    return define(f"fold_{side}", args, f"{body}return {state}")


def pair_args(mods: BackwardMods) -> list[str]:
    args = []
    for gradient, name, _, _ in mods.pairs():
        args += [f"{name}_ptr", f"{name}_top_ptr"]
        args += [f"{name}_stride_{i}" for i in range(len(gradient.load.at))]
    return args


def _kv_tile(file: File, mods: BackwardMods) -> str:
    spec = file.spec
    start = "q_lo = q_tile * BLOCK_M\nrows = q_lo + tl.arange(0, BLOCK_M)\n"
    body = "".join(f"{line}\n" for line in positions(file, Axis.Q, "q_idx", "q_len", keys=True))
    body += tile_load(spec, "q", "q_lo", "BLOCK_M", "BLOCK_D", head="h", length="q_len")
    body += 'qk = tl.dot(k, q.T, input_precision="ieee")\n'
    body += score_lines(file, mods, "qk", transposed=True)
    if spec.lowering.softmax:
        body += _lse_lines(mods) + probability_lines(spec, "[None, :]")
    else:
        body += weight_lines(spec)
    body += tile_load(spec, "dout", "q_lo", "BLOCK_M", "BLOCK_DV", head="h", length="q_len")
    body += 'dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")\n'
    if spec.lowering.softmax:
        body += "delta = tl.load(delta_ptr + rows, mask=rows < q_len, other=0.0)\n"
    body += 'dp = tl.dot(v, dout.T, input_precision="ieee")\n'
    body += ds_lines(spec, "[None, :]")
    q, kv = "q_idx[None, :]", "kv_idx[:, None]"
    body += sum_lines(mods, "kv", q, kv) + slope_lines(mods, q, kv)
    start += "q_idx = rows\n" if "q_idx" in body else ""
    return start + body + 'dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")\n'


def _q_tile(file: File, mods: BackwardMods) -> str:
    spec = file.spec
    body = "kv_lo = kv_tile * BLOCK_N\nkv_idx = kv_lo + tl.arange(0, BLOCK_N)\n"
    for name, columns in (("k", "BLOCK_D"), ("v", "BLOCK_DV")):
        body += tile_load(spec, name, "kv_lo", "BLOCK_N", columns, head="kv_head", length="kv_len")
    body += 'qk = tl.dot(q, k.T, input_precision="ieee")\n'
    body += score_lines(file, mods, "qk")
    body += probability_lines(spec, "[:, None]") if spec.lowering.softmax else weight_lines(spec)
    body += 'dp = tl.dot(dout, v.T, input_precision="ieee")\n'
    body += ds_lines(spec, "[:, None]")
    q, kv = "q_idx[:, None]", "kv_idx[None, :]"
    body += sum_lines(mods, "q", q, kv) + pair_lines(mods, q, kv) + slope_lines(mods, q, kv)
    return body + 'dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")\n'


def _lse_lines(mods: BackwardMods) -> str:
    """Lines that make `lse`, in log2 units, of its tile's scores; inf where a row keeps no key."""
    row = ""
    if mods.rows:
        row = f"lse -= {mods.row_term_at('reference_row(q_idx, kv_len)')}\n"
    return f'lse = tl.load(lse2_ptr + rows, mask=rows < q_len, other=float("inf"))\n{row}'


def probability_lines(spec: Spec, rows: str) -> str:
    scaled = in_log2_units(spec, "score")
    return f"p = tl.exp2({scaled} - lse{rows})\nif MASKED:\n    p = tl.where(keep, p, 0.0)\n"


def weight_lines(spec: Spec) -> str:
    sigmoid = spec.lowering.normalize is Normalize.SIGMOID
    weight = "tl.sigmoid(score)" if sigmoid else "score"
    return f"p = {weight}\nif MASKED:\n    p = tl.where(keep, p, 0.0)\n"


def ds_lines(spec: Spec, rows: str) -> str:
    match spec.lowering.normalize:
        case Normalize.SOFTMAX:
            return f"ds = p * (dp - delta{rows})\n"
        case Normalize.SIGMOID:
            return "ds = dp * p * (1.0 - p)\n"
        case _:
            return "ds = dp\nif MASKED:\n    ds = tl.where(keep, ds, 0.0)\n"


def sum_lines(mods: BackwardMods, side: str, q: str, kv: str) -> str:
    lines = ""
    for name, factor in mods.sums(side):
        value = factor.call("qk", "scale", "b", "h", q, kv)
        lines += f"{name}_ds = ds * {value}\nif MASKED:\n"
        lines += f"    {name}_ds = tl.where(keep, {name}_ds, 0.0)\n"
        lines += f"{name} += tl.sum({name}_ds, 1)\n"
    return lines


def pair_lines(mods: BackwardMods, q: str, kv: str, *, by_distance: bool = True) -> str:
    """Lines that add pair by pair; by_distance: also what could be added along diagonals."""
    lines = ""
    for gradient, name, factor, index in mods.pairs():
        if not by_distance and gradient.by_distance:
            continue
        value = factor.call("qk", "scale", "b", "h", q, kv)
        at = [f"{name}_at_{i}" for i in range(len(gradient.load.at))]
        steps = "".join(f" + {axis} * {name}_stride_{i}" for i, axis in enumerate(at))
        lines += f"""\
{name}_ds = ds * {value}
{name}_keep = {name}_ds != 0.0
if MASKED:
    {name}_keep = {name}_keep & keep
{", ".join(at)} = {index.call("b", "h", q, kv)}
add_pairs({name}_ptr{steps}, {name}_ds, {name}_keep, {name}_top_ptr, FIXED_POINT)
"""
    return lines


ADD_PAIRS = '''
@triton.jit
def add_pairs(pointers, values, keep, top_ptr, FIXED_POINT: tl.constexpr):
    """Add one value a pair, in the order that programs come; or, bitwise repeatable, in two runs:
    1 finds the largest magnitude, 2 adds integers in units of 2**-40 of it."""
    if FIXED_POINT == 0:
        tl.atomic_add(pointers, values, mask=keep, sem="relaxed")
    elif FIXED_POINT == 1:
        tl.atomic_max(top_ptr, tl.max(tl.where(keep, tl.abs(values), 0.0)))
    else:
        units = values * (1099511627776.0 / tl.load(top_ptr))
        tl.atomic_add(pointers, units.to(tl.int64), mask=keep, sem="relaxed")
'''


def slope_lines(mods: BackwardMods, q: str, kv: str, name: str = "ds") -> str:
    """Lines that multiply what `name` holds by the score's slope."""
    if mods.slope is None:
        return ""
    value = mods.slope.call("qk", "scale", "b", "h", q, kv)
    return f"{name} = {name} * {value}\nif MASKED:\n    {name} = tl.where(keep, {name}, 0.0)\n"


def _kernel_kv(file: File, mods: BackwardMods, fold: Function) -> Function:
    spec, plan = file.spec, file.spec.lowering.plan
    sums = [name for name, _ in mods.sums("kv")]
    args = [*sides(spec, "q", "k", "v", "dout"), "dk_ptr", *strides("dk"), "dv_ptr"]
    args += [*strides("dv"), "lse2_ptr", "delta_ptr", *(f"{name}_ptr" for name in sums)]
    tiles = loop(file, "kv", "q", "BLOCK_M")
    args += [*mods.extra, *LAST, *tiles.extra]
    body = which_tile(plan.key_order, "kv").replace("batch * heads", "batch * (heads // GROUP)")
    body = body.replace("b = bh // heads", "b = bh // (heads // GROUP)")
    body = body.replace("h = bh % heads", "kv_head = bh % (heads // GROUP)\nh = kv_head * GROUP")
    group = _group(file, mods, fold, sums, tiles)
    body += "kv_lo = kv_tile * BLOCK_N\n"
    if "kv_last" in group:
        body += "kv_last = tl.minimum(kv_lo + BLOCK_N, kv_len) - 1\n"
    body += "\n# -- load k and v\n"
    body += at_head(spec, "k", "kv_head") + at_head(spec, "v", "kv_head")
    body += tile_load(spec, "k", "kv_lo", "BLOCK_N", "BLOCK_D", head="kv_head", length="kv_len")
    body += tile_load(spec, "v", "kv_lo", "BLOCK_N", "BLOCK_DV", head="kv_head", length="kv_len")
    body += "columns = kv_lo + tl.arange(0, BLOCK_N)\nkv_idx = columns\n"
    body += "".join(f"{line}\n" for line in positions(file, Axis.KV, "kv_idx", "kv_len", keys=True))
    body += "dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)\n"
    body += "dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)\n"
    body += "\n# -- every query head that reads this key head\nfor g in tl.range(0, GROUP):\n"
    body += indented(group)
    body += f"""
# -- store
{_store("dk", "scale", "columns", "kv_len", "BLOCK_N", "BLOCK_D", "HEAD_DIM", "kv_head")}
{_store("dv", "", "columns", "kv_len", "BLOCK_N", "BLOCK_DV", "VALUE_DIM", "kv_head")}"""
    return define("backward_kv", args, body, kernel=True)


def _group(file: File, mods: BackwardMods, fold: Function, sums: list[str], tiles: Loop) -> str:
    spec = file.spec
    body = "h = kv_head * GROUP + g\n"
    moved = [a for a in ("q", "dout") if not spec.descriptors]
    names = {a: f"{a}_head_ptr" for a in moved}
    for a in moved:
        body += f"{names[a]} = {a}_ptr + b.to(tl.int64) * {a}_stride_b "
        body += f"+ h.to(tl.int64) * {a}_stride_h\n"
    rows = []
    if spec.lowering.softmax:
        body += "row = (b * heads + h).to(tl.int64) * q_len\n"
        body += "lse2_row_ptr = lse2_ptr + row\ndelta_row_ptr = delta_ptr + row\n"
        rows = ["lse2", "delta"]
    body += "".join(f"{name} = tl.zeros([BLOCK_N], tl.float32)\n" for name in sums)
    body += tiles.setup
    renamed = {f"{a}_ptr": names[a] for a in moved}
    renamed |= {f"{r}_ptr": f"{r}_row_ptr" for r in rows}
    state = ", ".join(_state(mods, "kv"))
    if tiles.full is not None:
        body += walk_tiles(fold, state, "q_tile", *tiles.full, False, renamed)
    body += walk_tiles(fold, state, "q_tile", *tiles.partial, True, renamed)
    for name in sums:
        at = "(b * heads + h).to(tl.int64) * kv_len + columns"
        body += f"tl.store({name}_ptr + {at}, {name}, mask=columns < kv_len)\n"
    return body


def _kernel_q(file: File, mods: BackwardMods, fold: Function) -> Function:
    spec, plan = file.spec, file.spec.lowering.plan
    sums = [name for name, _ in mods.sums("q")]
    args = [*sides(spec, "q", "k", "v", "dout"), "dq_ptr", *strides("dq"), "lse2_ptr", "delta_ptr"]
    tiles = loop(file, "q", "kv", "BLOCK_N")
    args += [*(f"{name}_ptr" for name in sums), *pair_args(mods)]
    args += [*mods.extra, *LAST, *tiles.extra]
    body = which_tile(plan.query_order, "q")
    body += "kv_head = h // GROUP\nq_lo = q_tile * BLOCK_M\n"
    if "q_last" in tiles.setup:
        body += "q_last = tl.minimum(q_lo + BLOCK_M, q_len) - 1\n"
    body += "\n# -- load q and dout\n"
    for name, head in (("q", "h"), ("dout", "h"), ("k", "kv_head"), ("v", "kv_head")):
        body += at_head(spec, name, head)
    body += tile_load(spec, "q", "q_lo", "BLOCK_M", "BLOCK_D", head="h", length="q_len")
    body += tile_load(spec, "dout", "q_lo", "BLOCK_M", "BLOCK_DV", head="h", length="q_len")
    body += "rows = q_lo + tl.arange(0, BLOCK_M)\n"
    if mods.rows or "q_idx" in fold.extra:
        body += "q_idx = rows\n"
        body += "".join(f"{line}\n" for line in positions(file, Axis.Q, "q_idx", "q_len"))
    if spec.lowering.softmax:
        body += "lse2_ptr += bh.to(tl.int64) * q_len\ndelta_ptr += bh.to(tl.int64) * q_len\n"
        body += _lse_lines(mods)
        body += "delta = tl.load(delta_ptr + rows, mask=rows < q_len, other=0.0)\n"
    body += "dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)\n"
    body += "".join(f"{name} = tl.zeros([BLOCK_M], tl.float32)\n" for name in sums)
    body += "\n" + tiles.setup + "\n"
    state = ", ".join(_state(mods, "q"))
    if tiles.full is not None:
        body += walk_tiles(fold, state, "kv_tile", *tiles.full, False)
    body += walk_tiles(fold, state, "kv_tile", *tiles.partial, True)
    body += "# -- store\n"
    for name in sums:
        at = "bh.to(tl.int64) * q_len + rows"
        body += f"tl.store({name}_ptr + {at}, {name}, mask=rows < q_len)\n"
    body += _store("dq", "scale", "rows", "q_len", "BLOCK_M", "BLOCK_D", "HEAD_DIM", "h")
    return define("backward_q", args, body, kernel=True)


def _store(
    name: str, factor: str, index: str, length: str, rows: str, columns: str, dim: str, head: str
) -> str:
    lo = "kv_lo" if rows == "BLOCK_N" else "q_lo"
    value = f"({name} * {factor})" if factor else name
    return f"""\
{name}_ptr += b.to(tl.int64) * {name}_stride_b + {head}.to(tl.int64) * {name}_stride_h
{name}_ptr += tl.cast({lo}, tl.int64) * {name}_stride_n
n = tl.arange(0, {rows})
d = tl.arange(0, {columns})
tl.store(
    {name}_ptr + n[:, None] * {name}_stride_n + d[None, :],
    {value}.to({name}_ptr.dtype.element_ty),
    mask=({index} < {length})[:, None] & (d < {dim})[None, :],
)"""
