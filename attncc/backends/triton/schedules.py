"""Which schedule a kernel runs with: one that was measured for such calls, else the default."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from attncc import tuned
from attncc.backends.triton.configs import Config
from attncc.binding import Binding
from attncc.errors import AttnccError
from attncc.ir.plan import Plan
from attncc.settings import Debug, settings

_digests: dict[int, tuple[Plan, str]] = {}
"""By identity, for hashing a Plan takes longer than a launch; each Plan is kept with its own."""

DIGESTS = 256


def choose(
    kernel: str,
    plan: Plan,
    binding: Binding,
    q: Tensor,
    v: Tensor,
    default: Config,
    fits: Callable[[Config], bool],
) -> Config:
    """The schedule that `attn.tune` found for calls like this one, if it fits, or the default."""
    found = _recorded(key(kernel, plan, binding, q, v)) if database() else None
    if found is not None and not fits(found):
        found = None
    config = found or default
    if settings().debug >= Debug.CHOICES:
        how = "tuned" if found else "by default"
        where = shape_class(binding, q.shape[-1], v.shape[-1])
        _tell(f"attncc: {plan.program.name}, {where}: {kernel}={config} {how}")
    return config


def key(kernel: str, plan: Plan, binding: Binding, q: Tensor, v: Tensor) -> tuned.Key:
    """What a measured schedule is valid for.

    Values of scalars and captured tensors are no part of it: of two windows of one program the one
    that was tuned last decides.
    """
    return tuned.Key(
        gpu=_gpu(q.device),
        program=_digest(plan),
        kernel=kernel,
        dtype=str(q.dtype).removeprefix("torch."),
        shape=shape_class(binding, q.shape[-1], v.shape[-1]),
        triton=_triton_version(),
    )


def shape_class(binding: Binding, dim: int, value_dim: int) -> str:
    """Calls whose lengths, heads and group round up to equal powers of two are tuned as one."""
    group = binding.heads // max(binding.kv_heads, 1)
    counts = {
        "q": binding.q_len,
        "kv": binding.kv_len,
        "heads": binding.batch * binding.heads,
        "group": group,
    }
    rounded = " ".join(f"{name}{_rounded(count)}" for name, count in counts.items())
    return f"d{dim} dv{value_dim} {rounded}"


def record(key: tuned.Key, config: Config, ms: float) -> tuned.Record:
    """A measurement as the database keeps it."""
    values = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    if config.heads:
        values["heads"] = config.heads
    return tuned.Record(key, values, ms)


def config_of(record: tuned.Record) -> Config | None:
    """The schedule of a record, or None where it is none that a kernel could have."""
    names = "BLOCK_M", "BLOCK_N", "num_warps", "num_stages"
    if set(record.config) - {"heads"} != set(names):
        return None
    m, n, warps, stages = (record.config[name] for name in names)
    config = Config(m, n, warps, stages, record.config.get("heads", 0))
    return config if config.legal else None


@lru_cache(maxsize=1)
def database() -> Mapping[tuned.Key, tuned.Record]:
    """What was tuned, read once a process; what is shipped where the rest cannot be read."""
    try:
        return tuned.load()
    except (OSError, ValueError, AttnccError) as error:
        if settings().debug >= Debug.CHOICES:
            _tell(f"attncc: no schedules tuned here, for they cannot be read: {error}")
        return tuned.shipped()


def _recorded(key: tuned.Key) -> Config | None:
    found = database().get(key)
    return None if found is None else config_of(found)


def _digest(plan: Plan) -> str:
    """A hash of the program's text."""
    known = _digests.get(id(plan))
    if known is None:
        if len(_digests) >= DIGESTS:
            _digests.clear()
        known = plan, hashlib.sha256(str(plan.program).encode()).hexdigest()[:16]
        _digests[id(plan)] = known
    return known[1]


@lru_cache
def _gpu(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


@lru_cache
def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def _rounded(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


@lru_cache(maxsize=1024)
def _tell(line: str) -> None:
    """Each line once."""
    print(line, file=sys.stderr)
