"""A registry on an unmounted, read-only or full volume: reads use the last known state, writes fail without effect."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from steer_engine.errors import RegistryError, RegistryFullError, UnknownVectorError
from steer_engine.vectors import ControlVector, Registry, save
from steer_engine.vectors import folder as folder_module
from steer_engine.vectors import storage as storage_module
from steer_engine.vectors.manifest import FOLDER
from steer_engine.vectors.storage import disk_errors

NOBODY = 65534
PRESET = {"edits": [{"vector": "a"}]}


def vector(seed: int, size: int = 64) -> ControlVector:
    return ControlVector(directions={1: np.random.default_rng(seed).standard_normal(size).astype(np.float32)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A registry with `a`, and the preset `p`."""
    registry = Registry(tmp_path)
    registry.put("a", vector(1))
    registry.put_preset("p", {"edits": [{"vector": "another"}]})
    return tmp_path


@contextmanager
def not_writable(folder: Path) -> Iterator[None]:
    """Makes a folder read-only, like a read-only mount. Root can write anyway, so the process changes its user."""
    everything = [folder, *folder.rglob("*")]
    modes = {path: path.stat().st_mode for path in everything}
    for path in everything:
        path.chmod(0o555 if path.is_dir() else 0o444)
    for parent in folder.parents:
        if parent.name.startswith("pytest-"):
            modes[parent] = parent.stat().st_mode
            parent.chmod(0o755)
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if was_root:
            os.seteuid(0)
        for path, mode in modes.items():
            path.chmod(mode)


@contextmanager
def full() -> Iterator[None]:
    """Limits files to 100 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


CHANGES: dict[str, Callable[[Registry], object]] = {
    "put": lambda registry: registry.put("b", vector(2)),
    "replace": lambda registry: registry.put("a", vector(2), if_match="*"),
    "delete": lambda registry: registry.delete("a"),
    "put_preset": lambda registry: registry.put_preset("q", {"edits": [{"vector": "a"}]}),
    "delete_preset": lambda registry: registry.delete_preset("p"),
    "incoming": lambda registry: registry.incoming("b"),
}


def assert_unchanged(registry: Registry) -> None:
    assert registry.get("a").digest == vector(1).digest
    assert registry.names() == {"a": vector(1).digest}
    assert list(registry.presets()) == ["p"]


@pytest.mark.parametrize("change", CHANGES)
def test_unmounted(folder: Path, change: str) -> None:
    """An unmounted volume leaves an empty folder. Nothing may be created there."""
    registry = Registry(folder)
    assert_unchanged(registry)
    assert registry.fault is None
    elsewhere = folder.with_name("elsewhere")
    folder.rename(elsewhere)
    folder.mkdir()
    assert_unchanged(registry)
    assert "cannot be read" in str(registry.fault)
    with pytest.raises(RegistryError, match="cannot be changed now") as caught:
        CHANGES[change](registry)
    assert caught.value.status == 503
    assert str(folder) not in caught.value.message
    assert list(folder.iterdir()) == []
    folder.rmdir()
    elsewhere.rename(folder)
    assert registry.fault is None
    CHANGES[change](registry)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """An operator's folder of files, with nothing uploaded."""
    folder = tmp_path / "files"
    save(vector(1), folder / "a.safetensors")
    save(vector(2), folder / "b.gguf")
    (folder / "p.preset.json").write_text(json.dumps(PRESET))
    return folder


def assert_files_are_served(registry: Registry) -> None:
    assert registry.get("a") == vector(1)
    assert registry.get("b") == vector(2)
    assert registry.preset("p") == PRESET
    assert registry.presets() == {"p": PRESET}
    assert registry.names() == {"a": vector(1).digest, "b": vector(2).digest}
    assert registry.get("a") == vector(1)


@pytest.mark.parametrize("leaves", ["nothing", "an empty mount point", "a file"])
def test_files_of_a_folder_that_is_away_are_served_on(files: Path, leaves: str) -> None:
    registry = Registry(files)
    assert registry.fault is None
    elsewhere = files.with_name("elsewhere")
    files.rename(elsewhere)
    if leaves == "an empty mount point":
        files.mkdir()
    elif leaves == "a file":
        files.write_text("an error that is not 'no such file'")
    assert_files_are_served(registry)
    assert registry.fault is not None
    assert str(files) not in registry.fault
    with pytest.raises(RegistryError, match="cannot be changed now") as caught:
        registry.put("c", vector(3))
    assert caught.value.status == 503
    if leaves == "an empty mount point":
        assert list(files.iterdir()) == []
        files.rmdir()
    elif leaves == "a file":
        files.unlink()
    elsewhere.rename(files)
    assert registry.fault is None
    assert_files_are_served(registry)
    for gone in files.iterdir():
        gone.unlink()
    assert registry.names() == registry.presets() == {}, "the folder is there, and the files were removed"
    with pytest.raises(UnknownVectorError):
        registry.get("a")


def test_another_folder_with_files_in_its_place_is_followed(files: Path) -> None:
    registry = Registry(files)
    files.rename(files.with_name("before"))
    save(vector(3), files / "c.safetensors")
    assert registry.names() == {"c": vector(3).digest}
    assert registry.presets() == {}
    assert registry.fault is None


