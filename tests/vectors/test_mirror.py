"""A mirror copies new and changed files, removes removed ones, leaves out unusable ones, and touches no others."""

from __future__ import annotations

import functools
import http.server
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec  # type: ignore[import-untyped]
import numpy as np
import pytest
from filelock import FileLock
from helpers.damage import SPECIAL

from steer_engine.errors import RegistryError, UnsupportedEngineError
from steer_engine.settings import RegistryLimits
from steer_engine.vectors import ControlVector, Registry, save
from steer_engine.vectors.manifest import VectorEntry
from steer_engine.vectors.mirror import LOCK, STATE, Mirror
from steer_engine.vectors.safetensors_format import to_bytes

CALM = {"edits": [{"vector": "north"}]}


def along(axis: int) -> ControlVector:
    direction = np.zeros(8, np.float32)
    direction[axis] = 1.0
    return ControlVector(directions={1: direction})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "here"
    made.mkdir()
    return made


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(params=["file", "memory", "http"])
def there(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Any]]:
    """A URL, and a function that writes (None: removes) a file there."""
    if request.param == "memory":
        url = f"memory://{uuid4().hex}"
        fs = fsspec.filesystem("memory")
        fs.makedirs(url)

        def write_there(name: str, data: bytes | None) -> None:
            fs.rm(f"{url}/{name}") if data is None else fs.pipe_file(f"{url}/{name}", data)

        yield url, write_there
        return
    root = tmp_path / "there"
    root.mkdir()

    def write(name: str, data: bytes | None) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink() if data is None else path.write_bytes(data)

    if request.param == "file":
        yield f"file://{root}", write
        return
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(root))) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", write
        server.shutdown()
        serving.join()


def test_files_are_copied_replaced_and_removed(there: tuple[str, Any], folder: Path, tmp_path: Path) -> None:
    url, write = there
    write("north.safetensors", to_bytes(along(1)))
    save(along(2), tmp_path / "south.gguf")
    write("south.gguf", (tmp_path / "south.gguf").read_bytes())
    write("calm.preset.json", json.dumps(CALM).encode())
    write("notes.txt", b"not a vector")
    mirror, registry = Mirror(url, folder), Registry(folder)
    assert mirror.sync()
    assert registry.names() == {"north": along(1).digest, "south": along(2).digest}
    assert registry.preset("calm") == CALM
    assert not (folder / "notes.txt").exists()

    read_again = (folder / "north.safetensors").stat().st_mtime_ns
    assert Mirror(url, folder).sync()
    assert (folder / "north.safetensors").stat().st_mtime_ns == read_again

    both = ControlVector(directions={0: along(3).directions[1], 1: along(4).directions[1]})
    write("north.safetensors", to_bytes(both))
    write("south.gguf", None)
    write("calm.preset.json", None)
    assert mirror.sync()
    assert registry.names() == {"north": both.digest}
    assert registry.presets() == {}
    # A removed copy is forgotten. The operator may add another file of that name, which stays.
    save(along(5), folder / "south.gguf")
    assert mirror.sync()
    assert registry.names() == {"north": both.digest, "south": along(5).digest}


def test_another_servers_registry(there: tuple[str, Any], folder: Path, tmp_path: Path) -> None:
    url, write = there
    (tmp_path / "other").mkdir()
    other = Registry(tmp_path / "other")

    def publish() -> None:
        for path in sorted((tmp_path / "other" / ".steer-engine").rglob("*")):
            if path.suffix in (".json", ".safetensors"):
                write(str(path.relative_to(tmp_path / "other")), path.read_bytes())

    other.put("north", along(1))
    other.put("same", along(1))
    other.put_preset("calm", CALM)
    publish()
    mirror, registry = Mirror(url, folder), Registry(folder)
    mirror.sync()
    assert registry.names() == other.names()
    assert registry.presets() == other.presets()
    other.put("north", along(2), if_match="*")
    other.delete("same")
    publish()
    mirror.sync()
    assert registry.names() == {"north": along(2).digest}

    # A file whose content differs from the manifest is not copied. The earlier copy stays.
    other.put("north", along(3), if_match="*")
    publish()
    name = VectorEntry.of(along(3).digest, to_bytes(along(3))).object_name
    write(f".steer-engine/objects/{name}", to_bytes(along(4)))
    mirror.sync()
    assert along(4).digest in mirror.faults["north.safetensors"]
    assert registry.names() == {"north": along(2).digest}


