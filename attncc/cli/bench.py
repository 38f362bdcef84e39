"""`attncc bench`: forward and backward beside torch's, over several lengths."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from attncc.cli.request import DTYPES, Request, bound_plan, options, placed, request

if TYPE_CHECKING:
    from torch import Tensor

    from attncc.peers import Call, Maker, Problem

FLOPS_A_PAIR = 4
"""Times head_dim, for the forward's two products; the backward's five count 2.5 times that."""


@click.command()
@options(q_len=4096, heads=4)
@click.option(
    "--lengths", metavar="N,N,...", help="Several query and key lengths, one after another."
)
@click.option("--dtype", type=click.Choice(DTYPES), help="[default: by device]")
@click.option("--device", help="cuda or cpu.  [default: the best there is]")
@click.option("--backward/--no-backward", default=True, help="Time the backward too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def bench(
    lengths: str | None,
    dtype: str | None,
    device: str | None,
    backward: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Time FILE's program beside torch's SDPA and FlexAttention in one run."""
    for length in _lengths(lengths, asked["q_len"]):
        if lengths is not None:
            asked |= {"q_len": length, "kv_len": length}
        call = request(**asked)
        problem, qkv = placed(call, dtype, device, asked["seed"])
        for name, make in contestants():
            row = {"length": length, "name": name, **measure(make, problem, qkv, backward)}
            _print(call, row, as_json)


def _lengths(text: str | None, default: int) -> list[int]:
    from attncc.errors import ArgumentError

    parts = (text or str(default)).split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ArgumentError(f"--lengths is {text!r}", hint="it takes numbers, such as 1024,4096")
    return [int(part) for part in parts]


def contestants() -> list[tuple[str, Maker]]:
    """attncc, and what torch has."""
    from attncc import peers

    return [("attncc", _own), ("SDPA", peers.sdpa), ("FlexAttention", peers.flex)]


def _own(problem: Problem) -> Call:
    import attncc

    attn = attncc.compile(problem.program)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attn(q, k, v, **problem.arguments)
        return out

    return call


def measure(
    make: Maker, problem: Problem, qkv: tuple[Tensor, Tensor, Tensor], backward: bool
) -> dict[str, Any]:
    """Milliseconds, or why there are none."""
    from attncc.peers import backward_milliseconds, forward_milliseconds

    try:
        made = make(problem)
        if isinstance(made, str):
            return {"why": made}
        found = {"forward_ms": forward_milliseconds(made, problem, qkv)}
        if backward:
            found["backward_ms"] = backward_milliseconds(made, problem, qkv)
        return found
    except Exception as error:
        first = str(error).strip().splitlines() or [""]
        return {"why": f"{type(error).__name__}: {first[0][:100]}"}


def _print(call: Request, row: dict[str, Any], as_json: bool) -> None:
    density = bound_plan(call, (128, 128)).density
    n = call.lengths
    flops = FLOPS_A_PAIR * float(density) * n.batch * n.heads * n.q_len * n.kv_len * n.head_dim
    for kind, factor in (("forward", 1.0), ("backward", 2.5)):
        if f"{kind}_ms" in row:
            row[f"{kind}_tflops"] = factor * flops / row[f"{kind}_ms"] / 1e9
    if as_json:
        click.echo(json.dumps({"program": call.program.name, **row}))
        return
    text = f"{row['length']:>7}  {row['name']:<14}"
    for kind in ("forward", "backward"):
        if f"{kind}_ms" in row:
            ms, speed = row[f"{kind}_ms"], row[f"{kind}_tflops"]
            text += f"  {kind} {ms:9.3f} ms {speed:7.2f} TFLOP/s"
    click.echo(text + (f"  not timed: {row['why']}" if "why" in row else ""))
