"""CUDA graphs: what must not be taken from, or left to, calls outside one that is captured.

A captured call only records its work; values come with each replay, from what the tensors then
hold. So nothing found before may stand in for work, nothing made here may serve other calls, and
what the arguments promise is checked on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def capturing(device: torch.device) -> bool:
    """Whether the current stream's work goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def promise(holds: Tensor, otherwise: str) -> None:
    """Has every replay fail on the device, as an assertion of torch does, where it is false."""
    torch._assert_async(holds, otherwise)
