"""A child that tries warp-specialised schedules, on a GPU made of threads."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

from torch import Tensor

from attncc.backends.gluon import launch, launch_backward
from attncc.backends.triton.kernels import Kernel
from attncc.tuning import trials
from tests.interpreted import gluon


class Described(gluon.Descriptor):
    """One that can be moved to another tensor, as Triton's can."""

    @property
    def base(self) -> Tensor:
        return self._base

    @base.setter
    def base(self, x: Tensor) -> None:
        self._base, self.tensor = x, x.detach().numpy().reshape(self.tensor.shape)


def described(x: Tensor, rows: int, columns: int) -> Described:
    found = Described(x.detach().numpy(), (1, 1, rows, columns))
    found.base = x
    return found


def in_line(x: Tensor, count: int) -> Described:
    found = Described(x.view(-1).numpy(), (count,), dtype=gluon.FLOAT32)
    found.base = x
    return found


class Function:
    """Stands for a jitted function."""

    def __init__(self, text: str, name: str) -> None:
        self.text, self.name = text, name

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self._run, grid)

    def _run(self, grid: tuple[int, ...], **arguments: Any) -> None:
        gluon.run(self.text, self.name, grid, arguments)


def loaded(stem: str, text: str, names: tuple[str, ...]) -> dict[str, Kernel]:
    return {name: Kernel(Function(text, name), gluon.arguments(text, name)) for name in names}


SERVES = {"unsupported": lambda *_: ""}
FORWARD = {"load": loaded, "described": described, "_processors": lambda device: 2, **SERVES}
BACKWARD = {"load": loaded, "described": described, "_in_line": in_line, **SERVES}


def simulated() -> ExitStack:
    """Warp-specialised kernels serve every call, and run by `gluon`."""
    stack = ExitStack()
    stack.enter_context(mock.patch.multiple(launch, **FORWARD))
    stack.enter_context(mock.patch.multiple(launch_backward, **BACKWARD))
    return stack


if __name__ == "__main__":
    with simulated():
        trials.main()
