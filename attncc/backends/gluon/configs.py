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


def backward_unsupported(
    plan: Plan, dtype: str, dim: int, value_dim: int, deterministic: bool
) -> str:
    """As `unsupported`, of the backward of a plan."""
    if reason := unsupported(dtype, dim, value_dim):
        return reason
    if dim % 8:
        return f"its gradients' rows are multiples of 16 bytes, and q has {dim} columns"
    if any(tensor.grad for tensor in plan.program.tensors):
        return "its backward spills where captured tensors have gradients"
    if deterministic:
        return "its backward adds to dq in the order that programs come"
    return ""


def backward_columns(dim: int, value_dim: int) -> int:
    """Columns of all tiles of the backward."""
    return next(n for n in DIMS if n >= max(dim, value_dim))


def backward(columns: int) -> Config:
    """The backward's schedule; with one stage, a warpgroup would wait for the other's next.

    Measured on an H100 with Triton 3.6, D 128: full 653 TFLOP/s, causal 594; with three stages
    608 and 551. Those of 256 columns fill the shared memory.
    """
    if is_wide(columns):
        return Config(64, 64, 8, 2)
    return Config(8192 // columns, 128, 8, 2)


def is_wide(columns: int) -> bool:
    """Whether warpgroups share out dk and dv, not keys."""
    return columns > 128


def backward_constexprs(config: Config, columns: int) -> dict[str, int]:
    return {"BLOCK_D": columns, "STAGES": config.num_stages, "REGISTERS": registers(config)}


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
