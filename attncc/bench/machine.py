"""What a measurement was taken on."""

from __future__ import annotations

import platform
from importlib.util import find_spec
from typing import Any

import torch


def describe(device: torch.device) -> dict[str, Any]:
    """Machine and versions, as a results file keeps them."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    if find_spec("triton") is not None:
        import triton

        found["triton"] = triton.__version__
    if device.type != "cuda":
        return {"device": f"{torch.get_num_threads()} CPU threads", **found}
    of = torch.cuda.get_device_properties(device)
    return {
        "device": of.name,
        "multiprocessors": of.multi_processor_count,
        "memory_GiB": round(of.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        **found,
    }
