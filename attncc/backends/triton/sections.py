"""The parts that forward and backward kernel files share: header, mods, tiles, loops."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from attncc.backends.triton.lower import Lowering, uses
from attncc.backends.triton.text import (
    GATHER,
    HELPERS,
    TANH_EXACT,
    TANH_HALF,
    WIDTH,
    Names,
    Printer,
    atom,
    indented,
    laid_out,
)
from attncc.backends.triton.versions import Version, installed
from attncc.ir.expr import (
    SIZES,
    Axis,
    Const,
    Expr,
    Load,
    Scalar,
    ScalarParam,
    TensorParam,
    axes,
    walk,
)
from attncc.ir.plan import Blocks, Order, Ranges, Segment
from attncc.ir.show import show, show_program

SHORT_ENOUGH = 66
"""Of a bound that a line divides."""

Params = tuple[ScalarParam | TensorParam, ...]


@dataclass(frozen=True, slots=True)
class Spec:
    """What makes one kernel file differ from another; equal specs give equal bytes.

    half:        inputs are fp16 or bf16.
    ptx:         for NVIDIA GPUs, so a function may be one of their instructions.
    descriptors: tiles come through tensor descriptors (sm_90 and up), not pointers.
    wide:        integers of the mods need 64 bits.
    columns:     kv_idx is kv_lo + kv_column, of which the score is given both.
    triton:      the version whose names are printed.
    """

    lowering: Lowering
    half: bool
    ptx: bool
    descriptors: bool
    wide: bool = False
    columns: bool = False
    triton: Version = field(default_factory=installed)

    @property
    def params(self) -> Params:
        return (*self.lowering.plan.params, *SIZES)

    @property
    def name(self) -> str:
        return self.lowering.plan.program.name


@dataclass(frozen=True, slots=True)
class Function:
    """A printed function of one pair of positions, and how to call it."""

    name: str
    leading: tuple[str, ...]
    extra: tuple[str, ...]
    text: str

    def call(self, *args: str) -> str:
        """A call with its leading arguments; the others keep their names."""
        return f"{self.name}({', '.join((*args, *self.extra))})"

    def assigned(self, targets: str, renamed: Mapping[str, str]) -> str:
        """A line that calls it by its arguments' own names, but for those renamed."""
        args = [renamed.get(a, a) for a in self.extra]
        return f"{targets} = {self.name}({', '.join(args)})"


CONSTEXPRS: tuple[str, ...] = (
    "MASKED",
    "FIXED_POINT",
    "HAS_DLSE",
    "GROUP",
    "HEAD_DIM",
    "VALUE_DIM",
)
CONSTEXPRS += ("BLOCK_M", "BLOCK_N", "BLOCK_D", "BLOCK_DV", "CHUNK", "WIDTH")
CONSTEXPRS += ("STAGES", "Q_STAGES", "CONSUMERS", "CONSUMER", "REGISTERS")
CONSTEXPRS += ("SCORES", "OUT", "OUT_ROWS", "WEIGHTS", "SUMS", "QUARTER", "REST")


PLACES = "kv_lo", "kv_column", "MASKED", "BLOCK_N"
"""What tells a function of the score about its tile."""


def define(name: str, args: Sequence[str], body: str, *, kernel: bool = False) -> Function:
    """A function with those of `args` that its body names, constexprs last."""
    body = re.sub(r"\n{3,}", "\n\n", body)
    words = set(re.findall(r"\w+", body))
    words -= set(re.findall(r"^(\w+): \w+\.constexpr =", body, re.MULTILINE))
    if kernel:
        words.discard("kv_head")  # which a kernel works out
    own = tuple(a for a in dict.fromkeys((*args, *CONSTEXPRS)) if a in words)
    typed = [f"{a}: tl.constexpr" if a in CONSTEXPRS else a for a in own]
    head = f"def {name}({', '.join(typed)}):"
    above = decorator(own) if kernel else "@triton.jit"
    return Function(name, (), own, f"{above}\n{head}\n{indented(body)}\n")


