"""`attncc tune`: the best schedule for a program, found by measuring."""

from __future__ import annotations

from typing import Any

import click

from attncc.cli.request import DTYPES, options, placed, request


@click.command()
@options(q_len=8192)
@click.option("--dtype", type=click.Choice(DTYPES), default="bf16", show_default=True)
@click.option("--backward/--no-backward", default=True, help="Tune the backward's kernels too.")
@click.option(
    "--time-budget",
    type=click.FloatRange(min=0, min_open=True),
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="For all kernels together, about.",
)
def tune(dtype: str, backward: bool, time_budget: float, **asked: Any) -> None:
    """Time FILE's kernels over tiles, warps and stages on this GPU, and keep the best.

    Schedules are tried in another process, and the best are checked before they are kept.

    The lines printed say, for each kernel, the schedule that later calls of such lengths run with.
    """
    import attncc
    from attncc.backends import registry

    problem, (q, k, v) = placed(request(**asked), dtype, "cuda", asked["seed"])
    attention = attncc.compile(problem.program)
    kernels = registry.kernels(attention.plan(q, k, v, **problem.arguments), q, v)
    if not backward:
        kernels = kernels[:1]
    budget: dict[str, Any] = {"kernels": kernels, "time_budget": time_budget}
    click.echo(attention.tune(q, k, v, **budget, **problem.arguments))
