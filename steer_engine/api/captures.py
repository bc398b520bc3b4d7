"""What requests of this process read, on its way from the engine into their answers."""

from __future__ import annotations

import asyncio
import base64
import uuid
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from safetensors.numpy import save

from steer_engine.capture import CaptureRequest
from steer_engine.resolve import ResolvedCapture

FORMAT = "steer-engine/capture/1"


class Captured:
    """Of one request: what it asks, and the report of its answer, which gets the rows."""

    def __init__(self, request: CaptureRequest, blocks: tuple[int, ...], report: dict[str, Any]) -> None:
        self.request = request
        self.begun = False
        """A prompt of the request is being read: there must be no second one."""
        self._blocks = blocks
        self._report = report

    @property
    def delivered(self) -> bool:
        return "data" in self._report["capture"]

    def deliver(self, rows_LPD: np.ndarray, prompt_len: int) -> None:
        """Put the rows, as the workers read them, into the report: base64 of a safetensors file."""
        positions, rows_LPD = self.request.arranged(rows_LPD, prompt_len)
        asked = self._report["capture"]
        when = "after" if asked["after"] else "before"
        tensors = {
            f"residual.{block}": np.ascontiguousarray(rows) for block, rows in zip(self._blocks, rows_LPD, strict=True)
        }
        metadata = {"format": FORMAT, "positions": ",".join(map(str, positions)), "edit": when}
        if self.request.positions == "mean":
            metadata["mean"] = "true"
        data = base64.b64encode(save(tensors, metadata=metadata)).decode("ascii")
        self._report["capture"] = asked | {"positions": positions, "prompt_tokens": prompt_len, "data": data}


class Captures:
    """Of one process, on its `Frontend`. An entry lives as long as its request object."""

    def __init__(self, *, max_bytes: int, max_at_once: int, hidden_size: int) -> None:
        self._max_bytes = max_bytes
        self._max_at_once = max_at_once
        self._row_bytes = hidden_size * np.dtype(np.float32).itemsize
        self._known: WeakValueDictionary[str, Captured] = WeakValueDictionary()

    @cached_property
    def places(self) -> asyncio.Semaphore:
        """Whoever reads holds one, so that the workers hold rows of a few requests at most."""
        return asyncio.Semaphore(self._max_at_once)

    def begin(self, asked: ResolvedCapture, report: dict[str, Any]) -> Captured:
        request = CaptureRequest(
            key=uuid.uuid4().hex,
            positions=asked.positions,
            blocks=asked.blocks,
            after=asked.after,
            max_rows=self._max_bytes // (self._row_bytes * len(asked.blocks)),
        )
        captured = Captured(request, asked.blocks, report)
        self._known[request.key] = captured
        return captured

    def find(self, key: str) -> Captured | None:
        return self._known.get(key)
