"""Masks joined by &, | and ~, of programs and of functions alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attncc
from attncc.errors import ArgumentError

N = 24
DOC = torch.tensor([0] * 9 + [1] * 15)
CAUSAL = attncc.compile("attention causal():\n    mask = q_idx >= kv_idx\n")
WINDOW = attncc.compile(
    "attention window(width: int = 5):\n    mask = abs(q_idx - kv_idx) < width\n"
)
NEXT = attncc.compile("attention next(width: int = 5):\n    mask = kv_idx < width\n")
ALIBI = attncc.compile(
    "attention alibi(slope: float[heads]):\n    score = score + slope[h] * (kv_idx - q_idx)\n"
)
GRID = attncc.compile("attention rows():\n    axes (y: 4, x: 6)\n    mask = q.y == kv.y\n")


def documents(doc: Tensor) -> Any:
    return lambda b, h, q, k: doc[q] == doc[k]


def within(size: int) -> Any:
    return lambda b, h, q, k: (q - k).abs() < size


def kept(attn: attncc.Attention, **params: object) -> Tensor:
    """Which of N x N pairs."""
    q = torch.zeros(1, 1, N, 1, dtype=torch.float64)
    v = torch.eye(N, dtype=torch.float64)[None, None]
    return attn(q, q, v, **params)[0, 0] > 0


Q, K = torch.meshgrid(torch.arange(N), torch.arange(N), indexing="ij")


def test_programs_and_functions_join() -> None:
    near, same = attncc.from_mods(mask_mod=within(4)), attncc.from_mods(mask_mod=documents(DOC))
    alike = DOC[Q] == DOC[K]
    assert torch.equal(kept(CAUSAL & same), (Q >= K) & alike)
    assert torch.equal(kept(CAUSAL & near | ~same), ((Q >= K) & ((Q - K).abs() < 4)) | ~alike)
    assert torch.equal(kept(~(CAUSAL | GRID)), ~((Q >= K) | (Q // 6 == K // 6)))
    both = attncc.and_masks(CAUSAL, documents(DOC), within(4))
    assert torch.equal(kept(both), (Q >= K) & alike & ((Q - K).abs() < 4))
    assert torch.equal(kept(attncc.or_masks(documents(DOC), CAUSAL)), alike | (Q >= K))
    assert torch.equal(kept(attncc.and_masks(CAUSAL)), Q >= K)


def test_the_result_is_a_program_of_its_own() -> None:
    for attn in (CAUSAL & WINDOW, ~GRID, WINDOW | attncc.from_mods(mask_mod=documents(DOC))):
        assert attncc.compile(str(attn)).program == attn.program
    assert str(CAUSAL & WINDOW) == (
        "attention causal_and_window(width: int = 5):\n"
        "    mask = q_idx >= kv_idx and abs(q_idx - kv_idx) < width\n"
    )
    assert (CAUSAL & WINDOW).plan(q_len=512, kv_len=512, width=64).counts.empty > 0


def test_parameters_alike_are_shared_and_others_renamed() -> None:
    both = WINDOW | NEXT
    assert [p.name for p in both.program.params] == ["width"]
    assert torch.equal(kept(both, width=3), ((Q - K).abs() < 3) | (K < 3))

    other = attncc.from_mods(mask_mod=within(4)) & attncc.from_mods(mask_mod=within(6))
    assert [p.name for p in other.program.params] == ["size", "size_2"]
    assert torch.equal(kept(other), (Q - K).abs() < 4)
    assert torch.equal(kept(other, size=9), (Q - K).abs() < 6)
    assert torch.equal(kept(other, size=9, size_2=2), (Q - K).abs() < 2)
    one = attncc.from_mods(mask_mod=within(4)) | attncc.from_mods(mask_mod=within(4))
    assert [p.name for p in one.program.params] == ["size"]


def test_tensors_are_shared_by_object_and_their_dims_kept_apart() -> None:
    same = attncc.from_mods(mask_mod=documents(DOC))
    assert len((same | same).program.params) == 1
    odd = torch.arange(2 * N) % 2
    twice = same & attncc.from_mods(mask_mod=documents(odd))
    assert [p.name for p in twice.program.params] == ["doc", "doc_2"]
    assert torch.equal(kept(twice), (DOC[Q] == DOC[K]) & (odd[Q] == odd[K]))
    wide = "attention wide(a: int[n]):\n    mask = a[kv_idx] > 0\n"
    tall = "attention tall(c: int[n], n_2: int = 1):\n    mask = c[q_idx] >= n_2\n"
    joined = attncc.compile(wide) | attncc.compile(tall)
    found = kept(joined, a=torch.ones(N, dtype=torch.int64), c=odd)
    assert found.all()


def test_what_is_captured_is_read_when_called() -> None:
    doc = DOC.clone()
    attn = ~attncc.from_mods(mask_mod=documents(doc)) | CAUSAL
    doc.fill_(1)
    assert torch.equal(kept(attn), Q >= K)


def test_and_keeps_the_score_of_one_side() -> None:
    q, k, v = torch.randn(3, 1, 2, N, 8)
    slope = torch.tensor([0.5, 0.25])
    expected = attncc.compile(
        "attention both(slope: float[heads]):\n"
        "    mask = q_idx >= kv_idx\n"
        "    score = score + slope[h] * (kv_idx - q_idx)\n"
    )(q, k, v, slope=slope)
    for attn in (
        ALIBI & CAUSAL,
        CAUSAL & ALIBI,
        attncc.and_masks(ALIBI, lambda b, h, q, k: q >= k),
    ):
        torch.testing.assert_close(attn(q, k, v, slope=slope), expected)
    sigmoid = attncc.compile("attention s():\n    mask = true\n    normalize = sigmoid\n")
    torch.testing.assert_close((CAUSAL & sigmoid)(q, k, v), (sigmoid & CAUSAL)(q, k, v))
    assert "normalize = sigmoid" in str(CAUSAL & sigmoid)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: ALIBI & ALIBI, "both alibi and alibi have more than a mask"),
        (lambda: ALIBI | CAUSAL, "alibi has more than a mask, which | would lose"),
        (lambda: CAUSAL | ALIBI, "alibi has more than a mask, which | would lose"),
        (lambda: ~ALIBI, "alibi has more than a mask, which ~ would lose"),
        (lambda: attncc.and_masks(), "there is no mask to join"),
    ],
)
def test_scores_that_would_be_lost_are_errors(wrong: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message.replace("|", r"\|")):
        wrong()


def test_other_operands_are_python_errors() -> None:
    with pytest.raises(TypeError):
        CAUSAL & 3  # type: ignore[operator]
