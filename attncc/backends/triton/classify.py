"""Prints the kernel file that lists tiles: a tile's summaries, then each row's tiles by class."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from attncc.backends.triton.sections import File, Function, Spec, define, header
from attncc.backends.triton.terms import Term, Test, tile_test
from attncc.backends.triton.text import HELPERS, TANH_EXACT, Printer, indented, laid_out
from attncc.ir.expr import Axis, Expr, Load, ScalarParam, walk
from attncc.ir.ops import Kind
from attncc.ir.plan import Segment
from attncc.ir.show import show
from attncc.passes.intervals import RELATIVE, TINY
from attncc.passes.precision import same_in_any_dtype

RESULT_WIDTH = 92
"""Of a returned tuple; a longer one takes a line a value."""

WIDE_HELPERS = HELPERS | {
    "bit_length": HELPERS["bit_length"].replace("tl.int32", "tl.int64"),
    "as_int": '''
@triton.jit
def as_int(x):
    """A loaded integer, in 64 bits: bounds of values may leave the 32 that values keep to."""
    return x.to(tl.int64)
''',
}


@dataclass(frozen=True, slots=True)
class Side:
    """One token axis, as the kernels spell it."""

    axis: Axis
    at: str
    block: str
    one: str
    many: str

    @property
    def index(self) -> str:
        return f"{self.at}_idx"

    @property
    def ends(self) -> tuple[str, str]:
        return f"{self.at}_lo", f"{self.at}_last"

    @property
    def tile(self) -> str:
        return f"{self.at}_tile"

    @property
    def strides(self) -> tuple[str, ...]:
        return tuple(f"{self.at}_stride_{of}" for of in ("b", "h", "term"))

    @property
    def pointers(self) -> tuple[str, str]:
        return f"{self.at}_int_ptr", f"{self.at}_float_ptr"


QUERIES = Side(Axis.Q, "q", "BLOCK_M", "query", "queries")
KEYS = Side(Axis.KV, "kv", "BLOCK_N", "key", "keys")

SIZES = ("q_len", "kv_len", "q_tiles", "kv_tiles")
LOCALS = ("b", "h", "kv_head", "first_tile", "end_tile", "chunk")


def lists_source(spec: Spec, doubles: bool = False) -> str:
    """One readable, stand-alone file with the kernels `summarize` (where something is to be read),
    `key_lists` and `query_lists`.

    doubles: some captured tensor is float64, so that no float here is exact.
    """
    file = ListFile(spec, doubles)
    kernels = [summarize(file)] if file.test.terms else []
    kernels += [row_lists(file, QUERIES, KEYS), row_lists(file, KEYS, QUERIES)]
    return file.whole(kernels)


class ListFile(File):
    """A file whose expressions are bounds: ints of 64 bits, and nan is kept."""

    def __init__(self, spec: Spec, doubles: bool) -> None:
        super().__init__(spec)
        plan = spec.lowering.plan
        self.doubles = doubles
        self.printer = Printer(self.names, plan.proved_loads, bounds=True, found=self.found)
        self.test: Test = tile_test(plan)
        ints = (p.name for p in spec.params if isinstance(p, ScalarParam) and p.kind is Kind.INT)
        self.ints = {self.names[name] for name in ints}

    def terms(self, side: Side) -> tuple[Term, ...]:
        return self.test.of(side.axis)

    def add(self, name: str, args: Iterable[str], lines: Sequence[str]) -> Function:
        """A function with those of `args` that its lines name; printed once."""
        for function in self.functions:
            if function.name == name:
                return function
        function = define(name, (*args, *SIZES), pruned(lines))
        self.functions.append(function)
        return function

    def widened(self, lines: Sequence[str], args: Iterable[str]) -> list[str]:
        """Lines that make positions and integer scalars 64 bits wide."""
        words = set(re.findall(r"\w+", "\n".join(lines)))
        places = ("b", "h", "kv_head", *(n for s in (QUERIES, KEYS) for n in (s.index, *s.ends)))
        names = [*places, *(arg for arg in args if arg in self.ints)]
        return [f"{name} = {name}.to(tl.int64)" for name in names if name in words]

    def whole(self, kernels: Sequence[str]) -> str:
        parts = [header(self.spec, "lists of tiles"), IMPORTS]
        functions = [function.text for function in self.functions]
        if "tanh(" in "".join(functions):
            parts.append(TANH_EXACT.strip() + "\n")
        parts += [WIDE_HELPERS[h].strip() + "\n" for h in sorted(self.printer.helpers)]
        text = "\n\n".join([*parts[2:], *functions, *kernels])
        return laid_out(parts[0] + parts[1] + "\n\n" + text)


IMPORTS = "import triton\nimport triton.language as tl\n"


def returned(texts: Sequence[str]) -> list[str]:
    line = f"return {', '.join(texts)}"
    if len(line) <= RESULT_WIDTH or len(texts) == 1:
        return [line]
    return ["return (", *[f"    {text}," for text in texts], ")"]


def assigned(
    function: Function, targets: str, indent: int = 0, renamed: Mapping[str, str] | None = None
) -> str:
    return indented(function.assigned(targets, renamed or {}), indent)


ENDS = re.compile(r"\s*((?:q|kv|other)_(?:lo|last)) = ")


def pruned(lines: Sequence[str]) -> str:
    """The lines as one text, without ends of tiles that nothing reads."""
    kept: list[str] = []
    read: set[str] = set()
    for line in reversed("\n".join(lines).split("\n")):
        assigned_end = ENDS.match(line)
        if assigned_end is None or assigned_end[1] in read:
            kept.append(line)
            read |= set(re.findall(r"\w+", line[assigned_end.end() if assigned_end else 0 :]))
    return "\n".join(reversed(kept))


def needs(functions: Iterable[Function], *locals_: str) -> list[str]:
    """The arguments of these functions that a caller with those locals must be given."""
    return [arg for function in functions for arg in function.extra if arg not in locals_]


def kernel(name: str, doc: str, args: Sequence[str], lines: Sequence[str]) -> str:
    body = pruned(lines)
    where = ["b = tl.program_id(1)", "h = tl.program_id(2)"]
    if re.search(r"\bkv_head\b", body):
        where.append("kv_head = h // GROUP")
    body = "\n".join([f'"""{doc}"""', *where, body])
    return define(name, (*args, *SIZES), body, kernel=True).text


# -- summaries


def term_values(file: ListFile, side: Side) -> Function:
    """One value a position and term, whose minimum or maximum over a tile the term is."""
    terms = file.terms(side)
    exprs = list(dict.fromkeys(term.expr for term in terms))
    lines, texts = file.printer.body(exprs)
    text = dict(zip(exprs, texts, strict=True))
    values = []
    for expr in exprs:
        if not text[expr].isidentifier():
            lines.append(f"t{len(lines)} = {text[expr]}")
            text[expr] = f"t{len(lines) - 1}"
    for term in terms:
        value = text[term.expr]
        if term.kind is Kind.BOOL:
            value = f"{value}.to(tl.int64)"
        elif term.kind is Kind.FLOAT:
            unknown = f'float("{"-" if term.low else ""}inf")'
            value = f"tl.where({value} == {value}, {value}, {unknown})"
        values.append(value)
    extras = file.extras(exprs)
    doc = [f'"""What tiles of {side.many} are known by, at each position."""']
    doc += [f"# {line}" for expr in exprs for line in textwrap.wrap(show(expr), RESULT_WIDTH)]
    body = [*lines, *returned(values)]
    args = ("b", "h", side.index, *extras)
    return file.add(f"{side.at}_values", args, [*doc, *file.widened(body, extras), *body])


def term_ends(file: ListFile, side: Side) -> Function:
    """The terms over a run of positions."""
    terms, values = file.terms(side), term_values(file, side)
    names = [term.name for term in terms]
    lo, last = side.ends
    lines = [
        f'"""The terms over {lo}, ..., {last}, WIDTH positions at a time."""',
        f"{side.index} = tl.minimum({lo} + tl.arange(0, WIDTH), {last})",
        assigned(values, ", ".join(names)),
        f"for i in range({lo} + WIDTH, {last} + 1, WIDTH):",
        f"    {side.index} = tl.minimum(i + tl.arange(0, WIDTH), {last})",
        assigned(values, "more", 4),
    ]
    for number, t in enumerate(terms):
        fold = "tl.minimum" if t.low else "tl.maximum"
        other = f"more[{number}]" if len(terms) > 1 else "more"
        lines.append(f"    {t.name} = {fold}({t.name}, {other})")
    lines += [f"{t.name} = tl.{'min' if t.low else 'max'}({t.name}, 0)" for t in terms]
    for t in terms:
        lines += _margin(file, t)
    args = (lo, last, *needs([values], side.index))
    return file.add(f"{side.at}_ends", args, [*lines, *returned(names)])


def _margin(file: ListFile, term: Term) -> list[str]:
    """Room for a float that is rounded otherwise elsewhere."""
    if term.kind is not Kind.FLOAT or (same_in_any_dtype(term.expr) and not file.doubles):
        return []
    sign = "-" if term.low else "+"
    return [f"{term.name} {sign}= tl.abs({term.name}) * {RELATIVE!r} + {TINY!r}"]


def summarize(file: ListFile) -> str:
    """The kernel that keeps the terms of every tile."""
    sides = [side for side in (QUERIES, KEYS) if file.terms(side)]
    lines: list[str] = []
    args: list[str] = []
    number = "tl.program_id(0)"
    for side in sides:
        own = _summarize(file, side, number)
        args += [*needs([term_ends(file, side)], *LOCALS, *side.ends), *side.pointers]
        args += [*side.strides, f"{side.at}_entries"]
        if len(sides) == 1:
            lines += own
        elif side is sides[0]:
            lines += [f"if {number} < {side.at}_entries:", indented("\n".join(own)), "else:"]
            number = f"{number} + {side.at}_entries"
        else:
            lines.append(indented("\n".join(own)))
    doc = "What the tile test reads of every tile; then the same of every CHUNK of tiles."
    return kernel("summarize", doc, args, lines)


def _summarize(file: ListFile, side: Side, number: str) -> list[str]:
    ends, at = term_ends(file, side), side.at
    lo, last = side.ends
    names = ", ".join(term.name for term in file.terms(side))
    total = f"{at}_entries - 1"
    if "+" in number:  # the second axis: its programs follow the first one's
        number, before = number.split(" + ")
        total = f"{before} + {total}"
    return [
        f"{at}_tile = {total} - {number}  # chunks first, which take longer",
        f"if {at}_tile < {at}_tiles:",
        f"    {lo} = {at}_tile * {side.block}",
        f"    {last} = tl.minimum({lo} + {side.block}, {at}_len) - 1",
        assigned(ends, names, 4, {"WIDTH": side.block}),
        "else:",
        f"    {lo} = ({at}_tile - {at}_tiles) * (CHUNK * {side.block})",
        f"    {last} = tl.minimum({lo} + CHUNK * {side.block}, {at}_len) - 1",
        assigned(ends, names, 4),
        _row(side),
        *[f"tl.store({place}, {term.name})" for term, place in _places(file, side)],
    ]


def _row(side: Side) -> str:
    b, h, _ = side.strides
    return f"{side.at}_index = b * {b} + h * {h} + {side.tile}"


def _places(file: ListFile, side: Side) -> list[tuple[Term, str]]:
    """Each term and its address; ints (and bools) and floats are in a tensor of their own."""
    places: list[tuple[Term, str]] = []
    counts = dict.fromkeys(side.pointers, 0)
    for term in file.terms(side):
        pointer = side.pointers[term.kind is Kind.FLOAT]
        number = counts[pointer]
        counts[pointer] += 1
        step = {0: "", 1: f" + {side.strides[2]}"}.get(number, f" + {number} * {side.strides[2]}")
        places.append((term, f"{pointer} + {side.at}_index{step}"))
    return places


def kept_terms(file: ListFile, side: Side) -> Function:
    """Reads the terms of a tile, or of a vector of tiles."""
    texts = [
        f"tl.load({place})" + (" != 0" if term.kind is Kind.BOOL else "")
        for term, place in _places(file, side)
    ]
    lines = [f'"""The terms of tiles of {side.many}."""', _row(side), *returned(texts)]
    args = ("b", "h", side.tile, *side.pointers, *side.strides)
    return file.add(f"{side.at}_terms", args, lines)


# -- the test


def verdict(file: ListFile) -> Function:
    """The tile test, of one tile or of vectors of tiles."""
    outputs = (file.test.full, file.test.some)
    lines, texts = file.printer.body(outputs)
    body = [*lines, *returned(texts)]
    extras = file.extras(outputs)
    doc = '"""(every pair is kept, some pair may be), over the tiles\' ends and terms."""'
    names = tuple(term.name for term in file.test.terms)
    args = ("b", "h", "kv_head", *QUERIES.ends, *KEYS.ends, *names, *extras)
    return file.add("tile_test", args, [doc, *file.widened(body, extras), *body])


