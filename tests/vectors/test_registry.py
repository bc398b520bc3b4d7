"""A registry with both sources of names: uploads over the API, and files of the operator."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from steer_engine.errors import (
    RegistryConflictError,
    RegistryError,
    SteeringRequestError,
    UnknownVectorError,
    VectorFileError,
)
from steer_engine.settings import ApiLimits
from steer_engine.vectors import ControlVector, Registry, save
from steer_engine.vectors import uploaded as uploaded_module
from steer_engine.vectors.manifest import FOLDER, Manifest, VectorEntry, write_manifest
from steer_engine.vectors.safetensors_format import to_bytes

CALM = {"edits": [{"vector": "put", "scale": 1.5}]}


def one(value: float, width: int = 4) -> ControlVector:
    return ControlVector(directions={1: np.full(width, value, np.float32)})


def test_an_upload_is_durable_and_visible_to_other_processes(tmp_path: Path) -> None:
    registry, other = Registry(tmp_path), Registry(tmp_path)
    assert registry.put("put", one(1)) is True
    for each in (registry, other, Registry(tmp_path, strict=True)):
        assert each.get("put") == one(1)
        assert each.get(one(1).digest) == one(1)
        assert each.names() == {"put": one(1).digest}
        assert each.digest_of("put") == one(1).digest
        assert each.generation == 1
    other.put("put", one(2), if_match=one(1).digest)
    assert registry.get("put") == one(2)
    with pytest.raises(UnknownVectorError):
        registry.get(one(1).digest)
    other.delete("put")
    with pytest.raises(UnknownVectorError):
        registry.get("put")
    assert registry.names() == {}


def test_names_of_files_cannot_be_changed_over_the_api(tmp_path: Path) -> None:
    save(one(1), tmp_path / "file.safetensors")
    registry = Registry(tmp_path)
    with pytest.raises(RegistryConflictError, match=r"belongs to the file file\.safetensors"):
        registry.put("file", one(2))
    with pytest.raises(RegistryConflictError, match="remove the file"):
        registry.delete("file")
    registry.put("put", one(2))
    assert registry.names() == {"file": one(1).digest, "put": one(2).digest}
    save(one(3), tmp_path / "put.safetensors")
    assert registry.get("put") == one(2)  # an acknowledged upload takes precedence over a file
    registry.delete("put")
    assert registry.get("put") == one(3)


def test_presets_of_both_sources(tmp_path: Path) -> None:
    (tmp_path / "calm.preset.json").write_text(json.dumps(CALM))
    registry = Registry(tmp_path)
    assert registry.preset("calm") == CALM
    loud = {"edits": [{"vector": "put", "scale": 9.0}]}
    assert registry.put_preset("loud", loud) is True
    assert Registry(tmp_path).presets() == {"calm": CALM, "loud": loud}
    with pytest.raises(RegistryConflictError):
        registry.put_preset("calm", loud)
    with pytest.raises(RegistryConflictError):
        registry.delete_preset("calm")
    with pytest.raises(SteeringRequestError):
        registry.put_preset("bad", {"preset": "calm"})
    with pytest.raises(UnknownVectorError, match="there are: calm, loud"):
        registry.preset("clam")
    with pytest.raises(UnknownVectorError, match="there are: loud, calm"):
        registry.preset("lound")
    for name in ("../calm", "", "x" * 100_000, "a\0"):
        with pytest.raises(UnknownVectorError):
            registry.preset(name)
    registry.delete_preset("loud")
    assert Registry(tmp_path).presets() == {"calm": CALM}


@pytest.mark.parametrize("name", ["", "-a", "a b", "a/b", "..", "a" * 129, "sha256:" + "0" * 64, "a\n", "ä", "a\0"])
def test_unusable_names_are_refused(tmp_path: Path, name: str) -> None:
    registry = Registry(tmp_path)
    for change in (
        lambda: registry.put(name, one(1)),
        lambda: registry.delete(name),
        lambda: registry.put_preset(name, CALM),
        lambda: registry.delete_preset(name),
    ):
        with pytest.raises(SteeringRequestError, match="not usable as a name"):
            change()
    assert list(tmp_path.iterdir()) == []


def test_uploads_need_a_folder() -> None:
    registry = Registry()
    registry.add("memory", one(1))
    assert registry.generation == 0
    assert registry.presets() == {}
    with pytest.raises(RegistryError, match="--steering-vectors"):
        registry.put("a", one(1))


def test_damaged_content_is_logged_and_raises_404(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Registry(tmp_path).put("put", one(1))
    (path,) = (tmp_path / FOLDER / "objects").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    registry = Registry(tmp_path)
    assert "Control vector put" in caplog.text
    with pytest.raises(UnknownVectorError, match="damaged"):
        registry.get("put")
    assert registry.check(hidden_size=4, num_blocks=9) == {}
    with pytest.raises(VectorFileError):
        Registry(tmp_path, strict=True)


def test_the_cache_is_limited_and_removed_vectors_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ApiLimits.variable("loaded_bytes"), str(3 * 4 * 4))
    registry = Registry(tmp_path)
    for i in range(10):
        registry.put(f"v{i}", one(i))
    assert len(registry._cache.digests()) == 3
    for i in range(10):
        assert registry.get(f"v{i}") == one(i)
        assert len(registry._cache.digests()) <= 3
    large = one(1, width=1000)
    registry.put("large", large)
    assert registry._cache.digests() == [VectorEntry.of(large.digest, to_bytes(large)).object_name]


def test_a_deleted_or_replaced_vector_is_not_available_by_digest(tmp_path: Path) -> None:
    """In every process that serves the folder. A resolved request keeps its vectors itself."""
    registry, other = Registry(tmp_path), Registry(tmp_path)
    registry.put("put", one(1))
    assert other.get(one(1).digest) == one(1)
    registry.put("put", one(2), if_match="*")
    for each in (registry, other):
        with pytest.raises(UnknownVectorError):
            each.get(one(1).digest)
        assert each.get(one(2).digest) == one(2)
    other.put("copy", one(2))
    registry.delete("put")
    for each in (registry, other):
        assert each.get(one(2).digest) == one(2), "the copy has it"
    registry.delete("copy")
    for each in (registry, other):
        with pytest.raises(UnknownVectorError):
            each.get(one(2).digest)


def test_an_unknown_name_costs_the_same_for_any_number_of_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(tmp_path)
    registry.put("known", one(1))
    entries = {f"v{i:05}": VectorEntry(digest=f"sha256:{i:064x}", num_bytes=1) for i in range(20_000)}
    presets = {f"p{i:05}": CALM for i in range(1000)}
    write_manifest(tmp_path / FOLDER / "manifest.json", Manifest(generation=2, vectors=entries, presets=presets))
    assert registry.generation == 2

    def parse(*_: object) -> None:
        raise AssertionError("the manifest has not changed")

    monkeypatch.setattr(Manifest, "model_validate", parse)
    registry._uploaded.manifest().by_digest  # type: ignore[union-attr]  # noqa: B018 - computed once per manifest
    began = time.process_time()
    for _ in range(100):
        for unknown in ("nobody", "sha256:" + "f" * 64):
            with pytest.raises(UnknownVectorError, match="v00000, .* and 19992 more"):
                registry.get(unknown)
        with pytest.raises(UnknownVectorError, match="p00000"):
            registry.preset("nobody")
    assert time.process_time() - began < 0.5, "parsing the manifest once would take 0.1 s"


def test_a_vector_used_by_a_preset_file_cannot_be_deleted(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    registry.put("put", one(1))
    (tmp_path / "calm.preset.json").write_text(json.dumps(CALM))
    with pytest.raises(RegistryConflictError, match="calm"):
        registry.delete("put")
    assert registry.get("put") == one(1)
    registry.put("put", one(2), if_match="*")  # the preset uses the name, so it follows
    (tmp_path / "calm.preset.json").unlink()
    registry.delete("put")


@pytest.mark.parametrize("in_file", [True, False])
def test_content_used_by_a_preset_by_digest_cannot_be_removed(tmp_path: Path, in_file: bool) -> None:
    registry = Registry(tmp_path)
    registry.put("put", one(1))
    pinned = {"edits": [{"vector": "other", "gate": {"vector": one(1).digest, "min_cos": 0.0}}]}
    if in_file:
        (tmp_path / "pinned.preset.json").write_text(json.dumps(pinned))
    else:
        registry.put_preset("pinned", pinned)
    with pytest.raises(RegistryConflictError, match="pinned"):
        registry.delete("put")
    with pytest.raises(RegistryConflictError, match="pinned"):
        registry.put("put", one(2), if_match="*")
    assert Registry(tmp_path).get(one(1).digest) == one(1)
    registry.put("copy", one(1))
    registry.put("put", one(2), if_match="*")
    with pytest.raises(RegistryConflictError, match="pinned"):
        registry.delete("copy")
    registry.put("put", one(1), if_match="*")
    registry.delete("copy")
    assert Registry(tmp_path).get(one(1).digest) == one(1)


def test_a_change_that_stat_does_not_show_yet_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system may answer `stat` from its cache for seconds, but opens the newest version of a file.

    A change must not undo another one that `stat` does not show yet.
    """
    registry, other = Registry(tmp_path), Registry(tmp_path)
    registry.put("first", one(1))
    manifest = tmp_path / FOLDER / "manifest.json"
    assert other.get("first") == one(1)
    stale = uploaded_module.file_signature(manifest)
    real = uploaded_module.file_signature
    monkeypatch.setattr(uploaded_module, "file_signature", lambda path: stale if path == manifest else real(path))
    registry.put("second", one(2))
    registry.put_preset("calm", CALM)
    assert other.get("second") == one(2)
    assert other.get(one(2).digest) == one(2)
    registry.put_preset("loud", CALM)
    assert other.preset("loud") == CALM
    with pytest.raises(UnknownVectorError):
        other.get("third")


