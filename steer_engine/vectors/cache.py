"""Vectors in host memory: an LRU cache with a byte budget, and the inline vectors of requests."""

from __future__ import annotations

import base64
import binascii
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from steer_engine.errors import PayloadTooLargeError, SteeringRequestError, VectorFileError
from steer_engine.fields import InlineVector
from steer_engine.settings import ApiLimits
from steer_engine.spec import SteeringSpec, with_vectors
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.files import AnyVector, from_safetensors

INLINE_BUDGET = 1 << 28
"""Bytes for inline vectors."""

Content = TypeVar("Content")


@dataclass(kw_only=True)
class VectorCache(Generic[Content]):
    """Digest, or name of an object -> content, usually a vector or a row set. Thread-safe.

    The least recently used entries are removed first.

    budget: bytes. The newest entry stays even if it is larger.
    """

    budget: int = field(default_factory=lambda: ApiLimits.from_environment().loaded_bytes)
    num_bytes: int = field(default=0, init=False)
    _entries: OrderedDict[str, tuple[Content, int]] = field(default_factory=OrderedDict, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def digests(self) -> list[str]:
        """All digests, the least recently used first."""
        with self._lock:
            return list(self._entries)

    def get(self, digest: str) -> Content | None:
        """The content of a digest, if it is cached."""
        with self._lock:
            if digest not in self._entries:
                return None
            self._entries.move_to_end(digest)
            return self._entries[digest][0]

    def put(self, digest: str, content: Content, num_bytes: int) -> None:
        """Add or replace an entry of `num_bytes` bytes."""
        with self._lock:
            _, before = self._entries.pop(digest, (None, 0))
            self._entries[digest] = (content, num_bytes)
            self.num_bytes += num_bytes - before
            while self.num_bytes > self.budget and len(self._entries) > 1:
                _, (_, freed) = self._entries.popitem(last=False)
                self.num_bytes -= freed


class InlineVectors:
    """Decodes the vectors that requests contain, and caches them by digest. Thread-safe.

    max_request_bytes: decoded bytes of all inline vectors of one request; 0 switches them off.
    budget: bytes of the cache.
    """

    def __init__(self, max_request_bytes: int, budget: int = INLINE_BUDGET) -> None:
        self._max_request_bytes = max_request_bytes
        self._cache = VectorCache[AnyVector](budget=budget)

    def take(self, spec: SteeringSpec) -> tuple[SteeringSpec, dict[str, AnyVector]]:
        """Cache the inline vectors of a spec. Returns the spec with handles in their place, and the vectors by handle.

        A handle is the vector's digest, with a suffix for further vectors of the same digest: a digest names directions
        but not what was fitted to them (condition, calibration), which must be that of this request.

        Raises:
            SteeringRequestError: inline vectors are switched off, or one is not a control vector.
            PayloadTooLargeError: more than `max_request_bytes`.
        """
        bytes_left = self._max_request_bytes
        own: dict[str, AnyVector] = {}

        def registered(vector: str | InlineVector, param: str) -> str:
            nonlocal bytes_left
            if isinstance(vector, str):
                return vector
            decoded, size = self._decode(vector, bytes_left, f"{param}.vector")
            bytes_left -= size
            handle = decoded.digest if decoded.digest not in own else f"{decoded.digest}#{len(own)}"
            own[handle] = decoded
            if isinstance(decoded, ControlVector) and (decoded.metadata.condition or decoded.metadata.probe):
                decoded = decoded.with_metadata(condition=None, probe=None)
            self._cache.put(decoded.digest, decoded, decoded.num_bytes)
            return handle

        return with_vectors(spec, registered), own

    def find(self, digest: str) -> AnyVector | None:
        """The inline vector with that digest, if it is still cached; without condition and calibration."""
        return self._cache.get(digest)

    def _decode(self, inline: InlineVector, bytes_left: int, param: str) -> tuple[AnyVector, int]:
        """The vector and the size of its file in bytes."""
        if self._max_request_bytes == 0:
            raise SteeringRequestError("Inline vectors are switched off on this server (max_inline_bytes).", param)
        # Checked before decoding: four characters encode three bytes.
        if len(inline.data) // 4 * 3 > bytes_left + 2:
            raise self._too_large(param)
        try:
            data = base64.b64decode(inline.data, validate=True)
        except (binascii.Error, ValueError):
            raise SteeringRequestError("The vector's data is not base64.", f"{param}.data") from None
        if len(data) > bytes_left:
            raise self._too_large(param)
        try:
            vector = from_safetensors(data)
        except VectorFileError as error:
            raise SteeringRequestError(f"Not a control vector: {error.message}", f"{param}.data") from None
        if vector.is_zero:
            raise SteeringRequestError("All directions of the vector are zero.", f"{param}.data")
        return vector, len(data)

    def _too_large(self, param: str) -> PayloadTooLargeError:
        return PayloadTooLargeError(
            f"The inline vectors of a request may have at most {self._max_request_bytes} bytes.", param
        )
