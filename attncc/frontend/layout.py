"""Lines to structure: where statements end, where bodies begin, and which brackets are open.

Inside brackets a new line means nothing. Outside, a line at the left margin starts a declaration,
the first line after a header's ':' sets the body's indentation, a line there starts a statement,
and a line indented deeper continues the line above.
"""

from __future__ import annotations

from collections.abc import Iterator

from lark import Token

from attncc.errors import ProgramSyntaxError
from attncc.ir.expr import Span

MAX_NESTING = 200
"""Open brackets at one place; people write fewer than ten."""

_OPENERS = {"LPAR": ")", "LSQB": "]"}
_CLOSERS = {"RPAR", "RSQB"}
_STARTERS = {"ATTENTION", "DEF", "FROM", "LET", "AXES"}
"""Tokens that only ever start a line: inside brackets they say that one was not closed."""


class Layout:
    """One text's layout; `open` and `continues` tell error messages what a place is part of."""

    def __init__(self) -> None:
        self.open: list[Token] = []
        self.continues = False
        """The line being read continues the one above by its indentation alone."""
        self._body: str | None = None
        self._header = False

    def structured(self, tokens: Iterator[Token]) -> Iterator[Token]:
        """The tokens with _NL at the ends of statements only, and _INDENT and _DEDENT."""
        last: Token | None = None
        newline: Token | None = None
        for token in tokens:
            if token.type == "_NL":
                newline = token
                continue
            if last is None and token.column != 1:
                raise _at(token, "the first line is indented", "start it at the left margin")
            if newline is not None and last is not None and not self.open:
                yield from self._line(newline)
            newline = None
            self._bracket(token)
            if not self.open:
                self._header = token.type == "COLON"
            last = token
            yield token
        if self.open:
            raise self.unclosed()
        if last is not None:
            yield from self._end(last)

    def unclosed(self) -> ProgramSyntaxError:
        """The error for the innermost open bracket."""
        token = self.open[-1]
        closer = _OPENERS[token.type]
        return _at(token, f"'{token}' is never closed", f"write the missing '{closer}'")

    def _bracket(self, token: Token) -> None:
        if token.type in _OPENERS:
            self.open.append(token)
            if len(self.open) > MAX_NESTING:
                message = f"brackets nest deeper than {MAX_NESTING}"
                raise _at(token, message, "name a part of it with 'let'")
        elif token.type in _CLOSERS and self.open:
            self.open.pop()
        elif token.type in _STARTERS and self.open and row(token) > row(self.open[-1]):
            raise self.unclosed()

    def _line(self, newline: Token) -> Iterator[Token]:
        """What a line break outside brackets means, by the indentation after it."""
        indent = newline[newline.rindex("\n") + 1 :].split("#")[0]
        place = _moved(newline, "_NL", indent)
        self.continues = False
        if not indent:
            yield from self._end(place)
        elif self._header and self._body is None:
            self._body = indent
            yield place
            yield _moved(newline, "_INDENT", indent)
        elif self._body is None or (indent.startswith(self._body) and indent != self._body):
            self.continues = True
        elif indent == self._body:
            yield place
        else:
            raise ProgramSyntaxError(
                "this line's indentation is not that of the lines above",
                hint="indent every statement of a body alike, and continuation lines deeper",
                span=Span(row(place), 1, len(indent)),
            )

    def _end(self, place: Token) -> Iterator[Token]:
        yield Token.new_borrow_pos("_NL", "", place)
        if self._body is not None:
            yield Token.new_borrow_pos("_DEDENT", "", place)
        self._body = None
        self._header = False


def row(token: Token) -> int:
    return token.line or 1


def _moved(newline: Token, kind: str, indent: str) -> Token:
    """A token of no width at the end of a line break and its indentation."""
    line = row(newline) + newline.count("\n")
    return Token(kind, "", line=line, column=len(indent) + 1)


def _at(token: Token, message: str, hint: str) -> ProgramSyntaxError:
    span = Span(row(token), token.column or 1, max(1, len(token)))
    return ProgramSyntaxError(message, hint=hint, span=span)
