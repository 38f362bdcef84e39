"""How long a first call takes, forward and backward, in a process of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from attncc.bench.cases import Case, Options
from attncc.bench.contest import compiled, synchronize
from attncc.bench.pool import Outcome, outcomes

PATIENCE = 600
"""Seconds after which a first call is given up."""

CACHES = ("ATTNCC_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")
"""Where compiled code is kept from process to process."""


OWN = CACHES[:1]


@dataclass(frozen=True)
class Job:
    """One contestant's first call; `cold`: with empty caches."""

    case: Case
    name: str
    options: Options
    cold: bool = False


def first_calls(jobs: Sequence[Job]) -> Iterator[Outcome]:
    """Seconds of each, one after another, each in a fresh process."""
    yield from outcomes(seconds, jobs, workers=1, seconds=PATIENCE, fresh=True)


def seconds(job: Job) -> float:
    """From torch imported and inputs made to gradients there."""
    with job.options.conditions(), empty_caches() if job.cold else nullcontext():
        device = torch.device(job.options.device)
        problem = job.case.problem(device, job.options.dtype)
        assert problem.inputs[0].shape == problem.dout.shape  # both are made now
        synchronize(device)
        begun = time.perf_counter()
        compiled(job.options.makers()[job.name](problem))
        synchronize(device)
        return time.perf_counter() - begun


@contextmanager
def empty_caches(names: Sequence[str] = CACHES) -> Iterator[None]:
    """New directories for them, of which a process that begins its work takes notice."""
    before = {name: os.environ.get(name) for name in names}
    with TemporaryDirectory(prefix="attncc-bench-") as root:
        os.environ.update({name: str(Path(root, name.lower())) for name in names})
        _read_anew()
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                os.environ.update({} if value is None else {name: value})
            _read_anew()


def _read_anew() -> None:
    from attncc.backends.triton.schedules import database
    from attncc.settings import settings

    settings.cache_clear()
    database.cache_clear()
