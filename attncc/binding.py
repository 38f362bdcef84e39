"""A Binding: the lengths, scalar values and captured tensors of one call, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Binding:
    """Everything a program needs besides q, k and v themselves.

    scalars: every scalar parameter and every size, by name.
    tensors: captured tensors by name, all on `device`.
    """

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    scalars: Mapping[str, bool | int | float] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    device: torch.device = torch.device("cpu")
