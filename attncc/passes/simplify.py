"""Simplify the mask and the score by exact rewrite rules, one small function each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from attncc.ir import ops
from attncc.ir.expr import FALSE, TRUE, Apply, Const, Expr, apply, kind
from attncc.ir.ops import Kind, Op
from attncc.ir.plan import Plan
from attncc.ir.rewrite import Rewriter, Rule, Rules
from attncc.passes.facts import FACTS
from attncc.passes.fold_constants import TABLE, fold
from attncc.passes.linear import Linear, difference, linear, weight


def simplify(plan: Plan) -> Plan:
    """Smaller expressions with the same value at every valid position."""
    rewriter = Rewriter(RULES)
    return replace(plan, mask=rewriter(plan.mask), score=rewriter(plan.score))


FLIPPED = {ops.LT: ops.GT, ops.LE: ops.GE, ops.GT: ops.LT, ops.GE: ops.LE}
FLIPPED |= {ops.EQ: ops.EQ, ops.NE: ops.NE}
NEGATED = {ops.LT: ops.GE, ops.LE: ops.GT, ops.GT: ops.LE, ops.GE: ops.LT}
NEGATED |= {ops.EQ: ops.NE, ops.NE: ops.EQ}


def _same_kind(node: Apply, result: Expr) -> Expr | None:
    """The result where no promotion to float is lost."""
    return result if kind(result) is node.kind else None


# -- logic


def and_of_constant(node: Apply) -> Expr | None:
    """true and x => x; x and true => x; false and x, x and false => false."""
    x, y = node.args
    if x == TRUE or y == FALSE:
        return y
    return x if y == TRUE or x == FALSE else None


def or_of_constant(node: Apply) -> Expr | None:
    """false or x => x; x or false => x; true or x, x or true => true."""
    x, y = node.args
    if x == FALSE or y == TRUE:
        return y
    return x if y == FALSE or x == TRUE else None


def flatten(op: Op, expr: Expr) -> Iterator[Expr]:
    """The operands of a chain of one associative operator, in order."""
    stack = [expr]
    while stack:
        node = stack.pop()
        if isinstance(node, Apply) and node.op is op:
            stack.extend(reversed(node.args))
        else:
            yield node


def repeated(node: Apply) -> Expr | None:
    """x and x => x; (x and y) and x => x and y; the same for or."""
    x, y = node.args
    return x if y in set(flatten(node.op, x)) else None


def absorbed(node: Apply) -> Expr | None:
    """x and (x or y) => x; x or (x and y) => x."""
    x, y = node.args
    inner = ops.OR if node.op is ops.AND else ops.AND
    return x if isinstance(y, Apply) and y.op is inner and x in set(flatten(inner, y)) else None


def double_negation(node: Apply) -> Expr | None:
    """not not x => x; - -x => x; ~~x => x."""
    (x,) = node.args
    return x.args[0] if isinstance(x, Apply) and x.op is node.op else None


def not_of_comparison(node: Apply) -> Expr | None:
    """not x < y => x >= y, over ints and bools (a float may be nan)."""
    (x,) = node.args
    if not isinstance(x, Apply) or x.op not in NEGATED:
        return None
    if any(kind(arg) is Kind.FLOAT for arg in x.args):
        return None
    return Apply(NEGATED[x.op], x.args, x.span)


def where_decided(node: Apply) -> Expr | None:
    """where(true, x, y) => x; where(false, x, y) => y; where(c, x, x) => x."""
    c, x, y = node.args
    if c == TRUE or x == y:
        return _same_kind(node, x)
    return _same_kind(node, y) if c == FALSE else None


def where_of_bools(node: Apply) -> Expr | None:
    """where(c, true, y) => c or y; where(c, x, false) => c and x; and their mirror images."""
    c, x, y = node.args
    if x == TRUE:
        return apply(ops.OR, c, y)
    if y == FALSE:
        return apply(ops.AND, c, x)
    if x == FALSE:
        return apply(ops.AND, apply(ops.NOT, c), y)
    if y == TRUE:
        return apply(ops.OR, apply(ops.NOT, c), x)
    return None


def where_again(node: Apply) -> Expr | None:
    """where(a, x, where(b, x, y)) => where(a or b, x, y)."""
    match node.args:
        case (a, x, Apply(ops.WHERE, (b, other, y))) if x == other:
            return apply(ops.WHERE, apply(ops.OR, a, b), x, y)
    return None


def bool_equality(node: Apply) -> Expr | None:
    """x == true => x; x == false => not x; != the other way round."""
    for x, y in (node.args, node.args[::-1]):
        if y in (TRUE, FALSE):
            return x if (y == TRUE) == (node.op is ops.EQ) else apply(ops.NOT, x)
    return None


# -- comparisons


def constant_on_the_right(node: Apply) -> Expr | None:
    """0 <= x => x >= 0."""
    x, y = node.args
    if isinstance(x, Const) and not isinstance(y, Const):
        return Apply(FLIPPED[node.op], (y, x), node.span)
    return None


def decided_comparison(node: Apply) -> Expr | None:
    """x < x + 1 => true; kv_idx < kv_len => true; over ints, from what positions are."""
    x, y = node.args
    match node.op:
        case ops.LT:
            return _decide(difference(y, x), 1)
        case ops.LE:
            return _decide(difference(y, x), 0)
        case ops.GT:
            return _decide(difference(x, y), 1)
        case ops.GE:
            return _decide(difference(x, y), 0)
        case _:
            return _decide_equality(node)


def _decide(form: Linear | None, at_least: int) -> Expr | None:
    if form is None:
        return None
    short = form.plus(Linear(const=at_least), -1)
    if FACTS.holds(short):
        return TRUE
    return FALSE if FACTS.holds(short.scaled(-1).plus(Linear(const=1), -1)) else None


def _decide_equality(node: Apply) -> Expr | None:
    form = difference(*node.args)
    if form is None:
        return None
    if not form.terms:
        return Const((form.const == 0) == (node.op is ops.EQ))
    common = math.gcd(*form.terms.values())
    apart = form.const % common != 0 or any(
        FACTS.holds(side.plus(Linear(const=1), -1)) for side in (form, form.scaled(-1))
    )
    return Const(node.op is ops.NE) if apart else None


STRICT = {ops.LE: (ops.LT, 1), ops.LT: (ops.LE, -1), ops.GE: (ops.GT, -1), ops.GT: (ops.GE, 1)}
"""x <= y is x < y + 1: the other operator, and what to add to x - y's constant, negated."""


