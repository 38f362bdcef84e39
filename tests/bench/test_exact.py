"""float64's slices against the dense interpreter, which is the definition."""

import pytest
import torch

import attncc
from attncc.bench import exact
from attncc.bench.cases import Asked
from attncc.bench.contestants import Contestant
from attncc.frontend import load
from attncc.inputs import Lengths

CPU = torch.device("cpu")
PROGRAMS = {
    "sink": "mask = q_idx > kv_idx\n    sink = s[h]",
    "sigmoid": "mask = q_idx >= kv_idx\n    score = score - 1.0\n    normalize = sigmoid",
    "none": "mask = (q_idx + b) % 3 != 0\n    normalize = none",
    "empty rows": "mask = q_idx - kv_idx > 20 * h\n    score = score + s[h] * kv_idx",
    "output": "mask = q_idx > kv_idx\n    output = s[h] * out + sigmoid(lse) * mean_value",
    "scale": "mask = true\n    scale = 0.5",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_slices_are_those_of_the_interpreter(name, monkeypatch):
    monkeypatch.setattr(exact, "CHUNK", 50)
    text = f"attention x(s: float[heads]):\n    {PROGRAMS[name]}\n"
    problem = Asked(load(text), Lengths(2, 4, 2, 90, 70, 16)).problem(CPU, torch.float32)
    q, k, v = (x.double().requires_grad_() for x in problem.inputs)
    out = attncc.compile(text).reference(q, k, v, dtype=torch.float64, **problem.arguments)
    gradients = torch.autograd.grad(out, (q, k, v), problem.dout.double())
    whole = dict(zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True))
    parts = exact.parts(problem, gradients=True)
    assert [part.name for part in parts] == ["out", "dq", "out", "dq", "dk", "dv"]
    for part in parts:
        expected = whole[part.name][part.batch, part.heads][:, part.rows]
        torch.testing.assert_close(part.value, expected, rtol=1e-5, atol=1e-6)


def test_each_wrong_result_is_named():
    text = "attention x():\n    mask = q_idx >= kv_idx\n"
    problem = Asked(load(text), Lengths(1, 2, 2, 40, 40, 8)).problem(CPU, torch.float32)
    attention = attncc.compile(text)
    leaves = tuple(x.detach().requires_grad_() for x in problem.inputs)
    truth = exact.parts(problem, gradients=True)

    def wrong(call) -> list[str]:
        return [line.split()[0] for line in exact.problems(Contestant(call, *made), truth)]

    made = (leaves, problem.dout)
    assert wrong(lambda q, k, v: attention(q, k, v)) == []
    off = wrong(lambda q, k, v: attention(q, k, v) + 0.1 * q.detach())
    assert off == ["out[0,", "out[0,"], "gradients are right"
    assert "dv[0," in wrong(lambda q, k, v: attention(q, k, v) + 0.01 * (v - v.detach()).sum())
    assert "out" in wrong(lambda q, k, v: attention(q, k, v) / 0)
