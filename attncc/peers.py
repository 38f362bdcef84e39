"""The same attention by torch's own means, to be timed beside: SDPA and FlexAttention."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attncc.inputs import Lengths
from attncc.ir.evaluate import Env, evaluate_unchecked
from attncc.ir.expr import Expr, Score
from attncc.ir.program import Normalize, Program

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
Inputs = tuple[Tensor, Tensor, Tensor]

MOST_PAIRS = 1 << 32
"""SDPA's mask takes a byte a pair of each batch and head: 4 GiB at most."""


@dataclass(frozen=True)
class Problem:
    """One call of a program, its arguments on `device`."""

    program: Program
    lengths: Lengths
    arguments: Mapping[str, Any]
    device: torch.device

    def value(self, expr: Expr, positions: Mapping[str, Tensor], score: Tensor | None) -> Tensor:
        """An expression of the program at some pairs, unchecked."""
        defaults = {p.name: p.default for p in self.program.scalars if p.default is not None}
        names = {tensor.name for tensor in self.program.tensors}
        scalars = {n: x for n, x in self.arguments.items() if n not in names}
        tensors = {n: x for n, x in self.arguments.items() if n in names}
        group = self.lengths.heads // self.lengths.kv_heads
        env = _Traced(
            positions={**positions, "kv_head": positions["h"] // group},
            scalars={**defaults, **scalars, **self.lengths.sizes()},
            tensors=tensors,
            score=score,
            device=self.device,
        )
        return evaluate_unchecked(expr, env)

    def scale(self) -> float | None:
        """None stands for the usual one."""
        if self.program.scale is None:
            return None
        zero = torch.zeros((), dtype=torch.int64, device=self.device)
        return float(self.value(self.program.scale, {"h": zero}, None))


class _Traced(Env):
    """Constants as operations: torch.compile cannot lower tensors that a mod makes of numbers."""

    def number(self, value: bool | int | float) -> Tensor:
        kinds = {bool: torch.bool, int: torch.int64, float: self.dtype}
        return torch.full((), value, dtype=kinds[type(value)], device=self.device)


Maker = Callable[[Problem], Call | str]


def sdpa(problem: Problem) -> Call | str:
    """torch's scaled_dot_product_attention under the whole mask, or why it cannot be."""
    program, n = problem.program, problem.lengths
    if program.normalize is not Normalize.SOFTMAX or program.sink is not None:
        return "it has no sinks, and no normalization but softmax"
    if program.score != Score():
        return "it has no score modification"
    if n.batch * n.heads * n.q_len * n.kv_len > MOST_PAIRS:
        return "its mask would take more than 4 GiB"
    shape = n.batch, n.heads, n.q_len, n.kv_len
    axes = [torch.arange(size, device=problem.device) for size in shape]
    positions = dict(zip(_POSITIONS, _broadcast(axes), strict=True))
    mask = problem.value(program.mask, positions, None)
    varies = [
        max(a, b) for a, b in zip(_padded(mask).shape, (1, 1, n.q_len, n.kv_len), strict=True)
    ]
    mask = _padded(mask).expand(varies)
    scale = problem.scale()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=n.heads != n.kv_heads
        )

    return call


def flex(problem: Problem) -> Call | str:
    """Compiled FlexAttention with the program as its mods, or why it cannot be."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    program, n = problem.program, problem.lengths
    if program.normalize is not Normalize.SOFTMAX or program.sink is not None:
        return "it has no sinks, and no normalization but softmax"

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        at = dict(zip(_POSITIONS, (b, h, q_idx, kv_idx), strict=True))
        return problem.value(program.mask, at, None)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        at = dict(zip(_POSITIONS, (b, h, q_idx, kv_idx), strict=True))
        return problem.value(program.score, at, score)

    blocks = create_block_mask(
        mask_mod, n.batch, n.heads, n.q_len, n.kv_len, device=str(problem.device)
    )
    mod = None if program.score == Score() else score_mod
    compiled = torch.compile(flex_attention)
    scale = problem.scale()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gqa = n.heads != n.kv_heads
        out = compiled(q, k, v, score_mod=mod, block_mask=blocks, scale=scale, enable_gqa=gqa)
        assert isinstance(out, Tensor)
        return out

    return call


def milliseconds(function: Callable[[], object], device: torch.device, runs: int = 5) -> float:
    """The median time of a call that has run before."""
    function()
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(function, return_mode="median"))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def forward_milliseconds(call: Call, problem: Problem, inputs: Inputs) -> float:
    """The median time of a forward that keeps nothing for a backward."""
    with torch.no_grad():
        return milliseconds(lambda: call(*inputs), problem.device)


def backward_milliseconds(call: Call, problem: Problem, inputs: Inputs) -> float:
    """The median time of the gradients of q, k and v, the forward left out."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = call(leaves[0], leaves[1], leaves[2])
    dout = torch.ones_like(out)
    return milliseconds(
        lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True), problem.device
    )


def device_name(device: torch.device) -> str:
    """What a measurement was taken on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


_POSITIONS = ("b", "h", "q_idx", "kv_idx")


def _padded(x: Tensor) -> Tensor:
    """With leading dimensions of size 1 up to four."""
    return x.view([1] * (4 - x.dim()) + list(x.shape))


def _broadcast(axes: list[Tensor]) -> list[Tensor]:
    """Each axis along a dimension of its own."""
    return [
        axis.view([-1 if at == own else 1 for at in range(len(axes))])
        for own, axis in enumerate(axes)
    ]
