"""Text to Programs."""

from __future__ import annotations

from attncc.frontend.files import load, parse, read

__all__ = ["load", "parse", "read"]