def visited(file: ListFile, rows: Side, columns: Side) -> Function:
    """The tiles of one axis that a tile of the other can visit."""
    segment = _segment(file, columns)
    before, (lo, hi) = file.printer.body((segment.lo, segment.hi))
    body = [*before, f"visit_lo = {lo}", f"visit_hi = {hi}"]
    extras = file.extras((segment.lo, segment.hi))
    first = f"visit_lo // {columns.block}"
    lines = [
        f'"""The first tile of {columns.many} that may hold a pair, and the one after the last."""',
        *file.widened(body, extras),
        *body,
        f"first_tile = tl.where(visit_lo < visit_hi, {first}, 0)",
        f"end_tile = tl.where(visit_lo < visit_hi, tl.cdiv(visit_hi, {columns.block}), 0)",
        "return first_tile.to(tl.int32), end_tile.to(tl.int32)",
    ]
    return file.add(f"visited_{columns.many}", ("b", "h", "kv_head", *rows.ends, *extras), lines)


def _segment(file: ListFile, columns: Side) -> Segment:
    return file.test.keys if columns is KEYS else file.test.queries


def _tile_at(side: Side, indent: str = "") -> list[str]:
    lo, last = side.ends
    return [
        f"{indent}{lo} = {side.tile} * {side.block}",
        f"{indent}{last} = tl.minimum({lo} + {side.block}, {side.at}_len) - 1",
    ]


