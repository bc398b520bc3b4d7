"""Keeps the memory of a step on a processor for the next step.

The stream has to lie in memory wherever an armed block ends, so the compiled graph of an armed model asks for more
buffers than a plain one. glibc gives freed memory at the end of its heap back to the system and gets it page by page
again, step by step: some 4 % of the time of 128 requests. Told to keep it, an armed engine is as fast as a plain one.
"""

from __future__ import annotations

import ctypes
import os

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Of <malloc.h>."""

KEPT_BYTES = 2**31 - 1
"""Freed memory at the end of the heap that is kept: the most that mallopt takes."""
MAPPED_BYTES = 2**25
"""What is larger is mapped, and unmapped when freed: the most that glibc takes."""


def keep_freed_memory() -> bool:
    """Tell the C library of this process to keep what is freed; whether it does.

    Where the environment sets the trimming of memory, or the C library has no such setting, nothing is changed; under
    a preloaded allocator it has no effect.
    """
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    # As soon as one is set, glibc stops to adapt the other by itself.
    return bool(mallopt(TRIM_THRESHOLD, KEPT_BYTES)) and bool(mallopt(MMAP_THRESHOLD, MAPPED_BYTES))
