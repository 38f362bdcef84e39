"""One pattern's inputs for single kernels, and what of their work counts as useful."""

from __future__ import annotations

import torch

import attncc
from attncc.backends.triton.configs import Config, default
from attncc.bench.rows import Pattern
from attncc.inputs import Lengths
from attncc.tuning.bench import Bench, Launch

PRODUCTS = {"forward": 2, "backward_kv": 4, "backward_q": 3}
"""Of a kept pair and head, each as long as the head."""


class Problem:
    """Random inputs of one pattern, and its kernels under any schedule."""

    def __init__(self, pattern: Pattern, shape: Lengths, dtype: torch.dtype) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        problem = pattern.problem(shape, device, dtype)
        plan = attncc.compile(problem.program).plan(*problem.inputs, **problem.arguments)
        self.bench = Bench(plan, *problem.inputs)
        self.product = problem.flops / 2

    def launch(self, kernel: str, config: Config) -> Launch:
        """One kernel under one schedule; what runs before it has run."""
        launch = self.bench.launch(kernel, config)
        assert launch is not None, "no tokens"
        return launch

    def default(self, kernel: str) -> Config:
        return default(kernel, self.bench.shape, self.bench.traits)

    def flops(self, kernel: str) -> float:
        return PRODUCTS[kernel] * self.product
