"""Generated kernels of programs that Python functions become, against the dense interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attncc
from attncc.binding import bind
from tests.interpreted.harness import check, inputs

B, H, N = 2, 2, 40
REACH = torch.tensor(7)
DOC = torch.tensor([[0] * 13 + [1] * 27, [0] * 30 + [4] * 10])
BIAS = torch.randn(H, 2 * N, requires_grad=True)
GAIN = torch.tensor(0.7, requires_grad=True)


def near(step: int, on: bool) -> Any:
    return lambda b, h, q, k: on & ((q - k).abs() <= REACH * step) | (q == k)


MODS = {
    "scalar tensor": (None, near(2, True)),
    "documents": (
        lambda s, b, h, q, k: s * GAIN + BIAS[h][q - k + N],
        lambda b, h, q, k: (DOC[b, q] == DOC[b][k]) & (q >= k),
    ),
    "view": (lambda s, b, h, q, k: s + BIAS.T[k, h] * BIAS[-1, q], None),
    "bits": (
        lambda s, b, h, q, k: s + ((k + 1) << (q % 5)) * 0.01 + torch.round(q / 2) * 0.1,
        lambda b, h, q, k: torch.fmod(q - k, 5) <= torch.where(h > 0, 1, 2),
    ),
    "dropped by score": (
        lambda s, b, h, q, k: torch.where(s > 0.1, s, -float("inf")),
        lambda b, h, q, k: q >= k,
    ),
    "dropped by position": (
        lambda s, b, h, q, k: s + torch.where(q - k < 9, 0.0, -float("inf")),
        lambda b, h, q, k: q >= k,
    ),
}


@pytest.mark.parametrize("name", MODS)
def test_functions_equal_dense(name: str) -> None:
    attn = attncc.from_mods(*MODS[name])
    q, k, v = torch.randn(3, B, H, N, 16)
    binding = bind(attn.program, q, k, v, attn._captured())
    check(attn.program, binding, inputs(binding, value_dim=24))
