"""Tile sizes, warps and stages: defaults that were measured, and which ones cannot fit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from attncc.errors import ArgumentError

PASTED = re.compile(
    r"(\d{1,4})x(\d{1,4}),warps=(\d{1,2}),stages=(\d)(?:,heads=(\d{1,4}))?", re.ASCII
)


@dataclass(frozen=True, slots=True)
class Config:
    """One kernel's schedule: queries and keys a tile, warps a program, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    heads: int = 0
    """How many run side by side; 0: as many as share the L2."""

    def __str__(self) -> str:
        heads = f",heads={self.heads}" if self.heads else ""
        tiles = f"{self.block_m}x{self.block_n}"
        return f"{tiles},warps={self.num_warps},stages={self.num_stages}{heads}"

    @classmethod
    def parse(cls, text: str) -> Config:
        """The inverse of str(); raises ArgumentError for what no kernel could run with."""
        found = PASTED.fullmatch("".join(text.split()))
        config = cls(*(int(n or 0) for n in found.groups())) if found else None
        if config is None or not config.legal:
            raise ArgumentError(
                f"{text!r} is no schedule",
                hint="write powers of two, such as 128x64,warps=8,stages=3",
            )
        return config

    @property
    def legal(self) -> bool:
        """Whether some kernel takes such numbers: tiles that tensor cores take, powers of two.

        Three warpgroups of a warp-specialised kernel own 64 rows each.
        """
        blocks = all(n in (16, 32, 64, 128, 256) for n in (self.block_m, self.block_n))
        powers = blocks and self.num_warps in (1, 2, 4, 8, 16)
        three = self.block_n in (64, 128) and (self.block_m, self.num_warps) == (192, 12)
        return (powers or three) and 1 <= self.num_stages <= 8 and self.heads >= 0


KERNELS = ("forward", "backward_kv", "backward_q")


@dataclass(frozen=True, slots=True)
class Shape:
    """What a schedule's cost depends on: padded head dims, bytes an element, the GPU's limits."""

    block_d: int
    block_dv: int
    itemsize: int
    shared_limit: int = 227 * 1024
    """Bytes of shared memory a program may have."""
    ampere: bool = False
    """An NVIDIA GPU below sm_90, whose tensor cores take all tiles from registers."""

    @property
    def widest(self) -> int:
        return max(self.block_d, self.block_dv)


def padded(dim: int) -> int:
    """The smallest power of two a tile of this many columns takes; tensor cores want 16."""
    return max(16, 1 << max(dim - 1, 0).bit_length())


def padded_value(dim: int, value_dim: int, itemsize: int) -> int:
    """Columns of a tile of values: as many as the keys' tile has in a swizzle of shared memory.

    ptxas 12.8 loses matrix descriptors where two tiles share memory in turn and are laid out
    differently, as keys and narrower values are where nothing is pipelined (see sass.py).
    """
    least = min(64, padded(dim)) if itemsize == 2 else 16
    return max(padded(value_dim), least)


@dataclass(frozen=True, slots=True)
class Traits:
    """What of a plan moves the best schedule."""

    plain: bool = True
    """No mask and no score mod: long loops of nothing but products and exponentials."""
    short: bool = False
    """Few tiles a row (windows, documents), so that starting and ending a tile weighs more."""
    listed: bool = False
    """Tiles from lists, whose loads cost registers."""


def default(kernel: str, shape: Shape, traits: Traits = Traits()) -> Config:
    """The schedule used without tuning; half types measured on an H100 with Triton 3.6."""
    if shape.itemsize > 2:
        pick = _default_float32(kernel, shape)
    elif shape.ampere:
        pick = _default_ampere(kernel, shape, traits)
    elif shape.widest > 128:  # causal, D256: 491, 319 and 531 TFLOP/s
        wide = {"forward": (128, 64, 8, 2), "backward_kv": (64, 64, 8, 2)}
        pick = wide.get(kernel, (64, 32, 4, 3))
    elif shape.widest > 64:
        pick = _default_128(kernel, traits)
    else:
        small = {"forward": (64, 128, 4, 2), "backward_kv": (128, 64, 4, 2)}
        pick = small.get(kernel, (128, 64, 4, 3))
    return _shrunk(kernel, Config(*pick), shape)


Numbers = tuple[int, int, int, int]
"""A Config's numbers."""


def _default_128(kernel: str, traits: Traits) -> Numbers:
    match kernel:
        case "forward":  # 562 against 519 TFLOP/s on full; with any mask or mod the other way
            if traits.listed:  # prefix-LM documents in 32768: 395 against 325 with 3 stages
                return (64, 64, 4, 2)
            return (128, 64, 4, 2) if traits.plain else (64, 64, 4, 3)
        case "backward_kv":
            return (64, 64, 4, 2)
        case _:
            return (64, 64, 4, 2) if traits.short else (128, 64, 8, 3)


