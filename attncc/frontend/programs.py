"""Declarations to Programs: parameters, clauses and axes, each checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from attncc.errors import (
    AttnccError,
    KindError,
    ProgramNameError,
    ProgramSyntaxError,
    ProgramValueError,
    suggest,
)
from attncc.frontend import tree
from attncc.frontend.clauses import CHECKS, a_kind, first, normalize_of, order_of
from attncc.frontend.resolver import Resolver
from attncc.frontend.scope import (
    BUILTIN_VALUES,
    CLAUSES,
    GRID_BASES,
    OUTPUT_VALUES,
    SIZE_NAMES,
    Function,
    Scope,
    Value,
    check_free,
    quoted,
)
from attncc.ir import expr as ir
from attncc.ir.expr import Span
from attncc.ir.grid import coordinate
from attncc.ir.ops import Kind
from attncc.ir.program import GridAxis, Normalize, Param, Program, TokenOrder

MAX_AXES = 8

_KINDS = {kind.value: kind for kind in Kind}
_FLAGS = ("sorted", "grad")


def resolve_program(
    node: tree.Attention, functions: Mapping[str, Function], resolver: Resolver, lines: list[str]
) -> Program:
    """One attention declaration as a Program without its source."""
    return _ProgramBuilder(node, functions, resolver).program(_comment(node.name.span, lines))


def _comment(header: Span, lines: list[str]) -> str:
    """The comment lines right above a header, without their '#'."""
    first = header.line - 1
    while first > 0 and lines[first - 1].startswith("#"):
        first -= 1
    above = lines[first : header.line - 1]
    return "\n".join(line[1:].removeprefix(" ").rstrip() for line in above)


class _ProgramBuilder:
    """Collects one program statement by statement; every name is taken once."""

    def __init__(
        self, node: tree.Attention, functions: Mapping[str, Function], resolver: Resolver
    ) -> None:
        self.node = node
        self.functions = functions
        self.resolver = resolver
        self.taken: dict[str, Span] = {}
        self.values: dict[str, Value] = dict(BUILTIN_VALUES)
        self.grids: dict[str, tuple[GridAxis, ...]] = {}
        """By the word that declares them."""
        self.coordinates: dict[tuple[str, str], ir.Expr] = {}
        self.clauses: dict[str, tree.Clause] = {}
        self.found: dict[str, ir.Expr] = {}
        self.normalize = Normalize.SOFTMAX
        self.order: TokenOrder | None = None
        self.later = {s.name.name: s.name.span for s in node.body if isinstance(s, tree.Let)}
        self.dims: dict[str, str] = {}

    def program(self, comment: str) -> Program:
        params = self._params()
        for statement in self.node.body:
            match statement:
                case tree.Let(name, value):
                    self._let(name, value)
                case tree.Axes():
                    self._axes(statement)
                case tree.Clause():
                    self._clause(statement)
        self._check_whole()
        return Program(
            name=self.node.name.name,
            params=params,
            mask=self.found.get("mask", ir.TRUE),
            score=self.found.get("score", ir.Score()),
            scale=self.found.get("scale"),
            sink=self.found.get("sink"),
            normalize=self.normalize,
            grid=self.grids.get("axes", self.grids.get("q_axes", ())),
            kv_grid=self._kv_grid(),
            output=self.found.get("output"),
            order=self.order,
            comment=comment,
            span=self.node.name.span,
        )

    def _take(self, name: tree.Ident) -> None:
        check_free(name, self.taken)
        self.taken[name.name] = name.span

    # Parameters

    def _params(self) -> tuple[Param, ...]:
        params: list[Param] = []
        for node in self.node.params:
            self._take(node.name)
        for node in self.node.params:
            param = self._tensor(node) if node.dims else self._scalar(node)
            params.append(param)
            self.values[param.name] = (
                param if isinstance(param, ir.TensorParam) else ir.Scalar(param, node.name.span)
            )
        return tuple(params)

    def _scalar(self, node: tree.Param) -> ir.ScalarParam:
        kind = _kind(node.kind)
        for flag in _flags(node):
            raise KindError(
                f"'{flag.name}' is for tensors; '{node.name.name}' is a scalar",
                hint=f"give it a dim: {node.name.name}: {kind.value}[1] {flag.name}",
                span=flag.span,
            )
        default = None if node.default is None else _default(node.default, kind)
        return ir.ScalarParam(node.name.name, kind, default, node.name.span)

    def _tensor(self, node: tree.Param) -> ir.TensorParam:
        kind, name = _kind(node.kind), node.name.name
        flags = {flag.name: flag for flag in _flags(node)}
        if "grad" in flags and kind is not Kind.FLOAT:
            raise KindError(
                f"'{name}' holds {kind.value}s, which have no gradient",
                hint=f"write {name}: float[...] grad, or leave 'grad' out",
                span=flags["grad"].span,
            )
        if "sorted" in flags and kind is Kind.BOOL:
            raise KindError(
                f"'{name}' holds bools, which have no order",
                hint="declare it int, or leave 'sorted' out",
                span=flags["sorted"].span,
            )
        if node.default is not None:
            raise KindError(
                f"'{name}' is a tensor, which has no default",
                hint="leave the default out, and pass the tensor in the call",
                span=node.default.span,
            )
        dims = tuple(self._dim(dim, name) for dim in node.dims)
        return ir.TensorParam(name, kind, dims, "sorted" in flags, "grad" in flags, node.name.span)

    def _dim(self, node: tree.Expr, tensor: str) -> ir.Dim:
        match node:
            case tree.Literal(bool()):
                pass
            case tree.Literal(int(size)) if size > 0:
                return size
            case tree.Name(name, span):
                self._check_dim_name(name, tensor, span)
                return name
        raise KindError(
            "a dim is a positive int or a name",
            hint="write a constant, a size such as kv_len, or a name that the tensor binds: [seq]",
            span=node.span,
        )

    def _check_dim_name(self, name: str, tensor: str, span: Span) -> None:
        if name in SIZE_NAMES:
            return
        if name in BUILTIN_VALUES:
            sizes = {"b": "batch", "h": "heads", "kv_head": "kv_heads"}
            size = sizes.get(name, {"q_idx": "q_len"}.get(name, "kv_len"))
            raise KindError(
                f"'{name}' is a position, not a dim", hint=f"write the size: {size}", span=span
            )
        if name in self.taken:
            raise KindError(
                f"'{name}' is a parameter, not a dim",
                hint="a dim is a constant, a size such as kv_len, or a name of its own",
                span=span,
            )
        if name not in self.dims:
            check_free(tree.Ident(name, span), {})
            self.dims[name] = tensor

    # Statements

    def _scope(self) -> Scope:
        return Scope(self.values, self.functions, self.coordinates, self.later, self.dims)

    def _output_scope(self) -> Scope:
        for name in OUTPUT_VALUES:
            if name in self.taken:
                raise ProgramNameError(
                    f"'{name}' is a name of the output clause",
                    hint="choose another name, here or without an output clause",
                    span=self.taken[name],
                )
        return replace(self._scope(), values={**self.values, **OUTPUT_VALUES})

    def _let(self, name: tree.Ident, value: tree.Expr) -> None:
        self._take(name)
        if name.name in self.dims:
            raise ProgramNameError(
                f"'{name.name}' is used twice; it is a dim of '{self.dims[name.name]}'",
                hint="choose another name",
                span=name.span,
            )
        self.values[name.name] = self.resolver.expr(value, self._scope())
        del self.later[name.name]

    def _axes(self, node: tree.Axes) -> None:
        for word in self.grids:
            if word == node.word:
                raise ProgramNameError(
                    f"'{word}' is given twice",
                    hint=f"name all axes in one '{word} (...)'",
                    span=node.span,
                )
            if "axes" in (word, node.word):
                raise ProgramNameError(
                    f"'{node.word}' is given beside '{word}'",
                    hint="axes is for both sides alike; else write q_axes and kv_axes",
                    span=node.span,
                )
        if len(node.axes) > MAX_AXES:
            raise ProgramSyntaxError(
                f"{len(node.axes)} axes; there are at most {MAX_AXES}",
                hint="join some of them to one",
                span=node.axes[MAX_AXES].name.span,
            )
        seen: dict[str, Span] = {}
        grid: list[GridAxis] = []
        for axis in node.axes:
            name = axis.name.name
            if name in seen:
                raise ProgramNameError(
                    f"axis '{name}' is used twice", hint="choose another name", span=axis.name.span
                )
            seen[name] = axis.name.span
            size = self.resolver.expr(axis.size, self._scope())
            _check_size(size, axis)
            grid.append(GridAxis(name, size))
        self.grids[node.word] = tuple(grid)
        for base, index in GRID_BASES.items():
            if node.word not in ("axes", f"{base}_axes"):
                continue
            for name in seen:
                found = coordinate(tuple(grid), name, index)
                self.coordinates[base, name] = self.resolver.measure(found, node.span)

    def _kv_grid(self) -> tuple[GridAxis, ...] | None:
        """Of keys, where it is not that of queries."""
        own = {"q_axes", "kv_axes"} & self.grids.keys()
        return self.grids.get("kv_axes", ()) if own else None

    def _clause(self, node: tree.Clause) -> None:
        name = node.name.name
        if name not in CLAUSES:
            raise self._unknown_clause(node)
        if name in self.clauses:
            line = self.clauses[name].name.span.line
            raise ProgramNameError(
                f"'{name}' is given twice; line {line} has it first",
                hint="join the two: with 'and' for masks, with a 'let' for steps of a score",
                span=node.name.span,
            )
        self.clauses[name] = node
        if name == "normalize":
            self.normalize = normalize_of(node.value)
            return
        if name == "order":
            self.order = self._order(node.value)
            return
        scope = self._output_scope() if name == "output" else self._scope()
        value = self.resolver.expr(node.value, scope)
        self.found[name] = CHECKS[name](value, node.value.span)

    def _order(self, node: tree.Expr) -> TokenOrder:
        def step(value: tree.Expr) -> ir.Expr:
            return self.resolver.expr(value, self._scope())

        axes = [axis for s in self.node.body if isinstance(s, tree.Axes) for axis in s.axes]
        tensors = {n: v for n, v in self.values.items() if isinstance(v, ir.TensorParam)}
        return order_of(node, step, [axis.name.name for axis in axes], tensors)

    def _unknown_clause(self, node: tree.Clause) -> AttnccError:
        name = node.name.name
        close = suggest(name, CLAUSES)
        if name in self.taken and not close:
            close = "a name means one value; 'let' gives the new value a name of its own"
        hint = close or f"write let {name} = ... to name a value; the clauses are {_CLAUSE_LIST}"
        return ProgramNameError(f"unknown clause {quoted(name)}", hint=hint, span=node.name.span)

    def _check_whole(self) -> None:
        name = self.node.name
        if "mask" not in self.clauses and "score" not in self.clauses:
            raise ProgramSyntaxError(
                f"'{name.name}' has neither a mask nor a score",
                hint="write one, e.g. mask = q_idx >= kv_idx, or mask = true for all pairs",
                span=name.span,
            )
        reads_lse = ir.LSE in ir.results(self.found.get("output"))
        if reads_lse and self.normalize is not Normalize.SOFTMAX:
            raise ProgramSyntaxError(
                f"'output' reads lse, but normalize is {self.normalize.value}, which has none",
                hint="leave one of the two out",
                span=self.clauses["output"].name.span,
            )
        if "sink" in self.clauses and self.normalize is not Normalize.SOFTMAX:
            raise ProgramSyntaxError(
                f"'sink' adds to the softmax, but normalize is {self.normalize.value}",
                hint="leave one of the two out",
                span=self.clauses["sink"].name.span,
            )


_CLAUSE_LIST = ", ".join(CLAUSES)


def _kind(name: tree.Ident) -> Kind:
    if name.name in _KINDS:
        return _KINDS[name.name]
    close = suggest(name.name, _KINDS) or "a parameter is int, float or bool, or a tensor of them"
    raise KindError(f"unknown kind {quoted(name.name)}", hint=close, span=name.span)


def _flags(node: tree.Param) -> tuple[tree.Ident, ...]:
    seen: set[str] = set()
    for flag in node.flags:
        if flag.name not in _FLAGS:
            hint = suggest(flag.name, _FLAGS) or "a tensor may be 'sorted' or 'grad'"
            raise ProgramNameError(f"unknown flag {quoted(flag.name)}", hint=hint, span=flag.span)
        if flag.name in seen:
            raise ProgramNameError(
                f"'{flag.name}' is used twice", hint="write it once", span=flag.span
            )
        seen.add(flag.name)
    return node.flags


def _default(node: tree.Expr, kind: Kind) -> bool | int | float:
    match node:
        case tree.Literal(value):
            pass
        case _:
            raise KindError(
                "a default is a literal", hint="write 1024, -0.5, true or false", span=node.span
            )
    given = Kind(type(value).__name__)
    if given is kind:
        return value
    if given is Kind.INT and kind is Kind.FLOAT:
        return float(value)
    raise KindError(
        f"the default is {a_kind(given)}, but the parameter is {a_kind(kind)}",
        hint=f"write {a_kind(kind)} here, or declare the parameter {given.value}",
        span=node.span,
    )


def _check_size(size: ir.Expr, axis: tree.GridAxis) -> None:
    name, span = axis.name.name, axis.size.span
    if ir.kind(size) is not Kind.INT:
        raise KindError(
            f"the size of axis '{name}' is {a_kind(ir.kind(size))}; it must be an int",
            hint="write an int, e.g. a parameter frames: int",
            span=span,
        )
    if ir.axes(size) or first(size, ir.Load) is not None:
        raise KindError(
            f"the size of axis '{name}' depends on more than scalars and sizes",
            hint="pass it as a scalar parameter, e.g. width: int",
            span=span,
        )
    if isinstance(size, ir.Const) and size.value <= 0:
        raise ProgramValueError(
            f"axis '{name}' has no positions", hint="its size is at least 1", span=span
        )