def _terms_of(file: ListFile, side: Side, indent: int = 0) -> list[str]:
    terms = file.terms(side)
    if not terms:
        return []
    return [assigned(kept_terms(file, side), ", ".join(t.name for t in terms), indent)]


def chunk_test(file: ListFile, columns: Side) -> Function:
    """The tile test of a whole chunk, which skips most of what is empty."""
    test, at = verdict(file), columns.at
    lo, last = columns.ends
    lines = [
        f'"""Whether some tile of a chunk of {columns.one} tiles may hold a pair."""',
        f"{columns.tile} = {at}_tiles + chunk",
        f"{lo} = chunk * (CHUNK * {columns.block})",
        f"{last} = tl.minimum({lo} + CHUNK * {columns.block}, {at}_len) - 1",
        *_terms_of(file, columns),
        assigned(test, "_, some_tile"),
        "return some_tile",
    ]
    return file.add(f"some_{columns.many}", ("chunk", *_arguments(file, columns)), lines)


def classify(file: ListFile, columns: Side) -> Function:
    """The tile test of the tiles of a chunk."""
    lo, _ = columns.ends
    inside = f"({columns.tile} >= first_tile) & ({columns.tile} < end_tile)"
    whole = f" & ({lo} + {columns.block} <= {columns.at}_len)" if columns is KEYS else ""
    lines = [
        f'"""(full, partial) of the {columns.one} tiles of a chunk."""',
        f"{columns.tile} = chunk * CHUNK + tl.arange(0, CHUNK)",
        f"inside = {inside}",
        f"{columns.tile} = tl.minimum({columns.tile}, {columns.at}_tiles - 1)",
        *_tile_at(columns),
        *_terms_of(file, columns),
        assigned(verdict(file), "full_tile, some_tile"),
        "some_tile = tl.where(inside, some_tile, False)",
        *(["# a ragged last tile needs bounds, as partial ones have"] if whole else []),
        f"full_tile = tl.where(some_tile{whole}, full_tile, False)",
        "return full_tile, some_tile & ~full_tile",
    ]
    args = ("chunk", "first_tile", "end_tile", *_arguments(file, columns))
    return file.add(f"classify_{columns.many}", args, lines)


