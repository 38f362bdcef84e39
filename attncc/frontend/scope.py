"""What names mean at a place in a program."""

from __future__ import annotations

import keyword
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from attncc.errors import ProgramNameError, suggest
from attncc.frontend import tree
from attncc.ir import expr as ir
from attncc.ir.expr import Span
from attncc.ir.ops import OPS, Form, Op

Value = ir.Expr | ir.TensorParam

BUILTIN_VALUES: Mapping[str, Value] = {
    **{index.name: index for index in ir.POSITIONS},
    **{size.name: ir.Scalar(size) for size in ir.SIZES},
    "score": ir.Score(),
}
OUTPUT_VALUES: Mapping[str, ir.Expr] = {param.name: ir.Scalar(param) for param in ir.RESULTS}
"""Names that the output clause alone reads."""
BUILTIN_FUNCTIONS: Mapping[str, Op] = {op.symbol: op for op in OPS if op.form is Form.CALL}
SIZE_NAMES = frozenset(size.name for size in ir.SIZES)
CLAUSES = ("mask", "score", "scale", "sink", "normalize", "output", "order")
GRID_BASES: Mapping[str, ir.Expr] = {"q": ir.Q_IDX, "kv": ir.KV_IDX}
_KEYWORDS = {
    *("attention", "def", "from", "import", "as", "let", "axes", "and", "or", "not"),
    *("true", "false", "bool", *CLAUSES, "sorted", "grad", "softmax", "sigmoid", "none"),
} - {"order"}  # which a let or a def may be named


@dataclass(frozen=True, slots=True)
class Function:
    """A `def`, and the functions its body can see. `library`: it is not in the user's own text."""

    definition: tree.Definition
    functions: Mapping[str, Function]
    library: str = ""

    @property
    def name(self) -> str:
        return self.definition.name.name


@dataclass(frozen=True, slots=True)
class Scope:
    """The names that one expression can use."""

    values: Mapping[str, Value]
    functions: Mapping[str, Function]
    grid: Mapping[tuple[str, str], ir.Expr] = field(default_factory=dict)
    later: Mapping[str, Span] = field(default_factory=dict)
    """Names that a `let` below defines."""
    dims: Mapping[str, str] = field(default_factory=dict)
    """Free dim names, and the tensor that has each."""
    inside: Function | None = None
    """The def whose body this is."""


def check_new(name: tree.Ident, taken: Mapping[str, Span]) -> None:
    """Raise where the name is taken, or is a word of Python's, which kernels are printed in."""
    text, hint = name.name, "choose another name"
    if text in taken:
        raise ProgramNameError(
            f"{quoted(text)} is used twice; line {taken[text].line} has it first",
            hint=hint,
            span=name.span,
        )
    if keyword.iskeyword(text) or text.startswith("__"):
        raise ProgramNameError(f"{quoted(text)} is a reserved word", hint=hint, span=name.span)


def check_free(name: tree.Ident, taken: Mapping[str, Span]) -> None:
    """Raise unless the name may mean something new in expressions."""
    check_new(name, taken)
    text, hint = name.name, "choose another name"
    if text in BUILTIN_VALUES:
        raise ProgramNameError(f"'{text}' is a name of the language", hint=hint, span=name.span)
    if text in BUILTIN_FUNCTIONS:
        raise ProgramNameError(f"'{text}' is a function of the language", hint=hint, span=name.span)
    if text in GRID_BASES:
        raise ProgramNameError(
            f"'{text}' stands for a token's coordinates, as in {text}.x", hint=hint, span=name.span
        )
    if text in _KEYWORDS:
        raise ProgramNameError(f"{quoted(text)} is a reserved word", hint=hint, span=name.span)


def is_free(name: str) -> bool:
    """Whether a parameter may have the name."""
    try:
        check_free(tree.Ident(name, Span(1, 1)), {})
    except ProgramNameError:
        return False
    return name.isidentifier() and name.isascii() and len(name) <= 64


def unknown_value(name: str, span: Span, scope: Scope) -> ProgramNameError:
    """The error for a name that means nothing as a value here."""
    if name in scope.later:
        line = scope.later[name].line
        return ProgramNameError(
            f"'{name}' is used before it is defined",
            hint=f"move its 'let' from line {line} above this line",
            span=span,
        )
    if name in scope.functions or name in BUILTIN_FUNCTIONS:
        return ProgramNameError(
            f"'{name}' is a function, not a value", hint=f"call it: {name}(...)", span=span
        )
    if name in scope.dims:
        tensor = scope.dims[name]
        return ProgramNameError(
            f"'{name}' is a dim of '{tensor}', not a value",
            hint=f"add a parameter for it, e.g. {name}_len: int, or use q_len or kv_len",
            span=span,
        )
    known = [*scope.values, *scope.functions, "true", "false"]
    hint = _FOREIGN.get(name, "") or suggest(name, known) or suggest(name.lower(), known)
    if not hint and scope.inside is not None:
        hint = f"a def sees only its arguments: write def {scope.inside.name}(..., {name})"
    hint = hint or "declare it as a parameter, or name a value with 'let' above"
    return ProgramNameError(f"unknown name {quoted(name)}", hint=hint, span=span)


def unknown_function(
    name: str, span: Span, scope: Scope, standard: Collection[str]
) -> ProgramNameError:
    """The error for a name that means nothing as a function here."""
    value = scope.values.get(name)
    if isinstance(value, ir.TensorParam):
        return ProgramNameError(
            f"'{name}' is a tensor, not a function", hint=f"index it: {name}[...]", span=span
        )
    if value is not None:
        return ProgramNameError(
            f"'{name}' is a value, not a function", hint="write * to multiply", span=span
        )
    known = [*scope.functions, *BUILTIN_FUNCTIONS]
    hint = _FOREIGN.get(name, "") or suggest(name, known)
    if name in standard:
        hint = f"write above the program: from std import {name}"
    hint = hint or "write a def for it above the program: def name(args) = EXPR"
    return ProgramNameError(f"unknown function {quoted(name)}", hint=hint, span=span)


_FOREIGN = {
    "pi": "write 3.141592653589793",
    "inf": "mask the pair out instead of adding -inf",
    "nan": "mask the pair out instead",
    "None": "leave the clause out",
    "True": "write true",
    "False": "write false",
    "i": "write q_idx",
    "j": "write kv_idx",
    "k_idx": "write kv_idx",
    "q_head": "write h",
    "pow": "write x * x, or x ** 2",
    "round": "write floor(x + 0.5)",
    "maximum": "write max",
    "minimum": "write min",
    "clamp": "write min(max(x, lo), hi)",
    "ceil": "write -floor(-x); of ints, -(-x // n)",
    "relu": "write max(x, 0)",
    **dict.fromkeys(
        OUTPUT_VALUES, "the output clause alone reads it; a def takes it as an argument"
    ),
}


def quoted(name: str) -> str:
    return f"'{name}'" if len(name) <= 40 else f"'{name[:40]}...'"
