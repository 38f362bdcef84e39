"""`attncc run`: a program on this machine, checked and timed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from attncc.cli.request import Request, bound_plan, options, request

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from attncc.peers import Call, Problem

TRIES = 2.0
"""An error of up to this many times torch's own, in the same dtype, is rounding."""


@click.command()
@options(q_len=4096)
@click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), help="[default: by device]")
@click.option("--device", help="cuda or cpu.  [default: the best there is]")
@click.option("--peers/--no-peers", default=True, help="Time torch's SDPA and FlexAttention too.")
def run(dtype: str | None, device: str | None, peers: bool, **asked: Any) -> None:
    """Run FILE's program: its tiles, its error against the dense interpreter, and its time."""
    import torch

    import attncc
    from attncc.cli.explain import draw_terminal
    from attncc.inputs import qkv
    from attncc.peers import Problem

    call = request(**asked)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = _dtypes()[dtype or ("bf16" if where.type == "cuda" else "fp32")]
    arguments = {
        name: value.to(where) if isinstance(value, torch.Tensor) else value
        for name, value in call.arguments.items()
    }
    _tell_documents(call)
    draw_terminal(call, bound_plan(call, (128, 128)))
    q, k, v = qkv(call.lengths, kind, where, asked["seed"])
    attn = attncc.compile(call.program)
    with torch.no_grad():
        _check(attn, q, k, v, arguments)
        problem = Problem(call.program, call.lengths, arguments, where)
        _time(lambda q, k, v: attn(q, k, v, **arguments), problem, (q, k, v), peers)


def _dtypes() -> dict[str, torch.dtype]:
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _tell_documents(call: Request) -> None:
    for number, row in enumerate(call.captured.rows[:1]):
        names = ", ".join(f"{d.name} ({d.length})" for d in row[:8])
        more = f" and {len(row) - 8} more" if len(row) > 8 else ""
        click.echo(f"documents of row {number}, in words: {names}{more}")


def _check(attn: Any, q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> None:
    """Exit code 1 where the result is further from float64 than rounding explains."""
    import torch

    exact = attn.reference(q, k, v, dtype=torch.float64, **arguments)
    plain = attn.reference(q, k, v, **arguments)
    out = attn(q, k, v, **arguments)
    ours = float((out.double() - exact).abs().max()) if out.numel() else 0.0
    theirs = float((plain.double() - exact).abs().max()) if out.numel() else 0.0
    allowed = TRIES * theirs + torch.finfo(q.dtype).eps
    good = ours <= allowed
    word = click.style("ok", fg="green") if good else click.style("WRONG", fg="red", bold=True)
    click.echo(
        f"\nlargest error against float64: {ours:.2e} (dense in {q.dtype}: {theirs:.2e})  {word}"
    )
    if not good:
        raise click.exceptions.Exit(1)


def _time(ours: Call, problem: Problem, qkv: tuple[Tensor, Tensor, Tensor], peers: bool) -> None:
    from attncc import peers as torch_peers

    device = torch_peers.device_name(problem.device)
    click.echo(f"\nforward on {device}, {qkv[0].dtype}, median")
    own = torch_peers.milliseconds(lambda: ours(*qkv), problem.device)
    click.echo(f"  {'attncc':<16}{own:9.2f} ms")
    if not peers:
        return
    for name, make in (("SDPA", torch_peers.sdpa), ("FlexAttention", torch_peers.flex)):
        found = _peer_time(make(problem), problem, qkv)
        if isinstance(found, str):
            click.echo(f"  {name:<16}not timed: {found}")
        else:
            click.echo(f"  {name:<16}{found:9.2f} ms   {found / own:.2f}x attncc's")


def _peer_time(
    made: Call | str, problem: Problem, qkv: tuple[Tensor, Tensor, Tensor]
) -> float | str:
    from attncc.peers import milliseconds

    if isinstance(made, str):
        return made
    try:
        return milliseconds(lambda: made(*qkv), problem.device)
    except Exception as error:  # torch.compile fails in many ways, none of them ours
        first = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {first[0][:100]}"
