"""Writing a file so that a crash at any moment leaves the old one or the new one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from steer_engine.errors import RegistryError, RegistryFullError


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside `path`, fsync, rename, fsync the folder.

    The file's time is the clock's, not the kernel's, which may stand still for 4 ms: two versions in a row, of one size
    and on one inode that was free again, would look alike to who compares `stat`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fchmod(stream.fileno(), 0o644)
            now = time.time_ns()
            os.utime(stream.fileno(), ns=(now, now))
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def writing() -> Iterator[None]:
    """Turn an OSError of the body into RegistryFullError (507: no room) or RegistryError (503: anything else)."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        if error.errno in _FULL:
            raise RegistryFullError(f"The registry's volume is full ({reason}); nothing was changed.") from error
        raise RegistryError(f"The registry's folder cannot be written ({reason}); nothing was changed.") from error


UPLOAD_SECONDS = 3600.0
"""No upload takes longer: what is older was left, also where the file system has no locks."""

YOUNG_SECONDS = 2.0
"""A file may be so new that its writer has not locked it yet."""


def mark(file: IO[bytes]) -> None:
    """This process writes `file`, until it closes it or dies."""
    with contextlib.suppress(OSError):  # no locks here: the age alone says
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_left(path: Path) -> bool:
    """Whether the writer of a file is gone. Raises OSError, FileNotFoundError where it has just finished."""
    age = time.time() - path.stat().st_mtime
    if age < YOUNG_SECONDS or age > UPLOAD_SECONDS:
        return age > UPLOAD_SECONDS
    with path.open("r+b") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True
