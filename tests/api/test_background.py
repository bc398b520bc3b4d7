"""Background tasks outlive every error: they report it, and try again."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from steer_engine.api import metrics
from steer_engine.api.background import Readiness, refresh_gauges, sync_mirror
from steer_engine.vectors import ControlVector, Registry
from steer_engine.vectors.mirror import STATE
from steer_engine.vectors.safetensors_format import to_bytes

SECONDS = 10.0


def along(axis: int) -> ControlVector:
    return ControlVector(directions={1: np.eye(8, dtype=np.float32)[axis]})


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


def value(metric: Any) -> float:
    (sample, *_) = [each for family in metric.collect() for each in family.samples]
    return float(sample.value)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """What is at the URL, and the copy."""
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    (there / "north.safetensors").write_bytes(to_bytes(along(1)))
    return there, here


@asynccontextmanager
async def mirrored(there: Path, here: Path) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(sync_mirror(f"file://{there}", here, 0.01))
    try:
        await until((here / "north.safetensors").exists)
        # The first round is over, and the next ones write nothing.
        await until(lambda: '"version":""' not in (here / STATE).read_text())
        yield task
    finally:
        assert not task.done(), task
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_a_nested_preset_at_the_url_is_left_out(folders: tuple[Path, Path]) -> None:
    there, here = folders
    async with mirrored(there, here):
        (there / "deep.preset.json").write_text('{"edits":' * 50_000)
        await until(lambda: value(metrics.mirror_left_out) == 1)
        (there / "south.safetensors").write_bytes(to_bytes(along(2)))
        await until((here / "south.safetensors").exists)
        assert value(metrics.mirror_failing) == 0
        (there / "deep.preset.json").unlink()
        await until(lambda: value(metrics.mirror_left_out) == 0)


@pytest.mark.parametrize("state", [b"", b"[" * 100_000, b"\xff", b'{"url": "memory://other"}', None])
async def test_a_damaged_state_is_reported_and_the_repair_is_noticed(
    folders: tuple[Path, Path], state: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    there, here = folders
    async with mirrored(there, here):
        good, failures = (here / STATE).read_bytes(), value(metrics.mirror_failures)
        damaged = here / "damaged"
        damaged.symlink_to(STATE) if state is None else damaged.write_bytes(state)
        damaged.replace(here / STATE)  # in one step, as the task looks at any moment
        (there / "south.safetensors").write_bytes(to_bytes(along(2)))
        await until(lambda: value(metrics.mirror_failures) >= failures + 2)
        assert value(metrics.mirror_failing) == 1
        assert "is not in sync" in caplog.text
        damaged.write_bytes(good)
        damaged.replace(here / STATE)
        await until((here / "south.safetensors").exists)
        await until(lambda: value(metrics.mirror_failing) == 0)


async def test_a_mirror_that_cannot_start_starts_later(folders: tuple[Path, Path]) -> None:
    there, here = folders
    (here / STATE).write_text(json.dumps({"url": "memory://other"}))
    task = asyncio.create_task(sync_mirror(f"file://{there}", here, 0.01))
    await until(lambda: value(metrics.mirror_failing) == 1)
    (here / STATE).unlink()
    await until((here / "north.safetensors").exists)
    await until(lambda: value(metrics.mirror_failing) == 0)
    assert not task.done()
    task.cancel()


async def test_gauges_are_refreshed_after_any_error(tmp_path: Path) -> None:
    class Breaking(Registry):
        broken = True

        def names(self) -> dict[str, str]:
            if self.broken:
                raise OSError(5, "Input/output error")
            return super().names()

    async def handshake() -> dict[str, Any]:
        return {}  # not what an engine answers

    registry = Breaking(tmp_path)
    registry.put("a", along(1))
    task = asyncio.create_task(refresh_gauges(Readiness(handshake), cast(Registry, registry), period=0.01))
    await until(lambda: value(metrics.registry_readable) == 0)
    registry.broken = False
    await until(lambda: value(metrics.registry_readable) == 1)
    assert not task.done()
    task.cancel()
