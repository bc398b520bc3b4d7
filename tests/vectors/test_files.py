"""The format of a control-vector file: by its suffix, or by its content."""

from __future__ import annotations

from pathlib import Path

import pytest

from steer_engine.errors import VectorFileError
from steer_engine.vectors import ControlVector, load, save
from steer_engine.vectors.files import from_bytes


@pytest.mark.parametrize(("name", "magic"), [("v.safetensors", b"{"), ("v.gguf", b"GGUF")])
def test_the_suffix_chooses_the_format(vector: ControlVector, tmp_path: Path, name: str, magic: bytes) -> None:
    save(vector, tmp_path / name)
    assert magic in (tmp_path / name).read_bytes()[:9]
    assert load(tmp_path / name) == vector
    assert from_bytes((tmp_path / name).read_bytes()) == vector


@pytest.mark.parametrize("data", [b"", b"GGUF", b"PK\3\4 and so on"])
def test_content_of_neither_format(data: bytes) -> None:
    with pytest.raises(VectorFileError):
        from_bytes(data)


@pytest.mark.parametrize("name", ["v.pt", "v", "v.GGUF"])
def test_other_suffixes_are_refused(vector: ControlVector, tmp_path: Path, name: str) -> None:
    with pytest.raises(VectorFileError, match=r"must end in \.safetensors or \.gguf"):
        load(tmp_path / name)
    with pytest.raises(VectorFileError, match=r"must end in \.safetensors or \.gguf"):
        save(vector, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
