"""attncc: attention variants from a few lines to a checked kernel."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attncc.api import Attention, and_masks, compile, from_mods, or_masks
    from attncc.errors import (
        ArgumentError,
        AttnccError,
        BoundsError,
        KindError,
        ProgramNameError,
        ProgramSyntaxError,
        ProgramValueError,
        UnsupportedError,
    )

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "Attention",
    "AttnccError",
    "BoundsError",
    "KindError",
    "ProgramNameError",
    "ProgramSyntaxError",
    "ProgramValueError",
    "UnsupportedError",
    "and_masks",
    "compile",
    "from_mods",
    "or_masks",
]


def __getattr__(name: str) -> object:
    """Names are imported when first used, so that `import attncc` does not import torch."""
    if name not in __all__:
        raise AttributeError(f"module 'attncc' has no attribute {name!r}")
    home = "attncc.errors" if name.endswith("Error") else "attncc.api"
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
