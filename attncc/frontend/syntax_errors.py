"""What a person should read where the parser can go no further."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from keyword import iskeyword

from lark import Token, UnexpectedCharacters

from attncc.errors import ProgramSyntaxError, suggest
from attncc.frontend.builder import place as span_of
from attncc.frontend.layout import Layout, row
from attncc.frontend.scope import CLAUSES
from attncc.ir.expr import Span

_WORDS = {
    "_NL": "the end of the line",
    "_INDENT": "an indented line",
    "_DEDENT": "the end of the body",
    "$END": "the end of the text",
    "NAME": "a name",
    "NUMBER": "a number",
    "COLON": "':'",
    "EQUAL": "'='",
    "COMMA": "','",
    "DOT": "'.'",
    "LPAR": "'('",
    "RPAR": "')'",
    "LSQB": "'['",
    "RSQB": "']'",
    "ATTENTION": "'attention'",
    "DEF": "'def'",
    "FROM": "'from'",
    "IMPORT": "'import'",
    "AS": "'as'",
    "LET": "'let'",
    "AXES": "'axes'",
}
_VALUE = {"NAME", "NUMBER", "LPAR", "TRUE", "FALSE", "MINUS", "TILDE"}
_OPERATORS = {
    "AND", "OR", "COMPARE", "BITOR", "BITXOR", "BITAND", "SHL", "SHR", "PLUS", "MINUS",
    "STAR", "SLASH", "FLOORDIV", "PERCENT", "POWER", "DOT", "LSQB", "LPAR",
}  # fmt: skip

_CHARACTERS = {
    "!": "write 'not'",
    "?": "write where(condition, a, b)",
    ";": "write one statement a line",
    '"': "the language has no strings",
    "'": "the language has no strings",
    "{": "group with ( and )",
    "}": "group with ( and )",
    "@": "write * to multiply",
    "≤": "write <=",
    "≥": "write >=",
    "≠": "write !=",
    "×": "write *",
    "−": "write - (the ASCII minus)",
    "\\": "a line indented deeper continues the line above; no backslash is needed",
    "\u00a0": "use plain spaces",
    "\r": "use plain line ends",
}


def unexpected_character(error: UnexpectedCharacters, text: str) -> ProgramSyntaxError:
    """A character that starts no token."""
    found = error.char
    shown = f"'{found}'" if found.isprintable() else f"U+{ord(found):04X}"
    hint = _CHARACTERS.get(found, "")
    position = error.pos_in_stream or 0
    if found == "!" and text[position : position + 2] == "!=":
        hint = "write !="
    span = Span(error.line, error.column, 1)
    return ProgramSyntaxError(f"{shown} means nothing here", hint=hint, span=span)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the parser stands: the token before, what could follow it, and the lines around."""

    before: Token | None
    accepted: Set[str]
    layout: Layout
    text: str

    def new_line(self, token: Token) -> bool:
        return self.before is not None and row(self.before) < row(token)


def unexpected_token(token: Token, place: Place) -> ProgramSyntaxError:
    """A token that cannot follow what came before it."""
    opened = place.layout.open
    below = bool(opened) and row(token) > row(opened[-1])
    if below and (place.new_line(token) or token.type == "EQUAL"):
        return place.layout.unclosed()
    message = f"expected {_expected(place.accepted)}, found {_found(token)}"
    span = span_of(token)
    if place.accepted == {"COLON"} and place.before is not None and place.new_line(token):
        message = "expected ':', found the end of the line"
        end = span_of(place.before)
        span = Span(end.line, end.column + end.length, 1)
    return ProgramSyntaxError(message, hint=_hint(token, place), span=span)


def _found(token: Token) -> str:
    if token.type in ("_NL", "_INDENT", "_DEDENT", "$END"):
        return _WORDS[token.type]
    text = str(token)
    return f"'{text}'" if len(text) <= 40 else f"'{text[:40]}...'"


def _expected(accepted: Set[str]) -> str:
    words = []
    rest = set(accepted)
    if rest >= _VALUE:
        words.append("a value")
        rest -= {*_VALUE, "NOT"}
    if len(rest & _OPERATORS) > 3:
        words.append("an operator")
        rest -= _OPERATORS
    if len(rest) > 1:
        rest -= {"$END"}
    words += [word for name, word in _WORDS.items() if name in rest]
    *most, last = words or ["something else"]
    return f"{', '.join(most)} or {last}" if most else last


def _hint(token: Token, place: Place) -> str:
    start = token.start_pos or 0
    for situation, hint in _SITUATIONS:
        if situation(token, place):
            return hint
    pairs = (place.text[start : start + 2], place.text[max(0, start - 1) : start + 1])
    for pair in pairs:
        if token.type not in _UNWRITTEN and pair in _PAIR_HINTS:
            return _PAIR_HINTS[pair]
    if "ATTENTION" in place.accepted:
        return _top_level(str(token))
    for rule, hint in _LATER_SITUATIONS:
        if rule(token, place):
            return hint
    return _fallback(token, place)


_UNWRITTEN = {"_NL", "_INDENT", "_DEDENT", "$END"}
_PAIR_HINTS = {
    "&&": "write 'and'",
    "||": "write 'or'",
    "<>": "write !=",
    "=>": "write >=",
    "=<": "write <=",
    **dict.fromkeys(
        ("+=", "-=", "*=", "/=", "|=", "&="),
        "a name means one value; give the new value a name of its own with 'let'",
    ),
}

