"""A child that tries schedules, in which some kernels hang, die or give wrong numbers."""

from __future__ import annotations

import os
import signal
import time

from attncc.tuning import trials
from attncc.tuning.bench import Part


def start(self: Part) -> None:
    """By the number of keys: 16 hangs, 32 dies, 128 and 256 are quick and wrong in one row."""
    keys = self.arguments.get("BLOCK_N")
    if keys == 16:
        time.sleep(600)
    if keys == 32:
        os.kill(os.getpid(), signal.SIGKILL)
    usual(self)
    if keys in WRONG:
        self.tensor("out")[0, -1, WRONG[keys]] += 1


def compile(self: Part) -> None:
    """The same of compilers; 256 keys raise an error."""
    keys = self.arguments["BLOCK_N"]
    if keys == 16:
        time.sleep(600)
    if keys == 32:
        os.kill(os.getpid(), signal.SIGKILL)
    if keys == 256:
        raise RuntimeError("no such layout")


usual = Part.start

WRONG = {128: 3, 256: 15}
"""Rows of 40, of which samples have the first, and not the second."""


def median(launch: trials.Launch, device: object) -> float:
    """Fewer keys take longer."""
    return 1.0 / launch.parts[0].arguments["BLOCK_N"]


if __name__ == "__main__":
    Part.start, Part.compile, trials.median = start, compile, median
    trials.main()
