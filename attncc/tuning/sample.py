"""A few rows of a call by the dense interpreter in float64, to hold a kernel's results to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attncc.backends import dense
from attncc.ir.program import Normalize
from attncc.tiles import BoundPlan

ROWS = 96
"""At most, of each head: a third of them first, a third last, the rest between."""

PAIRS = 1 << 23
"""At most, of each head."""

NORMS = {
    torch.bfloat16: (2e-2, 6e-2),
    torch.float16: (3e-3, 1e-2),
    torch.float32: (2e-5, 2e-4),
}
"""Largest relative error by norms, of outputs and of gradients."""

FACTOR = 2.0
"""How many times the error of the dense interpreter in the call's own dtype, if that is more."""

CANCELLED = 0.1
"""Of dv's norm: gradients of scores may cancel to nothing, as those of rows with one key do."""

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Sample:
    """Rows of the first head of the first sequence, and of the last of the last."""

    bound: BoundPlan
    q: Tensor
    k: Tensor
    v: Tensor

    @cached_property
    def rows(self) -> Tensor:
        """Positions of queries."""
        binding = self.bound.binding
        count = min(binding.q_len, ROWS, max(3, PAIRS // max(binding.kv_len, 1)))
        part = max(1, count // 3)
        middle = binding.q_len // 2
        starts = 0, min(middle, binding.q_len - part), binding.q_len - part
        found = {start + i for start in starts for i in range(part)}
        return torch.tensor(sorted(found), device=self.q.device)

    @property
    def heads(self) -> list[tuple[int, int, int]]:
        """(b, h, key head) of each."""
        binding = self.bound.binding
        group = binding.heads // binding.kv_heads
        ends = {(0, 0), (binding.batch - 1, binding.heads - 1)}
        return [(b, h, h // group) for b, h in sorted(ends)]

    @cached_property
    def dout(self) -> Tensor:
        """Gradients [B, Hq, Q, Dv] of the output that are 0 but in the sample."""
        rng = torch.Generator(self.q.device).manual_seed(0)
        dout = self.q.new_zeros(*self.q.shape[:3], self.v.shape[-1])
        for b, h, _ in self.heads:
            shape = len(self.rows), self.v.shape[-1]
            made = torch.randn(shape, generator=rng, device=self.q.device)
            dout[b, h, self.rows] = made.to(dout.dtype)
        return dout

    def problem(self, found: Values) -> str:
        """What of a kernel's results is not what the program means; empty if all is."""
        return "; ".join(self._problems(found))

    def _problems(self, found: Values) -> Iterator[str]:
        for name in ("out", "lse", "dq", "dk", "dv"):
            if name not in found or (name == "lse" and not self._softmax):
                continue
            mine = self._of(name, found[name])
            exact, rough = self._exact[name], self._rough[name]
            allowed = NORMS[self.q.dtype][name.startswith("d")]
            error, usual, size = _gap(mine, exact), _gap(rough, exact), _size(exact)
            if name in ("dq", "dk"):
                size = max(size, CANCELLED * _size(self._exact["dv"]))
            if not error <= max(allowed * size, FACTOR * usual):
                yield f"{name} is off by {error / max(size, 1e-30):.1g} of its norm"

    @property
    def _softmax(self) -> bool:
        return self.bound.plan.program.normalize is Normalize.SOFTMAX

    def _of(self, name: str, x: Tensor) -> Tensor:
        if name in ("dk", "dv"):
            places = dict.fromkeys((b, kv_head) for b, _, kv_head in self.heads)
            return torch.stack([x[place] for place in places])
        return torch.stack([x[b, h, self.rows] for b, h, _ in self.heads])

    @cached_property
    def _exact(self) -> Values:
        return self._dense(torch.float64)

    @cached_property
    def _rough(self) -> Values:
        return self._dense(self.q.dtype)

    def _dense(self, dtype: torch.dtype) -> Values:
        """out, lse, dq, dk and dv of the sample, computed in `dtype`."""
        parts: dict[str, list[Tensor]] = {"out": [], "lse": [], "dq": []}
        sides: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for b, h, kv_head in self.heads:
            q = _leaf(self.q[b, h, self.rows], dtype)
            if (b, kv_head) not in sides:
                sides[b, kv_head] = (
                    _leaf(self.k[b, kv_head], dtype),
                    _leaf(self.v[b, kv_head], dtype),
                )
            k, v = sides[b, kv_head]
            with torch.enable_grad():
                out, lse = dense.rows(
                    self.bound.plan.program, self.bound.binding, b, h, self.rows, q, k, v
                )
                if out.requires_grad:
                    torch.autograd.backward(out, self.dout[b, h, self.rows].to(dtype))
            parts["out"].append(out.detach())
            parts["lse"].append(lse.detach())
            parts["dq"].append(_gradient(q))
        parts["dk"] = [_gradient(k) for k, _ in sides.values()]
        parts["dv"] = [_gradient(v) for _, v in sides.values()]
        return {name: torch.stack(values) for name, values in parts.items()}


def _leaf(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().to(dtype, copy=True).requires_grad_()


def _gradient(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad


def _gap(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference; NaN and inf in equal places do not count."""
    found, expected = found.double(), expected.double()
    same = (found == expected) | (found.isnan() & expected.isnan())
    return float(torch.where(same, 0.0, found - expected).norm())


def _size(expected: Tensor) -> float:
    return float(torch.where(expected.isfinite(), expected.double(), 0.0).norm())
