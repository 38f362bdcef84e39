"""Axes of queries and keys that differ: attention between two grids."""

import pytest
import torch

import attncc
from attncc.errors import ArgumentError

CROSS = """
attention cross(reach: int = 1):
    q_axes (y: 4, x: 6)
    kv_axes (t: 2, y: 2, x: 3)
    mask = abs(q.y // 2 - kv.y) <= reach and q.x // 2 == kv.x and kv.t * 2 <= q.y
"""


def test_each_side_has_its_own_coordinates() -> None:
    attn = attncc.compile(CROSS)
    q, k, v = (torch.randn(1, 1, n, 8, dtype=torch.float64) for n in (24, 12, 12))
    keep = torch.zeros(24, 12, dtype=torch.bool)
    for i in range(24):
        for j in range(12):
            (y, x), (t, b, a) = divmod(i, 6), (j // 6, j // 3 % 2, j % 3)
            keep[i, j] = abs(y // 2 - b) <= 0 and x // 2 == a and t * 2 <= y
    score = (q @ k.mT / 8**0.5).masked_fill(~keep, -torch.inf)
    wanted = torch.nan_to_num(score.softmax(-1)) @ v
    torch.testing.assert_close(attn(q, k, v, reach=0), wanted)
    plan = attn.plan(q_len=24, kv_len=12, reach=0, tile=(6, 3))
    assert plan.counts == plan.exact_counts()


@pytest.mark.parametrize(
    "lines",
    [
        "    q_axes (y: 4, x: 6)\n    mask = q.x < kv_idx",
        "    kv_axes (y: 4, x: 6)\n    mask = kv.y < q_idx",
    ],
)
def test_one_side_may_have_axes_alone(lines: str) -> None:
    attn = attncc.compile(f"attention a():\n{lines}\n")
    assert attncc.compile(str(attn)).program == attn.program
    assert lines.split("\n")[0] in str(attn)


def test_programs_with_both_come_back() -> None:
    attn = attncc.compile(CROSS)
    assert "q_axes (y: 4, x: 6)" in str(attn) and "kv_axes (t: 2, y: 2, x: 3)" in str(attn)
    assert "kv.t * 2 <= q.y" in str(attn)
    assert attncc.compile(str(attn)).program == attn.program
    with pytest.raises(ArgumentError, match="axes of their own"):
        attn(*(torch.randn(1, 1, n, 8) for n in (24, 12, 12)), order=(2, 2))
