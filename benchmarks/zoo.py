"""The programs of examples/: how fast each is beside full attention, and a page that shows them.

python -m benchmarks.zoo --out benchmarks/results/zoo_cpu.json    measures, on a GPU if there is one
python -m benchmarks.zoo --page                                   writes examples/README.md
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from torch import Tensor

import attncc
from attncc import picture, report
from attncc.bench.contest import milliseconds
from attncc.bench.machine import describe
from attncc.inputs import Lengths, captured, qkv

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PICTURES = EXAMPLES / "pictures"
RESULTS = tuple(ROOT / "benchmarks" / "results" / f"zoo_{name}.json" for name in ("h100", "cpu"))
"""The first that is there is shown."""

TILE = 128, 128
LENGTHS = {"cuda": Lengths(1, 16, 4, 16384, 16384, 128), "cpu": Lengths(1, 4, 2, 4096, 4096, 64)}
SHOWN = Lengths(1, 4, 2, 4096, 4096, 64)


def arguments(program: Any, n: Lengths) -> dict[str, Any]:
    """Scalars and tensors that make sense; others are made up as `attncc run` does."""
    side = int(n.kv_len**0.5)
    frames = n.kv_len // 256
    heads = torch.arange(n.heads)
    own: Mapping[str, Mapping[str, Any]] = {
        "moa": {"span": (64 << heads % 6).to(torch.int32)},
        "duo_attention": {"retrieval": torch.arange(n.kv_heads) % 2 == 0},
        "vdit": {"reference": torch.arange(frames) % 8 == 0},
        "prefix_documents": _prefixes(n),
        "dynamic_mask": _dynamic(n),
        "swin": {"bias": torch.randn(n.heads, 15, 15), "height": side, "width": side, "window": 8},
        "neighborhood_2d": {"height": side, "width": side},
        "t5_bias": {"bias": torch.randn(n.heads, 32), "bucket": torch.arange(128) // 4},
        "selective": {"beta": torch.zeros(1)},
    }
    found = dict(own.get(program.name, {}))
    given = {name: x for name, x in found.items() if isinstance(x, Tensor)}
    return found | dict(captured(program, n, given).tensors)


def _prefixes(n: Lengths) -> dict[str, Tensor]:
    cuts = torch.tensor([0, 700, 1000, 1900, 2600, 2800]) * n.kv_len // 4096
    doc = torch.searchsorted(cuts, torch.arange(n.kv_len), right=True) - 1
    return {"doc": doc.expand(n.batch, -1).contiguous(), "start": cuts.expand(n.batch, -1).clone()}


def _dynamic(n: Lengths, kept: int = 512) -> dict[str, Tensor]:
    delta = torch.randn(n.batch, n.kv_heads, n.kv_len, generator=torch.Generator().manual_seed(0))
    least = torch.full_like(delta, -torch.inf)
    for i in range(kept, n.kv_len):
        least[..., i] = delta[..., : i + 1].kthvalue(i + 2 - kept, -1).values
    return {"delta": delta, "least": least}


def programs() -> list[attncc.Attention]:
    return [attncc.compile(path) for path in sorted(EXAMPLES.glob("*.attn"))]


# -- measuring


def measure(only: str, rounds: int, rep: int) -> dict[str, Any]:
    """Each program in turns with full attention of its shape, forward; medians of rounds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lengths = LENGTHS[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = qkv(lengths, dtype, device)
    full = attncc.compile(EXAMPLES / "full.attn")
    rows = {}
    for attn in programs():
        if only not in attn.program.name:
            continue
        given = arguments(attn.program, lengths)
        given = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in given.items()}
        calls: dict[str, Callable[[], object]] = {
            "full": lambda: full(q, k, v),
            "own": lambda attn=attn, given=given: attn(q, k, v, **given),
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        with torch.no_grad():
            for call in calls.values():
                call()
            for _ in range(rounds):
                for name, call in calls.items():
                    times[name].append(milliseconds(call, rep, device))
        ms = {name: median(found) for name, found in times.items()}
        rows[attn.program.name] = {"ms": ms["own"], "speedup": ms["full"] / ms["own"]}
        click.echo(f"{attn.program.name:24} {ms['own']:9.3f} ms  {ms['full'] / ms['own']:6.2f}x")
    made = {"machine": describe(device), "date": date.today().isoformat(), "rows": rows}
    return made | {"shape": str(lengths), "dtype": str(dtype).removeprefix("torch.")}


# -- the page


def page() -> str:
    """Every program beside its picture, density, tier and measured gain."""
    found = next((json.loads(path.read_text()) for path in RESULTS if path.exists()), None)
    intro = (
        "Made by `python -m benchmarks.zoo --page`. Pictures are of the first head, 4096 tokens in "
        "tiles of 128 x 128: full tiles dark, partial ones light, empty ones are never visited."
    )
    if found is not None:
        what = f"{found['shape']} {found['dtype']}, forward, on {found['machine']['device']}"
        intro += f" Gains are over full attention of the same shape: {what}, {found['date']}."
    lines = ["# Published systems, a few lines each", "", intro]
    for attn in programs():
        lines += ["", *_entry(attn, found)]
    return "\n".join(lines) + "\n"


def _entry(attn: attncc.Attention, found: Mapping[str, Any] | None) -> list[str]:
    program = attn.program
    given = arguments(program, SHOWN)
    sizes = {name: size for name, size in SHOWN.sizes().items() if name != "head_dim"}
    plan = attn.plan(**sizes, **given, tile=TILE)
    title = program.comment.split("\n")[0].rstrip(".")
    (PICTURES / f"{program.name}.svg").write_text(picture.svg(report.grid(plan), program.name))
    counts = plan.counts
    visited = 1 - counts.empty / counts.total
    facts = [f"{visited:.1%} of tiles visited, {plan.density.low:.1%} of pairs kept"]
    facts.append(report.tier(plan.plan))
    gain = (found or {}).get("rows", {}).get(program.name)
    if gain is not None and program.name != "full":
        facts.append(f"{gain['speedup']:.2f} x as fast as full attention")
    text = (EXAMPLES / f"{program.name}.attn").read_text().rstrip()
    return [
        f"## {title}",
        "",
        f'<img src="pictures/{program.name}.svg" width="240" alt="tiles of {program.name}">',
        "",
        f"[{program.name}.attn]({program.name}.attn): {'; '.join(facts)}.",
        "",
        *(f"    {line}".rstrip() for line in text.split("\n")),
    ]


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="Measure, and write this file.")
@click.option("--only", default="", help="Programs whose name holds this.")
@click.option("--rounds", default=3)
@click.option("--rep", default=60, help="Milliseconds of each turn.")
@click.option("--page", "shown", is_flag=True, help="Write examples/README.md and its pictures.")
def main(out: Path | None, only: str, rounds: int, rep: int, shown: bool) -> None:
    """Measure the programs of examples/, or show them."""
    if out is not None:
        out.write_text(json.dumps(measure(only, rounds, rep), indent=1) + "\n")
    if shown:
        PICTURES.mkdir(exist_ok=True)
        (EXAMPLES / "README.md").write_text(page())


if __name__ == "__main__":
    main()
