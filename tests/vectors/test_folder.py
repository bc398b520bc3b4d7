"""Vectors and presets in files of the operator's folder, and vectors added in memory."""

from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from registry_costs import counted_stats

from steer_engine.errors import ModelMismatchError, SteeringRequestError, UnknownVectorError, VectorFileError
from steer_engine.vectors import ControlVector, Registry, save
from steer_engine.vectors import folder as folder_module
from steer_engine.vectors.files import AnyVector
from steer_engine.vectors.folder import MAX_PRESET_FILE_BYTES, PresetFiles, check_preset

CALM = {"edits": [{"vector": "calm", "scale": 1.5, "blocks": "8-22"}]}


def one(value: float, block: int = 1, width: int = 4) -> ControlVector:
    return ControlVector(directions={block: np.full(width, value, np.float32)})


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Records the paths that the registry reads from disk."""
    seen: list[Path] = []
    original = folder_module.load_any

    def load_any(path: Path) -> AnyVector:
        seen.append(path)
        return original(path)

    monkeypatch.setattr(folder_module, "load_any", load_any)
    return seen


def test_the_name_of_a_file_is_its_stem(tmp_path: Path) -> None:
    save(one(1), tmp_path / "cheerful.safetensors")
    save(one(2), tmp_path / "Formal-v1.2_b.gguf")
    (tmp_path / "README.txt").write_text("not a vector")
    (tmp_path / ".hidden.safetensors").write_text("ignored")
    registry = Registry(tmp_path)
    assert registry.names() == {"Formal-v1.2_b": one(2).digest, "cheerful": one(1).digest}
    assert registry.get("cheerful") == one(1)
    assert registry.get(one(2).digest) == one(2)
    assert registry.digest_of("cheerful") == one(1).digest
    assert registry.directory == tmp_path


def test_errors_for_unknown_names_list_the_registered_ones(tmp_path: Path) -> None:
    registry = Registry()
    with pytest.raises(UnknownVectorError, match="no control vector 'a'; none is registered") as caught:
        registry.get("a")
    assert caught.value.status == 404
    assert caught.value.param == "vector"
    for i in range(10):
        registry.add(f"v{i}", one(i))
    with pytest.raises(UnknownVectorError, match="v6, v7 and 2 more"):
        registry.get("../../etc/passwd")
    with pytest.raises(UnknownVectorError):
        registry.get("sha256:" + "0" * 64)
    with pytest.raises(UnknownVectorError) as caught:
        registry.get("x" * 100_000)
    assert len(caught.value.message) < 400


def test_a_name_with_path_parts_reaches_no_file(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save(one(1), tmp_path / "outside.safetensors")
    registry = Registry(tmp_path / "in")
    for name in ("../outside", "./../outside", str(tmp_path / "outside"), "..", "", "a\0b"):
        with pytest.raises(UnknownVectorError):
            registry.get(name)


def test_broken_and_foreign_files_are_logged_once_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(one(1), tmp_path / "good.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\0" * 20)
    (tmp_path / "folder.gguf").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    save(one(3), tmp_path / "-bad name.safetensors")
    with caplog.at_level(logging.INFO):
        registry = Registry(tmp_path)
        assert list(registry.names()) == ["good"]
        registry.names()
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 4
    for part in (
        "broken.safetensors: The header",
        "folder.gguf: not a regular",
        "pipe.safetensors: not a regular",
        "-bad name.safetensors: the file's stem is not usable",
    ):
        assert sum(part in error for error in errors) == 1
    with pytest.raises(UnknownVectorError):
        registry.get("broken")
    with pytest.raises(VectorFileError, match=r"broken\.safetensors.*folder\.gguf"):
        Registry(tmp_path, strict=True)


def test_the_folder_must_exist(tmp_path: Path) -> None:
    with pytest.raises(VectorFileError, match="gone: the folder of control vectors does not exist"):
        Registry(tmp_path / "gone")


def test_a_stem_used_twice_is_an_error_for_the_second(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(one(1), tmp_path / "v.safetensors")
    save(one(2), tmp_path / "v.gguf")
    assert Registry(tmp_path).get("v") == one(1)
    assert r"v.gguf: left out, the name 'v' is already taken by v.safetensors" in caplog.text
    with pytest.raises(VectorFileError, match="already taken"):
        Registry(tmp_path, strict=True)


def test_changed_files_are_read_again_and_unchanged_ones_are_not(tmp_path: Path, reads: list[Path]) -> None:
    path = tmp_path / "v.safetensors"
    save(one(1), path)
    registry = Registry(tmp_path)
    registry.get("v")
    registry.names()
    assert reads == [path]
    save(one(2), path)
    assert registry.get("v") == one(2)
    save(one(3), tmp_path / "w.safetensors")
    assert registry.get("w") == one(3)
    assert registry.names() == {"v": one(2).digest, "w": one(3).digest}
    assert len(reads) == 3
    with pytest.raises(UnknownVectorError):
        registry.get(one(1).digest)
    path.unlink()
    with pytest.raises(UnknownVectorError):
        registry.get("v")
    assert registry.names() == {"w": one(3).digest}
    with pytest.raises(UnknownVectorError):
        registry.get(one(2).digest)


def test_a_new_file_is_found_by_digest(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    save(one(5), tmp_path / "late.safetensors")
    assert registry.get(one(5).digest) == one(5)


def test_the_last_good_version_of_a_file_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "v.safetensors"
    save(one(1), path)
    registry = Registry(tmp_path, strict=True)
    path.write_bytes(path.read_bytes()[:-3])
    assert registry.get("v") == one(1)
    assert f"The version read before ({one(1).digest}) stays." in caplog.text
    save(one(2), path)
    assert registry.get("v") == one(2)


def test_a_removed_folder_loses_only_its_own_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "vectors"
    save(one(1), folder / "v.safetensors")
    registry = Registry(folder)
    registry.add("memory", one(2))
    (folder / "v.safetensors").unlink()
    with pytest.raises(UnknownVectorError):
        registry.get("v")
    folder.rmdir()
    assert registry.get("memory") == one(2)
    assert "memory" in registry.names()
    assert "folder cannot be read" in caplog.text


def test_add(tmp_path: Path) -> None:
    save(one(1), tmp_path / "file.safetensors")
    registry = Registry(tmp_path)
    assert registry.add("memory", one(2)) == one(2).digest
    registry.add("memory", one(3))
    registry.add("alias", one(3))
    assert registry.get("memory") == one(3)
    with pytest.raises(SteeringRequestError, match=r"belongs to the file file\.safetensors") as caught:
        registry.add("file", one(2))
    assert caught.value.param == "name"
    for name in ("", "-a", "a b", "a/b", "a" * 129, "sha256:" + "0" * 64, "a\n", "ä"):
        with pytest.raises(SteeringRequestError, match="not usable as a name"):
            registry.add(name, one(2))
    registry.add("a" * 128, one(2))


def test_a_vector_is_available_by_digest_while_a_name_has_it(tmp_path: Path) -> None:
    save(one(1), tmp_path / "file.safetensors")
    save(one(1), tmp_path / "copy.safetensors")
    registry = Registry(tmp_path)
    registry.add("kept", one(2))
    for i in range(100):
        registry.add("moving", one(i))
    assert registry.get(one(99).digest) is registry.get("moving")
    assert registry.get(one(2).digest) is registry.get("kept")
    with pytest.raises(UnknownVectorError):
        registry.get(one(98).digest)
    (tmp_path / "file.safetensors").unlink()
    assert registry.get(one(1).digest) == one(1), "the copy has it"
    (tmp_path / "copy.safetensors").unlink()
    with pytest.raises(UnknownVectorError):
        registry.get(one(1).digest)


def test_an_unknown_digest_does_not_read_a_folder_that_has_not_changed(tmp_path: Path) -> None:
    for i in range(20):
        save(one(i), tmp_path / f"v{i}.safetensors")
    os.utime(tmp_path, (1, 1))  # long ago
    registry = Registry(tmp_path)
    with counted_stats() as calls, pytest.raises(UnknownVectorError):
        registry.get("sha256:" + "0" * 64)
    assert not [path for path in calls if path.endswith(".safetensors")]
    save(one(50), tmp_path / "late.safetensors")
    assert registry.get(one(50).digest) == one(50)


def test_check_against_a_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(one(1, block=1), tmp_path / "fits.safetensors")
    save(one(1, block=9), tmp_path / "deep.safetensors")
    save(one(1, width=8), tmp_path / "wide.safetensors")
    registry = Registry(tmp_path)
    misfits = registry.check(hidden_size=4, num_blocks=9)
    assert sorted(misfits) == ["deep", "wide"]
    assert "Control vector wide does not fit this model: The vector has hidden size 8" in caplog.text
    with pytest.raises(ModelMismatchError, match=r"deep: .*wide: "):
        registry.check(hidden_size=4, num_blocks=9, strict=True)
    assert registry.check(hidden_size=4, num_blocks=10, strict=False).keys() == {"wide"}


def test_threads_see_one_version_or_the_other(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    versions = {one(1).digest, one(2).digest}
    save(one(1), path)
    registry = Registry(tmp_path)
    stop = threading.Event()
    faults: list[object] = []

    def look() -> None:
        while not stop.is_set():
            try:
                if registry.get("v").digest not in versions or registry.names().keys() != {"v"}:
                    faults.append("unexpected content")
            except Exception as error:
                faults.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for i in range(50):
        save(one(1 + i % 2), path)
    stop.set()
    for thread in threads:
        thread.join()
    assert faults == []


def test_preset_files_have_their_stem_as_name_and_are_followed(tmp_path: Path) -> None:
    presets = PresetFiles(tmp_path)
    assert presets.all() == {}
    path = tmp_path / "calm.preset.json"
    path.write_text(json.dumps(CALM))
    assert presets.all() == {"calm": CALM}
    other = {"edits": [{"vector": "loud"}]}
    path.unlink()
    assert presets.get("calm") is None
    path.write_text(json.dumps(other))
    assert presets.get("calm") == other


def test_unusable_preset_files_are_logged_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = {
        "text": "calm",
        "nested": json.dumps({"preset": "calm"}),
        "empty": json.dumps({"edits": []}),
        "typo": json.dumps({"edits": [{"vektor": "calm"}]}),
        "deep": "[" * 100_000,
        "null": "null",
        "large": " " * (MAX_PRESET_FILE_BYTES + 1),
        "inline": json.dumps({"edits": [{"vector": {"data": "AAAA"}}]}),
        "inline-condition": json.dumps({"edits": [{"vector": "v", "when": {"any": [{"vector": {"data": "AAAA"}}]}}]}),
    }
    for name, text in bad.items():
        (tmp_path / f"{name}.preset.json").write_text(text)
    (tmp_path / "good.preset.json").write_text(json.dumps(CALM))
    (tmp_path / ".hidden.preset.json").write_text("ignored")
    presets = PresetFiles(tmp_path)
    assert presets.all() == {"good": CALM}
    assert presets.all() == {"good": CALM}
    assert sorted(presets.faults) == sorted(bad)
    assert all(f"{name}.preset.json" in caplog.text for name in bad)
    assert len(caplog.records) == len(bad)
    (tmp_path / "text.preset.json").write_text(json.dumps(CALM))
    assert presets.get("text") == CALM
    assert "text" not in presets.faults


def test_a_removed_folder_has_no_presets(tmp_path: Path) -> None:
    assert PresetFiles(tmp_path / "gone").all() == {}


def test_check_preset_names_the_field(tmp_path: Path) -> None:
    assert check_preset(CALM) == CALM
    with pytest.raises(SteeringRequestError) as wrong:
        check_preset({"edits": [{"vector": "calm", "scale": "1"}]})
    assert wrong.value.param == "steering.edits[0].scale"


def test_a_preset_cannot_have_a_capture() -> None:
    with pytest.raises(SteeringRequestError, match="captures belong in requests"):
        check_preset({"edits": [{"vector": "v"}], "capture": {}})
