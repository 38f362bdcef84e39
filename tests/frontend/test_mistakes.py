"""Every mistake's whole message; run this file to write mistakes.txt anew, and read the diff."""

import re
from pathlib import Path

import pytest

from attncc import errors
from attncc.frontend import parse

GOLDEN = Path(__file__).with_name("mistakes.txt")
HEADER = "attention a(w: int, c: float, on: bool, doc: int[batch, kv_len], bias: float[heads, n]):"
"""Stands for `...` in the golden file."""


def _cases() -> list[tuple[str, str]]:
    """(program, message) pairs: programs follow '=== KIND' lines, messages follow '---' lines."""
    blocks = re.split(r"^===.*\n", GOLDEN.read_text("utf-8"), flags=re.M)[1:]
    pairs = (block.rstrip("\n").split("\n---\n") for block in blocks)
    return [(program, message) for program, message in pairs]


def _full(program: str) -> str:
    return program.replace("...\n", HEADER + "\n") + "\n"


def _error(program: str) -> errors.AttnccError:
    with pytest.raises(errors.AttnccError) as caught:
        parse(_full(program))
    return caught.value


def _message(error: errors.AttnccError) -> str:
    return "\n".join(line.rstrip() for line in str(error).replace(HEADER, "...").split("\n"))


@pytest.mark.parametrize(("program", "message"), _cases(), ids=lambda text: text.split("\n")[-1])
def test_message(program: str, message: str) -> None:
    error = _error(program)
    assert _message(error) == message
    assert error.span is not None
    assert error.hint
    assert type(error) is not errors.AttnccError


def test_no_message_shows_the_parser_within() -> None:
    text = " ".join(message for _, message in _cases())
    assert not re.search(r"\b(LPAR|RPAR|NUMBER|_NL|_INDENT|COMMA|Token|lark)\b", text)


def test_the_path_is_named() -> None:
    with pytest.raises(errors.AttnccError, match=r"^my/file\.attn:2:12: unknown name 'x'"):
        parse("attention a():\n    mask = x\n", "my/file.attn")


if __name__ == "__main__":
    written = []
    for program, _ in _cases():
        error = _error(program)
        written.append(f"=== {type(error).__name__}\n{program}\n---\n{_message(error)}\n\n")
    GOLDEN.write_text("".join(written), "utf-8")
