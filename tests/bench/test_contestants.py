"""Peers that need a GPU are held here by stand-ins that compute what their documentation says."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from attncc.bench import contestants, exact
from attncc.bench.cases import Asked
from attncc.bench.contestants import LeftOut, makers
from attncc.bench.problem import Problem
from attncc.bench.table import TITLES
from attncc.frontend import load
from attncc.inputs import Lengths

EXAMPLES = Path(__file__).parents[2] / "examples"
CPU = torch.device("cpu")


def problem(name: str, **lengths: int) -> Problem:
    shape = Lengths(
        **{"batch": 2, "heads": 4, "kv_heads": 2, "q_len": 160, "kv_len": 160} | lengths
    )
    return Asked(load(EXAMPLES / f"{name}.attn"), shape).problem(CPU, torch.float32)


def held(name: str, asked: Problem) -> None:
    contestant = makers()[name](asked)
    assert exact.problems(contestant, exact.parts(asked, gradients=True)) == []


def varlen(q, k, v, cu_q, cu_k, longest_q, longest_k, *, window_size, scale=None, enable_gqa=False):
    """[tokens, heads, D], sequence by sequence."""
    assert cu_q.equal(cu_k) and cu_q.dtype == torch.int32
    assert longest_q == longest_k == cu_q.diff().max()
    sizes = cu_q.diff().tolist()
    parts = []
    for one in zip(*(x.split(sizes) for x in (q, k, v)), strict=True):
        heads_first = (x.transpose(0, 1)[None] for x in one)
        out = windowed(*heads_first, scale=scale, window_size=window_size)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def windowed(q, k, v, *, scale, window_size):
    at = torch.arange(q.shape[2])
    distance = at[:, None] - at[None, :]
    left, right = (10**9 if side in (None, -1) else side for side in window_size)
    mask = (distance <= left) & (-distance <= right)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


def cute() -> ModuleType:
    """flash_attn.cute's two functions."""
    module = ModuleType("flash_attn.cute")

    def window(causal, window_size):
        return (window_size[0], 0) if causal else window_size

    def flash_attn_func(q, k, v, *, softmax_scale, causal, window_size):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        sides = window(causal, window_size)
        out = windowed(*heads_first, scale=softmax_scale, window_size=sides)
        return out.transpose(1, 2), None

    def flash_attn_varlen_func(
        q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, **masks
    ):
        where = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return varlen(q, k, v, *where, scale=softmax_scale, window_size=window(**masks)), None

    module.flash_attn_func = flash_attn_func
    module.flash_attn_varlen_func = flash_attn_varlen_func
    return module


@pytest.fixture
def no_needs(monkeypatch):
    monkeypatch.setattr(contestants, "_needs", lambda *args: None)


def test_everybody_has_a_title():
    assert set(makers(tuned=1.0)) == set(TITLES)


@pytest.mark.parametrize("name", ["packed", "streaming", "s2", "full", "alibi", "softpag"])
def test_attncc_is_held_to_float64(name):
    held("attncc", problem(name))


@pytest.mark.parametrize("name", ["packed", "streaming", "s2", "full"])
def test_sdpa_computes_the_program(name):
    held("sdpa", problem(name))


@pytest.mark.parametrize("name", ["packed", "s2", "softcap"])
def test_flex_computes_the_program(name):
    with torch.compiler.set_stance("force_eager"):
        held("flex", problem(name))


@pytest.mark.parametrize("name", ["full", "causal"])
def test_a_backend_of_sdpa_computes_the_program(name, no_needs):
    held("flash", problem(name))


def test_varlen_computes_packed_documents(no_needs, monkeypatch):
    from torch.nn.attention import varlen as module

    monkeypatch.setattr(module, "varlen_attn", varlen)
    held("varlen", problem("packed"))
    with pytest.raises(LeftOut, match="packed documents alone"):
        makers()["varlen"](problem("causal"))


def test_varlen_repeats_heads_where_it_has_no_groups(no_needs, monkeypatch):
    from torch.nn.attention import varlen as module

    def without_groups(q, k, v, cu_q, cu_k, longest_q, longest_k, *, window_size):
        assert q.shape == k.shape
        return varlen(q, k, v, cu_q, cu_k, longest_q, longest_k, window_size=window_size)

    monkeypatch.setattr(module, "varlen_attn", without_groups)
    held("varlen", problem("packed"))


@pytest.mark.parametrize("name", ["full", "causal", "sliding_window", "packed"])
def test_fa4_computes_the_program(name, no_needs, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute())
    held("fa4", problem(name))


@pytest.mark.parametrize(
    ("who", "name", "why"),
    [
        ("sdpa", "softcap", "has no score modification"),
        ("sdpa", "gated", "has no output clause"),
        ("flex", "gated", "has no output clause"),
        ("cudnn", "causal", "needs a GPU"),
        ("fa4", "causal", "is not here: flash-attn-4 is not installed"),
        ("flex_flash", "causal", "is not here: flash-attn-4 is not installed"),
    ],
)
def test_a_peer_says_what_it_lacks(who, name, why):
    with pytest.raises(LeftOut, match=why):
        makers()[who](problem(name))


def test_a_backend_of_sdpa_has_no_masks(no_needs):
    with pytest.raises(LeftOut, match="no mask but causal"):
        makers()["cudnn"](problem("streaming"))
