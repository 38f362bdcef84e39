"""What a Plan decided, and its tiles, in words and as data: for `print(plan)` and `explain`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attncc import picture
from attncc.ir.expr import FALSE, TRUE, Expr, Load, TensorParam, kind, walk
from attncc.ir.ops import Kind
from attncc.ir.plan import READ_AT, Blocks, Order, Plan, Ranges, Summary, TileTest
from attncc.ir.show import show, show_param

if TYPE_CHECKING:
    from attncc.tiles import BoundPlan

INDENT = "  "


def lines(plan: Plan) -> list[str]:
    """The decisions of a plan, a line each, indented by two spaces below their titles."""
    parts = [tier(plan)]
    parts += _section("keys of a query tile, q_lo to q_last", _ranges(plan.key_ranges, "kv_idx"))
    parts += _section(
        "queries of a key tile, kv_lo to kv_last", _ranges(plan.query_ranges, "q_idx")
    )
    parts += _section("found by search, once for all calls of one mask", _searches(plan))
    if plan.blocks is Blocks.LISTS:
        parts += _section("tile test", _tile_test(plan.tiles))
    parts += _section("score", _score(plan))
    parts += _section("order of work", _orders(plan))
    if plan.program.output is not None:
        parts += _section("output, by torch after the kernel", [show(plan.program.output)])
    parts += _section("notes", [f"{note.by}: {note.text}" for note in plan.notes])
    return parts


def tier(plan: Plan) -> str:
    """Where the tiles come from, in a sentence."""
    match plan.blocks:
        case Blocks.RANGES if plan.mask == TRUE:
            return "tier 1: every pair is kept, so every tile is full"
        case Blocks.RANGES if plan.searches:
            return "tier 1: loop bounds in closed form, of positions searched in sorted tensors"
        case Blocks.RANGES:
            return "tier 1: loop bounds in closed form; no table, whatever the arguments"
        case Blocks.LISTS:
            return "tier 2: lists of tiles, classified by intervals; O(n) to summarize the tensors"


def data(plan: Plan) -> dict[str, Any]:
    """The same decisions for tools; every expression is text of the language."""
    return {
        "tier": 1 if plan.blocks is Blocks.RANGES else 2,
        "why": tier(plan),
        "mask": show(plan.mask),
        "score": show(plan.score),
        "key_ranges": _ranges_data(plan.key_ranges),
        "query_ranges": _ranges_data(plan.query_ranges),
        "searches": _searches(plan),
        "tile_test": {
            "must": show(plan.tiles.must, _bounds(plan.tiles)),
            "may": show(plan.tiles.may, _bounds(plan.tiles)),
            "summaries": [
                {"expr": show(s.expr), "axis": str(s.axis.name).lower()}
                for s in plan.tiles.summaries
            ],
        },
        "query_order": plan.query_order.value,
        "key_order": plan.key_order.value,
        "output": None if plan.program.output is None else show(plan.program.output),
        "row_terms_cancel": plan.row_terms_cancel,
        "captured": [{"declared": name, "reads": reads} for name, reads in captured(plan).items()],
        "notes": [{"by": note.by, "text": note.text} for note in plan.notes],
    }


def captured(plan: Plan) -> dict[str, str]:
    """For each captured tensor as declared: where it is read, and how reads are kept in range."""
    program = plan.program
    clauses = (plan.mask, plan.score, program.sink, program.output)
    exprs = [e for e in clauses if e is not None]
    loads = {node: None for expr in exprs for node in walk(expr) if isinstance(node, Load)}
    found: dict[str, str] = {}
    for tensor in program.tensors:
        own = [load for load in loads if load.tensor == tensor]
        reads = [f"{show(load)} ({_safety(plan, load)})" for load in own]
        found[show_param(tensor)] = ", ".join(reads) or "not read"
    return found


def tiles(bound: BoundPlan) -> list[str]:
    """The lengths, the counts, and a picture of the first sequence and head."""
    binding, (rows, keys) = bound.binding, bound.tile
    title = (
        f"{binding.q_len} queries x {binding.kv_len} keys, "
        f"{binding.batch} x {binding.heads} heads, tiles of {rows} x {keys}"
    )
    if not bound.counts.total:
        return [title, "no tiles"]
    return [title, _counts(bound), picture.text(grid(bound)), picture.legend()]


def backend(bound: BoundPlan) -> str:
    """Whose kernels a call with such heads gets on a Hopper GPU, and why not Gluon's."""
    from attncc.backends.gluon.configs import backward_unsupported, unsupported
    from attncc.backends.registry import WIDEST_HEAD

    dim = bound.binding.head_dim
    if dim > WIDEST_HEAD:
        return f"sm_90: no kernels for head dims above {WIDEST_HEAD}; backend='dense' has no limit"
    if reason := unsupported("bfloat16", dim, dim):
        return f"sm_90: triton's kernels; not gluon's: {reason}"
    if reason := backward_unsupported(bound.plan, "bfloat16", dim, dim, deterministic=False):
        return f"sm_90: gluon's forward for bf16 and fp16, triton's kernels else: {reason}"
    return "sm_90: gluon's kernels for bf16 and fp16, triton's for fp32 and deterministic backwards"


