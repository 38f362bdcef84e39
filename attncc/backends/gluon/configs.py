"""Schedules of warp-specialised kernels: which fit an SM, and the one used without tuning."""

from __future__ import annotations

from attncc.backends.triton.configs import Config, Shape

ROWS = 64
"""Queries of one consumer warpgroup: what a wgmma instruction has."""

DIMS = (64, 128, 256)
"""Columns of tiles that are printed; narrower heads are padded."""


def default(shape: Shape) -> Config:
    """The forward's schedule; num_warps are those that consume, num_stages the rings' slots."""
    if shape.widest > 128:
        return Config(128, 64, 8, 2)
    if shape.widest > 64:
        return Config(128, 128, 8, 2)
    return Config(128, 128, 8, 3)


def registers(config: Config) -> int:
    """Registers a thread of a consumer takes, when the producer has given up what it can."""
    return {8: 240, 12: 160}[config.num_warps]


def shared_memory(config: Config, shape: Shape, out_in_q: bool) -> int:
    """Bytes of the tiles held at once."""
    own = config.block_m * (shape.block_d + (0 if out_in_q else shape.block_dv))
    streamed = config.num_stages * config.block_n * (shape.block_d + shape.block_dv)
    return shape.itemsize * (own + streamed)
