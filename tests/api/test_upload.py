"""An upload that the disk refuses is an error, and leaves no file behind."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.requests import Request

from steer_engine.api.registry_routes import Uploads
from steer_engine.errors import RegistryError, RegistryFullError
from steer_engine.vectors import ControlVector
from steer_engine.vectors.safetensors_format import to_bytes

VECTOR = ControlVector(directions={1: np.ones(4096, np.float32)})


def request_of(content: bytes) -> Request:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    return Request({"type": "http", "method": "PUT", "headers": []}, receive)


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow past 1 kB. Not a fixture: pytest's own output may be a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_a_vector_is_taken(tmp_path: Path) -> None:
    assert (await Uploads(2**20, 1).receive(request_of(to_bytes(VECTOR)), tmp_path)).digest == VECTOR.digest
    assert list(tmp_path.iterdir()) == []


async def test_a_full_disk(tmp_path: Path) -> None:
    uploads = Uploads(2**20, 1)
    for _ in range(2):  # its place is free again
        with full_disk(), pytest.raises(RegistryFullError, match="is full"):
            await uploads.receive(request_of(to_bytes(VECTOR)), tmp_path)
    assert list(tmp_path.iterdir()) == []


async def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="cannot be written") as caught:
        await Uploads(2**20, 1).receive(request_of(to_bytes(VECTOR)), tmp_path / "gone")
    assert caught.value.status == 503
