"""Uploads are durable: after a crash at any moment, everything acknowledged exists and nothing is incomplete."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_engine.errors import (
    CapacityError,
    PreconditionError,
    RegistryConflictError,
    RegistryError,
    RegistryFullError,
    UnknownVectorError,
    VectorFileError,
)
from steer_engine.settings import RegistryLimits
from steer_engine.vectors import ControlVector
from steer_engine.vectors import uploaded as uploaded_module
from steer_engine.vectors.manifest import FOLDER, VectorEntry, preset_digest
from steer_engine.vectors.safetensors_format import to_bytes
from steer_engine.vectors.storage import lock_upload
from steer_engine.vectors.uploaded import ANY, UploadedVectors

PRESET = {"edits": [{"vector": "a", "scale": 2.0}]}


def one(value: float, width: int = 4) -> ControlVector:
    return ControlVector(directions={1: np.full(width, value, np.float32)})


def objects(folder: Path) -> set[str]:
    return {path.name for path in (folder / FOLDER / "objects").iterdir()}


def object_name(vector: ControlVector) -> str:
    return entry(vector).object_name


def entry(vector: ControlVector) -> VectorEntry:
    return VectorEntry.of(vector.digest, to_bytes(vector))


def test_the_folder_is_created_by_the_first_upload(tmp_path: Path) -> None:
    uploaded = UploadedVectors(tmp_path)
    assert uploaded.manifest().vectors == {}
    assert uploaded.verify() == {}
    assert list(tmp_path.iterdir()) == []


def test_put_load_and_delete(tmp_path: Path) -> None:
    uploaded = UploadedVectors(tmp_path)
    assert uploaded.put("a", one(1)).is_new is True
    assert uploaded.put("a", one(1)).is_new is False
    assert uploaded.put("b", one(1)).is_new is True
    assert objects(tmp_path) == {object_name(one(1))}
    assert uploaded.load(entry(one(1))) == one(1)
    assert uploaded.delete("a") == one(1).digest
    assert uploaded.load(entry(one(1))) == one(1)  # b still has this content
    uploaded.delete("b")
    assert objects(tmp_path) == set()
    with pytest.raises(UnknownVectorError):
        uploaded.load(entry(one(1)))
    with pytest.raises(UnknownVectorError):
        uploaded.delete("a")


def test_replacing_a_name_needs_its_current_digest(tmp_path: Path) -> None:
    uploaded = UploadedVectors(tmp_path)
    uploaded.put("a", one(1))
    with pytest.raises(RegistryConflictError, match=one(1).digest):
        uploaded.put("a", one(2))
    with pytest.raises(PreconditionError):
        uploaded.put("a", one(2), if_match=one(3).digest)
    with pytest.raises(PreconditionError, match="does not exist"):
        uploaded.put("new", one(2), if_match=ANY)
    with pytest.raises(PreconditionError):
        uploaded.delete("a", if_match=one(2).digest)
    for change in (
        lambda: uploaded.put("a", one(2), if_match="x" * 9000),
        lambda: uploaded.delete("a", if_match="x" * 9000),
    ):
        with pytest.raises(PreconditionError, match=r"'x{70,76}\.\.\.'") as caught:
            change()
        assert len(caught.value.message) < 200
    assert uploaded.manifest().vectors["a"].digest == one(1).digest
    assert uploaded.put("a", one(2), if_match=one(1).digest).is_new is False
    assert uploaded.put("a", one(3), if_match=ANY).is_new is False
    assert objects(tmp_path) == {object_name(one(3))}
    uploaded.delete("a", if_match=one(3).digest)


def test_presets(tmp_path: Path) -> None:
    uploaded = UploadedVectors(tmp_path)
    uploaded.put("a", one(1))
    other = {"edits": [{"vector": "b", "gate": {"vector": "a", "min_cos": 0.1}}]}
    assert uploaded.put_preset("calm", PRESET) is True
    assert uploaded.put_preset("calm", PRESET) is False
    with pytest.raises(RegistryConflictError):
        uploaded.put_preset("calm", other)
    assert uploaded.put_preset("calm", other, if_match=preset_digest(PRESET)) is False
    with pytest.raises(RegistryConflictError, match="calm"):
        uploaded.delete("a")
    with pytest.raises(PreconditionError):
        uploaded.delete_preset("calm", if_match=preset_digest(PRESET))
    uploaded.delete_preset("calm", if_match=preset_digest(other))
    with pytest.raises(UnknownVectorError):
        uploaded.delete_preset("calm")
    uploaded.delete("a")


HOLDS = {"vector": "a", "above": 0.1}


@pytest.mark.parametrize(
    "preset",
    [
        {"edits": [{"vector": "b", "when": HOLDS}]},
        {"edits": [{"vector": "b", "when": {"any": [{"vector": "b", "above": 0}, HOLDS]}}]},
        {"edits": [{"vector": "b"}], "when": {"all": [HOLDS]}},
        {"edits": [{"vector": "b"}], "when": HOLDS},
    ],
)
def test_a_vector_of_a_condition_is_in_use(tmp_path: Path, preset: dict[str, Any]) -> None:
    uploaded = UploadedVectors(tmp_path)
    uploaded.put("a", one(1))
    with pytest.raises(RegistryConflictError, match="calm"):
        uploaded.delete("a", file_presets={"calm": preset})
    uploaded.put_preset("calm", preset)
    with pytest.raises(RegistryConflictError, match="calm"):
        uploaded.delete("a")


def test_limits(tmp_path: Path) -> None:
    uploaded = UploadedVectors(tmp_path, RegistryLimits(max_vectors=2, max_presets=1))
    uploaded.put("a", one(1))
    uploaded.put("b", one(2))
    with pytest.raises(RegistryFullError, match="at most 2 vectors"):
        uploaded.put("c", one(3))
    assert objects(tmp_path) == {object_name(one(1)), object_name(one(2))}
    uploaded.put_preset("calm", PRESET)
    with pytest.raises(RegistryFullError, match="at most 1 presets"):
        uploaded.put_preset("loud", PRESET)
    size = uploaded.manifest().num_bytes
    small = UploadedVectors(tmp_path / "small", RegistryLimits(max_registry_bytes=size // 2))
    small.put("a", one(1))
    small.put("same content", one(1))
    with pytest.raises(RegistryFullError, match="bytes"):
        small.put("b", one(2))


def test_processes_see_the_changes_of_others_at_once(tmp_path: Path) -> None:
    mine, theirs = UploadedVectors(tmp_path), UploadedVectors(tmp_path)
    mine.put("a", one(1))
    assert theirs.manifest().vectors["a"].digest == one(1).digest
    theirs.put("a", one(2), if_match=one(1).digest)
    assert mine.manifest().vectors["a"].digest == one(2).digest
    assert mine.manifest().generation == 2
    theirs.delete("a")
    assert mine.manifest().vectors == {}


def test_an_unchanged_manifest_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded = UploadedVectors(tmp_path)
    uploaded.put("a", one(1))
    uploaded.manifest()
    reads = []
    original = uploaded_module.read_manifest
    monkeypatch.setattr(uploaded_module, "read_manifest", lambda *args: (reads.append(args), original(*args))[1])
    for _ in range(5):
        uploaded.manifest()
    assert reads == []
    UploadedVectors(tmp_path).put("b", one(2))
    uploaded.manifest()
    assert len(reads) == 2 + 1  # two by the other one, at startup and under its lock; and one here


def test_a_damaged_manifest_is_an_error_and_never_an_empty_registry(tmp_path: Path) -> None:
    UploadedVectors(tmp_path).put("a", one(1))
    path = tmp_path / FOLDER / "manifest.json"
    whole = path.read_bytes()
    for damaged in (b"", whole[:-5], b"[" * 100_000, json.dumps({"format": 2}).encode(), b"\xff"):
        path.write_bytes(damaged)
        with pytest.raises(RegistryError, match="is not a manifest"):
            UploadedVectors(tmp_path)
        assert path.read_bytes() == damaged


def test_damaged_content_is_found_at_startup_and_repaired_by_another_upload(tmp_path: Path) -> None:
    uploaded = UploadedVectors(tmp_path)
    for name, value in (("short", 1), ("other", 2), ("gone", 3), ("good", 4)):
        uploaded.put(name, one(value))
    folder = tmp_path / FOLDER / "objects"
    path = folder / object_name(one(1))
    path.write_bytes(path.read_bytes()[:-1])
    (folder / object_name(one(2))).write_bytes((folder / object_name(one(4))).read_bytes())
    (folder / object_name(one(3))).unlink()
    faults = UploadedVectors(tmp_path).verify()
    assert sorted(faults) == ["gone", "other", "short"]
    with pytest.raises(VectorFileError):
        uploaded.load(entry(one(2)))
    assert uploaded.put("short", one(1)).is_new is False
    assert uploaded.load(entry(one(1))) == one(1)


def _flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("damage", [_flip, Path.unlink, lambda path: (path.unlink(), os.mkfifo(path))])
@pytest.mark.parametrize("name", ["v", "another"])
@pytest.mark.timeout(20)
def test_an_acknowledged_upload_repairs_damaged_content(
    tmp_path: Path, name: str, damage: Callable[[Path], object]
) -> None:
    """Whatever the damage and its size, and under whatever name the content is uploaded again."""
    uploaded = UploadedVectors(tmp_path)
    uploaded.put("v", one(1))
    damage(tmp_path / FOLDER / "objects" / object_name(one(1)))
    with pytest.raises((VectorFileError, UnknownVectorError)):
        uploaded.load(entry(one(1)))
    assert uploaded.put(name, one(1)).is_new is (name == "another")
    assert uploaded.load(entry(one(1))) == one(1)
    assert UploadedVectors(tmp_path).verify() == {}


def test_startup_removes_unused_files(tmp_path: Path) -> None:
    uploaded = UploadedVectors(tmp_path)
    uploaded.put("a", one(1))
    root = tmp_path / FOLDER
    young, old = uploaded.incoming() / "young", uploaded.incoming() / "old"
    leftovers = [root / "objects" / "0.safetensors", root / "objects" / ".x.part", root / ".manifest.json.y.part", old]
    for path in (*leftovers, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert UploadedVectors(tmp_path).verify() == {}
    assert not any(path.exists() for path in leftovers)
    assert young.exists()
    assert uploaded.load(entry(one(1))) == one(1)


def test_an_upload_is_abandoned_when_its_writer_has_ended(tmp_path: Path) -> None:
    uploaded = UploadedVectors(tmp_path)
    uploaded.put("a", one(1))
    abandoned, in_progress = uploaded.incoming() / "abandoned", uploaded.incoming() / "in progress"
    abandoned.write_bytes(b"half")
    with in_progress.open("wb") as file:
        lock_upload(file)
        for path in (abandoned, in_progress):
            os.utime(path, (time.time() - 10, time.time() - 10))
        UploadedVectors(tmp_path).verify()
        assert not abandoned.exists()
        assert in_progress.exists()
    UploadedVectors(tmp_path).verify()
    assert not in_progress.exists()


def test_a_change_waits_for_the_lock_and_then_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded = UploadedVectors(tmp_path)
    uploaded.put("a", one(1))
    monkeypatch.setattr(uploaded_module, "LOCK_SECONDS", 0.05)
    with uploaded._changing(), pytest.raises(CapacityError):
        UploadedVectors(tmp_path).put("b", one(2))
    UploadedVectors(tmp_path).put("b", one(2))


def test_startup_needs_no_lock_to_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verifying thousands of objects takes minutes; other servers must not wait for it."""
    uploaded = UploadedVectors(tmp_path)
    uploaded.put("a", one(1))
    uploaded.put("b", one(2))
    monkeypatch.setattr(uploaded_module, "LOCK_SECONDS", 0.05)
    with uploaded._changing():
        assert UploadedVectors(tmp_path).verify() == {}, "a server starts while another one removes unused files"
    load, changed = UploadedVectors.load, []

    def load_slowly(self: UploadedVectors, entry: VectorEntry) -> ControlVector:
        if not changed:
            changed.append(uploaded.delete("b"))  # refused if `verify` has the lock
        return load(self, entry)

    monkeypatch.setattr(UploadedVectors, "load", load_slowly)
    assert UploadedVectors(tmp_path).verify() == {}, "a vector deleted meanwhile is not damaged"
    assert changed == [one(2).digest]


