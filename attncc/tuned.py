"""The tuned configs: a plain-text file of one JSON record a line, shared by many processes.

Those that come with the package, beside this module, hold where a user's own file has none.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO

from attncc import __version__, cache

FILE_NAME = "tuned.jsonl"

SHIPPED = Path(__file__).with_name(FILE_NAME)
"""Records of some GPUs, as `attn.tune` stored them there."""


@dataclass(frozen=True, slots=True)
class Key:
    """What a measured config is valid for.

    gpu:     the device's name, as its driver gives it.
    program: hash of the program's text.
    kernel:  "forward", "backward_kv", "backward_q", "gluon_forward", "gluon_backward".
    dtype:   of q, k and v.
    shape:   the class of shapes measured, such as "d128 dv128 q8192 kv8192 heads32 group1".
    triton:  Triton's version.
    attncc:  that of the printer of the kernel.
    """

    gpu: str
    program: str
    kernel: str
    dtype: str
    shape: str
    triton: str
    attncc: str = __version__


@dataclass(frozen=True, slots=True)
class Record:
    """One measurement: the config that won, such as {"BLOCK_M": 128, "num_warps": 8}."""

    key: Key
    config: Mapping[str, int]
    ms: float

    def line(self) -> str:
        """The record as it stands in the file, to keep or to paste."""
        return json.dumps({**asdict(self.key), "config": dict(self.config), "ms": self.ms})


def path() -> Path:
    """Where the records are."""
    return cache.directory() / FILE_NAME


def store(record: Record) -> None:
    """Append one record; a later record for the same key replaces an earlier one."""
    with path().open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        start = b"\n" if _ends_mid_line(file) else b""
        file.write(start + record.line().encode() + b"\n")
        file.flush()  # before the lock goes


def load() -> dict[Key, Record]:
    """Every record by its key, the latest one, a user's own before those of the package."""
    try:
        with path().open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            content = file.read()
    except FileNotFoundError:
        content = b""
    return shipped() | _records(content)


def shipped() -> dict[Key, Record]:
    """The records that come with the package."""
    return _records(SHIPPED.read_bytes())


def _records(content: bytes) -> dict[Key, Record]:
    """Those of a file; lines that are no records are passed over."""
    records = (parse(line) for line in content.decode(errors="replace").splitlines())
    return {record.key: record for record in records if record is not None}


def lookup(key: Key) -> Record | None:
    """The latest record for a key."""
    return load().get(key)


def parse(line: str) -> Record | None:
    """A line of the file as a record, or None."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    names = [f.name for f in fields(Key)]
    config, ms = row.get("config"), row.get("ms")
    if not all(isinstance(row.get(name), str) for name in names):
        return None
    if not isinstance(config, dict) or not all(type(v) is int for v in config.values()):
        return None
    if isinstance(ms, bool) or not isinstance(ms, int | float):
        return None
    return Record(Key(**{name: row[name] for name in names}), config, float(ms))


def _ends_mid_line(file: IO[bytes]) -> bool:
    """A process died while it wrote."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return False
    file.seek(size - 1)
    return file.read(1) != b"\n"
