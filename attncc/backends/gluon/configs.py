"""Schedules of warp-specialised kernels: which fit an SM, and the one used without tuning."""

from __future__ import annotations

from attncc.backends.gluon.hoist import DIVISIONS
from attncc.backends.triton.configs import Config, Shape
from attncc.ir.expr import Axis, Load, axes, walk
from attncc.ir.plan import Blocks, Plan

ROWS = 64
"""Queries of one consumer warpgroup: what a wgmma instruction has."""

DIMS = (64, 128, 256)
"""Columns of tiles that are printed; narrower heads are padded."""


def unsupported(dtype: str, dim: int, value_dim: int) -> str:
    """Why no kernel serves heads of such a torch dtype and dims; empty where one does."""
    if dtype not in ("bfloat16", "float16"):
        return f"it takes bfloat16 and float16, and q is {dtype}"
    if value_dim % 8:
        return f"its output's rows are multiples of 16 bytes, and v has {value_dim} columns"
    if max(dim, value_dim) > DIMS[-1]:
        return f"it has no kernel for head dims above {DIMS[-1]}"
    return ""


def columns(dim: int, value_dim: int) -> tuple[int, int]:
    """Columns of tiles of queries and keys, and of values."""
    padded, padded_value = (next(n for n in DIMS if n >= x) for x in (dim, value_dim))
    return padded, padded_value


def default(shape: Shape, plan: Plan) -> Config:
    """The forward's schedule; num_warps are those that consume, num_stages the rings' slots.

    Measured on an H100 with Triton 3.6, TFLOP/s over kept pairs, beside the next best: D 256, full
    767; D 128, full 688, documents of 683 tokens 325 (128 keys: 273); D 64, full 520 (two
    consumers: 420).
    """
    if shape.widest > 128:
        return Config(128, 64, 8, 2)
    if shape.widest > 64:
        return Config(128, 64, 8, 3) if plan.searches or _is_costly(plan) else WIDE
    # The kernels that list tiles know powers of two only.
    return Config(192, 128, 12, 2) if plan.blocks is Blocks.RANGES else Config(128, 128, 8, 3)


WIDE = Config(128, 128, 8, 2)


def _is_costly(plan: Plan) -> bool:
    """Whether pairs read tensors or divide, for which tiles of 128 keys would spill."""
    pair = Axis.Q | Axis.KV
    nodes = (n for e in (plan.score, plan.mask) for n in walk(e) if axes(n) & pair == pair)
    return any(isinstance(n, Load) or getattr(n, "op", None) in DIVISIONS for n in nodes)


def constexprs(config: Config, shape: Shape) -> dict[str, int]:
    """What a forward takes of its schedule beside the sizes of its tiles."""
    _, q_stages = spare(config, shape)
    return {
        "STAGES": config.num_stages,
        "Q_STAGES": q_stages,
        "CONSUMERS": config.block_m // ROWS,
        "REGISTERS": registers(config),
    }


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