def test_files_that_cannot_be_looked_at_for_a_while_are_served_on(
    files: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(files)
    with monkeypatch.context() as patched:
        for module in (folder_module, storage_module):
            patched.setattr(module, "file_signature", not_now)
        for _ in range(3):
            assert registry.get("a") == vector(1)
            assert registry.preset("p") == PRESET
        for name in ("none", "unknown"):
            with pytest.raises(UnknownVectorError):
                registry.get(name)
    # Each file once. An unknown name looks at no other file.
    assert len([record for record in caplog.records if "Stale file handle" in record.getMessage()]) == 2
    assert_files_are_served(registry)


def test_a_file_that_cannot_be_read_for_a_while_is_read_later(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        for module in (folder_module, storage_module):
            patched.setattr(module, "read_file", not_now)
        registry = Registry(files)
        assert registry.names() == registry.presets() == {}
    assert_files_are_served(registry)


def not_now(path: Path, *_: object) -> None:
    raise OSError(errno.ESTALE, "Stale file handle")


def test_a_vector_that_was_not_read_before_is_unavailable_and_not_unknown(folder: Path) -> None:
    """404 says that a name does not exist. A volume that is away cannot say so."""
    registry = Registry(folder)
    folder.rename(folder.with_name("elsewhere"))
    for name in ("a", vector(1).digest):
        with pytest.raises(RegistryError, match="cannot be read now") as caught:
            registry.get(name)
        assert caught.value.status == 503
        assert str(folder) not in caught.value.message
    with pytest.raises(UnknownVectorError):
        registry.get("never there")
    folder.with_name("elsewhere").rename(folder)
    assert_unchanged(registry)


def test_no_folder_at_all(folder: Path) -> None:
    registry = Registry(folder)
    assert_unchanged(registry)
    folder.rename(folder.with_name("elsewhere"))
    folder.write_text("an error that is not 'no such file'")
    assert_unchanged(registry)
    assert registry.fault is not None


@pytest.mark.parametrize("change", CHANGES)
def test_read_only(folder: Path, change: str) -> None:
    with not_writable(folder):
        registry = Registry(folder)
        assert_unchanged(registry)
        assert registry.fault is None, "it can be read"
        with pytest.raises(RegistryError, match="cannot be written") as caught:
            CHANGES[change](registry)
        assert caught.value.status == 503
        assert_unchanged(registry)


def test_a_read_only_replica_follows(folder: Path) -> None:
    """A replica that can only read sees the uploads of another one."""
    source = Registry(folder)
    with not_writable(folder):
        replica = Registry(folder)
    source.put("b", vector(2))
    with not_writable(folder):
        assert replica.get("b").digest == vector(2).digest


@pytest.mark.parametrize("change", ["put", "replace", "put_preset"])
def test_full(folder: Path, change: str) -> None:
    registry = Registry(folder)
    with full(), pytest.raises(RegistryFullError, match="is full"):
        CHANGES[change](registry)
    assert_unchanged(registry)
    assert_unchanged(Registry(folder, strict=True))
    assert not list((folder / FOLDER).rglob("*.part"))
    CHANGES[change](registry)


ON_A_SMALL_VOLUME = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-P", "-c"]
FULL_VOLUME = """
import os, subprocess, sys
from pathlib import Path
import numpy as np
from steer_engine.errors import RegistryFullError
from steer_engine.vectors import ControlVector, Registry

folder = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)

def vector(value):
    return ControlVector(directions={1: np.full(20_000, value, np.float32)})

registry = Registry(folder)
for value in range(6):
    registry.put(f"v{value}", vector(value + 1))
registry.put_preset("p", {"edits": [{"vector": "v0"}]})
with (folder / "fill").open("wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError:
        pass
assert os.statvfs(folder).f_bavail == 0
try:
    registry.put_preset("q", {"edits": [{"vector": "v1"}]})
    raise SystemExit("the volume is not full")
except RegistryFullError:
    pass
registry.delete_preset("p")
with (folder / "more").open("wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError:
        pass
assert os.statvfs(folder).f_bavail == 0
for value in range(5):
    registry.delete(f"v{value}")
again = Registry(folder, strict=True)
assert list(again.names()) == ["v5"], again.names()
assert again.presets() == {}
again.put("new", vector(9))
print("done")
"""


@pytest.mark.skipif(
    subprocess.run([*ON_A_SMALL_VOLUME[:-3], "true"], capture_output=True, check=False).returncode != 0,
    reason="mounting a file system is not allowed here",
)
def test_deleting_works_with_no_byte_free(tmp_path: Path) -> None:
    done = subprocess.run(
        [*ON_A_SMALL_VOLUME, FULL_VOLUME, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.parametrize(
    ("code", "status"), [(errno.ENOSPC, 507), (errno.EDQUOT, 507), (errno.EROFS, 503), (errno.EIO, 503)]
)
def test_disk_errors_become_registry_errors(code: int, status: int) -> None:
    with pytest.raises(RegistryError, match=os.strerror(code)) as caught, disk_errors():
        raise OSError(code, os.strerror(code))
    assert caught.value.status == status


def test_a_manifest_damaged_at_run_time(folder: Path) -> None:
    """The last known state is served, nothing can be changed until the repair, and clients see no path."""
    registry, path = Registry(folder), folder / FOLDER / "manifest.json"
    assert_unchanged(registry)
    good = path.read_bytes()
    path.write_bytes(good[:-3])
    assert_unchanged(registry)
    assert "damaged" in str(registry.fault)
    for change in CHANGES.values():
        with pytest.raises(RegistryError, match="cannot be changed now") as caught:
            change(registry)
        assert caught.value.status == 503
        assert str(folder) not in caught.value.message
    assert path.read_bytes() == good[:-3]
    path.write_bytes(good)
    assert registry.fault is None
    CHANGES["put"](registry)
