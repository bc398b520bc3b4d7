"""Files of uploads under way: whose writer lives holds a lock on them, which ends with it however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import time
from pathlib import Path
from typing import IO

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
