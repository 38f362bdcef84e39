"""`attncc tune`: the best schedule for a program, found by measuring."""

from __future__ import annotations

from typing import Any

import click

from attncc.cli.request import DTYPES, options, placed, request


@click.command()
@options(q_len=8192)
@click.option("--dtype", type=click.Choice(DTYPES), default="bf16", show_default=True)
def tune(dtype: str, **asked: Any) -> None:
    """Time FILE's kernels over tiles, warps and stages on this GPU, and keep the best."""
    import attncc

    problem, (q, k, v) = placed(request(**asked), dtype, "cuda", asked["seed"])
    attncc.compile(problem.program).tune(q, k, v, **problem.arguments)