def test_threads_lose_no_change(tmp_path: Path) -> None:
    stores = [UploadedVectors(tmp_path) for _ in range(2)]

    def work(number: int) -> None:
        for i in range(10):
            stores[number % 2].put(f"v{number}-{i}", one(100 * number + i))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(UploadedVectors(tmp_path).manifest().vectors) == 40
    assert UploadedVectors(tmp_path).manifest().generation == 40


def test_kill_at_any_moment(tmp_path: Path) -> None:
    """50 times: a process uploads, replaces and deletes until it is killed. The folder has what it acknowledged."""
    rng = random.Random(5)
    state: dict[str, str] = {}
    undecided = 0
    for moment in range(50):
        began, done = _run_until_killed(tmp_path, seed=moment, seconds=rng.uniform(0.0, 0.06))
        for name, digest in done:
            _apply(state, name, digest)
        uploaded = UploadedVectors(tmp_path)
        assert uploaded.verify() == {}
        found = {name: entry.digest for name, entry in uploaded.manifest().vectors.items()}
        if found != state:
            # The change in progress may have happened or not, but not in part.
            assert len(began) == len(done) + 1
            _apply(state, *began[-1])
            undecided += 1
        assert found == state
        entries = list(uploaded.manifest().vectors.values())
        assert objects(tmp_path) == {each.object_name for each in entries}
        for each in entries:
            assert uploaded.load(each).digest == each.digest
    assert state
    assert undecided < 50


