"""Which Triton there is, and which ones kernels are made for."""

from __future__ import annotations

import re
from functools import lru_cache

from attncc.errors import UnsupportedError

Version = tuple[int, int]

OLDEST: Version = (3, 6)

OPTIONS = {"enable_fp_fusion": True}
"""What every kernel asks of the compiler; Triton 3.10's own default is to round each product."""


def parsed(text: str) -> Version:
    """The (3, 7) of "3.7.1" and of "3.7"."""
    found = re.match(r"(\d+)\.(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


@lru_cache
def installed() -> Version:
    """The Triton that kernels are printed for; UnsupportedError where none can run them."""
    try:
        import triton
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            "kernels need Triton, and it is not installed", hint=_hint("install")
        ) from error
    if reason := too_old(triton.__version__):
        raise UnsupportedError(reason, hint=_hint("upgrade to"))
    return parsed(triton.__version__)


def too_old(text: str) -> str:
    """Why a Triton of that version serves no kernel; empty where it does."""
    major, minor = OLDEST
    why = f"kernels need Triton {major}.{minor} or later, and {text} is installed"
    return why if parsed(text) < OLDEST else ""


def _hint(verb: str) -> str:
    major, minor = OLDEST
    return f"{verb} triton>={major}.{minor}, or ask for backend='cpu' or backend='dense'"