def shorter_comparison(node: Apply) -> Expr | None:
    """q_idx + 4 >= q_idx - x => x >= -4; x < y + 1 => x <= y; over ints, where it gets shorter."""
    form = difference(*node.args)
    if form is None:
        return None
    best: Expr | None = None
    least = sum(map(weight, node.args))
    other, by = STRICT.get(node.op, (node.op, 0))
    for op, candidate in ((node.op, form), (other, form.plus(Linear(const=by), -1))):
        left, right = (side.expr() for side in _balanced(candidate))
        if weight(left) + weight(right) < least:
            least = weight(left) + weight(right)
            best = Apply(op, (left, right), node.span)
    return best


def _balanced(form: Linear) -> tuple[Linear, Linear]:
    """(left, right) for left OP right, the constant on the right."""
    common = math.gcd(*form.terms.values(), form.const)
    left, right = Linear(form.terms).split()
    right = right.plus(Linear(const=form.const), -1)
    if not left.terms:
        left, right = Linear(const=form.const), Linear(right.terms)
    if common <= 1:
        return left, right
    return _divided(left, common), _divided(right, common)


def _divided(form: Linear, by: int) -> Linear:
    return Linear({atom: f // by for atom, f in form.terms.items()}, form.const // by)


# -- arithmetic


def shorter_sum(node: Apply) -> Expr | None:
    """(q_idx + x) - q_idx => x; (x + 1) + 2 => x + 3; over ints, where it gets shorter."""
    if node.kind is not Kind.INT:
        return None
    result = linear(node).expr()
    return result if weight(result) < weight(node) else None


def neutral_element(node: Apply) -> Expr | None:
    """x * 1, 1 * x, x / 1, x - 0 => x, for floats too; x // 1 => x, for ints."""
    x, y = node.args
    if node.op is ops.FLOORDIV and node.kind is not Kind.INT:
        return None
    if node.op is ops.MUL and x in (Const(1), Const(1.0)):
        x, y = y, x
    neutral = 0 if node.op is ops.SUB else 1
    return _same_kind(node, x) if y in (Const(neutral), Const(float(neutral))) else None


def times_zero(node: Apply) -> Expr | None:
    """x * 0 => 0, over ints (a float may be inf or nan)."""
    zero = node.kind is Kind.INT and Const(0) in node.args
    return Const(0) if zero else None


def floor_from_remainder(node: Apply) -> Expr | None:
    """x - x % c => x // c * c; so that x occurs once."""
    match node:
        case Apply(_, (x, Apply(ops.MOD, (y, c)))) if x == y and node.kind is Kind.INT:
            return apply(ops.MUL, apply(ops.FLOORDIV, x, c), c)
    return None


def divided_twice(node: Apply) -> Expr | None:
    """x // a // b => x // (a * b), for constants a, b > 0."""
    match node:
        case Apply(_, (Apply(ops.FLOORDIV, (x, Const(a))), Const(b))) if _ints(node, a, b):
            return apply(ops.FLOORDIV, x, Const(int(a * b))) if a > 0 and b > 0 else None
    return None


def divided_exactly(node: Apply) -> Expr | None:
    """(x * c + y) // c => x + y // c; (x * c + y) % c => y % c; for a constant c > 0."""
    x, c = node.args
    if node.kind is not Kind.INT or not isinstance(c, Const) or c.value <= 0:
        return None
    by = int(c.value)
    form = linear(x)
    toward_zero = abs(form.const) // by * by * (1 if form.const > 0 else -1)
    whole = Linear({a: f for a, f in form.terms.items() if f % by == 0}, toward_zero)
    if not whole.terms and whole.const == 0:
        return None
    rest = form.plus(whole, -1)
    short = apply(node.op, rest.expr(), c)
    return short if node.op is ops.MOD else apply(ops.ADD, _divided(whole, by).expr(), short)


def divided_by_addend(node: Apply) -> Expr | None:
    """(x + n * d) // d => x // d + n; (x + n * d) % d => x % d; for any int d."""
    x, d = node.args
    if node.kind is not Kind.INT or isinstance(d, Const):
        return None
    form = linear(x)
    times = form.terms.get(d, 0)
    if times == 0:
        return None
    short = apply(node.op, form.without(d).expr(), d)
    return short if node.op is ops.MOD else apply(ops.ADD, short, Const(times))


def small_dividend(node: Apply) -> Expr | None:
    """x // d => 0 and x % d => x, where 0 <= x < d."""
    x, d = node.args
    if node.kind is not Kind.INT or not FACTS.nonnegative(x):
        return None
    if not FACTS.holds(linear(d).plus(linear(x), -1).plus(Linear(const=1), -1)):
        return None
    return x if node.op is ops.MOD else Const(0)


def remainder_twice(node: Apply) -> Expr | None:
    """x % d % d => x % d; over ints."""
    x, d = node.args
    again = isinstance(x, Apply) and x.op is ops.MOD and x.args[1] == d
    return x if again and node.kind is Kind.INT else None


def _ints(node: Apply, *values: float) -> bool:
    return node.kind is Kind.INT and all(isinstance(value, int) for value in values)


def redundant_limit(node: Apply) -> Expr | None:
    """max(0, q_idx) => q_idx; min(x, x) => x; min(q_lo, q_last) => q_lo."""
    x, y = node.args
    if x == y:
        return x
    small, large = (x, y) if node.op is ops.MIN else (y, x)
    if FACTS.at_most(small, large):
        return _same_kind(node, x)
    return _same_kind(node, y) if FACTS.at_most(large, small) else None


LONGEST = 12
"""Operands of a chain that are compared each with each."""


def nested_limit(node: Apply) -> Expr | None:
    """min(min(x, 3), 5) => min(x, 3); any operand of the chain that another one makes needless."""
    parts = list(flatten(node.op, node))
    if not 3 <= len(parts) <= LONGEST or node.kind is not Kind.INT:
        return None
    for i, one in enumerate(parts):
        for j, two in enumerate(parts):
            small, large = (one, two) if node.op is ops.MIN else (two, one)
            if i != j and (FACTS.at_most(small, large) or one == two):
                return chain(node.op, [p for k, p in enumerate(parts) if k != j])
    return None


def chain(op: Op, parts: list[Expr]) -> Expr:
    """The parts under one associative binary operator."""
    result = parts[0]
    for part in parts[1:]:
        result = apply(op, result, part)
    return result


def abs_of_nonnegative(node: Apply) -> Expr | None:
    """abs(x) => x where x >= 0; abs(-x) => abs(x)."""
    (x,) = node.args
    if isinstance(x, Apply) and x.op is ops.NEG:
        return apply(ops.ABS, x.args[0])
    return x if FACTS.nonnegative(x) else None


def conversion_to_itself(node: Apply) -> Expr | None:
    """int(x) and floor(x) of an int, float(x) of a float => x."""
    return _same_kind(node, node.args[0])


_LOGIC: tuple[Rule, ...] = (repeated, absorbed)
_ORDER: tuple[Rule, ...] = (constant_on_the_right, decided_comparison, shorter_comparison)
_EQUALITY: tuple[Rule, ...] = (bool_equality, *_ORDER)
_LIMIT: tuple[Rule, ...] = (redundant_limit, nested_limit)

_RULES: dict[Op, tuple[Rule, ...]] = {
    ops.AND: (and_of_constant, *_LOGIC),
    ops.OR: (or_of_constant, *_LOGIC),
    ops.NOT: (double_negation, not_of_comparison),
    ops.WHERE: (where_decided, where_of_bools, where_again),
    ops.LT: _ORDER,
    ops.LE: _ORDER,
    ops.GT: _ORDER,
    ops.GE: _ORDER,
    ops.EQ: _EQUALITY,
    ops.NE: _EQUALITY,
    ops.ADD: (shorter_sum,),
    ops.SUB: (neutral_element, floor_from_remainder, shorter_sum),
    ops.NEG: (double_negation, shorter_sum),
    ops.MUL: (neutral_element, times_zero, shorter_sum),
    ops.DIV: (neutral_element,),
    ops.FLOORDIV: (
        neutral_element,
        divided_twice,
        divided_exactly,
        divided_by_addend,
        small_dividend,
    ),
    ops.MOD: (remainder_twice, divided_exactly, divided_by_addend, small_dividend),
    ops.MIN: _LIMIT,
    ops.MAX: _LIMIT,
    ops.ABS: (abs_of_nonnegative,),
    ops.INVERT: (double_negation,),
    ops.INT: (conversion_to_itself,),
    ops.FLOOR: (conversion_to_itself,),
    ops.FLOAT: (conversion_to_itself,),
}

RULES: Rules = {op: (fold, *_RULES.get(op, ())) for op in TABLE}
