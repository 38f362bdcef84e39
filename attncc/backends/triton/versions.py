"""Which Triton there is, and which ones kernels are made for."""

from __future__ import annotations

import re
from functools import lru_cache

from attncc.errors import ArgumentError, UnsupportedError

Version = tuple[int, int]

OLDEST: Version = (3, 6)
INSTALL = "pip install 'triton>=3.6'"

OPTIONS = {"enable_fp_fusion": True}
"""What every kernel asks of the compiler; Triton 3.10's own default is to round each product."""


@lru_cache
def installed() -> Version:
    """The Triton that is there; UnsupportedError where there is none, or one too old."""
    try:
        import triton
    except ModuleNotFoundError as error:
        raise UnsupportedError("kernels need Triton, and there is none", hint=INSTALL) from error
    return supported(triton.__version__)


def supported(text: str) -> Version:
    """The (3, 7) of "3.7.1" or "3.7"; UnsupportedError where kernels are made for later ones."""
    found = re.match(r"(\d+)\.(\d+)", text)
    if not found:
        raise ArgumentError(f"{text!r} is no version of Triton", hint="write it as 3.7 or 3.7.1")
    version = int(found[1]), int(found[2])
    if version < OLDEST:
        raise UnsupportedError(f"kernels need Triton 3.6 or later, not {text}", hint=INSTALL)
    return version
