"""One row of the peers' table: who can compute it, whether they agree, and how fast they are."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import attncc
from benchmarks.rows import Mod, Row

torch._functorch.config.donated_buffer = False  # so that a backward can be run twice

BLOCK = 128
"""FlexAttention's blocks of a mask."""

SLICE = 64
"""Queries of two heads that are computed in float64, spread over the row."""

OUT, GRADIENT = 1e-2, 2e-2
"""Relative errors by norms that pass, of bf16."""

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass
class Contest:
    """Inputs of one row, and its contestants; `failed` says why others are none."""

    row: Row
    device: torch.device
    inputs: Inputs
    dout: Tensor
    arguments: dict[str, Any]
    mods: tuple[Mod | None, Mod | None]
    tiles: Tensor | None
    calls: dict[str, Call] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def pairs(self) -> int:
        """Kept (query, key) pairs of one head."""
        return self.row.shape.length**2 if self.tiles is None else int(self.tiles.sum())

    @property
    def flops(self) -> float:
        """Of the forward: two products a kept pair."""
        shape = self.row.shape
        return 4.0 * shape.batch * shape.heads * self.pairs * shape.head_dim


def contest(row: Row, device: torch.device, tune: bool = False) -> Contest:
    """The row with everybody who can run it, compiled: forward and backward ran once."""
    rng = torch.Generator(device).manual_seed(0)
    shape = row.shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = [(shape.batch, n, shape.length, shape.head_dim) for n in (shape.heads, shape.kv_heads)]
    make = {"generator": rng, "device": device, "dtype": dtype}
    q, k, v = (torch.randn(sizes[n], **make).requires_grad_() for n in (0, 1, 1))
    arguments = row.pattern.arguments(shape, device)
    mods = row.pattern.mods(arguments)
    tiles = None if mods[0] is None else kept_by_tile(mods[0], shape.length, device)
    dout = torch.randn(sizes[0], **make)
    found = Contest(row, device, (q, k, v), dout, arguments, mods, tiles)
    makers = {"attncc": lambda c: by_attncc(c, tune), "flex": by_flex}
    if row.pattern.sdpa and device.type == "cuda":
        makers |= {"cudnn": by_sdpa("CUDNN_ATTENTION"), "flash": by_sdpa("FLASH_ATTENTION")}
    for name, maker in makers.items():
        try:
            call = maker(found)
            if (out := call(q, k, v)).requires_grad:
                gradients(found, out)
            found.calls[name] = call
        except Exception as error:
            found.failed[name] = f"{type(error).__name__}: {str(error).strip()[:300]}"
    return found


def gradients(found: Contest, out: Tensor) -> Inputs:
    """Of q, k and v."""
    return torch.autograd.grad(out, found.inputs, found.dout, retain_graph=True)


# -- contestants


def by_attncc(found: Contest, tune: bool) -> Call:
    attention = attncc.compile(found.row.pattern.program)
    names = {param.name for param in attention.program.params}
    arguments = {name: value for name, value in found.arguments.items() if name in names}
    q, k, v = found.inputs
    if tune and hasattr(attention, "tune"):
        attention.tune(q, k, v, **arguments)
    plan = attention.plan(q, k, v, **arguments)
    return lambda q, k, v: attention(q, k, v, plan=plan)


def by_flex(found: Contest) -> Call:
    mask, score = found.mods
    blocks = None if mask is None else block_mask(found.tiles, mask)
    gqa = found.row.shape.heads != found.row.shape.kv_heads
    on_gpu = found.device.type == "cuda"
    attend = torch.compile(flex_attention, dynamic=False) if on_gpu else flex_attention

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not on_gpu:  # it has no backward there
            q, k, v = q.detach(), k.detach(), v.detach()
        return attend(q, k, v, score_mod=score, block_mask=blocks, enable_gqa=gqa)

    return call


def by_sdpa(backend: str) -> Callable[[Contest], Call]:
    def make(found: Contest) -> Call:
        causal = found.row.pattern.sdpa == "causal"
        gqa = found.row.shape.heads != found.row.shape.kv_heads

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)

        return call

    return make


def kept_by_tile(mask: Mod, length: int, device: torch.device) -> Tensor:
    """int64 [tiles, tiles]: pairs that the mask keeps, the same for every batch and head."""
    zero = torch.zeros((), dtype=torch.int64, device=device)
    keys = torch.arange(length, device=device)
    parts = []
    for rows in keys.split(1024):
        kept = mask(zero, zero, rows[:, None], keys[None, :]).expand(len(rows), length)
        parts.append(kept.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).sum((1, 3)))
    return torch.cat(parts)


