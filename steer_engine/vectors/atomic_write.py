"""Writing a file so that a crash at any moment leaves the old one or the new one."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path


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
