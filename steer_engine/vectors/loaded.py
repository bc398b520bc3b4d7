"""Contents that were read from disk, within a budget of host memory. One per registry."""

from __future__ import annotations

import base64
import binascii
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from steer_engine.errors import PayloadTooLargeError, SteeringRequestError, VectorFileError
from steer_engine.spec import EditSpec, InlineVector, SteeringSpec
from steer_engine.vectors import safetensors_format
from steer_engine.vectors.control_vector import ControlVector

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


MAX_HELD_BYTES = 1 << 28
"""Host memory for inline vectors; those least recently asked for go first."""


class InlineVectors:
    """Decodes them, and keeps each once however often it is sent. Thread-safe.

    max_request_bytes: decoded bytes of all inline vectors of one request; 0 switches them off.
    """

    def __init__(self, max_request_bytes: int, max_held_bytes: int = MAX_HELD_BYTES) -> None:
        self._max_request_bytes = max_request_bytes
        self._max_held_bytes = max_held_bytes
        self._lock = threading.Lock()
        self._held: OrderedDict[str, ControlVector] = OrderedDict()

    def take(self, spec: SteeringSpec) -> SteeringSpec:
        """The same spec with every inline vector named by its digest.

        Raises:
            SteeringRequestError: switched off, or not a control vector; PayloadTooLargeError.
        """
        if spec.edits is None or not any(isinstance(edit.vector, InlineVector) for edit in spec.edits):
            return spec
        room = self._max_request_bytes
        edits: list[EditSpec] = []
        for i, edit in enumerate(spec.edits):
            if isinstance(edit.vector, InlineVector):
                vector, size = self._decode(edit.vector, room, f"steering.edits[{i}].vector")
                room -= size
                self._hold(vector)
                edit = edit.model_copy(update={"vector": vector.digest})
            edits.append(edit)
        return spec.model_copy(update={"edits": edits})

    def find(self, digest: str) -> ControlVector | None:
        """The inline vector with that content, if it is still held."""
        with self._lock:
            found = self._held.get(digest)
            if found is not None:
                self._held.move_to_end(digest)
            return found

    def _decode(self, inline: InlineVector, room: int, param: str) -> tuple[ControlVector, int]:
        if self._max_request_bytes == 0:
            raise SteeringRequestError("Inline vectors are switched off on this server (max_inline_bytes).", param)
        # Before decoding: four characters hold three bytes.
        if len(inline.data) // 4 * 3 > room + 2:
            raise PayloadTooLargeError(
                f"The inline vectors of a request may have at most {self._max_request_bytes} bytes.", param
            )
        try:
            data = base64.b64decode(inline.data, validate=True)
        except (binascii.Error, ValueError):
            raise SteeringRequestError("The data of the vector are not base64.", f"{param}.data") from None
        if len(data) > room:
            raise PayloadTooLargeError(
                f"The inline vectors of a request may have at most {self._max_request_bytes} bytes.", param
            )
        try:
            vector = safetensors_format.from_bytes(data)
        except VectorFileError as error:
            raise SteeringRequestError(f"Not a control vector: {error.message}", f"{param}.data") from None
        if not any(vector.norms.values()):
            raise SteeringRequestError("All directions of the vector are zero.", f"{param}.data")
        return vector, len(data)

    def _hold(self, vector: ControlVector) -> None:
        with self._lock:
            self._held[vector.digest] = vector
            self._held.move_to_end(vector.digest)
            total = sum(_num_bytes(held) for held in self._held.values())
            while total > self._max_held_bytes and len(self._held) > 1:
                total -= _num_bytes(self._held.popitem(last=False)[1])


def _num_bytes(vector: ControlVector) -> int:
    return len(vector.blocks) * vector.hidden_size * 4