def _arguments(file: ListFile, columns: Side) -> list[str]:
    """What the tile test of columns needs from the kernel."""
    own = (columns.tile, *columns.ends, *(t.name for t in file.terms(columns)))
    read = [kept_terms(file, columns)] if file.terms(columns) else []
    return needs([*read, verdict(file)], *own)


# -- lists


def row_lists(file: ListFile, rows: Side, columns: Side) -> str:
    """The kernel that lists the tiles of one row: full ones, then partial ones."""
    may_visit, some = visited(file, rows, columns), chunk_test(file, columns)
    split = classify(file, columns)
    read = [kept_terms(file, rows)] if file.terms(rows) else []
    known = (*LOCALS, rows.tile, *rows.ends, *(t.name for t in file.terms(rows)))
    chunks = "for chunk in range(first_tile // CHUNK, tl.cdiv(end_tile, CHUNK)):"
    lines = [
        f"{rows.tile} = tl.program_id(0)",
        *_tile_at(rows),
        *_terms_of(file, rows),
        assigned(may_visit, "first_tile, end_tile"),
        "",
        *_start(file, rows, columns, may_visit),
        "",
        "# -- how many are full, since the partial ones follow them",
        "full_count = 0",
        chunks,
        assigned(some, "some_tile", 4),
        "    if some_tile:",
        assigned(split, "full_tile, partial_tile", 8),
        "        full_count += tl.sum(full_tile.to(tl.int32), 0)",
        "",
        "# -- the two lists, ascending",
        "full_index_ptr = index_ptr + row_index",
        "partial_index_ptr = full_index_ptr + full_count",
        "full_count = 0",
        "partial_count = 0",
        chunks,
        assigned(some, "some_tile", 4),
        "    if some_tile:",
        assigned(split, "full_tile, partial_tile", 8),
        f"        {columns.tile} = chunk * CHUNK + tl.arange(0, CHUNK)",
        f"        {columns.tile} = {columns.tile}.to(index_ptr.dtype.element_ty)",
    ]
    for name in ("full", "partial"):
        lines += [
            f"        {name}_at_tile = {name}_count + tl.cumsum({name}_tile.to(tl.int32), 0) - 1",
            f"        tl.store({name}_index_ptr + {name}_at_tile, {columns.tile}, "
            f"mask={name}_tile)",
            f"        {name}_count += tl.sum({name}_tile.to(tl.int32), 0)",
        ]
    lines += [f"tl.store({name}_count_ptr + row, {name}_count)" for name in ("full", "partial")]
    args = needs([may_visit, some, split, *read], *known)
    args += ["index_ptr", "start_ptr", "full_count_ptr", "partial_count_ptr", "list_size"]
    doc = f"The {columns.one} tiles of a tile of {rows.many}: full ones, then partial ones."
    return kernel(f"{columns.one}_lists", doc, args, lines)