def test_a_broken_file_is_left_out_and_its_last_good_version_stays(there: tuple[str, Any], folder: Path) -> None:
    url, write = there
    write("north.safetensors", to_bytes(along(1)))
    write("new.safetensors", b"no header")
    mirror = Mirror(url, folder)
    mirror.sync()
    write("north.safetensors", b"cut")
    write("bad.preset.json", b"{}")
    mirror.sync()
    assert set(mirror.faults) == {"north.safetensors", "new.safetensors", "bad.preset.json"}
    assert Registry(folder).names() == {"north": along(1).digest}
    write("new.safetensors", to_bytes(along(2)))
    mirror.sync()
    assert Registry(folder).names() == {"north": along(1).digest, "new": along(2).digest}


def test_the_operators_own_files_are_neither_replaced_nor_removed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    save(along(1), tmp_path / "there" / "north.safetensors")
    save(along(2), folder / "north.safetensors")
    save(along(3), folder / "own.safetensors")
    mirror = Mirror(f"file://{tmp_path}/there", folder)
    mirror.sync()
    assert "did not come from the URL" in mirror.faults["north.safetensors"]
    (tmp_path / "there" / "north.safetensors").unlink()
    mirror.sync()
    assert Registry(folder).names() == {"north": along(2).digest, "own": along(3).digest}


def test_a_copy_left_by_a_killed_process_is_replaced(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    save(along(1), tmp_path / "there" / "north.safetensors")
    mirror = Mirror(f"file://{tmp_path}/there", folder)
    mirror.sync()
    state = json.loads((folder / STATE).read_text())
    state["copies"]["north.safetensors"] = {"version": "", "digest": None}  # the state saved before the file is written
    (folder / STATE).write_text(json.dumps(state))
    save(along(2), tmp_path / "there" / "north.safetensors")
    Mirror(mirror.url, folder).sync()
    assert Registry(folder).names() == {"north": along(2).digest}


def test_an_unreachable_source_is_an_error_and_removes_nothing(folder: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    save(along(1), there / "north.safetensors")
    mirror = Mirror(f"file://{there}", folder)
    assert not mirror.has_copies
    mirror.sync()
    assert mirror.has_copies
    there.rename(tmp_path / "elsewhere")
    for url in (f"file://{there}", "http://127.0.0.1:9/x"):
        with pytest.raises(RegistryError, match="cannot be read"):
            Mirror(url, folder if url.startswith("file") else tmp_path / "elsewhere").sync()
    assert Registry(folder).names() == {"north": along(1).digest}


def test_one_process_at_a_time(folder: Path, tmp_path: Path) -> None:
    mirror = Mirror(f"file://{tmp_path}", folder)
    with FileLock(folder / LOCK):
        assert not mirror.sync()
    assert mirror.sync()


def test_the_limits_of_a_registry_apply(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for axis in range(3):
        save(along(axis), tmp_path / "there" / f"v{axis}.safetensors")
    mirror = Mirror(f"file://{tmp_path}/there", folder, RegistryLimits(max_vectors=2, max_presets=0))
    with pytest.raises(RegistryError, match="3 files; the registry takes at most 2"):
        mirror.sync()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("s3://bucket/vectors", "s3fs"),
        ("nowhere://x", "nowhere"),
        ("https://user:secret@example.org/x", "must not contain a password"),
    ],
)
def test_an_unusable_url_is_refused_with_a_reason(
    folder: Path, url: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
    with pytest.raises(UnsupportedEngineError, match=reason) as refused:
        Mirror(url, folder)
    assert "secret" not in str(refused.value)


def test_a_folder_mirrors_one_url(folder: Path, tmp_path: Path) -> None:
    Mirror(f"file://{tmp_path}", folder).sync()
    with pytest.raises(UnsupportedEngineError, match="is a copy of"):
        Mirror("memory://elsewhere", folder)


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["odd.safetensors", "odd.gguf", "odd.preset.json"])
@pytest.mark.timeout(20)
def test_special_files_at_the_url_are_left_out(folder: Path, tmp_path: Path, name: str, kind: str) -> None:
    there = tmp_path / "there"
    save(along(1), there / "north.safetensors")
    save(along(2), there / "south.safetensors")
    SPECIAL[kind](there / name)
    Mirror(f"file://{there}", folder).sync()
    assert Registry(folder).names() == {"north": along(1).digest, "south": along(2).digest}
