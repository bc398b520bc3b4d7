"""Files on disk: atomic writes, change detection, disk errors, and locks on uploads in progress."""

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

FileSignature = tuple[int, int, int]
"""(mtime in ns, size in bytes, inode). It changes whenever a file is replaced."""

MAX_UPLOAD_SECONDS = 3600.0
"""An older upload is abandoned, locked or not. Some file systems have no locks."""

LOCK_GRACE_SECONDS = 2.0
"""The writer of a newer file may not have locked it yet."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file. A crash at any moment leaves the old file or the new one.

    Writes a temporary file in the same folder, syncs it, renames it, and syncs the folder. The modification time is set
    from the clock, because the kernel's own time advances only every 4 ms. Without this, two versions that have the
    same size and reuse the same inode could have the same `FileSignature`.
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


def file_signature(path: Path | int) -> FileSignature | None:
    """The signature of a file, given by path or descriptor; None if there is no such file."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return (status.st_mtime_ns, status.st_size, status.st_ino)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Convert an OSError of the body to RegistryFullError (507, no space) or RegistryError (503, anything else)."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        if error.errno in _FULL:
            raise RegistryFullError(f"The registry's volume is full ({reason}); nothing was changed.") from error
        raise RegistryError(f"The registry's folder cannot be written ({reason}); nothing was changed.") from error


def lock_upload(file: IO[bytes]) -> None:
    """Lock a file that this process is writing. Closing the file releases the lock, and so does a crash."""
    with contextlib.suppress(OSError):  # the file system has no locks: `is_abandoned` goes by age alone
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_abandoned(path: Path) -> bool:
    """Whether no process is writing this upload any more. Raises OSError; FileNotFoundError if it has just finished."""
    age = time.time() - path.stat().st_mtime
    if age < LOCK_GRACE_SECONDS or age > MAX_UPLOAD_SECONDS:
        return age > MAX_UPLOAD_SECONDS
    with path.open("r+b") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True
