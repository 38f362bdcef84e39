import subprocess
import sys
from dataclasses import replace

import pytest

from attncc.errors import AttnccError
from attncc.frontend import parse
from attncc.ir import ops
from attncc.ir.expr import (
    KV_IDX,
    KV_LEN,
    Q_IDX,
    Const,
    Expr,
    Load,
    Scalar,
    Score,
    apply,
    kind,
    walk,
)
from attncc.ir.ops import OPS, Form, Kind, Op
from attncc.ir.program import Normalize, Program

HEADER = "attention a(w: int, c: float, on: bool, t: int[4], f: float[n, n] grad):\n"


def one(body: str, header: str = HEADER) -> Program:
    (program,) = parse(header + "".join(f"    {line}\n" for line in body.split("\n")))
    return program


def mask(text: str) -> Expr:
    return one(f"mask = {text}").mask


def same(left: str, right: str) -> bool:
    return mask(left) == mask(right)


def test_precedence_is_pythons() -> None:
    assert same("on or on and not on == on", "on or (on and (not (on == on)))")
    assert same("w + 2 * -w ** 2 < w", "(w + (2 * (-(w ** 2)))) < w")
    assert same("w & 3 << 1 + 1 | 4 ^ 5 == w", "((w & (3 << (1 + 1))) | (4 ^ 5)) == w")
    assert same("-w // 2 == ~w % 3", "((-w) // 2) == ((~w) % 3)")
    assert same("w - 2 - 3 > w // 2 // 3", "((w - 2) - 3) > ((w // 2) // 3)")


def test_chains_become_conjunctions() -> None:
    assert same("0 <= w < 4 != q_idx", "0 <= w and w < 4 and 4 != q_idx")
    assert not same("(0 < w) == (w < 4)", "0 < w == w < 4")


def test_bools_under_bit_operators() -> None:
    assert same("on & on | on ^ on", "(on and on) or (on != on)")


def test_literals_keep_their_kind() -> None:
    found = [part.value for part in walk(one("score = where(on, -1, 1.0) + 2").score)
             if isinstance(part, Const)]  # fmt: skip
    assert [repr(value) for value in found] == ["-1", "1.0", "2"]
    assert mask("-1 > w").args[0] == Const(-1)  # type: ignore[union-attr]
    assert mask("-(1) > w").args[0] == apply(ops.NEG, Const(1))  # type: ignore[union-attr]
    assert mask("0x1f > w").args[0] == Const(31)  # type: ignore[union-attr]


def test_nothing_is_folded() -> None:
    assert mask("1 + 1 > w * 0") == apply(
        ops.GT, apply(ops.ADD, Const(1), Const(1)), apply(ops.MUL, _scalar("w"), Const(0))
    )


def _scalar(name: str) -> Scalar:
    return Scalar(next(p for p in one("mask = true").scalars if p.name == name))


def test_powers_are_products() -> None:
    assert same("w ** 3 > 0", "w * w * w > 0")
    assert one("score = c ** 0").score == Const(1.0)
    assert same("w ** 1 > 0", "w > 0")


def test_lets_are_written_out_and_shared() -> None:
    program = one("let d = q_idx - kv_idx\nlet e = d * d\nmask = e > w")
    assert program.mask == mask("(q_idx - kv_idx) * (q_idx - kv_idx) > w")
    assert len(list(walk(program.mask))) == 6


def test_ints_promote_where_a_clause_is_a_float() -> None:
    program = one("score = w\nscale = 1\nsink = h")
    assert [kind(e) for e in (program.score, program.scale, program.sink) if e] == [Kind.FLOAT] * 3


def test_clauses() -> None:
    program = one("mask = on\nscore = score + c\nscale = c\nsink = 0.5\nnormalize = softmax")
    assert program.scale == _scalar("c")
    assert program.sink == Const(0.5)
    assert one("mask = on\nnormalize = sigmoid").normalize is Normalize.SIGMOID
    assert one("score = score\nnormalize = none").normalize is Normalize.NONE
    assert one("mask = on").score == Score()


def test_parameters() -> None:
    header = (
        "attention a(\n    w: int = -4, c: float = 30,  # a comment\n    on: bool = false,\n"
        "    doc: int[batch, kv_len] sorted, s: float[heads, 3, seq] grad sorted, k: bool[seq],\n"
        "):\n"
    )
    program = one("mask = true", header)
    assert [p.default for p in program.scalars] == [-4, 30.0, False]
    assert isinstance(program.scalars[1].default, float)
    doc, s, k = program.tensors
    assert (doc.kind, doc.dims, doc.sorted, doc.grad) == (
        Kind.INT,
        ("batch", "kv_len"),
        True,
        False,
    )
    assert (s.dims, s.sorted, s.grad) == (("heads", 3, "seq"), True, True)
    assert k.kind is Kind.BOOL


