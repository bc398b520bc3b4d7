from __future__ import annotations

from pathlib import Path

import pytest

from steer_engine.errors import VectorFileError
from steer_engine.vectors import ControlVector, load, save


@pytest.mark.parametrize(("name", "magic"), [("v.safetensors", b"{"), ("v.gguf", b"GGUF")])
def test_the_suffix_chooses_the_format(vector: ControlVector, tmp_path: Path, name: str, magic: bytes) -> None:
    save(vector, tmp_path / name)
    assert magic in (tmp_path / name).read_bytes()[:9]
    assert load(tmp_path / name) == vector


@pytest.mark.parametrize("name", ["v.pt", "v", "v.GGUF"])
def test_other_suffixes_are_refused(vector: ControlVector, tmp_path: Path, name: str) -> None:
    with pytest.raises(VectorFileError, match=r"ends in \.safetensors or \.gguf"):
        load(tmp_path / name)
    with pytest.raises(VectorFileError, match=r"ends in \.safetensors or \.gguf"):
        save(vector, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
