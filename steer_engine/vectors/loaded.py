"""Contents that were read from disk, within a budget of host memory. One per registry."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, TypeVar

BUDGET_VARIABLE = "STEER_ENGINE_LOADED_BYTES"
DEFAULT_BUDGET = 1 << 30

Content = TypeVar("Content")


@dataclass(kw_only=True)
class Loaded(Generic[Content]):
    """Digest -> content; what is used least recently goes first, and is read again when it is needed. Thread-safe.

    budget: bytes; one content is kept whatever its size.
    """

    budget: int = field(default_factory=lambda: int(os.environ.get(BUDGET_VARIABLE, DEFAULT_BUDGET)))
    num_bytes: int = field(default=0, init=False)
    _kept: OrderedDict[str, tuple[Content, int]] = field(default_factory=OrderedDict, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def digests(self) -> list[str]:
        """In the order of their last use."""
        with self._lock:
            return list(self._kept)

    def get(self, digest: str) -> Content | None:
        with self._lock:
            if digest not in self._kept:
                return None
            self._kept.move_to_end(digest)
            return self._kept[digest][0]

    def put(self, digest: str, content: Content, num_bytes: int) -> None:
        with self._lock:
            _, before = self._kept.pop(digest, (None, 0))
            self._kept[digest] = (content, num_bytes)
            self.num_bytes += num_bytes - before
            while self.num_bytes > self.budget and len(self._kept) > 1:
                _, (_, freed) = self._kept.popitem(last=False)
                self.num_bytes -= freed
