"""What the commands that plan or run a program have in common: which one, how long, with what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from attncc.errors import ArgumentError, UnsupportedError, suggest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from attncc.bench.problem import Problem
    from attncc.inputs import Captured, Lengths
    from attncc.ir.expr import ScalarParam
    from attncc.ir.program import Program
    from attncc.tiles import BoundPlan

F = TypeVar("F", bound=Callable[..., Any])
COUNT = click.IntRange(min=1)
LENGTH = click.IntRange(min=0)


@dataclass(frozen=True, slots=True)
class Request:
    """A program and one call of it."""

    program: Program
    lengths: Lengths
    scalars: dict[str, bool | int | float]
    captured: Captured

    @property
    def arguments(self) -> dict[str, Any]:
        """The program's parameters, by name."""
        return {**self.scalars, **self.captured.tensors}


def options(q_len: int, heads: int = 1, required: bool = True) -> Callable[[F], F]:
    """Adds the options that `request` reads; `q_len` and `heads` hold where none are given."""
    added = [
        click.argument("file", type=click.Path(path_type=Path), required=required),
        click.option("--name", help="Which program, where FILE holds several."),
        click.option("--q-len", type=LENGTH, default=q_len, show_default=True, help="Queries."),
        click.option("--kv-len", type=LENGTH, help="Keys.  [default: as many as queries]"),
        click.option("--batch", type=COUNT, default=1, show_default=True, help="Sequences."),
        click.option("--heads", type=COUNT, default=heads, show_default=True, help="Query heads."),
        click.option("--kv-heads", type=COUNT, help="Key heads.  [default: as many as heads]"),
        click.option("--head-dim", type=COUNT, default=64, show_default=True, help="Of q and k."),
        click.option(
            "--set", "settings", multiple=True, metavar="NAME=VALUE", help="A scalar parameter."
        ),
        click.option(
            "--tensor", "files", multiple=True, metavar="NAME=FILE.npy", help="A captured tensor."
        ),
        click.option("--seed", type=int, default=0, help="Of the inputs that are made up."),
    ]

    def decorate(function: F) -> F:
        for option in reversed(added):
            function = option(function)
        return function

    return decorate


def request(
    file: Path,
    name: str | None,
    q_len: int,
    kv_len: int | None,
    batch: int,
    heads: int,
    kv_heads: int | None,
    head_dim: int,
    settings: tuple[str, ...],
    files: tuple[str, ...],
    seed: int,
) -> Request:
    """The options as a Request, captured tensors made up where no file is given."""
    from attncc.frontend import load
    from attncc.inputs import Lengths, captured

    program = load(file, name)
    lengths = Lengths(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads or heads,
        q_len=q_len,
        kv_len=q_len if kv_len is None else kv_len,
        head_dim=head_dim,
    )
    scalars = dict(_scalar(program, text) for text in settings)
    _check_complete(program, scalars)
    given = dict(_tensor(text) for text in files)
    return Request(program, lengths, scalars, captured(program, lengths, given, seed))


def bound_plan(call: Request, tile: tuple[int, int]) -> BoundPlan:
    """The plan of a request, with its tiles."""
    import attncc

    sizes: dict[str, Any] = call.lengths.sizes()
    return attncc.compile(call.program).plan(**sizes, tile=tile, **call.arguments)


DTYPES = ("bf16", "fp16", "fp32")


def placed(
    call: Request, dtype: str | None, device: str | None, seed: int
) -> tuple[Problem, tuple[Tensor, Tensor, Tensor]]:
    """The call on a device, by default the best, and q, k, v in a dtype, by default its usual."""
    import torch

    from attncc.bench.problem import Problem

    where = place(device)
    arguments = {
        name: value.to(where) if isinstance(value, torch.Tensor) else value
        for name, value in call.arguments.items()
    }
    kind = dtype_of(dtype, where)
    problem = Problem(call.program, call.lengths, arguments, where, kind, seed=seed)
    return problem, problem.inputs


def place(device: str | None) -> torch.device:
    """The device that was asked for, or the best there is."""
    import torch

    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(
            f"there is no {device}", hint="`attncc doctor` says what there is, and why"
        )
    return where


def dtype_of(dtype: str | None, device: torch.device) -> torch.dtype:
    """The dtype that was asked for, or the usual one of a device."""
    import torch

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    return dtypes[dtype or ("bf16" if device.type == "cuda" else "fp32")]


def tile(text: str) -> tuple[int, int]:
    """`128x64` as (128, 64)."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ArgumentError(f"--tile is {text!r}", hint="it takes queries x keys, such as 128x64")
    return int(parts[0]), int(parts[1])


def _split(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ArgumentError(f"--{option} is {text!r}", hint=f"write --{option} name=value")
    return name, value


def _scalar(program: Program, text: str) -> tuple[str, bool | int | float]:
    name, value = _split("set", text)
    known = {param.name: param for param in program.scalars}
    if name not in known:
        hint = suggest(name, known) or f"it has {', '.join(known) or 'none'}"
        raise ArgumentError(f"{program.name} has no scalar parameter {name!r}", hint=hint)
    return name, _number(known[name], value)


def _number(param: ScalarParam, text: str) -> bool | int | float:
    readers: dict[str, Callable[[str], bool | int | float]] = {
        "bool": lambda t: {"true": True, "false": False}[t.lower()],
        "int": int,
        "float": float,
    }
    try:
        return readers[param.kind.value](text)
    except (ValueError, KeyError):
        examples = {"bool": "true or false", "int": "a whole number", "float": "a number"}
        raise ArgumentError(
            f"{param.name} is {text!r}, and is declared {param.kind.value}",
            hint=f"write {examples[param.kind.value]}",
        ) from None


def _check_complete(program: Program, scalars: dict[str, bool | int | float]) -> None:
    missing = [p.name for p in program.scalars if p.default is None and p.name not in scalars]
    if missing:
        raise ArgumentError(
            f"{program.name} needs a value for {', '.join(missing)}",
            hint=" ".join(f"--set {name}=..." for name in missing),
        )


def _tensor(text: str) -> tuple[str, Tensor]:
    import numpy as np
    import torch

    name, path = _split("tensor", text)
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ArgumentError(
            f"cannot read {path!r} for {name}: {error}", hint="save it with numpy.save"
        ) from None
    return name, torch.from_numpy(np.ascontiguousarray(array))
