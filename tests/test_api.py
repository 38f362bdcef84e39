"""The public API on the CPU: compile, call, plan, source, reference."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import attncc
from attncc import frontend
from attncc.plans import KEPT

WINDOW = "attention w(window: int = 9, slope: float[heads] grad):\n" \
    "    mask = q_idx >= kv_idx and q_idx - kv_idx < window\n" \
    "    score = score + slope[h] * (kv_idx - q_idx)\n"  # fmt: skip
DOCS = "attention d(doc: int[batch, kv_len] sorted, bias: float[heads] grad):\n" \
    "    mask = q_idx >= kv_idx and doc[b, q_idx] == doc[b, kv_idx]\n" \
    "    score = score * bias[h]\n"  # fmt: skip


@pytest.fixture
def window():
    return attncc.compile(WINDOW)


def qkv(length=40, dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, length, 8, generator=rng).to(dtype) for _ in range(3)]


def slopes(**options):
    return torch.linspace(0.1, 0.4, 4, **options)


def test_importing_attncc_imports_no_torch():
    code = "import sys, attncc, attncc.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names():
    assert "compile" in dir(attncc) and issubclass(attncc.BoundsError, attncc.AttnccError)
    assert set(attncc.__all__) <= set(dir(attncc))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = attncc.nothing


def test_compile_takes_a_path_a_text_or_a_program(tmp_path: Path):
    path = tmp_path / "both.attn"
    path.write_text(WINDOW + "\n" + DOCS)
    assert attncc.compile(path, "w").program.name == "w"
    assert attncc.compile(str(path), name="d").program.name == "d"
    assert attncc.compile(frontend.parse(WINDOW)[0]).program.name == "w"
    with pytest.raises(attncc.ArgumentError, match="there are 2 programs: w, d"):
        attncc.compile(path)
    with pytest.raises(attncc.ProgramSyntaxError):
        attncc.compile("attention a()")
    with pytest.raises(attncc.ArgumentError, match="a parameter named 'plan' could not be passed"):
        attncc.compile("attention a(plan: int):\n    mask = q_idx < plan\n")


def test_prints(window):
    assert repr(window) == "<attncc.Attention w>" and str(window).startswith("attention w(")


@pytest.mark.parametrize("backend", [None, "cpu", "dense"])
def test_call(window, backend):
    q, k, v = (x.requires_grad_() for x in qkv())
    slope = slopes(requires_grad=True)
    out, lse = window(q, k, v, slope=slope, return_lse=True, backend=backend)
    expected, expected_lse = window.reference(
        q, k, v, slope=slope, return_lse=True, dtype=torch.float64
    )
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v, slope))
    exact = torch.autograd.grad(expected.square().sum(), (q, k, v, slope))
    for got, wanted in zip(grads, exact, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert isinstance(window(q, k, v, slope=slope), torch.Tensor)


def test_scalars_change_from_call_to_call(window):
    q, k, v = qkv()
    for size in (1, 5, 40):
        found = window(q, k, v, slope=slopes(), window=size)
        torch.testing.assert_close(found, window.reference(q, k, v, slope=slopes(), window=size))


def test_no_grad_and_inference(window):
    q, k, v = (x.requires_grad_() for x in qkv())
    expected = window(q, k, v, slope=slopes()).detach()
    with torch.no_grad():
        out = window(q, k, v, slope=slopes(requires_grad=True))
        assert not out.requires_grad and torch.equal(out, expected)
    with torch.inference_mode():
        assert torch.equal(window(q, k, v, slope=slopes()), expected)


def test_autocast_converts_as_sdpa_does(window):
    q, k, v = qkv()
    expected = window(*(x.bfloat16() for x in (q, k, v)), slope=slopes())
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = window(q.requires_grad_(), k.bfloat16(), v, slope=slopes(), return_lse=True)
        assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
        assert torch.equal(out, expected)
        out.sum().backward()
        assert q.grad.dtype == torch.float32
        double = window(*qkv(dtype=torch.float64), slope=slopes())
        assert double.dtype == torch.float64
        dense = window(q, k, v, slope=slopes(), backend="dense")
        torch.testing.assert_close(dense, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(window, reentrant):
    q, k, v = (x.requires_grad_() for x in qkv())
    expected = torch.autograd.grad(window(q, k, v, slope=slopes()).square().sum(), (q, k, v))

    def layer(q, k, v):
        return window(q, k, v, slope=slopes())

    out = checkpoint(layer, q, k, v, use_reentrant=reentrant)
    out.square().sum().backward()
    for x, grad in zip((q, k, v), expected, strict=True):
        torch.testing.assert_close(x.grad, grad)


def test_torch_compile_breaks_the_graph_once(window):
    q, k, v = qkv()

    def layer(q, k, v):
        return window(2 * q, k, v, slope=slopes()) + 1

    expected = layer(q, k, v)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), expected)
    assert torch._dynamo.explain(layer)(q, k, v).graph_break_count == 1


# -- plans


def test_a_plan_of_lengths_and_of_tensors(window):
    plan = window.plan(q_len=512, kv_len=512, heads=4, window=100, slope=slopes())
    counts = plan.counts
    assert (counts.full, counts.partial, counts.empty) == (0, 28, 36)
    assert plan.tile == (128, 128) and 0 < float(plan.density) < 1
    assert window.plan(*qkv(), slope=slopes(), tile=(16, 16)).counts.total == 2 * 4 * 9
    text = str(plan)
    assert "tier 1" in text and "▒▒··" in text and "28 partial" in text
    assert "q_last" in text
    none = window.plan(q_len=0, kv_len=512, heads=4, slope=slopes())
    assert str(none).endswith("0 queries x 512 keys, 1 x 4 heads, tiles of 128 x 128\nno tiles")


def test_a_plan_is_reused(window):
    q, k, v = qkv()
    plan = window.plan(q, k, v, slope=slopes(), window=5)
    expected = window(q, k, v, slope=slopes(), window=5)
    assert torch.equal(window(q, k, v, plan=plan), expected)
    other = window(q, k, v, plan=plan, slope=2 * slopes())  # the mask does not read it
    assert torch.equal(other, window(q, k, v, slope=2 * slopes(), window=5))


def test_plans_share_their_tiles_while_the_mask_stays():
    docs = attncc.compile(DOCS)
    q, k, v = qkv()
    doc = torch.zeros(2, 40, dtype=torch.int64)
    first = docs.plan(q, k, v, doc=doc, bias=slopes())
    second = docs.plan(q, k, v, doc=doc, bias=slopes())
    assert second.origin is first.origin
    doc[:, 20:] = 1
    third = docs.plan(q, k, v, doc=doc, bias=slopes())
    assert third.origin is not first.origin
    torch.testing.assert_close(
        docs(q, k, v, doc=doc, bias=slopes()), docs.reference(q, k, v, doc=doc, bias=slopes())
    )
    for size in range(2 * KEPT):
        docs.plan(q[:, :, size:], k, v, doc=doc, bias=slopes())
    assert len(docs._compiled.plans.kept) == KEPT


def test_wrong_plans(window):
    q, k, v = qkv()
    plan = window.plan(q, k, v, slope=slopes())
    doc = torch.zeros(2, 40, dtype=torch.int64)
    other = attncc.compile(DOCS).plan(q, k, v, doc=doc, bias=slopes())
    wrong = [
        ({"plan": other}, "plan is of d, expected one of w"),
        ({"plan": window.plan(q_len=39, kv_len=40, batch=2, heads=4, slope=slopes())},
         "plan is for q_len 39, but q, k and v have q_len 40"),
        ({"plan": plan, "window": 3}, "plan was made with another window, which the mask reads"),
    ]  # fmt: skip
    for options, message in wrong:
        with pytest.raises(attncc.ArgumentError, match=message):
            window(q, k, v, **options)
    with pytest.raises(attncc.ArgumentError, match="a plan needs all of q, k and v"):
        window.plan(q, slope=slopes())
    with pytest.raises(attncc.ArgumentError, match="a plan without tensors needs kv_len"):
        window.plan(q_len=4, slope=slopes())


# -- mistakes in calls


def test_backends_are_chosen_and_never_fall_back(window, monkeypatch):
    q, k, v = qkv()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(attncc.UnsupportedError, match="the triton backend got cpu tensors"):
        window(q, k, v, slope=slopes(), backend="triton")
    with pytest.raises(attncc.ArgumentError, match="there is no backend 'tritn'"):
        window(q, k, v, slope=slopes(), backend="tritn")
    meta = [x.to("meta") for x in (q, k, v)]
    with pytest.raises(attncc.UnsupportedError, match="the cpu backend got meta tensors"):
        window(*meta, slope=slopes(device="meta"), backend="cpu")
    with pytest.raises(attncc.UnsupportedError, match="no backend is made for meta tensors"):
        window(*meta, slope=slopes(device="meta"))


def test_lse_needs_a_softmax():
    found = attncc.compile("attention s():\n    mask = q_idx >= kv_idx\n    normalize = sigmoid\n")
    with pytest.raises(attncc.ArgumentError, match="return_lse: s has no lse"):
        found(*qkv(), return_lse=True)
    with pytest.raises(attncc.ArgumentError, match="return_lse"):
        found.reference(*qkv(), return_lse=True)


def test_wrong_arguments_are_told(window):
    q, k, v = qkv()
    with pytest.raises(attncc.ArgumentError, match="did you mean 'window'"):
        window(q, k, v, slope=slopes(), windw=3)
    with pytest.raises(attncc.ArgumentError, match="is missing its parameter 'slope"):
        window(q, k, v)
    with pytest.raises(attncc.ArgumentError, match="q is a list"):
        window([q], k, v, slope=slopes())
    undeclared = attncc.compile("attention u(t: float[heads]):\n    score = score + t[h]\n")
    with torch.no_grad():
        undeclared(q, k, v, t=(leaf := slopes(requires_grad=True)))
    with pytest.raises(attncc.ArgumentError, match="t requires grad, but is not declared"):
        undeclared(q, k, v, t=leaf)
    table = attncc.compile("attention t(t: float[n]):\n    score = score + t[q_idx - kv_idx]\n")
    with pytest.raises(attncc.BoundsError, match="'t' is read at -39"):
        table(q, k, v, t=torch.zeros(40))


def test_source_needs_no_gpu(window):
    text = window.source("sm_90")
    assert "def forward(" in text and window.source("sm_90") == text
    assert "backward" in window.source("sm_80", dtype="fp32", backward=True)


def test_source_of_a_backend(window):
    assert "@triton.jit" in window.source(backend="triton")
    assert "@gluon.jit" in window.source(backend="gluon")
    with pytest.raises(attncc.UnsupportedError, match="captured tensors have gradients"):
        window.source(backend="gluon", backward=True)
    assert window.source(backend="gluon", head_dim=256) != window.source(backend="gluon")
    with pytest.raises(attncc.UnsupportedError, match="v has 20 columns"):
        window.source(backend="gluon", value_dim=20)


def test_source_is_of_the_backend_that_calls_get(window):
    causal = attncc.compile("attention a():\n    mask = q_idx >= kv_idx\n")
    assert "@gluon.jit" in causal.source()
    assert "@gluon.jit" in causal.source(backward=True)
    wide = causal.source(backward=True, head_dim=256)
    assert "def fold_dk" in wide and "@triton.jit" not in wide
    assert "@triton.jit" in window.source(backward=True)
    for others in ({"dtype": "fp32"}, {"target": "sm_100"}, {"value_dim": 20}):
        assert "@triton.jit" in window.source(**others)


def test_the_plans_asked_for_last_are_kept() -> None:
    docs = attncc.compile("attention a():\n    mask = q_idx >= kv_idx\n")
    steady = docs.plan(q_len=64, kv_len=64).origin
    for size in range(2 * KEPT):
        docs.plan(q_len=65 + size, kv_len=64)
        assert docs.plan(q_len=64, kv_len=64).origin is steady
