"""Published systems of examples/ that are a few calls or an output clause, against plain numpy."""

from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
import torch
from torch import Tensor

import attncc

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
B, H, HKV, D, DV = 2, 4, 2, 8, 6
INF = np.inf

Array = np.ndarray


def example(name: str):
    return run_path(str(EXAMPLES / f"{name}.py"))


def inputs(q_len: int, kv_len: int, seed: int = 0) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = (B, H, q_len, D), (B, HKV, kv_len, D), (B, HKV, kv_len, DV)
    return [torch.randn(s, generator=rng, dtype=torch.float64).requires_grad_() for s in shapes]


def arrays(b: int, h: int, *tensors: Tensor) -> list[Array]:
    """q, k and v of one query head."""
    q, k, v = (x.detach().numpy() for x in tensors)
    return [q[b, h], k[b, h * HKV // H], v[b, h * HKV // H]]


def attend(q: Array, k: Array, v: Array, bias: Array | float = 0.0) -> tuple[Array, float]:
    """One query [D] over all keys: out [DV] and lse; of no keys, 0 and -inf."""
    if not len(k):
        return np.zeros(v.shape[1]), -INF
    scores = k @ q / np.sqrt(D) + bias
    lse = np.logaddexp.reduce(scores)
    return np.exp(scores - lse) @ v, lse


def check(found: tuple[Tensor, Tensor], rows) -> None:
    """rows(b, h) gives each query's (out, lse)."""
    out, lse = (x.detach().numpy() for x in found)
    for b in range(B):
        for h in range(H):
            for i, (row, total) in enumerate(rows(b, h)):
                np.testing.assert_allclose(out[b, h, i], row, atol=1e-12)
                np.testing.assert_allclose(lse[b, h, i], total, atol=1e-12)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_short_and_names_its_paper_and_convention(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 25
    comment = run_path(str(path))["__doc__"]
    assert "arXiv" in comment and "Shows" in comment and "Convention" in comment


# -- LongNet


def longnet(branches: tuple[tuple[int, int], ...], tensors: list[Tensor]):
    """Each branch gathers its tokens segment by segment; weights are the branches' own sums."""

    def rows(b: int, h: int):
        q, k, v = arrays(b, h, *tensors)
        found = [[] for _ in q]
        for width, rate in branches:
            for start in range(0, len(q), width):
                tokens = range(start, min(start + width, len(q)))
                own = [i for i in tokens if i % rate == h % rate]
                for at, i in enumerate(own):
                    found[i].append(attend(q[i], k[own[: at + 1]], v[own[: at + 1]]))
        for parts in found:
            if not parts:
                yield np.zeros(DV), -INF
                continue
            lses = np.array([lse for _, lse in parts])
            total = np.logaddexp.reduce(lses)
            yield np.exp(lses - total) @ np.stack([out for out, _ in parts]), total

    return rows


@pytest.mark.parametrize("branches", [((4, 1), (8, 2), (16, 4), (32, 8)), ((6, 2), (12, 3))])
def test_longnet(branches: tuple[tuple[int, int], ...]) -> None:
    """Segments end where the sequence does; the second has rows in no branch."""
    tensors = inputs(37, 37)
    found = example("longnet")["longnet"](*tensors, branches)
    check(found, longnet(branches, tensors))
    assert bool((found[1] == -INF).any()) == (len(branches) == 2)


def test_longnet_in_one_pass_is_its_branches() -> None:
    tensors = inputs(37, 37)
    branches = ((4, 1), (8, 2), (16, 4), (32, 8))
    once = attncc.compile(EXAMPLES / "longnet.attn")
    found = once(*tensors, segment=4, return_lse=True)
    merged = example("longnet")["longnet"](*tensors, branches)
    torch.testing.assert_close(found, merged)
    gradients = (
        torch.autograd.grad(out.sin().sum() + lse.sum(), tensors) for out, lse in (found, merged)
    )
    torch.testing.assert_close(*gradients)


# -- StreamingLLM


@pytest.mark.parametrize(("window", "sinks"), [(5, 3), (1, 1), (64, 4), (7, 0)])
def test_streaming_in_branches(window: int, sinks: int) -> None:
    """Early rows have no keys in the branch of sinks; without sinks, none has."""
    tensors = inputs(23, 23)

    def rows(b: int, h: int):
        q, k, v = arrays(b, h, *tensors)
        for i in range(len(q)):
            kept = [j for j in range(i + 1) if i - j < window or j < sinks]
            yield attend(q[i], k[kept], v[kept])

    found = example("streaming_branches")["streaming"](*tensors, window=window, sinks=sinks)
    check(found, rows)
    once = attncc.compile(EXAMPLES / "streaming.attn")
    expected = once(*tensors, window=window, sinks=sinks, return_lse=True)
    torch.testing.assert_close(found, expected)


# -- RazorAttention

RETRIEVAL = torch.tensor([True, False, False, True])


@pytest.mark.parametrize(("recent", "sinks"), [(6, 4), (1, 0), (26, 4), (30, 4)])
def test_razor(recent: int, sinks: int) -> None:
    """30 tokens of prompt and 5 after it; in the last two nothing is dropped."""
    tensors = inputs(5, 35)
    dropped = range(sinks, 30 - recent)

    def rows(b: int, h: int):
        q, k, v = arrays(b, h, *tensors)
        for i in range(len(q)):
            seen = np.arange(30 + i + 1)
            if RETRIEVAL[h] or not dropped:
                yield attend(q[i], k[seen], v[seen])
                continue
            kept = np.setdiff1d(seen, dropped)
            keys, values = (np.vstack([x[kept], x[dropped].mean(0)]) for x in (k, v))
            yield attend(q[i], keys, values, np.append(np.zeros(len(kept)), np.log(len(dropped))))

    run = example("razor_attention")
    found = run["razor"](*tensors, RETRIEVAL, recent, sinks)
    expected = [[list(rows(b, h)) for h in range(H)] for b in range(B)]
    out = np.array([[[out for out, _ in head] for head in row] for row in expected])
    np.testing.assert_allclose(found.detach().numpy(), out, atol=1e-12)


def test_a_column_stands_for_equal_keys_exactly() -> None:
    """The log-weight counts what was dropped: of equal keys nothing is lost."""
    q, k, v = (x.detach() for x in inputs(5, 35))
    k[:, :, 4:24], v[:, :, 4:24] = k[:, :, 4:5], v[:, :, 4:5]
    razor = example("razor_attention")["razor"]
    dense = razor(q, k, v, torch.ones(H, dtype=torch.bool), recent=6)
    cut = razor(q, k, v, torch.zeros(H, dtype=torch.bool), recent=6)
    torch.testing.assert_close(cut, dense)


# -- Delta Attention


@pytest.mark.parametrize(("n", "gamma"), [(150, 8), (300, 64), (45, 16), (150, 1)])
def test_delta(n: int, gamma: int) -> None:
    """150: the last 134 rows are dense; 45 are fewer than the tail; a gamma of 1 is dense."""
    tensors = inputs(n, n)
    window, sinks = 5, 2
    found = example("delta_attention")["delta"](*tensors, gamma, window, sinks)
    tail = n - (n % gamma + max(128, gamma))
    for b, h in ((0, 1), (1, 2)):
        q, k, v = arrays(b, h, *tensors)

        def row(i: int, sparse: bool, q=q, k=k, v=v) -> Array:
            kept = [j for j in range(i + 1) if not sparse or i - j < window or j < sinks]
            return attend(q[i], k[kept], v[kept])[0]

        for i in range(n):
            first = i // gamma * gamma
            corrected = row(i, True) + row(first, False) - row(first, True)
            expected = row(i, False) if i >= tail else corrected
            np.testing.assert_allclose(found[b, h, i].detach().numpy(), expected, atol=1e-12)
    assert torch.autograd.grad(found.sum(), tensors)[0].isfinite().all()


# -- output clauses


def test_gated_and_softpag() -> None:
    tensors = inputs(13, 13)
    logit, amount = torch.randn(B, H, 13, dtype=torch.float64), torch.tensor([0.0, 0.3, 1.0, 0.5])
    gated = attncc.compile(EXAMPLES / "gated.attn")(*tensors, logit=logit).detach().numpy()
    mixed = attncc.compile(EXAMPLES / "softpag.attn")(*tensors, amount=amount).detach().numpy()
    for b in range(B):
        for h in range(H):
            q, k, v = arrays(b, h, *tensors)
            a = amount.numpy()[h].astype(np.float64)
            for i in range(13):
                gate = 1 / (1 + np.exp(-logit[b, h, i].item()))
                causal = gate * attend(q[i], k[: i + 1], v[: i + 1])[0]
                np.testing.assert_allclose(gated[b, h, i], causal, atol=1e-12)
                towards = (1 - a) * attend(q[i], k, v)[0] + a * v[i]
                np.testing.assert_allclose(mixed[b, h, i], towards, atol=1e-7)
