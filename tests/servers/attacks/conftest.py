"""Attacks leave the server as it was: same vectors, same presets, nothing half taken in, and it still steers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.living import USER, complete, spec
from helpers.server_process import Server


def state(server: Server) -> dict[str, Any]:
    return {what: server.get(f"/v1/steering/{what}", headers=USER).json() for what in ("vectors", "presets")}


@pytest.fixture(scope="module", autouse=True)
def _unharmed(living: Server) -> Iterator[None]:
    before = state(living)
    yield
    assert state(living) == before
    assert complete(living, steering=spec("house")).status_code == 200
    folder = Path(living.log_path.parent, "vectors", ".steer-engine", "incoming")
    assert not folder.exists() or list(folder.iterdir()) == []
    assert "Traceback" not in living.log
