"""Text to syntax tree, in one pass and without recursion."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from lark import Lark, Token, UnexpectedCharacters, UnexpectedToken
from lark.parsers.lalr_interactive_parser import InteractiveParser

from attncc.errors import ProgramSyntaxError
from attncc.frontend import tree
from attncc.frontend.builder import Builder
from attncc.frontend.layout import Layout
from attncc.frontend.syntax_errors import Place, unexpected_character, unexpected_token
from attncc.ir.expr import Span

MAX_TEXT = 100_000
"""Characters; a program is a few hundred, and the worst text of this length takes 2 s to refuse."""


@cache
def _lark() -> Lark:
    grammar = Path(__file__).with_name("grammar.lark").read_text("utf-8")
    return Lark(grammar, parser="lalr", lexer="basic", transformer=Builder())


def parse_tree(text: str) -> tree.File:
    """The syntax tree of a text with plain line ends; errors carry a span, not the source."""
    if len(text) > MAX_TEXT:
        raise ProgramSyntaxError(
            f"{len(text):,} characters is too long for a program",
            hint=f"the limit is {MAX_TEXT:,}; large tables belong in captured tensors",
            span=Span(1, 1),
        )
    parser = _lark().parse_interactive(text)
    layout = Layout()
    before: Token | None = None
    try:
        tokens = parser.lexer_thread.lex(parser.parser_state)  # type: ignore[no-untyped-call]
        for token in layout.structured(tokens):
            _feed(parser, token, before, layout, text)
            before = token if token.type not in ("_NL", "_INDENT", "_DEDENT") else before
        result = _feed(parser, _end(text, before), before, layout, text)
    except UnexpectedCharacters as error:
        raise unexpected_character(error, text) from None
    assert isinstance(result, tree.File)
    return result


def _feed(
    parser: InteractiveParser, token: Token, before: Token | None, layout: Layout, text: str
) -> object:
    try:
        return parser.feed_token(token)
    except UnexpectedToken:
        # accepts(), not the error's list: LALR reduces on tokens that then do not fit
        accepted = frozenset(parser.accepts())  # type: ignore[no-untyped-call]
        place = Place(before, accepted, layout, text)
        raise unexpected_token(token, place) from None


def _end(text: str, before: Token | None) -> Token:
    line = text.count("\n") + 1 if before is None else before.line
    column = 1 if before is None else before.end_column
    return Token("$END", "", line=line, column=column)