def decorator(args: Sequence[str]) -> str:
    """Which arguments must not recompile the kernel: all but pointers, strides and constexprs."""
    typed = ("_ptr", "_desc")
    free = [a for a in args if not a.endswith(typed) and "_stride_" not in a]
    quoted = [f'"{a}"' for a in free if a not in CONSTEXPRS]
    listed = ", ".join(quoted)
    if len(listed) + 24 <= WIDTH:
        return f"@triton.jit(do_not_specialize=[{listed}])"
    lines = "".join(f"        {q},\n" for q in quoted)
    return f"@triton.jit(\n    do_not_specialize=[\n{lines}    ]\n)"


class File:
    """Collects the functions of one kernel file and what their callers must be given."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        plan = spec.lowering.plan
        self.names = Names(p.name for p in plan.params)
        proved = plan.proved_loads
        self.found = frozenset(search.tensor for search in plan.searches)
        columns = spec.columns and not spec.wide
        self.printer = Printer(self.names, proved, spec.ptx, found=self.found, columns=columns)
        self.ends = Printer(self.names, proved, spec.ptx, wide=spec.wide, found=self.found)
        self.ends.helpers = self.printer.helpers
        self.functions: list[Function] = []

    def extras(self, exprs: Sequence[Expr | None]) -> tuple[str, ...]:
        """The arguments, beyond positions, that these expressions read."""
        found = uses(exprs, self.spec.params)
        args = ["kv_head"] if found.kv_head else []
        args += [self.names[p.name] for p in found.scalars]
        for tensor in found.tensors:
            args += self._tensor(tensor, exprs)
        return tuple(dict.fromkeys(args))  # searches may name a length twice

    def _tensor(self, tensor: TensorParam, exprs: Sequence[Expr | None]) -> list[str]:
        name, ranks = tensor.name, range(len(tensor.dims))
        if tensor in self.found:
            return [self.names.pointer(name), *map(str, tensor.dims[1:])]
        args = [self.names.pointer(name)] + [self.names.stride(name, i) for i in ranks]
        loads = [n for e in exprs if e is not None for n in walk(e) if isinstance(n, Load)]
        if any(n.tensor == tensor and n not in self.printer.proved for n in loads):
            args += [self.names.size(name, i) for i in ranks]
        return args

    def function(
        self,
        name: str,
        doc: str,
        outputs: Sequence[Expr],
        leading: Sequence[str],
        *,
        kept: bool = False,
    ) -> Function:
        """Prints `name`, which returns the outputs, and keeps it.

        kept: what it returns matters at kept pairs alone; in unmasked tiles those are all.
        """
        extra = self.extras(outputs)
        lines, texts = self.printer.body(outputs, kept=kept)
        words = set(re.findall(r"\w+", " ".join((*lines, *texts)))) if kept else set()
        extra = (*extra, *(name for name in PLACES if name in words))
        if self.spec.wide:
            wide = [i for i in ("q_idx", "kv_idx") if i in leading]
            lines = [f"{i} = {i}.to(tl.int64)" for i in wide] + lines
        body = "\n".join([f'"""{doc}"""', *lines, f"return {', '.join(texts)}"])
        typed = [f"{a}: tl.constexpr" if a in CONSTEXPRS else a for a in extra]
        head = f"def {name}({', '.join((*leading, *typed))}):"
        function = Function(name, tuple(leading), extra, f"@triton.jit\n{head}\n{indented(body)}\n")
        self.functions.append(function)
        return function

    def text(self, title: str, kernels: Sequence[str]) -> str:
        """The whole file."""
        parts = [header(self.spec, title), "import triton\nimport triton.language as tl\n"]
        tanh = TANH_HALF if self.spec.half and self.spec.ptx else TANH_EXACT
        used = "".join(f.text for f in self.functions) + "".join(kernels)
        if "tanh(" in used:
            parts.append(tanh.strip() + "\n")
        parts += [HELPERS[h].strip() + "\n" for h in sorted(self.printer.helpers)]
        if "gather(" in used:
            parts.append(GATHER.strip() + "\n")
        if "in_order(" in used:
            parts.append(IN_ORDER.strip() + "\n")
        parts += [f.text for f in self.functions]
        return laid_out(parts[0] + parts[1] + "\n\n" + "\n\n".join([*parts[2:], *kernels]))


def header(spec: Spec, title: str) -> str:
    """The program verbatim, and what was inferred from it."""
    plan = spec.lowering.plan
    lines = [f"attncc: {spec.name}, {title}", ""]
    lines += [f"  {line}".rstrip() for line in show_program(plan.program).strip().split("\n")]
    if plan.blocks is Blocks.RANGES and plan.key_ranges:
        lines += ["", "Keys of a query tile:", *_range_lines(plan.key_ranges)]
    if plan.blocks is Blocks.RANGES and plan.query_ranges:
        lines += ["", "Queries of a key tile:", *_range_lines(plan.query_ranges)]
    if plan.blocks is Blocks.LISTS:
        lines += ["", "Tiles come from lists: a row's full ones, then its partial ones."]
    wrapped = [part for line in lines for part in _wrapped(line)]
    return "".join(f"# {line}".rstrip() + "\n" for line in wrapped)


def _wrapped(line: str) -> list[str]:
    """A comment line in pieces that fit, later ones indented deeper."""
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.wrap(line, WIDTH - 2, subsequent_indent=indent, drop_whitespace=True) or [""]


def _range_lines(ranges: Ranges) -> list[str]:
    lines = []
    for title, segments in (("visit", ranges.visit), ("unmasked", ranges.unmasked)):
        for segment in segments:
            lines.append(f"  {title:8} [{show(segment.lo)}, {show(segment.hi)})")
    return lines


def positions(file: File, which: Axis, index: str, length: str, *, keys: bool = False) -> list[str]:
    """Lines that keep positions readable where a captured tensor is read at them.

    keys: in a kernel of key tiles.
    """
    lowering = file.spec.lowering
    exprs = (
        lowering.key_mask if keys else lowering.mask,
        lowering.score,
        *(g.load for g in lowering.gradients),
    )
    if uses(exprs, file.spec.params).axes & which:
        return [f"{index} = tl.minimum({index}, {length} - 1)"]
    return []


def which_tile(order: Order, rows: str) -> str:
    """The start of a kernel: its row tile, batch and head."""
    rank, moved = "rank // width", ""
    match order:
        case Order.REVERSED:
            tile = f"{rows}_tiles - 1 - {rank}"
        case Order.BY_WORK:
            moved = "order_ptr += b * order_stride_b + h * order_stride_h\n"
            tile = f"tl.load(order_ptr + {rank}).to(tl.int32)"
        case _:
            tile = rank
    return f"""\