def _start(file: ListFile, rows: Side, columns: Side, may_visit: Function) -> list[str]:
    """Lines that find where the row's list starts, in an index with room for what ranges allow."""
    lines = [
        "# -- where its list starts: behind all that the rows before it may visit",
        "bh = b * tl.num_programs(2) + h",
        f"row = bh * {rows.at}_tiles + {rows.tile}",
    ]
    if not bounded(_segment(file, columns)):
        lines.append(f"row_index = row.to(tl.int64) * {columns.at}_tiles")
        return [*lines, "tl.store(start_ptr + row, row_index)"]
    lo, last = rows.ends
    renamed = {lo: "other_lo", last: "other_last"}
    room = "tl.where(other_tile < " + rows.tile + ", other_end_tile - other_first_tile, 0)"
    return [
        *lines,
        "row_index = bh.to(tl.int64) * list_size",
        f"for i in range(0, {rows.tile}, CHUNK):",
        "    other_tile = i + tl.arange(0, CHUNK)",
        f"    other_lo = other_tile * {rows.block}",
        f"    other_last = tl.minimum(other_lo + {rows.block}, {rows.at}_len) - 1",
        assigned(may_visit, "other_first_tile, other_end_tile", 4, renamed),
        f"    row_index += tl.sum({room}, 0)",
        "tl.store(start_ptr + row, row_index)",
    ]


def bounded(segment: Segment) -> bool:
    """Whether the host knows what rows may visit: it depends on the row, and on no tensor."""
    nodes: list[Expr] = [*walk(segment.lo), *walk(segment.hi)]
    loads = any(isinstance(node, Load) for node in nodes)
    return not loads and any(_on_tile(node) for node in nodes)


def _on_tile(expr: Expr) -> bool:
    return bool(getattr(expr, "axes", Axis.NONE) & (Axis.Q | Axis.KV))
