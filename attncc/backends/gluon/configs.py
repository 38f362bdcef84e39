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


BARRIERS = 2048
"""Bytes of shared memory for what is no tile: barriers, and descriptions of work."""


def spare(config: Config, shape: Shape) -> tuple[bool, int]:
    """Whether the output must leave through q's shared memory, and how many tiles of q it holds."""
    streamed = config.num_stages * config.block_n * (shape.block_d + shape.block_dv)
    room = shape.shared_limit - BARRIERS - shape.itemsize * streamed
    q, out = (shape.itemsize * config.block_m * n for n in (shape.block_d, shape.block_dv))
    if 2 * q + out <= room:
        return False, 2
    return (False, 1) if q + out <= room else (True, 1)
