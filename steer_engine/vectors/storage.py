"""Files on disk: bounded reads, atomic writes, change detection, disk errors, and locks on uploads in progress."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from steer_engine.errors import RegistryError, RegistryFullError, UnreadableFileError, VectorFileError

FileSignature = tuple[int, int, int]
"""(mtime in ns, size in bytes, inode). It changes whenever a file is replaced."""

MAX_UPLOAD_SECONDS = 3600.0
"""An older upload is abandoned, locked or not. Some file systems have no locks."""

LOCK_GRACE_SECONDS = 2.0
"""The writer of a newer file may not have locked it yet."""

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def read_file(path: Path, max_bytes: int) -> tuple[bytes, FileSignature]:
    """The content of a regular file and its signature, both of one version of the file.

    Everything that a folder contains is read this way.

    Raises:
        OSError: the file cannot be read, or does not exist.
        VectorFileError: it is not a regular file, or has more than `max_bytes`. The message does not name it.
    """
    handle = open_regular(path)
    try:
        status = os.fstat(handle)
        if status.st_size > max_bytes:
            raise VectorFileError(f"the file has {status.st_size} bytes; at most {max_bytes} are read.")
        with os.fdopen(handle, "rb", closefd=False) as file:
            data = file.read(status.st_size)
    finally:
        os.close(handle)
    return data, (status.st_mtime_ns, status.st_size, status.st_ino)


def open_regular(path: Path) -> int:
    """A handle to read a regular file. Opening a pipe without `O_NONBLOCK` waits for a writer.

    Raises:
        OSError: the file cannot be read, or does not exist.
        VectorFileError: it is not a regular file. The message does not name it.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise VectorFileError("not a regular file.")
    return handle


def read_vector_file(path: Path, max_bytes: int) -> bytes:
    """The content of a vector's file. Raises VectorFileError, which names the file; see `read_file`."""
    try:
        return read_file(path, max_bytes)[0]
    except VectorFileError as error:
        raise VectorFileError(f"{path}: {error.message}") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = getattr(error, "strerror", None) or error
        raise UnreadableFileError(f"{path}: cannot be read ({reason}).") from None


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


def file_signature(path: Path) -> FileSignature | None:
    """The signature of a file; None if there is no such file. Raises OSError if it cannot be looked at."""
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
        if error.errno in NO_SPACE:
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