Situation = Callable[[Token, Place], bool]


def _word(*words: str) -> Situation:
    return lambda token, place: str(token) in words and "STAR" in place.accepted


def _after(word: str) -> Situation:
    return lambda token, place: str(place.before) == word


def _where(accepted: str, *types: str) -> Situation:
    """The one thing that fits is `accepted`, and a token of these types was found."""
    return lambda token, place: place.accepted == {accepted} and token.type in types


def _no_colon(token: Token, place: Place) -> bool:
    return place.accepted == {"COLON"} and place.new_line(token)


def _continues(token: Token, place: Place) -> bool:
    return place.layout.continues and place.new_line(token)


def _same_line_body(token: Token, place: Place) -> bool:
    return place.accepted == {"_NL"} and place.before is not None and place.before.type == "COLON"


def _keyword_argument(token: Token, place: Place) -> bool:
    return token.type == "EQUAL" and "COMPARE" in place.accepted and bool(place.layout.open)


def _assigns(token: Token, place: Place) -> bool:
    return token.type == "EQUAL" and "COMPARE" in place.accepted


def _index_again(token: Token, place: Place) -> bool:
    return token.type == "LSQB" and place.before is not None and place.before.type == "RSQB"


def _unary_plus(token: Token, place: Place) -> bool:
    return token.type == "PLUS" and place.accepted >= _VALUE


def _inner_def(token: Token, place: Place) -> bool:
    return token.type in ("DEF", "FROM") and "LET" in place.accepted


def _inner_let(token: Token, place: Place) -> bool:
    return token.type == "LET" and "STAR" in place.accepted


def _missing_operator(token: Token, place: Place) -> bool:
    words = token.type in ("NAME", "NUMBER", "LPAR") and not iskeyword(str(token))
    return words and "STAR" in place.accepted


def _missing_comma(token: Token, place: Place) -> bool:
    return _missing_operator(token, place) and "COMMA" in place.accepted


_SITUATIONS: tuple[tuple[Situation, str], ...] = (
    (_no_colon, "end the header with ':'"),
    (
        _continues,
        "this line is indented deeper than the statement above, so it continues it; "
        "indent statements alike",
    ),
    (_word("if", "else"), "write where(condition, a, b)"),
    (_word("in", "is"), "write the comparison out: a == x or a == y"),
    (_word("xor"), "write a != b for bools, a ^ b for ints"),
    (_after("return"), "write the value as a clause: mask = ... or score = ..."),
    (_where("EQUAL", "COLON"), "a function is one expression: def name(args) = EXPR"),
    (_where("EQUAL", "COMPARE"), "write = to define, == to compare"),
    (_where("EQUAL", "_NL"), "write = and a value"),
    (
        _where("COLON", "EQUAL", "COMMA", "RPAR"),
        "write a parameter as name: kind, e.g. window: int = 1024",
    ),
    (_same_line_body, "put the body on lines of its own, indented"),
    (
        _where("_INDENT", "_NL", "_DEDENT", "$END", "NAME", "LET", "ATTENTION", "DEF", "FROM"),
        "indent the body below its header; it needs at least a mask or a score",
    ),
    (
        _where("LPAR", "COLON", "EQUAL", "_NL"),
        "write the parentheses even when there are no parameters: name()",
    ),
    (_index_again, "write all indices in one pair of brackets: t[i, j]"),
    (_unary_plus, "leave out the '+'"),
    (_inner_def, "a def or import stands at the left margin, above the program"),
    (_inner_let, "start a new line before 'let'"),
)
_LATER_SITUATIONS: tuple[tuple[Situation, str], ...] = (
    (_keyword_argument, "arguments go by position; == compares"),
    (_assigns, "write == to compare; a 'let', clause or parameter starts its own line"),
    (_missing_comma, "write ',' or an operator between the two"),
    (_missing_operator, "write an operator between the two, e.g. *"),
)


def _fallback(token: Token, place: Place) -> str:
    """What to do where the text gives no idea of what was meant."""
    accepted = place.accepted
    if token.type in ("RPAR", "RSQB"):
        closer = {"RPAR": "]", "RSQB": ")"}[token.type]
        if accepted & ({"RPAR", "RSQB"} - {token.type}):
            return f"write the missing '{closer}' first"
        return "write a value first" if accepted >= _VALUE else "remove it, or open it before"
    if accepted >= _VALUE:
        return "write a number, a name, or an expression in parentheses"
    if "LET" in accepted:
        return "write a clause such as mask = ..., or let name = ..."
    if accepted == {"EQUAL"}:
        return "write = between the name and its value"
    if "COMMA" in accepted and place.layout.open:
        return "write ',' between two, and ')' after the last"
    if accepted == {"NAME"} or accepted == {"NAME", "RPAR"}:
        return "a name starts with a letter, and is no word of the language"
    return "remove it, or start a new line before it"


def _top_level(word: str) -> str:
    if word == "import":
        return "write from std import causal, window"
    if word in (*CLAUSES, "let", "axes"):
        return f"'{word}' stands inside an attention: indent it below 'attention name(...):'"
    close = suggest(word, ("attention", "def", "from"))
    return close or "a program starts with: attention name(...):"
