"""Generated source files, kept under the user's own directory by the hash of their content."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from attncc.errors import ArgumentError
from attncc.settings import settings

HASH_DIGITS = 16


def directory() -> Path:
    """The cache directory, made with mode 0700 where it is missing.

    Its files are run, so one that others could write to is refused with an ArgumentError.
    """
    path = settings().cache_dir
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
    except OSError as error:
        raise ArgumentError(
            f"the cache directory {path} cannot be made: {error.strerror}",
            hint="set ATTNCC_CACHE_DIR to a directory of your own",
        ) from error
    _check_private(path, found)
    return path


def write_source(stem: str, text: str) -> Path:
    """The file that holds exactly `text`, written if need be: `<stem>_<hash>.py`.

    stem: what a reader should see in the name, such as "packed_forward"; other signs become "_".
    Any number of processes may write the same source at once: each sees a whole file.
    """
    content = text.encode()
    digest = hashlib.sha256(content).hexdigest()[:HASH_DIGITS]
    path = directory() / f"{re.sub(r'[^A-Za-z0-9_]+', '_', stem)}_{digest}.py"
    if not _holds(path, content):
        write_atomically(path, content)
    return path


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file in one step, so that readers see the old content or the new, whole."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_module(path: Path) -> ModuleType:
    """The module in a file of `write_source`; the same object for the same file.

    Compiled from the text each time it is first loaded: no bytecode file is read or left behind.
    """
    name = f"attncc_generated.{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(path)  # Triton reads a kernel's source back through this
    exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    return sys.modules.setdefault(name, module)


def _check_private(path: Path, found: os.stat_result) -> None:
    if found.st_uid != os.geteuid():
        raise ArgumentError(
            f"the cache directory {path} belongs to another user (id {found.st_uid})",
            hint="set ATTNCC_CACHE_DIR to a directory of your own",
        )
    if stat.S_IMODE(found.st_mode) & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise ArgumentError(
            f"the cache directory {path} is open to other users (mode {mode:04o})",
            hint=f"chmod 700 {path}, or set ATTNCC_CACHE_DIR to a directory of your own",
        )


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except FileNotFoundError:
        return False