def test_axes() -> None:
    program = one("axes (t: kv_len // w, y: w, x: 4)\nmask = q.t == kv.t and q.y == kv.x")
    expected = "q_idx // (w * 4) == kv_idx // (w * 4) and q_idx // 4 % w == kv_idx % 4"
    assert program.mask == mask(expected)
    assert [axis.name for axis in program.grid] == ["t", "y", "x"]
    assert one("axes (i: w)\nmask = q.i > kv.i").mask == mask("q_idx > kv_idx")


def test_lines_continue_by_indentation_and_brackets() -> None:
    text = "attention a():\n    mask = q_idx >= kv_idx\n        # why\n        and kv_idx > 3\n\n"
    text += "    score = where(\n  q_idx > 3,\nscore,\n    0.0)\n"
    (program,) = parse(text)
    assert program == parse(str(program))[0]
    assert kind(program.mask) is Kind.BOOL


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("indent", ["  ", "\t", "     "])
def test_line_ends_and_indentation(ending: str, indent: str) -> None:
    lines = ["# c", "attention a():", f"{indent}mask = true # x", "", f"{indent}scale = 1.0", "# d"]
    (program,) = parse(ending.join(lines))
    assert program.scale == Const(1.0)
    assert program.comment == "c"


def test_comments_above_a_declaration() -> None:
    text = "# not this\n\n# one\n#  two\n#\n# three\nattention a():\n    mask = true\n"
    text += "# four\nattention b():\n    mask = true\nattention c():\n    mask = true\n"
    assert [p.comment for p in parse(text)] == ["one\n two\n\nthree", "four", ""]


def test_defs() -> None:
    text = (
        "def outer(x, t) = inner(x) + t[x % 4]\n"
        "def inner(y) = y * w_free()\n"
        "def w_free() = kv_len\n"
    )
    header = text + HEADER
    assert one("mask = outer(q_idx, t) > 0", header).mask == mask(
        "q_idx * kv_len + t[q_idx % 4] > 0"
    )


def test_a_def_and_a_parameter_may_share_a_name() -> None:
    program = one("mask = window(window)", "from std import window\nattention a(window: int):\n")
    assert program.mask == apply(ops.LT, apply(ops.SUB, Q_IDX, KV_IDX), Scalar(program.scalars[0]))


def test_imports_and_aliases() -> None:
    header = "from std import causal, sliding as local,\n" + HEADER
    assert one("mask = causal() and local(w)", header).mask == mask(
        "q_idx >= kv_idx and (q_idx >= kv_idx and q_idx - kv_idx < w)"
    )


def test_spans_lie_in_the_users_text() -> None:
    text = "from std import document\nattention a(doc: int[batch, kv_len]):\n"
    text += "    mask = q_idx > 0 and document(doc)\n"
    (program,) = parse(text)
    loads = [part for part in walk(program.mask) if isinstance(part, Load)]
    assert [(load.span.line, load.span.column) for load in loads if load.span] == [(3, 26)] * 2
    assert program.source == text


def test_spans_take_no_part_in_equality() -> None:
    program = one("mask  =  q_idx   >= kv_idx")
    assert program == one("mask = q_idx >= kv_idx")
    assert replace(program, name="b") != program


ARGUMENTS = {Kind.BOOL: "on", Kind.INT: "w", Kind.FLOAT: "c"}


def _written(op: Op, args: tuple[str, ...]) -> str:
    match op.form:
        case Form.INFIX:
            return f"{args[0]} {op.symbol} {args[1]}"
        case Form.PREFIX:
            return f"{op.symbol} {args[0]}"
        case Form.CALL:
            return f"{op.symbol}({', '.join(args)})"


def _kinds(arity: int) -> list[tuple[Kind, ...]]:
    if arity == 0:
        return [()]
    return [(*rest, kind) for rest in _kinds(arity - 1) for kind in Kind]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_operator_on_every_kind(op: Op) -> None:
    """What the table allows parses to that operator; what it refuses is an error with a hint."""
    for kinds in _kinds(op.arity):
        text = _written(op, tuple(ARGUMENTS[kind] for kind in kinds))
        result = op.kind(kinds)
        if (
            result is None
            and op in (ops.BITAND, ops.BITOR, ops.BITXOR)
            and set(kinds) == {Kind.BOOL}
        ):
            result = Kind.BOOL  # written for 'and', 'or' and '!='
        body = f"let x = {text}\nmask = true"
        if result is None:
            with pytest.raises(AttnccError) as caught:
                one(body)
            assert caught.value.hint
            continue
        clause = "mask = x" if result is Kind.BOOL else "score = x"
        program = one(f"let x = {text}\n{clause}")
        assert kind(program.mask if result is Kind.BOOL else program.score) in (result, Kind.FLOAT)


def test_parsing_needs_no_torch() -> None:
    code = (
        "import sys; from attncc.frontend import parse\n"
        "parse('from std import causal\\nattention a():\\n    mask = causal()\\n')\n"
        "assert not {'torch', 'triton', 'numpy', 'sympy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_sizes_are_names() -> None:
    assert Scalar(KV_LEN) in set(walk(mask("kv_idx < kv_len // 2")))