# -- which tile is mine: `swizzle` heads at a time, whose other side then stays in L2
section = tl.program_id(0) // (swizzle * {rows}_tiles)
rank = tl.program_id(0) % (swizzle * {rows}_tiles)
width = tl.minimum(swizzle, batch * heads - section * swizzle)
bh = section * swizzle + rank % width
b = bh // heads
h = bh % heads
{moved}{rows}_tile = {tile}
"""


@dataclass(frozen=True, slots=True)
class Loop:
    """How a kernel walks the tiles of its other side: set-up lines, and per loop count and tile."""

    setup: str
    full: tuple[str, list[str]] | None
    partial: tuple[str, list[str]]
    extra: tuple[str, ...] = ()
    """What the set-up reads beyond tiles and lengths."""


def loop(file: File, rows: str, columns: str, block: str, *, spread: bool = True) -> Loop:
    """The unmasked and the partial tiles of one row tile; `columns` is "kv" or "q".

    spread: programs whose unmasked tiles are the same begin apart.
    """
    plan = file.spec.lowering.plan
    ranges = plan.key_ranges if columns == "kv" else plan.query_ranges
    if plan.blocks is Blocks.LISTS:
        return _list_loop(rows)
    assert ranges is not None
    ends = [end for s in (*ranges.visit, *ranges.unmasked) for end in (s.lo, s.hi)]
    found = _range_loop(file, ranges, columns, block, spread=spread)
    return replace(found, extra=file.extras(ends))


def _list_loop(rows: str) -> Loop:
    setup = f"""\
