from attncc.ir import ops
from attncc.ir.expr import KV_IDX, Q_IDX, Apply, Const, apply, walk
from attncc.ir.rewrite import Rewriter, postorder


def plus_zero(node: Apply):
    """x + 0 => x."""
    return node.args[0] if node.args[1] == Const(0) else None


REWRITE_SUMS = {ops.ADD: (plus_zero,)}


def test_children_come_first_and_once() -> None:
    shared = apply(ops.ADD, Q_IDX, KV_IDX)
    both = apply(ops.MUL, shared, shared)
    order = list(postorder(both))
    assert order == [Q_IDX, KV_IDX, shared, both]


def test_rules_apply_everywhere_until_none_does() -> None:
    nested = Q_IDX
    for _ in range(500):  # deeper than Python would recurse
        nested = apply(ops.ADD, nested, Const(0))
    assert Rewriter(REWRITE_SUMS)(nested) is Q_IDX


def test_no_change_is_the_same_object() -> None:
    expr = apply(ops.ADD, Q_IDX, KV_IDX)
    assert Rewriter(REWRITE_SUMS)(expr) is expr


def test_equal_results_are_one_object() -> None:
    left, right = (apply(ops.SUB, Q_IDX, KV_IDX) for _ in range(2))
    rewriter = Rewriter({})
    assert left is not right
    assert rewriter(left) is rewriter(right)


def test_a_shared_graph_is_rewritten_once() -> None:
    expr = apply(ops.ADD, Q_IDX, Const(0))
    for _ in range(60):  # 2 ** 60 nodes, written out
        expr = apply(ops.SUB, expr, expr)
    assert len(list(walk(Rewriter(REWRITE_SUMS)(expr)))) == 61
