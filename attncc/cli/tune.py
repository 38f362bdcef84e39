"""`attncc tune`: the best schedule for a program, found by measuring."""

from __future__ import annotations

from typing import Any

import click

from attncc.cli.request import options, request


@click.command()
@options(q_len=8192)
@click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), default="bf16")
def tune(dtype: str, **asked: Any) -> None:
    """Time FILE's kernels over tiles, warps and stages on this GPU, and keep the best."""
    import torch

    import attncc
    from attncc.errors import UnsupportedError
    from attncc.inputs import qkv

    call = request(**asked)
    if not torch.cuda.is_available():
        raise UnsupportedError(
            "there is no GPU to measure on", hint="`attncc doctor` says what there is, and why"
        )
    device = torch.device("cuda")
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in call.arguments.items()
    }
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    q, k, v = qkv(call.lengths, dtypes[dtype], device, asked["seed"])
    attncc.compile(call.program).tune(q, k, v, **arguments)
