"""What planning costs on a GPU, beside FlexAttention's: python -m benchmarks.planning.

A fresh BoundPlan each time, as a training step with new documents makes it: summaries, key lists
(and query lists, which only a backward needs) and the order of rows. `device` is the time of a
replayed CUDA graph of it, which also shows that nothing waits for the host; `call` is the whole
from Python; `peak` counts every byte allocated on the way.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from attncc.backends.triton.classify import KEYS, QUERIES
from attncc.backends.triton.lists import ListMaker, Lists, room
from attncc.bench.machine import describe
from attncc.binding import Binding, bind_lengths
from attncc.frontend import parse
from attncc.ir.plan import Plan
from attncc.passes import analyze
from attncc.tiles import FULL, PARTIAL, BoundPlan

RESULTS = Path(__file__).parent / "results"
MEAN_DOCUMENT = 683
"""12 documents in 8192 tokens, as in the benchmark of kernels."""
CHECKED = 32768
"""Longest sequence whose lists are compared with BoundPlan's, tile by tile."""
PEER = 131072
"""Longest sequence that the peer, which looks at every pair, is timed on."""
MOST_ROOM = 2**28
"""Bytes of lists beyond which a row is left out."""

DOCUMENTS = """
attention documents(doc: int[batch, kv_len]):
    mask = q_idx >= kv_idx and doc[b, q_idx] == doc[b, kv_idx]
"""


@dataclass(frozen=True)
class Case:
    name: str
    plan: Plan
    heads: int
    tensors: Callable[[int], dict[str, Tensor]]
    mask_mod: Callable[[dict[str, Tensor]], Callable[..., Tensor]]