def test_each_name_has_its_own_metadata(tmp_path: Path) -> None:
    """Metadata are not content, so two names of one digest may differ in them."""
    registry, other = Registry(tmp_path), Registry(tmp_path)
    mine, theirs = one(1).with_metadata(notes="mine", model="m"), one(1).with_metadata(notes="theirs, and longer")
    assert mine == theirs
    registry.put("mine", mine)
    registry.put("theirs", theirs)
    for each in (registry, other, Registry(tmp_path, strict=True)):
        assert each.get("mine").metadata == mine.metadata
        assert each.get("theirs").metadata == theirs.metadata
        assert each.get(one(1).digest) == one(1)
    newer = one(1).with_metadata(notes="newer")
    assert registry.put("mine", newer) is False, "other metadata are no other content: If-Match is not needed"
    for each in (registry, other, Registry(tmp_path, strict=True)):
        assert each.get("mine").metadata == newer.metadata
        assert each.get("theirs").metadata == theirs.metadata
    registry.delete("theirs")
    assert len(list((tmp_path / FOLDER / "objects").iterdir())) == 1
    assert Registry(tmp_path, strict=True).get("mine").metadata == newer.metadata


def test_a_file_whose_metadata_change_is_followed(tmp_path: Path) -> None:
    save(one(1).with_metadata(notes="old"), tmp_path / "v.safetensors")
    save(one(1).with_metadata(notes="another"), tmp_path / "w.safetensors")
    registry = Registry(tmp_path)
    assert [registry.get(name).metadata.notes for name in "vw"] == ["old", "another"]
    save(one(1).with_metadata(notes="new"), tmp_path / "v.safetensors")
    assert [registry.get(name).metadata.notes for name in "vw"] == ["new", "another"]


def test_objects_named_by_their_digest_alone_are_served(tmp_path: Path) -> None:
    """As manifests without `file` name them."""
    registry = Registry(tmp_path)
    registry.put("v", one(1))
    root = tmp_path / FOLDER
    (path,) = (root / "objects").iterdir()
    path.rename(path.with_name(f"{one(1).digest.removeprefix('sha256:')}.safetensors"))
    manifest = json.loads((root / "manifest.json").read_text())
    del manifest["vectors"]["v"]["file"]
    (root / "manifest.json").write_text(json.dumps(manifest))
    again = Registry(tmp_path, strict=True)
    assert again.get("v") == again.get(one(1).digest) == one(1)
    assert again.put("v", one(1)) is False
    assert Registry(tmp_path, strict=True).get("v") == one(1)
