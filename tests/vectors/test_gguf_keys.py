"""A GGUF file that says more than "add these directions" is refused, or imported as what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFReader
from helpers.gguf_files import write_gguf

from steer_engine.errors import VectorFileError
from steer_engine.vectors import Registry, load, save
from steer_engine.vectors.gguf_format import from_bytes
from steer_engine.vectors.importers import import_vector

PROJECT: dict[str, object] = {
    "glp.mode": "project",
    "glp.spec_version": 1,
    "glp.alpha_default": 4.0,
    "glp.rank": 1,
    "glp.orthonormal": True,
    "glp.hook_point": "residual_stream_post_layer",
    "glp.derived_at": "residual_stream_post_layer",
    "glp.content_sha256": "0" * 64,
    "glp.created": "2026-09-01",
    "glp.method": "paired_difference_of_means",
    "glp.layer_ids_zero_based": "1,3",
    "general.base_model.0.name": "example/model",
}
"""The keys of a file as the GLP specification describes it."""


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (PROJECT, r"made for op 'ablate' with scale 4 \(glp.mode, glp.alpha_default\).*vectors import"),
        ({"glp.mode": "project"}, "made for op 'ablate' with scale 1"),
        ({"glp.mode": "add", "glp.alpha_default": 2.0}, "made for op 'add' with scale 2"),
        ({"glp.mode": "rotate"}, "glp.mode = 'rotate' is not supported"),
        ({"glp.mode": 1}, "glp.mode = 1 is not supported"),
        ({"glp.mode": ["project"]}, "glp.mode = 'an array' is not supported"),
        ({"glp.hook_point": "ffn_out_pre_residual"}, "glp.hook_point = 'ffn_out_pre_residual' is not supported"),
        (PROJECT | {"glp.spec_version": 2}, "glp.spec_version = 2 is not supported"),
        (PROJECT | {"glp.rank": 2}, "glp.rank = 2 is not supported"),
        (PROJECT | {"glp.alpha_default": float("nan")}, "glp.alpha_default = nan is not supported"),
        (PROJECT | {"glp.layer_ids_zero_based": "0,2"}, "glp.layer_ids_zero_based = '0,2' is not supported"),
        ({"glp.structure": "per-execution-step"}, "the key 'glp.structure' is not known"),
        ({"controlvector.mode": "multiply"}, "the key 'controlvector.mode' is not known"),
        ({"dspark.mode": "project"}, "the key 'dspark.mode' is not known.*import the file with.*--force"),
        ({f"k.{i:02d}": i for i in range(20)}, "'k.07' is not known; and 12 more"),
        ({"k" * 300: "v"}, r"the key 'k{70,76}\.\.\.' is not known"),
    ],
)
def test_what_is_not_an_addition_is_refused_and_named(tmp_path: Path, keys: dict[str, object], named: str) -> None:
    path = write_gguf(tmp_path / "v.gguf", keys)
    with pytest.raises(VectorFileError, match=named):
        load(path)
    with pytest.raises(VectorFileError, match=named):
        from_bytes(path.read_bytes())


def test_a_server_leaves_such_a_file_out(tmp_path: Path) -> None:
    write_gguf(tmp_path / "v.gguf", PROJECT)
    assert Registry(tmp_path).names() == {}
    with pytest.raises(VectorFileError, match="made for op 'ablate'"):
        Registry(tmp_path, strict=True)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"general.name": "calm", "general.anything": 3, "general.tags": ["a", "b"]},
        {"glp.mode": "add", "glp.spec_version": 1, "glp.hook_point": "residual_stream_post_layer"},
        {"glp.mode": "add", "glp.alpha_default": 1.0, "glp.contrast": "calm_vs_angry"},
    ],
)
def test_descriptions_are_read(tmp_path: Path, keys: dict[str, object]) -> None:
    assert load(write_gguf(tmp_path / "v.gguf", keys)).blocks == (1, 3)


def test_a_projection_is_imported_as_an_ablation(tmp_path: Path) -> None:
    vector = import_vector(write_gguf(tmp_path / "v.gguf", PROJECT), "gguf")
    assert vector.directions[3].tolist() == [3.0, 1.0, -2.0]
    assert "Made for op 'ablate' with scale 4." in vector.metadata.notes
    assert vector.metadata.extra["glp.mode"] == "project"
    save(vector, tmp_path / "v.safetensors")
    assert load(tmp_path / "v.safetensors").metadata == vector.metadata


def test_a_projection_stays_one_when_it_is_written_as_gguf(tmp_path: Path) -> None:
    """llama.cpp's forks and ours read the operation from these keys."""
    vector = import_vector(write_gguf(tmp_path / "v.gguf", PROJECT), "gguf")
    save(vector, tmp_path / "back.gguf")
    reader = GGUFReader(tmp_path / "back.gguf")
    for key in ("glp.mode", "glp.spec_version", "glp.alpha_default", "glp.rank", "glp.hook_point"):
        assert reader.get_field(key).contents() == PROJECT[key]
    with pytest.raises(VectorFileError, match="made for op 'ablate'"):
        load(tmp_path / "back.gguf")
    again = import_vector(tmp_path / "back.gguf", "gguf")
    assert again == vector
    assert again.metadata.extra == vector.metadata.extra
    assert again.metadata.notes.count("Made for op") == 1


def test_metadata_that_cannot_be_written_as_keys_are_refused(tmp_path: Path) -> None:
    vector = import_vector(write_gguf(tmp_path / "v.gguf", PROJECT), "gguf")
    for rank in ("one", "-1", "4294967296", "9" * 5000):
        wrong = vector.with_metadata(extra=vector.metadata.extra | {"glp.rank": rank[:1024]})
        with pytest.raises(VectorFileError, match=rf"glp\.rank is '{rank[:10]}.*; a number from 0 is needed"):
            save(wrong, tmp_path / "w.gguf")


def test_ignored_keys_are_named_in_the_notes(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "v.gguf", {"glp.mode": "rotate", "other.tool": 1})
    with pytest.raises(VectorFileError, match="'other.tool' is not known"):
        import_vector(path, "gguf")
    vector = import_vector(path, "gguf", keys="ignored")
    assert vector.metadata.notes == (
        "Imported from v.gguf (gguf). Ignored in the file: glp.mode = 'rotate' is not supported; "
        "the key 'other.tool' is not known. GGUF model hint: llama"
    )
    assert "glp.mode" not in vector.metadata.extra
    elsewhere = write_gguf(tmp_path / "w.gguf", PROJECT | {"glp.hook_point": "ffn_out_pre_residual"})
    notes = import_vector(elsewhere, "gguf", keys="ignored").metadata.notes
    assert "Made for op 'ablate' with scale 4. Ignored in the file: glp.hook_point" in notes


def test_a_projection_has_no_block_0(tmp_path: Path) -> None:
    keys = PROJECT | {"glp.layer_ids_zero_based": "0,1"}
    with pytest.raises(VectorFileError, match=r"direction\.0 is not possible with glp\.mode"):
        import_vector(write_gguf(tmp_path / "v.gguf", keys, (0, 1)), "gguf")