Change = tuple[str, str | None]


def _apply(state: dict[str, str], name: str, digest: str | None) -> None:
    if digest is None:
        state.pop(name, None)
    else:
        state[name] = digest


def _run_until_killed(folder: Path, seed: int, seconds: float) -> tuple[list[Change], list[Change]]:
    """Changes that a child process began, and those it acknowledged, before SIGKILL."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _change_forever(folder, seed, writer)
    os.close(writer)
    try:
        os.read(reader, 1)  # the child has started
        time.sleep(seconds)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with os.fdopen(reader) as report:
        lines = [json.loads(line) for line in report.read().splitlines() if line.endswith("]")]
    return [(n, d) for kind, n, d in lines if kind == "began"], [(n, d) for kind, n, d in lines if kind == "done"]


def _change_forever(folder: Path, seed: int, writer: int) -> None:
    def say(kind: str, name: str, digest: str | None) -> None:
        os.write(writer, f"{json.dumps([kind, name, digest])}\n".encode())

    os.write(writer, b"\n")
    try:
        rng, uploaded = random.Random(seed), UploadedVectors(folder)
        while True:
            name = f"v{rng.randrange(4)}"
            known = name in uploaded.manifest().vectors
            if known and rng.random() < 0.3:
                say("began", name, None)
                uploaded.delete(name)
                say("done", name, None)
            else:
                vector = one(rng.random(), width=2000)
                say("began", name, vector.digest)
                uploaded.put(name, vector, if_match=ANY if known else None)
                say("done", name, vector.digest)
    finally:
        os._exit(1)
