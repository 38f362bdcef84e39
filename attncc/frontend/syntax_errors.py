"""What a person should read where the parser can go no further."""

from __future__ import annotations

from collections.abc import Set

from lark import Token, UnexpectedCharacters

from attncc.errors import ProgramSyntaxError, suggest
from attncc.frontend.builder import place
from attncc.frontend.layout import Layout, row
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
_VALUE = {"NAME", "NUMBER", "LPAR", "TRUE", "FALSE", "MINUS", "TILDE", "NOT"}
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


def unexpected_token(
    token: Token, before: Token | None, accepted: Set[str], layout: Layout
) -> ProgramSyntaxError:
    """A token that cannot follow what came before it."""
    if layout.open and row(token) > row(layout.open[-1]):
        starts_line = before is not None and row(before) < row(token)
        if starts_line or token.type == "EQUAL":
            return layout.unclosed()
    message = f"expected {_expected(accepted)}, found {_found(token)}"
    return ProgramSyntaxError(
        message, hint=_hint(token, before, accepted, layout), span=place(token)
    )


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
        rest -= _VALUE
    if len(rest & _OPERATORS) > 3:
        words.append("an operator")
        rest -= _OPERATORS
    words += [word for name, word in _WORDS.items() if name in rest]
    *most, last = words or ["something else"]
    return f"{', '.join(most)} or {last}" if most else last


def _hint(token: Token, before: Token | None, accepted: Set[str], layout: Layout) -> str:
    text, last = str(token), str(before or "")
    pair = f"{last}{text}"
    if layout.continues and before is not None and row(before) < row(token):
        return (
            "this line is indented deeper than the statement above, so it continues it; "
            "indent statements alike"
        )
    if text in _WORD_HINTS and before is not None:
        return _WORD_HINTS[text]
    if pair in _PAIR_HINTS:
        return _PAIR_HINTS[pair]
    for test, hint in _SITUATIONS:
        if test(token, before, accepted):
            return hint
    if token.type == "NAME" and "ATTENTION" in accepted:
        return _top_level(text)
    return ""


_WORD_HINTS = {
    "if": "write where(condition, a, b)",
    "else": "write where(condition, a, b)",
    "return": "write def name(args) = EXPR",
    "lambda": "write def name(args) = EXPR above the program",
    "in": "write the comparison out: a == x or a == y",
    "is": "write ==",
    "xor": "write a != b for bools, a ^ b for ints",
    "let": "start a new line before 'let'",
}
_PAIR_HINTS = {
    "&&": "write 'and'",
    "||": "write 'or'",
    "<>": "write !=",
    "++": "the language has no ++",
    "--": "the language has no --",
    "+=": "a name means one value; give the new value a name of its own with 'let'",
    "-=": "a name means one value; give the new value a name of its own with 'let'",
    "*=": "a name means one value; give the new value a name of its own with 'let'",
    "|=": "a name means one value; give the new value a name of its own with 'let'",
    "&=": "a name means one value; give the new value a name of its own with 'let'",
}


def _assigns_inside(token: Token, before: Token | None, accepted: Set[str]) -> bool:
    return token.type == "EQUAL" and bool(accepted & {"COMPARE"})


def _python_def(token: Token, before: Token | None, accepted: Set[str]) -> bool:
    return token.type == "COLON" and accepted == {"EQUAL"}


def _no_kind(token: Token, before: Token | None, accepted: Set[str]) -> bool:
    return accepted == {"COLON"} and token.type in {"EQUAL", "COMMA", "RPAR"}


def _no_body(token: Token, before: Token | None, accepted: Set[str]) -> bool:
    return accepted == {"_INDENT"}


def _same_line_body(token: Token, before: Token | None, accepted: Set[str]) -> bool:
    return accepted == {"_NL"} and before is not None and before.type == "COLON"


def _no_colon(token: Token, before: Token | None, accepted: Set[str]) -> bool:
    return accepted == {"COLON"} and token.type == "_NL"


def _no_parameters(token: Token, before: Token | None, accepted: Set[str]) -> bool:
    return accepted == {"LPAR"} and token.type in {"COLON", "EQUAL", "_NL"}


def _index_again(token: Token, before: Token | None, accepted: Set[str]) -> bool:
    return token.type == "LSQB" and before is not None and before.type == "RSQB"


def _unary_plus(token: Token, before: Token | None, accepted: Set[str]) -> bool:
    return token.type == "PLUS" and accepted >= _VALUE


def _missing_operator(token: Token, before: Token | None, accepted: Set[str]) -> bool:
    return token.type in {"NAME", "NUMBER", "LPAR"} and "STAR" in accepted


_SITUATIONS = (
    (_assigns_inside, "write == to compare; a 'let', clause or parameter starts its own line"),
    (_python_def, "a function is one expression: def name(args) = EXPR"),
    (_no_kind, "write a parameter as name: kind, e.g. window: int = 1024"),
    (_no_colon, "end the header with ':'"),
    (_same_line_body, "put the body on lines of its own, indented"),
    (_no_body, "indent the body below its header; it needs at least a mask or a score"),
    (_no_parameters, "write the parentheses even when there are no parameters: name()"),
    (_index_again, "write all indices in one pair of brackets: t[i, j]"),
    (_unary_plus, "leave out the '+'"),
    (_missing_operator, "write an operator between the two, e.g. *"),
)


def _top_level(word: str) -> str:
    close = suggest(word, ("attention", "def", "from", "import"))
    if close and word not in ("mask", "score"):
        return close
    if word in ("mask", "score", "scale", "sink", "normalize"):
        return f"'{word}' stands inside an attention: indent it below 'attention name(...):'"
    return "a program starts with: attention name(...):"
