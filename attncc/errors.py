"""Every error a user can cause: what was wrong, where, and what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from attncc.ir.expr import Span


class AttnccError(Exception):
    """Base of all errors raised on purpose; `str()` is the whole message with its caret.

    message: what is wrong, naming the thing, what it was and what was expected.
    hint:    what to write instead.
    source, span: the program text and the place in it.
    path:    the file the text came from, if any.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        source: str = "",
        span: Span | None = None,
        path: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.source = source
        self.span = span
        self.path = path

    def __str__(self) -> str:
        return "\n".join(filter(None, (self._head(), self._excerpt(), self._hint())))

    def _head(self) -> str:
        where = self.path or ("program" if self.span else "")
        if self.span:
            where = f"{where}:{self.span.line}:{self.span.column}"
        return f"{where}: {self.message}" if where else self.message

    def _excerpt(self) -> str:
        lines = self.source.split("\n")
        if not self.span or not self.source or self.span.line > len(lines):
            return ""
        line = lines[self.span.line - 1]
        # A window of the line, so that a megabyte on one line still shows its caret.
        start = max(0, self.span.column - 1 - 60)
        window = "".join(c if c.isprintable() else " " for c in line[start : start + 120])
        at = self.span.column - 1 - start
        width = max(1, min(self.span.length, len(window) - at))
        return f"    {window}\n    {' ' * at}{'^' * width}"

    def _hint(self) -> str:
        return f"    {self.hint}" if self.hint else ""


class ProgramSyntaxError(AttnccError):
    """The text is not in the language."""


class ProgramNameError(AttnccError):
    """A name is unknown, or used twice."""


class KindError(AttnccError):
    """An operator, index or clause got a value of the wrong kind."""


class ProgramValueError(AttnccError):
    """A value that has no meaning where it stands: a zero divisor, a number too large."""


class ArgumentError(AttnccError):
    """A call got a wrong, missing or extra argument, shape, dtype or device."""


class BoundsError(AttnccError):
    """A captured tensor would be read outside its range at a pair the mask keeps."""


class UnsupportedError(AttnccError):
    """A backend that was asked for by name cannot run this program, or a feature is not there."""


def suggest(name: str, known: Iterable[str]) -> str:
    """A hint naming the close matches, or the empty string."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
