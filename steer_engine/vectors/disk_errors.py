"""What a failing disk means to whoever wanted to change the registry: an error that says so, never a traceback."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from steer_engine.errors import RegistryError, RegistryFullError

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
