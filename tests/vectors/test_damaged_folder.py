"""Whatever is in a registry's folder, every read ends, and ends with an answer or a SteerError."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from helpers.damage import SPECIAL, damaged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steer_engine.errors import RegistryError, SteerError, UnknownVectorError, UnsupportedEngineError
from steer_engine.vectors import ControlVector, Registry, save
from steer_engine.vectors.manifest import FOLDER, VectorEntry
from steer_engine.vectors.mirror import STATE, Mirror
from steer_engine.vectors.safetensors_format import to_bytes

PRESET = {"edits": [{"vector": "file", "scale": 1.5, "blocks": [1], "scope": {"start": 0}}]}


def one(value: float) -> ControlVector:
    return ControlVector(directions={1: np.full(4, value, np.float32)})


FILES = (
    "file.safetensors",
    "other.gguf",
    "calm.preset.json",
    f"{FOLDER}/manifest.json",
    f"{FOLDER}/objects/{VectorEntry.of(one(3).digest, to_bytes(one(3))).object_name}",
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every kind of file."""
    folder = tmp_path_factory.mktemp("good")
    save(one(1), folder / "file.safetensors")
    save(one(2), folder / "other.gguf")
    (folder / "calm.preset.json").write_text(json.dumps(PRESET))
    Registry(folder).put("mine", one(3))
    Registry(folder).put_preset("loud", PRESET)
    return folder


def read_everything(registry: Registry) -> None:
    """What the routes read. Names are what is expected, or missing."""
    assert registry.names().keys() <= {"file", "other", "mine"}
    assert registry.presets().keys() <= {"calm", "loud"}
    for name in ("file", "other", "mine", one(3).digest, "none"):
        with contextlib.suppress(UnknownVectorError, RegistryError):
            assert registry.get(name).hidden_size > 0
    for name in ("calm", "loud", "none"):
        with contextlib.suppress(UnknownVectorError):
            json.dumps(registry.preset(name), ensure_ascii=False, allow_nan=False).encode()
    assert registry.fault is None or str(registry.directory) not in registry.fault


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.timeout(20)
def test_special_files_are_left_out(good: Path, tmp_path: Path, name: str, kind: str) -> None:
    folder = tmp_path / "registry"
    shutil.copytree(good, folder)
    running = Registry(folder)
    (folder / name).unlink()
    SPECIAL[kind](folder / name)
    began = time.monotonic()
    tracemalloc.start()
    try:
        read_everything(running)
        with contextlib.suppress(RegistryError):  # a manifest is never replaced by an empty one
            read_everything(Registry(folder))
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()
    assert time.monotonic() - began < 5


@settings(
    max_examples=150, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_files_are_left_out(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "registry"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    running = Registry(folder)
    path = folder / data.draw(st.sampled_from(FILES))
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    read_everything(running)
    with contextlib.suppress(SteerError):
        running.put("mine", one(3))
    with contextlib.suppress(RegistryError):
        read_everything(Registry(folder))


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_state_of_a_mirror_is_an_error_of_ours(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "copy"
    folder.mkdir(exist_ok=True)
    mirror = Mirror(f"file://{good}", folder)
    mirror.sync()
    state = (folder / STATE).read_bytes()
    (folder / STATE).write_bytes(data.draw(damaged(state)))
    try:
        with contextlib.suppress(RegistryError, UnsupportedEngineError):
            Mirror(mirror.url, folder).sync()
    finally:
        (folder / STATE).write_bytes(state)


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.timeout(20)
def test_a_special_file_as_the_state_of_a_mirror_is_an_error_of_ours(good: Path, tmp_path: Path, kind: str) -> None:
    mirror = Mirror(f"file://{good}", tmp_path)
    SPECIAL[kind](tmp_path / STATE)
    with contextlib.suppress(RegistryError, UnsupportedEngineError):
        mirror.sync()
