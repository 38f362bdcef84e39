from pathlib import Path

import pytest
import torch

from attncc import peers
from attncc.frontend import load
from attncc.inputs import Lengths, captured, qkv

EXAMPLES = Path(__file__).parent.parent / "examples"
CPU = torch.device("cpu")


def problem(name: str, **lengths: int) -> peers.Problem:
    program = load(EXAMPLES / f"{name}.attn")
    sizes = Lengths(q_len=128, kv_len=128, **lengths)
    return peers.Problem(program, sizes, captured(program, sizes, {}).tensors, CPU)


@pytest.mark.parametrize("name", ["packed", "streaming", "s2", "full"])
def test_sdpa_computes_the_program(name):
    import attncc

    asked = problem(name, batch=2, heads=4, kv_heads=2)
    inputs = qkv(asked.lengths, torch.float32, CPU)
    call = peers.sdpa(asked)
    assert not isinstance(call, str)
    expected = attncc.compile(asked.program).reference(*inputs, **asked.arguments)
    torch.testing.assert_close(call(*inputs), expected, atol=1e-5, rtol=1e-5)


def test_sdpa_says_what_it_lacks():
    assert peers.sdpa(problem("softcap")) == "it has no score modification"


def test_a_time_is_a_median_in_milliseconds():
    assert 0 < peers.milliseconds(lambda: sum(range(100)), CPU) < 10
