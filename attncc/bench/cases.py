"""What a benchmark measures, a row of the table or a program that was asked for, and how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from attncc.bench.contestants import TUNED, Maker, makers
from attncc.bench.problem import Problem
from attncc.inputs import Lengths, captured
from attncc.ir.program import Program

TINY = 256
"""Tokens of a call whose kernels take less time than its launches."""


class Case(Protocol):
    """Something that makes a Problem, and travels to other processes."""

    @property
    def title(self) -> str: ...

    @property
    def group(self) -> str: ...

    @property
    def shape(self) -> Lengths: ...

    def problem(self, device: torch.device, dtype: torch.dtype) -> Problem: ...

    def shaped(self, shape: Lengths) -> Case:
        """The same with other lengths."""
        ...


@dataclass(frozen=True)
class Asked:
    """A program of a file, with captured tensors that are made up where none are given."""

    program: Program
    shape: Lengths
    scalars: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    group: str = "file"

    @property
    def title(self) -> str:
        return self.program.name

    def problem(self, device: torch.device, dtype: torch.dtype) -> Problem:
        tensors = captured(self.program, self.shape, self.given, self.seed).tensors
        arguments = {**self.scalars, **{name: x.to(device) for name, x in tensors.items()}}
        return Problem(self.program, self.shape, arguments, device, dtype, seed=self.seed)

    def shaped(self, shape: Lengths) -> Asked:
        """As it is where tensors are given, which fit its own lengths alone."""
        return self if self.given else replace(self, shape=shape)


@dataclass(frozen=True)
class Options:
    """How rows are measured.

    rounds, rep: turns of each contestant, and milliseconds of each turn.
    names:       the contestants; unknown ones take no part.
    tuned:       seconds that tuning may take, or None for no tuned contestant.
    costs:       planning, host time and, in fresh processes, first calls too.
    cold:        first calls with empty caches as well.
    eager:       torch.compile compiles nothing.
    """

    device: str
    dtype: torch.dtype
    names: tuple[str, ...]
    rounds: int = 3
    rep: int = 40
    backward: bool = True
    tuned: float | None = None
    costs: bool = True
    cold: bool = False
    eager: bool = False
    time_budget: float = float("inf")
    date: str = ""

    @contextmanager
    def conditions(self) -> Iterator[None]:
        """The state of torch in which rows are measured."""
        eager = torch.compiler.set_stance("force_eager") if self.eager else nullcontext()
        with eager, torch.set_grad_enabled(self.backward):
            yield

    def makers(self) -> dict[str, Maker]:
        asked = (*self.names, TUNED)
        return {name: make for name, make in makers(self.tuned).items() if name in asked}


def tiny(shape: Lengths) -> Lengths:
    """One key head of few tokens, its kernels the same."""
    heads = shape.heads // shape.kv_heads
    length = {"q_len": min(shape.q_len, TINY), "kv_len": min(shape.kv_len, TINY)}
    return replace(shape, batch=1, heads=heads, kv_heads=1, **length)


def shrunk(shape: Lengths, length: int) -> Lengths:
    """Few heads, tokens and columns, for a rehearsal without a GPU."""
    heads = min(shape.heads, 2 * shape.heads // shape.kv_heads, 4)
    kv_heads = max(1, heads * shape.kv_heads // shape.heads)
    return Lengths(1, heads, kv_heads, length, length, min(shape.head_dim, 64))
