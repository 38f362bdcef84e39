"""Schedules of warp-specialised kernels: which fit an SM, and the one used without tuning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from attncc.backends.gluon.hoist import DIVISIONS
from attncc.backends.triton.configs import Config, Shape
from attncc.backends.triton.lower import lower
from attncc.ir.expr import Axis, Load, axes, walk
from attncc.ir.plan import Blocks, Plan

KERNELS = ("gluon_forward", "gluon_backward")

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
    found = lower(plan).gradients
    if found and is_wide(max(dim, value_dim)):
        return "its backward of such wide heads has no gradients of captured tensors"
    if not all(gradient.by_distance for gradient in found):
        return "its backward spills where captured tensors have gradients, but by distance"
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
    return Config(8192 // columns, BACKWARD_KEYS, 8, 2)


BACKWARD_KEYS = 128
"""Of a program, 64 a warpgroup; heads that are wide have 64 in all."""


def is_wide(columns: int) -> bool:
    """Whether warpgroups share out dk and dv, not keys."""
    return columns > 128


def usual(kernel: str, shape: Shape, plan: Plan, kv_len: int) -> Config:
    """The schedule that is used without tuning."""
    return backward(shape.widest) if kernel == "gluon_backward" else default(shape, plan, kv_len)


HEADS = (0, 1, 4, 8, 16)
"""How many are tried side by side."""


def candidates(kernel: str, shape: Shape, plan: Plan, heads: int) -> Iterator[Config]:
    """Every schedule worth timing, those that cannot fit left out; heads: of the whole batch."""
    if kernel == "gluon_backward":
        usual = backward(shape.widest)
        found = (replace(usual, num_stages=stages) for stages in (2, 3, 4))
    else:
        tiles = product((2, 3), (64, 128), (2, 3, 4), HEADS)
        found = (
            Config(ROWS * consumers, n, 4 * consumers, stages, side)
            for consumers, n, stages, side in tiles
            if side < heads
        )
    return (config for config in found if fits(kernel, config, shape, plan))


def fits(kernel: str, config: Config, shape: Shape, plan: Plan) -> bool:
    """Whether a schedule is one that the kernel is printed for, within the memory of an SM."""
    fits = _backward_fits if kernel == "gluon_backward" else _forward_fits
    return config.num_stages > 1 and fits(config, shape, plan)


def _forward_fits(config: Config, shape: Shape, plan: Plan) -> bool:
    m, n = config.block_m, config.block_n
    if config.num_warps not in REGISTERS or m != ROWS * config.num_warps // 4:
        return False
    if n not in (64, 128) or (plan.blocks is Blocks.LISTS and m & (m - 1)):
        return False
    if m * n > 128 * 128 and axes(plan.score) & PAIR:  # terms of keys spill
        return False
    # A thread's share of the output, of scores in float32 and of weights in half of that.
    enough = shape.block_dv // 2 + n // 2 + n // 4 < registers(config)
    out_in_q, _ = spare(config, shape)
    if out_in_q and shape.block_d != shape.block_dv:
        return False
    streamed = config.num_stages * n * (shape.block_d + shape.block_dv)
    used = shape.itemsize * (m * shape.block_d + streamed)
    return enough and used <= shape.shared_limit - BARRIERS


def _backward_fits(config: Config, shape: Shape, plan: Plan) -> bool:
    """Its keys and values, and of each stage q, dout, ds of two warpgroups, lse and delta."""
    m, n, columns = config.block_m, config.block_n, shape.widest
    if is_wide(columns):
        return config == backward(columns)
    stage = 2 * shape.itemsize * m * (columns + ROWS) + 2 * 4 * m
    used = 2 * shape.itemsize * n * columns + config.num_stages * stage
    printed = config == replace(backward(columns), num_stages=config.num_stages)
    return printed and used <= shape.shared_limit - BARRIERS


def backward_constexprs(config: Config, columns: int) -> dict[str, int]:
    return {"BLOCK_D": columns, "STAGES": config.num_stages, "REGISTERS": registers(config)}


def columns(dim: int, value_dim: int) -> tuple[int, int]:
    """Columns of tiles of queries and keys, and of values."""
    padded, padded_value = (next(n for n in DIMS if n >= x) for x in (dim, value_dim))
    return padded, padded_value


def default(shape: Shape, plan: Plan, kv_len: int = 0) -> Config:
    """The forward's schedule; num_warps are those that consume, num_stages the rings' slots.

    Measured on an H100 with Triton 3.6, TFLOP/s over kept pairs, beside the next best: D 256, full
    796; D 128, full 728, relative bias 508 (64 keys: 428), documents of 683 tokens 360 (128 keys:
    336), of 2730 tokens 665 (64 keys: 582); D 64, full 581 (two consumers: 420), ALiBi 412 (three
    consumers: 373).
    """
    if shape.widest > 128:
        return Config(128, 64, 8, 2)
    if shape.widest > 64:
        short = bool(plan.searches) and kv_len < LONG
        return Config(128, 64, 8, 3) if short or _is_costly(plan) else WIDE
    # The kernels that list tiles know powers of two only; terms of keys spill with three consumers.
    three = plan.blocks is Blocks.RANGES and not axes(plan.score) & PAIR
    return Config(192, 128, 12, 2) if three else Config(128, 128, 8, 3)


WIDE = Config(128, 128, 8, 2)
LONG = 16384
"""Keys from which searched rows, documents as a rule, are taken to be long enough for WIDE."""

PAIR = Axis.Q | Axis.KV


def _is_costly(plan: Plan) -> bool:
    """Whether masks read tensors by pairs, or pairs divide: for 128 keys those would spill."""
    reads = any(isinstance(n, Load) and axes(n) & PAIR == PAIR for n in walk(plan.mask))
    nodes = (n for e in (plan.score, plan.mask) for n in walk(e) if axes(n) & PAIR == PAIR)
    return reads or any(getattr(n, "op", None) in DIVISIONS for n in nodes)


def constexprs(config: Config, shape: Shape) -> dict[str, int]:
    """What a forward takes of its schedule beside the sizes of its tiles."""
    _, q_stages = spare(config, shape)
    return {
        "STAGES": config.num_stages,
        "Q_STAGES": q_stages,
        "CONSUMERS": config.block_m // ROWS,
        "REGISTERS": registers(config),
    }


REGISTERS = {8: 240, 12: 160}
"""By the warps that consume: what a thread takes, when the producer has given up what it can."""


def registers(config: Config) -> int:
    return REGISTERS[config.num_warps]


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