def _default_ampere(kernel: str, shape: Shape, traits: Traits) -> Numbers:
    """What compiles for sm_80 with no spills or few; not timed on a GPU.

    bf16, D 64, 128 and 256, full, causal, softcap and packed: forwards spill nothing, backwards up
    to 56 bytes.
    """
    match kernel:
        case "forward":
            listed = (64, 32, 4, 2)
            small = listed if traits.listed else (128, 64, 4, 3)
            middle = listed if traits.listed else (64, 64, 4, 2)
            picks = small, middle, (64, 64, 8, 2)
        case "backward_kv":
            picks = (32, 128, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2)
        case _:
            picks = (128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 2)
    return _by_width(shape, picks)


def _default_float32(kernel: str, shape: Shape) -> Numbers:
    """What compiles for sm_80 and sm_90 with no spills or few; not timed on a GPU.

    Full-precision products are unrolled over registers, so a tile one size too large spills by
    kilobytes, at up to two stack accesses a multiplication. These spill up to 152 bytes (forward,
    D 128, lists) at up to 0.1, most of them nothing, and compile in 1 to 9 s.
    """
    match kernel:
        case "forward":
            picks = (64, 32, 8, 2), (32, 32, 8, 1), (32, 16, 8, 1)
        case "backward_kv":
            picks = (32, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1)
        case _:
            picks = (64, 32, 8, 1), (32, 32, 8, 1), (32, 16, 8, 1)
    return _by_width(shape, picks)


def _by_width(shape: Shape, picks: tuple[Numbers, Numbers, Numbers]) -> Numbers:
    """The one for head dims up to 64, up to 128 or above."""
    return picks[(shape.widest > 64) + (shape.widest > 128)]


def _shrunk(kernel: str, config: Config, shape: Shape) -> Config:
    """Fewer stages, then smaller tiles, until shared memory suffices."""
    while not fits(kernel, config, shape) and (less := smaller(config)):
        config = less
    return config


def smaller(config: Config) -> Config | None:
    """The next schedule that takes less: a stage fewer, or half the longer side; None at last."""
    m, n, stages = config.block_m, config.block_n, config.num_stages
    if stages > 1:
        return Config(m, n, config.num_warps, stages - 1)
    if max(m, n) <= 16:
        return None
    m, n = (m // 2, n) if m >= n else (m, n // 2)
    return Config(m, n, config.num_warps, stages)


def shared_memory(kernel: str, config: Config, shape: Shape) -> int:
    """Bytes of shared memory, estimated: resident tiles, and `num_stages` of streamed ones."""
    d, dv = shape.block_d, shape.block_dv
    m, n = config.block_m, config.block_n
    match kernel:
        case "forward":
            resident, streamed = m * d, n * (d + dv)
        case "backward_kv":
            resident, streamed = n * (d + dv), m * (d + dv)
        case _:
            resident, streamed = m * (d + dv), n * (d + dv)
    scratch = m * n if kernel != "forward" else 0
    return shape.itemsize * (resident + config.num_stages * streamed + scratch)


def fits(kernel: str, config: Config, shape: Shape) -> bool:
    """Whether a schedule can run: shared memory, and accumulators that registers can hold."""
    m, n = config.block_m, config.block_n
    if m & (m - 1):
        return False
    rows = {"forward": m * shape.block_dv, "backward_q": m * shape.block_d}
    accumulators = rows.get(kernel, n * (shape.block_d + shape.block_dv))
    tiles = m * n if kernel == "forward" else 2 * m * n
    registers = (accumulators + tiles) / (32 * config.num_warps)
    return shared_memory(kernel, config, shape) <= shape.shared_limit and registers <= 255


def candidates(kernel: str, shape: Shape) -> Iterator[Config]:
    """Every schedule worth timing, those that cannot fit left out."""
    blocks = (16, 32, 64, 128) if shape.itemsize > 2 or shape.widest > 128 else (32, 64, 128)
    least = 16 * 16 if shape.itemsize > 2 and shape.widest > 128 else 32 * 32
    for m, n, warps, stages in product(blocks, blocks, (4, 8), (1, 2, 3, 4)):
        config = Config(m, n, warps, stages)
        too_thin = m * n < least or (shape.itemsize == 2 and m < 16 * warps // 4)
        if not too_thin and fits(kernel, config, shape):
            yield config