def block_mask(tiles: Tensor | None, mask: Mod) -> BlockMask:
    """FlexAttention's own structure, from counts that take less memory than its own way."""
    assert tiles is not None
    full = tiles == BLOCK * BLOCK
    lists = []
    for chosen in ((tiles > 0) & ~full, full):
        flags = chosen[None, None].to(torch.int32)
        lists += [
            flags.sum(-1, dtype=torch.int32),
            flags.argsort(dim=-1, descending=True, stable=True).to(torch.int32),
        ]
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=mask)


# -- agreement


def gate(found: Contest) -> list[str]:
    """What is wrong with attncc's outputs: against float64 on a slice, and against flex in full."""
    if "attncc" not in found.calls:
        return [f"attncc did not run: {found.failed.get('attncc', '')}"]
    mine = outputs(found, "attncc")
    problems = [f"{name} is not finite" for name, x in mine.items() if not x.isfinite().all()]
    shape = found.row.shape
    for b, h in {(0, 0), (shape.batch - 1, shape.heads - 1)}:
        rows = torch.linspace(0, shape.length - 1, SLICE, device=found.device).long()
        for name, exact in slice_in_float64(found, b, h, rows).items():
            problems += _apart(f"{name}[{b}, {h}]", name, mine[name][b, h, rows], exact)
    if "flex" in found.calls:
        for name, value in outputs(found, "flex").items():
            problems += _apart(f"{name} against flex", name, mine[name], value)
    return problems


def outputs(found: Contest, name: str) -> dict[str, Tensor]:
    out = found.calls[name](*found.inputs)
    values = {"out": out.detach()}
    if not out.requires_grad:
        return values
    return values | dict(zip(("dq", "dk", "dv"), gradients(found, out), strict=True))


def slice_in_float64(found: Contest, b: int, h: int, rows: Tensor) -> dict[str, Tensor]:
    """out and dq of some queries of one head, by the mods that the peers use."""
    q, k, v = (x.detach() for x in found.inputs)
    mask, score = found.mods
    key_head = h // (found.row.shape.heads // found.row.shape.kv_heads)
    some = q[b, h, rows].double().requires_grad_()
    scores = some @ k[b, key_head].double().T / math.sqrt(q.shape[-1])
    keys = torch.arange(k.shape[2], device=found.device)[None, :]
    at = torch.tensor(b, device=found.device), torch.tensor(h, device=found.device), rows[:, None]
    if score is not None:
        scores = score(scores, *at, keys)
    if mask is not None:
        scores = scores.masked_fill(~mask(*at, keys), -math.inf)
    out = scores.softmax(-1) @ v[b, key_head].double()
    (dq,) = torch.autograd.grad(out, some, found.dout[b, h, rows].double())
    return {"out": out.detach(), "dq": dq}


def _apart(what: str, name: str, one: Tensor, other: Tensor) -> list[str]:
    one, other = one.double(), other.double()
    error = float((one - other).norm() / other.norm())
    allowed = OUT if name == "out" else GRADIENT
    return [] if error <= allowed else [f"{what} is off by {error:.3g} in norm, allowed {allowed}"]


# -- time


def timed(found: Contest, rounds: int, rep: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of each round by contestant and direction; contestants take turns."""
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for name, call in found.calls.items():
        out = call(*found.inputs)
        calls[name, "forward"] = lambda call=call: call(*found.inputs)
        if out.requires_grad:
            calls[name, "backward"] = lambda out=out: gradients(found, out)
    times: dict[str, dict[str, list[float]]] = {name: {} for name in found.calls}
    for _ in range(rounds):
        for (name, direction), call in calls.items():
            ms = milliseconds(call, rep, found.device)
            times[name].setdefault(direction, []).append(ms)
    return times


def milliseconds(call: Callable[[], object], rep: int, device: torch.device) -> float:
    """The median over `rep` milliseconds of calls, by the GPU's own clock."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(call, warmup=rep // 3, rep=rep, return_mode="median"))
    begun = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begun)


def result(found: Contest, times: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """What the results file keeps of a row."""
    shape, row = found.row.shape, found.row
    results = {
        name: {
            direction: {
                "ms": statistics.median(rounds),
                "tflops": factor * found.flops / statistics.median(rounds) / 1e9,
                "rounds_ms": [round(ms, 5) for ms in rounds],
            }
            for direction, rounds in of.items()
            for factor in [2.5 if direction == "backward" else 1.0]
        }
        for name, of in times.items()
    }
    return {
        "row": row.pattern.title,
        "shape": str(shape),
        "group": row.group,
        "density": found.pairs / shape.length**2,
        "results": results,
        "failed": found.failed,
    }


def freed() -> None:
    """Gives back what a row held, its compiled graphs too."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
