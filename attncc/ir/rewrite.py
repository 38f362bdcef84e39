"""Rewriting expressions bottom-up by small named rules, with shared nodes kept shared."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence

from attncc.ir import ops
from attncc.ir.expr import Apply, Expr, apply, children, rebuild
from attncc.ir.ops import Op

Rule = Callable[[Apply], Expr | None]
"""A rule looks at one node over finished children and gives the new node, or None for no change."""

Rules = Mapping[Op, Sequence[Rule]]
"""The rules of each operator, tried in order until none applies."""


def postorder(expr: Expr, skip: Container[int] = ()) -> Iterator[Expr]:
    """Every distinct node object, children before parents; nothing at or below ids in `skip`."""
    seen: set[int] = set()
    stack = [(expr, False)]
    while stack:
        node, ready = stack.pop()
        if ready:
            yield node
        elif id(node) not in seen and id(node) not in skip:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((child, False) for child in reversed(children(node)))


def mapped(expr: Expr, change: Callable[[Expr], Expr]) -> Expr:
    """The expression with `change` applied to every node, children first."""
    done: dict[int, Expr] = {}
    for node in postorder(expr):
        parts = tuple(done[id(child)] for child in children(node))
        done[id(node)] = change(rebuild(node, parts))
    return done[id(expr)]


class Rewriter:
    """Applies rules until none changes anything; equal results are one object.

    Interning keeps comparisons of large results cheap: equal children are identical.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.done: dict[int, tuple[Expr, Expr]] = {}
        self.known: dict[Expr, Expr] = {}

    def __call__(self, expr: Expr) -> Expr:
        """The expression with every rule applied everywhere."""
        for node in postorder(expr, skip=self.done):
            parts = tuple(self.done[id(child)][1] for child in children(node))
            self._remember(node, self._settle(rebuild(node, parts)))
        return self.done[id(expr)][1]

    def make(self, op: Op, *args: Expr) -> Expr:
        """`op` over the arguments, rewritten."""
        return self(apply(op, *args))

    def _settle(self, node: Expr) -> Expr:
        if isinstance(node, Apply):
            for rule in self.rules.get(node.op, ()):
                changed = rule(node)
                if changed is not None:
                    return self(changed)
        return self.known.setdefault(node, node)

    def _remember(self, node: Expr, result: Expr) -> None:
        # The pair keeps the node alive, so that its id stays its own.
        self.done[id(node)] = (node, result)
        self.done[id(result)] = (result, result)


def signed_terms(expr: Expr, sign: str = "+") -> Iterator[tuple[str, Expr]]:
    """What a sum adds and subtracts."""
    other = "-" if sign == "+" else "+"
    match expr:
        case Apply(ops.ADD | ops.SUB as op, (x, y)):
            yield from signed_terms(x, sign)
            yield from signed_terms(y, sign if op is ops.ADD else other)
        case Apply(ops.NEG, (x,)):
            yield from signed_terms(x, other)
        case _:
            yield sign, expr
