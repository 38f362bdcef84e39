"""Texts that no person writes: an error in seconds, never a crash, a hang or a RecursionError."""

import random
import time

import pytest

from attncc.errors import AttnccError
from attncc.frontend import parse
from attncc.frontend.parser import MAX_TEXT

LIMIT_S = 9.0
"""The worst takes about 2 s on two busy cores."""

HEAD = "attention a(w: int, t: int[4]):\n    mask = "


def _filled(head: str, unit: str, tail: str) -> str:
    """As many units as the longest text that is read at all can hold."""
    room = MAX_TEXT - len(head) - len(tail)
    return head + unit * (room // len(unit)) + tail


def _garbage(seed: int, length: int, alphabet: str) -> str:
    return "".join(random.Random(seed).choices(alphabet, k=length))


def _doubling_defs(body: str) -> str:
    defs = [f"def f{i + 1}(x) = " + body.replace("f", f"f{i}") + "\n" for i in range(1, 150)]
    return "def f1(x) = x + x\n" + "".join(defs) + HEAD + "f150(w) > 0"


HOSTILE = {
    "10 MB of garbage": _garbage(0, 10**5, "abc()[]=+-*/<>:,. \n\t#\0é\x1b'\"") * 100,
    "a 10 MB line": HEAD + "w" * 10**7,
    "parentheses": HEAD + "(" * 10_000 + "w" + ")" * 10_000 + " > 0",
    "open parentheses": _filled(HEAD, "(", ""),
    "closed parentheses": _filled(HEAD, ")", ""),
    "indexing": HEAD + "t[" * 10_000 + "w" + "]" * 10_000 + " > 0",
    "calls": HEAD + "abs(" * 10_000 + "w" + ")" * 10_000 + " > 0",
    "minus signs": HEAD + "-" * 10_000 + "w > 0",
    "many minus signs": _filled(HEAD, "-", "w > 0"),
    "negations": _filled(HEAD, "not ", "true"),
    "a sum": HEAD + "+".join(["w"] * 100_000) + " > 0",
    "a conjunction": _filled(HEAD, "w > 0 and\n        ", "true"),
    "a comparison": _filled(HEAD, "w<", "w"),
    "powers": _filled(HEAD, "w**", "2 > 0"),
    "a minimum": _filled(HEAD + "min(", "w,", "w) > 0"),
    "digits": _filled(HEAD, "1", " > w"),
    "a name": _filled(HEAD, "w", " > 0"),
    "lets that double": "attention a(w: int):\n    let a0 = w\n"
    + "".join(f"    let a{i + 1} = a{i} + a{i}\n" for i in range(150))
    + "    mask = a150 > 0",
    "defs that double": _doubling_defs("f(x) + f(x)"),
    "defs that double unseen": _doubling_defs("(f(x) + f(x)) ** 0"),
    "nested powers": HEAD + "(" * 150 + "w" + " ** 16)" * 150 + " > 0",
    "a chain of defs": "def f0(x) = x\n"
    + "".join(f"def f{i + 1}(x) = f{i}(x)\n" for i in range(4_000))
    + HEAD
    + "f4000(w) > 0",
    "a ring of defs": "".join(f"def f{i}(x) = f{(i + 1) % 4_000}(x)\n" for i in range(4_000)),
    "wide defs": "def f(x) = " + "+".join(["x"] * 150) + "\n"
    "def g(x) = " + "+".join([f"f(x) ** {0}"] * 150) + "\nattention a(w: int):\n"
    + "".join(f"    let a{i} = g(w)\n" for i in range(3_000))
    + "    mask = true",
    "axes": "attention a(t: int):\n    axes ("
    + ", ".join(f"a{i}: t" for i in range(10_000))
    + ")\n    mask = true",
    "line ends": _filled("", "\n", ""),
    "staircase": "attention a():\n" + "".join(" " * i + "mask\n" for i in range(1, 600)),
    "nothing": "",
    "half a surrogate": HEAD + "\ud800",
    "control characters": "\0\x1b[31m" * 100,
}  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_it_is_refused_in_time(text: str) -> None:
    started = time.perf_counter()
    with pytest.raises(AttnccError) as caught:
        parse(text)
    assert time.perf_counter() - started < LIMIT_S
    message = str(caught.value)
    assert len(message) < 1_000
    assert message.replace("\n", "").isprintable()


@pytest.mark.parametrize("seed", range(200))
def test_garbage_of_tokens(seed: int) -> None:
    words = ["attention ", "a", "(", ")", ":", "\n", "\n    ", "mask", "=", "score", "let ", "def "]
    words += ["1", "2.5", "-", "not ", " and ", "<", "[", "]", ",", "q_idx", "int", "axes", "."]
    chosen = random.Random(seed).choices(words, k=40)
    with pytest.raises(AttnccError) as caught:
        parse("attention a():\n    mask = " + "".join(chosen) + ")")
    assert caught.value.hint


@pytest.mark.parametrize("seed", range(200))
def test_one_character_changed(seed: int) -> None:
    """A valid text with one character removed, doubled or replaced parses, or says why not."""
    text = (
        "from std import causal\n\n# A comment.\n"
        "attention a(w: int = -4, doc: int[batch, kv_len] sorted, s: float[heads] grad):\n"
        "    axes (y: w, x: 3)\n    let d = q_idx - kv_idx  # why\n"
        "    mask = causal() and (abs(d) <= w or doc[b, q_idx] == doc[b, kv_idx]\n"
        "        or q.x == kv.x)\n    score = where(d < 1e-3, score ** 2, s[h] * d)\n"
        "    scale = 0.5\n    sink = s[h]\n    normalize = softmax\n"
    )
    source = random.Random(seed)
    at = source.randrange(len(text))
    new = source.choice(("", text[at] * 2, source.choice("()[]=<:,.\n\t #q1!&")))
    try:
        parse(text[:at] + new + text[at + 1 :])
    except AttnccError as error:
        assert error.hint
        assert error.span is not None