def documents(n: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    cuts = torch.rand(n, generator=rng) < 1 / MEAN_DOCUMENT
    return {"doc": cuts.long().cumsum(0)[None].cuda()}


def question(n: int) -> dict[str, Tensor]:
    """An eighth is the question, then 8 answers."""
    return {"doc": ((torch.arange(n) * 9) // n)[None].cuda()}


def _documents_mod(tensors: dict[str, Tensor]) -> Callable[..., Tensor]:
    doc = tensors["doc"]
    return lambda b, h, q, k: (q >= k) & (doc[b, q] == doc[b, k])


def _question_mod(tensors: dict[str, Tensor]) -> Callable[..., Tensor]:
    doc = tensors["doc"]

    def mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (doc[b, q] == doc[b, k]) & (q >= k)
        return ((doc[b, q] != 0) & (doc[b, k] == 0)) | own

    return mod


def _s2_mod(tensors: dict[str, Tensor]) -> Callable[..., Tensor]:
    def mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        near = q // 64 - k // 64 < 4
        return (q >= k) & (near | ((k // 64 + h) % 4 == 0))

    return mod


def cases() -> list[Case]:
    def example(name: str) -> Plan:
        return analyze(parse(Path(f"examples/{name}.attn").read_text())[0])

    return [
        Case("documents", analyze(parse(DOCUMENTS)[0]), 1, documents, _documents_mod),
        Case("share_question", example("share_question"), 1, question, _question_mod),
        Case("s2", example("s2"), 4, lambda n: {}, _s2_mod),
    ]


# -- attncc


def bound_of(case: Case, n: int, tensors: dict[str, Tensor], tile: tuple[int, int]) -> BoundPlan:
    arguments: dict[str, object] = dict(tensors)
    binding = bind_lengths(
        case.plan.program, q_len=n, kv_len=n, heads=case.heads, arguments=arguments
    )
    return BoundPlan(case.plan, on_gpu(binding), tile)


def on_gpu(binding: Binding) -> Binding:
    fields = ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim", "scalars", "tensors")
    found = {name: getattr(binding, name) for name in fields}
    return Binding(**found, device=torch.device("cuda", torch.cuda.current_device()))


def plan_once(bound: BoundPlan, backward: bool) -> list[Lists]:
    maker = ListMaker(BoundPlan(bound.plan, bound.binding, bound.tile))
    made = [maker.lists(QUERIES, KEYS)]
    return [*made, maker.lists(KEYS, QUERIES)] if backward else made


def measured(bound: BoundPlan, backward: bool) -> dict[str, float]:
    def run() -> list[Lists]:
        return plan_once(bound, backward)

    made = run()  # compiles
    made = run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    kept = sum(_bytes(lists) for lists in made)
    visited = int((made[0].full_count + made[0].partial_count).sum())
    del made
    return {
        "device_us": 1e3 * graphed(run),
        "call_us": 1e6 * called(run),
        "peak_MiB": peak(run) / 2**20,
        "kept_MiB": kept / 2**20,
        "visited": visited,
    }


def _bytes(lists: Lists) -> int:
    parts = (lists.index, lists.start, lists.full_count, lists.partial_count, lists.order)
    return sum(part.numel() * part.element_size() for part in parts if part is not None)


def graphed(run: Callable[[], object], replays: int = 50) -> float:
    """Milliseconds of one replay of its CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = run()
    for _ in range(3):
        graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    del made
    return begin.elapsed_time(end) / replays


def called(run: Callable[[], object], calls: int = 30) -> float:
    """Seconds of one call, until the device is done; the median."""
    times = []
    for _ in range(calls):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        made = run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
        del made
    return median(times)


def peak(run: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    made = run()
    torch.cuda.synchronize()
    del made
    return torch.cuda.max_memory_allocated() - before


# -- correctness


def check(bound: BoundPlan) -> None:
    """The lists against BoundPlan's classes."""
    keys, queries = plan_once(bound, backward=True)
    classes = bound.classify()
    assert spelled_out(queries, bound.q_tiles).transpose(2, 3).equal(classes), "query lists differ"
    if bound.binding.kv_len % bound.tile[1]:
        classes = classes.clone()
        classes[..., -1].clamp_(max=PARTIAL)
    assert spelled_out(keys, bound.kv_tiles).equal(classes), "key lists differ"


def spelled_out(lists: Lists, columns: int) -> Tensor:
    found = torch.zeros((lists.start.numel(), columns), dtype=torch.int8, device=lists.start.device)
    full, partial = lists.full_count.flatten(), lists.partial_count.flatten()
    for start, count, value in (
        (lists.start.flatten(), full, FULL),
        (lists.start.flatten() + full, partial, PARTIAL),
    ):
        rows = torch.repeat_interleave(torch.arange(count.numel(), device=count.device), count)
        within = torch.arange(rows.numel(), device=rows.device) - (count.cumsum(0) - count)[rows]
        found[rows, lists.index[start[rows] + within].long()] = value
    return found.view(*lists.start.shape, columns)


# -- the peer


def flex(case: Case, n: int, tensors: dict[str, Tensor]) -> dict[str, float]:
    """FlexAttention's create_block_mask, compiled; blocks of 128, both directions."""
    from torch.nn.attention.flex_attention import create_block_mask

    make = torch.compile(create_block_mask)
    mod = case.mask_mod(tensors)
    heads = case.heads if case.heads > 1 else None

    def run() -> object:
        return make(mod, 1 if tensors else None, heads, n, n, device="cuda")

    run()
    run()
    return {"call_us": 1e6 * called(run, 10), "peak_MiB": peak(run) / 2**20}


# -- the table


def rows(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for case in cases():
        for n in asked.lengths:
            tensors = case.tensors(n)
            for block in asked.tiles:
                bound = bound_of(case, n, tensors, (block, block))
                copies = case.heads if case.name == "s2" else 1
                if 2 * copies * room(bound, QUERIES, KEYS) > MOST_ROOM:
                    continue
                if n <= CHECKED:
                    check(bound)
                yield {
                    "case": case.name,
                    "n": n,
                    "tile": block,
                    "checked": n <= CHECKED,
                    "forward": measured(bound, backward=False),
                    "both": measured(bound, backward=True),
                    "flex": _peer(case, n, tensors, block, asked),
                }
                torch.cuda.empty_cache()


def _peer(
    case: Case, n: int, tensors: dict[str, Tensor], block: int, asked: argparse.Namespace
) -> dict[str, float] | None:
    return flex(case, n, tensors) if asked.peer and block == 128 and n <= PEER else None


def line(row: dict[str, Any]) -> str:
    forward, both, peer = row["forward"], row["both"], row["flex"]
    text = f"{row['case']:15} {row['n']:8} {row['tile']:4} tiles={forward['visited']:8}"
    for name, part in (("forward", forward), ("both", both)):
        text += f"  {name} {part['device_us']:7.1f} us, {part['call_us']:7.1f} called"
        text += f", {part['peak_MiB']:6.2f} MiB"
    return text + (f"  flex {peer['call_us']:8.0f} us, {peer['peak_MiB']:6.1f} MiB" if peer else "")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planning")
    lengths = [2**k for k in range(13, 21)]
    parser.add_argument("--lengths", type=int, nargs="*", default=lengths)
    parser.add_argument("--tiles", type=int, nargs="*", default=[64, 128])
    parser.add_argument("--no-peer", dest="peer", action="store_false")
    parser.add_argument("--date", default="undated", help="kept with the results")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    machine = describe(torch.device("cuda"))
    short = machine["device"].split()[1].lower().split("-")[0]
    out = asked.out or RESULTS / f"planning_{short}.json"
    results: dict[str, Any] = {"machine": machine, "date": asked.date, "rows": []}
    for row in rows(asked):
        results["rows"].append(row)
        print(line(row), flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
