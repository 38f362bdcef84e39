"""`attncc doctor`: what this machine can do, and why not more."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import click

PAIRS = {"2.11": "3.6", "2.12": "3.7", "2.13": "3.7", "2.14": "3.8", "2.15": "3.9"}
"""The Triton that each torch is built and tested with."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: `ok` is None for plain facts."""

    topic: str
    ok: bool | None
    text: str


@click.command()
def doctor() -> None:
    """Say what this machine can do with attncc, and why not more."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    signs = {True: Text("✓", "green"), False: Text("✗", "yellow"), None: Text(" ")}
    for look in (_python, _torch, _triton, _gpu, _backends, _compile_check, _cache, _environment):
        for finding in _guarded(look):
            table.add_row(signs[finding.ok], finding.topic, Text(finding.text))
    Console().print(table)


def _guarded(look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A broken installation is a finding too."""
    try:
        yield from look()
    except Exception as error:
        yield Finding(look.__name__.strip("_"), False, f"{type(error).__name__}: {error}")


def _python() -> Iterator[Finding]:
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Finding("python", True, f"{text}, {os.cpu_count()} cores")


def _torch() -> Iterator[Finding]:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    build = f"ROCm {torch.version.hip}" if torch.version.hip else build
    yield Finding("torch", True, f"{torch.__version__} ({build})")


def _triton() -> Iterator[Finding]:
    if reason := _no_kernels():
        yield Finding("triton", False, f"{reason}: no GPU kernels, no `attncc emit`")
        return
    import triton

    found = str(triton.__version__)
    torch_version = _version("torch") or ""
    pair = PAIRS.get(".".join(torch_version.split(".")[:2]))
    matches = pair is None or found.startswith(pair + ".")
    why = "" if matches else f", but torch {torch_version} is built with Triton {pair}"
    yield Finding("triton", matches, found + why)
    yield _interpreter(found)


def _no_kernels() -> str:
    """Why Triton's kernels are not to be had; empty where they are."""
    from attncc.backends.triton.versions import installed
    from attncc.errors import UnsupportedError

    try:
        installed()
    except UnsupportedError as error:
        return error.message
    return ""


def _interpreter(triton: str) -> Finding:
    numpy = _version("numpy") or ""
    broken = triton.startswith("3.6.") and _numbers(numpy) >= (2, 4)
    if broken:
        text = f"Triton {triton}'s interpreter breaks with numpy {numpy}: install numpy<2.4"
    else:
        text = "TRITON_INTERPRET=1 runs kernels on the CPU (float32; its bfloat16 is wrong)"
    return Finding("interpreter", not broken, text)


def _gpu() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = (
            "torch finds none (driver, or CUDA_VISIBLE_DEVICES?)" if built else "torch is CPU only"
        )
        yield Finding("gpu", False, f"none: {why}")
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        able = bool(torch.version.hip) or found.major >= 8
        text = f"{found.name}, {found.total_memory >> 30} GiB, sm_{found.major}{found.minor}"
        yield Finding(
            f"gpu {index}", able, text + ("" if able else "; kernels want sm_80 or later")
        )


def _backends() -> Iterator[Finding]:
    import torch

    gpu = torch.cuda.is_available() and not _no_kernels()
    yield Finding("backends", True, "triton (GPU), cpu, dense" if gpu else "cpu, dense")


def _compile_check() -> Iterator[Finding]:
    if _no_kernels():
        return
    from attncc.backends.triton import aot

    missing = aot.missing_tools()
    if missing:
        yield Finding("emit", False, f"Triton's wheel lacks {', '.join(missing)}")
    else:
        yield Finding("emit", True, f"compiles for {', '.join(aot.TARGETS)} without a GPU")
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    text = compiler or "none: Triton needs one to launch kernels on a GPU"
    yield Finding("c compiler", compiler is not None, text)


def _cache() -> Iterator[Finding]:
    from attncc import cache, tuned

    path = cache.directory()
    sources = sum(1 for _ in path.glob("*.py"))
    yield Finding("cache", True, f"{path}: {sources} sources, {len(tuned.load())} tuned configs")


def _environment() -> Iterator[Finding]:
    from attncc.settings import VARIABLES, unknown_variables

    for name in VARIABLES:
        if name in os.environ:
            yield Finding(name, None, os.environ[name])
    for name in unknown_variables(os.environ):
        yield Finding(name, False, f"is no setting; there are {', '.join(VARIABLES)}")


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:2])
