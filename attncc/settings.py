"""What the user sets through the environment: ATTNCC_DEBUG and two more variables."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from attncc.errors import ArgumentError, suggest

BACKENDS = ("auto", "cpu", "dense", "gluon", "triton")
VARIABLES = ("ATTNCC_DEBUG", "ATTNCC_BACKEND", "ATTNCC_CACHE_DIR")


class Debug(IntEnum):
    """How much is told on standard error; each step includes those below it."""

    QUIET = 0
    CHOICES = 1
    TIMES = 2
    PASSES = 3
    SOURCE = 4


def tell(level: Debug, text: str) -> None:
    """Prints to standard error where ATTNCC_DEBUG is at least `level`."""
    if settings().debug >= level:
        print(f"attncc: {text}", file=sys.stderr)


@dataclass(frozen=True, slots=True)
class Settings:
    """One reading of the environment.

    backend:   the one every call uses, or "auto".
    cache_dir: where generated sources and tuned configs are kept.
    """

    debug: Debug
    backend: str
    cache_dir: Path


def read(environ: Mapping[str, str]) -> Settings:
    """The settings that `environ` holds; raises ArgumentError for a value outside its range."""
    return Settings(
        debug=_debug(environ.get("ATTNCC_DEBUG", "")),
        backend=_backend(environ.get("ATTNCC_BACKEND", "")),
        cache_dir=_cache_dir(environ),
    )


@functools.cache
def settings() -> Settings:
    """The process' settings, read the first time they are asked for."""
    return read(os.environ)


def unknown_variables(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Names that begin like ours and mean nothing, mistyped ones most likely."""
    return tuple(sorted(n for n in environ if n.startswith("ATTNCC_") and n not in VARIABLES))


def _debug(text: str) -> Debug:
    levels = {str(int(level)): level for level in Debug}
    if text and text not in levels:
        meaning = ", ".join(f"{int(level)} {level.name.lower()}" for level in Debug)
        raise ArgumentError(f"ATTNCC_DEBUG is {text!r}", hint=f"it takes a number: {meaning}")
    return levels[text] if text else Debug.QUIET


def _backend(text: str) -> str:
    if text and text not in BACKENDS:
        hint = suggest(text, BACKENDS) or f"it takes one of {', '.join(BACKENDS)}"
        raise ArgumentError(f"ATTNCC_BACKEND is {text!r}, which is no backend", hint=hint)
    return text or "auto"


def _cache_dir(environ: Mapping[str, str]) -> Path:
    if own := environ.get("ATTNCC_CACHE_DIR"):
        return Path(own).expanduser().absolute()
    shared = environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is invalid and must be ignored.
    root = Path(shared) if Path(shared).is_absolute() else Path("~/.cache").expanduser()
    return root / "attncc"
