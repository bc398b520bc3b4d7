from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from steer_engine.errors import VectorFileError
from steer_engine.vectors import ControlVector, load, save
from steer_engine.vectors.importers import KINDS, import_vector


def test_the_source_is_noted_and_the_result_can_be_saved(tmp_path: Path) -> None:
    vector = ControlVector(directions={3: np.array([1.0, 2.0])})
    save(vector, tmp_path / "theirs.gguf")
    imported = import_vector(tmp_path / "theirs.gguf", "gguf", model="example/model")
    assert imported == vector
    assert imported.metadata.notes == "Imported from theirs.gguf (gguf)."
    assert imported.metadata.model == "example/model"
    save(imported, tmp_path / "ours.safetensors")
    assert load(tmp_path / "ours.safetensors").metadata == imported.metadata


def test_unknown_kinds_are_refused_with_the_list(tmp_path: Path) -> None:
    with pytest.raises(VectorFileError, match="no kind 'pickle'.*gguf, caa, persona, refusal, layers, vllm-lens"):
        import_vector(tmp_path / "x.pt", "pickle")


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_file_is_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / "direction_metadata.json").write_text('{"layer": 1}')
    with pytest.raises(VectorFileError, match=r"vec_layer_1_gone\.pt: cannot be read"):
        import_vector(tmp_path / "vec_layer_1_gone.pt", kind)