# -- its tiles, from the lists
list_row = b * count_stride_b + h * count_stride_h + {rows}_tile
full_count = tl.load(full_count_ptr + list_row)
partial_count = tl.load(partial_count_ptr + list_row)
full_list_ptr = index_ptr + tl.load(start_ptr + list_row)
partial_list_ptr = full_list_ptr + full_count
"""
    return Loop(
        setup,
        ("full_count", ["tl.load(full_list_ptr + i).to(tl.int32)"]),
        ("partial_count", ["tl.load(partial_list_ptr + i).to(tl.int32)"]),
    )


def _range_loop(file: File, ranges: Ranges, columns: str, block: str, *, spread: bool) -> Loop:
    lines = ["# -- its tiles: visited ones, those that need no mask, and the partial rest"]
    visit = _tiles(file, ranges.visit, "visit", block, columns, outward=True, lines=lines)
    full = _tiles(file, ranges.unmasked, "full", block, columns, outward=False, lines=lines)
    gaps = _gaps(full)
    if full and _from_zero(ranges.visit) and _from_zero(ranges.unmasked):
        gaps = gaps[1:]
    starts, counts = _partial(visit, gaps, lines)
    befores = [f"partial_count_{at}" for at in range(len(starts) - 1)]
    partial = (counts, _numbered(starts, befores))
    if not full:
        return Loop("\n".join(lines) + "\n", None, partial)
    lo, hi = full[0]
    if len(full) == 1:
        tile = [f"{lo} + i"]
        if spread and columns == "q" and not _varies(ranges.unmasked):
            lines += [SPREAD, f"turn = kv_tile * 17 % tl.maximum({hi} - {lo}, 1)"]
            tile = [
                f"{lo} + turn + i",
                f"tl.where({{tile}} < {hi}, {{tile}}, {{tile}} - {hi} + {lo})",
            ]
        return Loop("\n".join(lines) + "\n", (f"{hi} - {lo}", tile), partial)
    lines.append(f"full_count_0 = {hi} - {lo}")
    (lo_1, hi_1) = full[1]
    tile = _numbered([lo, lo_1], ["full_count_0"])
    return Loop("\n".join(lines) + "\n", (f"full_count_0 + {hi_1} - {lo_1}", tile), partial)


SPREAD = "# -- begin apart: programs that read the same tile at once wait for each other"
"""Full attention, dk and dv on an H100: 549 instead of 490 TFLOP/s. Forward and dq gain nothing."""


def _varies(segments: Sequence[Segment]) -> bool:
    """Whether rows of tiles begin or end apart by themselves."""
    return any(axes(end) & ~(Axis.B | Axis.H) for s in segments for end in (s.lo, s.hi))


def _tiles(
    file: File,
    segments: Sequence[Segment],
    name: str,
    block: str,
    columns: str,
    *,
    outward: bool,
    lines: list[str],
) -> list[tuple[str, str]]:
    """Names of the (first, end) tiles of each segment, in order and disjoint."""
    assert len(segments) <= 2, "tier 1 keeps at most two segments"
    result = []
    for at, segment in enumerate(segments):
        lo, hi = (f"{name}_{end}" + (f"_{at}" if len(segments) > 1 else "") for end in ("lo", "hi"))
        before, (lo_text, hi_text) = file.ends.body((segment.lo, segment.hi))
        lines += before
        lo_text, hi_text = (
            _narrow(file.spec, text, expr, f"{columns}_len")
            for text, expr in ((lo_text, segment.lo), (hi_text, segment.hi))
        )
        if outward:
            lo_text = _short(lo, lo_text, lines)
            first, end = f"{_grouped(lo_text)} // {block}", f"tl.cdiv({hi_text}, {block})"
        else:
            hi_text = _short(hi, hi_text, lines)
            first, end = f"tl.cdiv({lo_text}, {block})", f"{_grouped(hi_text)} // {block}"
        lines += [f"{lo} = {first}", f"{hi} = tl.maximum({end}, {lo})"]
        result.append((lo, hi))
    if len(segments) == 2:
        lines += _ordered(*result)
    return result


def _grouped(text: str) -> str:
    """Text that an operator may follow."""
    return text if text.isdigit() else atom(text)


def _short(name: str, text: str, lines: list[str]) -> str:
    """The text, or a name for what is too long to stand before an operator."""
    if len(text) <= SHORT_ENOUGH:
        return text
    lines.append(f"{name} = {text}")
    return name


def _narrow(spec: Spec, text: str, expr: Expr, length: str) -> str:
    """Text of 32 bits: arguments and captured tensors may be wider."""
    own = spec.lowering.plan.program.tensors
    loads = [n for n in walk(expr) if isinstance(n, Load)]
    captured = any(n.tensor in own for n in loads)
    captured |= any(isinstance(n, Scalar) and n.param not in SIZES for n in walk(expr))
    if spec.wide and (captured or loads):
        return f"tl.minimum(tl.maximum({text}, 0), {length}).to(tl.int32)"
    return f"{atom(text)}.to(tl.int32)" if captured else text


def _ordered(first: tuple[str, str], second: tuple[str, str]) -> list[str]:
    (a, a_end), (b, b_end) = first, second
    return [
        f"{a}, {a_end}, {b}, {b_end} = in_order({a}, {a_end}, {b}, {b_end})",
    ]


IN_ORDER = '''
@triton.jit
def in_order(a, a_end, b, b_end):
    """The union of [a, a_end) and [b, b_end) as two disjoint ranges, the lower one first."""
    first = tl.minimum(a, b)
    first_end = tl.where(a <= b, a_end, b_end)
    second_end = tl.where(a <= b, b_end, a_end)
    second = tl.maximum(tl.maximum(a, b), first_end)
    return first, first_end, second, tl.maximum(second, second_end)
'''


def _numbered(starts: Sequence[str], befores: Sequence[str]) -> list[str]:
    """The i-th tile of ranges that begin at `starts`, with so many tiles before each but the first.

    Each later text names the tile of the ones before it as {tile}.
    """
    tiles = [f"{starts[0]} + i"]
    for start, before in zip(starts[1:], befores, strict=True):
        tiles.append(f"tl.where(i < {before}, {{tile}}, {start} + i - {before})")
    return tiles


def _from_zero(segments: Sequence[Segment]) -> bool:
    return len(segments) == 1 and segments[0].lo == Const(0)


def _gaps(full: Sequence[tuple[str, str]]) -> list[tuple[str | None, str | None]]:
    """What lies between the full ranges, as (first, end); None is open."""
    edges: list[str | None] = [None]
    for lo, hi in full:
        edges += [lo, hi]
    edges.append(None)
    return [(edges[i], edges[i + 1]) for i in range(0, len(edges), 2)]


def _partial(
    visit: Sequence[tuple[str, str]],
    gaps: Sequence[tuple[str | None, str | None]],
    lines: list[str],
) -> tuple[list[str], str]:
    """First tiles of the partial pieces, and their total count; adds lines that compute them."""
    if not visit:  # the mask keeps no pair
        return ["0"], "0"
    starts: list[str] = []
    total = ""
    pieces = [(v, g) for g in gaps for v in visit]
    for at, ((lo, hi), (gap_lo, gap_hi)) in enumerate(pieces):
        suffix = f"_{at}" if len(pieces) > 1 else ""
        start = lo if gap_lo is None else f"partial_lo{suffix}"
        if gap_lo is not None:
            lines.append(f"{start} = tl.maximum({lo}, {gap_lo})")
        end = hi
        if gap_hi is not None:
            end = f"partial_hi{suffix}"
            lines.append(f"{end} = tl.minimum({hi}, {gap_hi})")
        count = f"tl.maximum({end} - {start}, 0)"
        lines.append(f"partial_count{suffix} = {total + ' + ' if total else ''}{count}")
        total = f"partial_count{suffix}"
        starts.append(start)
    return starts, total