def grid(bound: BoundPlan) -> list[list[int]]:
    """The classes of the first sequence and head, a list a row of tiles."""
    classes = bound.classify()
    found: list[list[int]] = classes[0, 0].tolist() if classes.numel() else []
    return found


def _counts(bound: BoundPlan) -> str:
    counts, density = bound.counts, bound.density
    pairs = f"{density.low:.1%}" if density.exact else f"{density.low:.1%} to {density.high:.1%}"
    return (
        f"tiles: {counts.full} full, {counts.partial} partial, {counts.empty} empty; "
        f"{1 - counts.empty / counts.total:.1%} of tiles visited, {pairs} of pairs kept"
    )


def _safety(plan: Plan, load: Load) -> str:
    return "proved in range" if load in plan.proved_loads else "checked when bound"


def _section(title: str, body: list[str]) -> list[str]:
    return [title, *(INDENT + line for line in body)] if body else []


def _ranges(ranges: Ranges | None, name: str) -> list[str]:
    if ranges is None:
        return []
    found = []
    for title, segments in (("visit", ranges.visit), ("unmasked", ranges.unmasked)):
        found += [f"{title:9}{show(s.lo)} <= {name} < {show(s.hi)}" for s in segments]
        if not segments:
            found.append(f"{title:9}none")
    found += [f"{'beyond':9}{show(part)}" for part in ranges.left_out]
    return found


def _searches(plan: Plan) -> list[str]:
    """`first_key_0[b, q_idx]: the first kv_idx with doc[b, kv_idx] >= doc[b, q_idx]`"""
    found = []
    for search in plan.searches:
        at = ", ".join(show(READ_AT[str(dim)]) for dim in search.tensor.dims)
        sought, order = show(search.of.at[-1]), ">" if search.past else ">="
        condition = f"{show(search.of)} {order} {show(search.value)}"
        found.append(f"{search.tensor.name}[{at}]: the first {sought} with {condition}")
    return found


def _ranges_data(ranges: Ranges | None) -> dict[str, Any] | None:
    if ranges is None:
        return None
    return {
        "visit": [[show(s.lo), show(s.hi)] for s in ranges.visit],
        "unmasked": [[show(s.lo), show(s.hi)] for s in ranges.unmasked],
        "complete": ranges.complete,
    }


def _tile_test(test: TileTest) -> list[str]:
    names = _bounds(test)
    found = [f"full     if {show(test.must, names)}"] if test.must != FALSE else ["full     never"]
    return found + ([f"visited  if {show(test.may, names)}"] if test.may != TRUE else [])


def _bounds(test: TileTest) -> dict[Expr, str]:
    """`lowest(doc[b, kv_idx])` for reads of that summary: over the tile of its position."""
    words: dict[TensorParam, str] = {}
    for summary in test.summaries:
        low, high = _words(summary)
        words |= {summary.low: f"{low}({show(summary.expr)})"}
        words |= {summary.high: f"{high}({show(summary.expr)})"}
    nodes = [*walk(test.must), *walk(test.may)]
    return {n: words[n.tensor] for n in nodes if isinstance(n, Load) and n.tensor in words}


def _words(summary: Summary) -> tuple[str, str]:
    return ("all", "any") if kind(summary.expr) is Kind.BOOL else ("lowest", "highest")


def _score(plan: Plan) -> list[str]:
    if not plan.row_terms_cancel:
        return []
    return ["what depends on the row alone cancels in the softmax, and is given back to lse"]


def _orders(plan: Plan) -> list[str]:
    orders = (("query tiles", plan.query_order), ("key tiles", plan.key_order))
    return [f"{what}: {order.value}" for what, order in orders if order is not Order.NATURAL]
