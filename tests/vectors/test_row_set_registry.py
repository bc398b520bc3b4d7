"""Row sets beside control vectors: in the folder, uploaded, inline and mirrored."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest

from steer_engine.errors import ModelMismatchError, SteeringRequestError
from steer_engine.parse import parse_spec
from steer_engine.vectors import ControlVector, Registry, RowSet
from steer_engine.vectors.cache import InlineVectors
from steer_engine.vectors.files import save, to_bytes
from steer_engine.vectors.mirror import Mirror


def rows(scale: float = 1.0, label: str = "praise") -> RowSet:
    read = np.array([[1, 0, -1], [0, 2, 0]], np.float32) * scale
    return RowSet(kind="features", read={1: read}, write={1: read[::-1]}, labels={1: {0: label}})


VECTOR = ControlVector(directions={1: np.ones(3, np.float32)})


def test_a_folder_serves_both_kinds_by_name_and_by_digest(tmp_path: Path) -> None:
    save(rows(), tmp_path / "f.safetensors")
    save(VECTOR, tmp_path / "v.safetensors")
    registry = Registry(tmp_path, strict=True)
    assert registry.names() == {"f": rows().digest, "v": VECTOR.digest}
    for name in ("f", rows().digest):
        assert registry.rows(name) == rows()
        assert registry.find(name) == rows()
    with pytest.raises(
        SteeringRequestError, match="'f' is a set of features, not a control vector; use .* \"feature\""
    ):
        registry.get("f")
    with pytest.raises(SteeringRequestError, match="'v' is a control vector; operations on features"):
        registry.rows("v")
    assert registry.digest_of("f") == rows().digest


def test_a_new_label_of_a_file_is_noticed(tmp_path: Path) -> None:
    save(rows(), tmp_path / "f.safetensors")
    registry = Registry(tmp_path)
    save(rows(label="blame"), tmp_path / "f.safetensors")
    assert registry.rows("f").labels == {1: {0: "blame"}}


def test_an_uploaded_row_set_survives_a_restart(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    assert registry.put("f", rows())
    assert not registry.put("f", rows())
    again = Registry(tmp_path, strict=True)
    assert again.rows("f") == rows()
    assert again.rows("f").labels == rows().labels
    assert again.put("f", rows(2.0), if_match=rows().digest) is False
    assert registry.rows("f") == rows(2.0)
    assert registry.delete("f") == rows(2.0).digest
    assert registry.names() == {}


def test_a_row_set_that_does_not_fit_the_model_is_named(tmp_path: Path) -> None:
    save(rows(), tmp_path / "f.safetensors")
    registry = Registry(tmp_path)
    assert registry.check(hidden_size=3, num_blocks=2) == {}
    assert "hidden size 3 but the model has 4" in registry.check(hidden_size=4, num_blocks=2)["f"]
    with pytest.raises(ModelMismatchError):
        registry.check(hidden_size=4, num_blocks=2, strict=True)


def test_an_inline_row_set_is_cached_by_its_digest() -> None:
    inline = InlineVectors(1 << 20)
    data = base64.b64encode(to_bytes(rows())).decode()
    spec = parse_spec({"edits": [{"vector": {"data": data}}]})
    assert spec is not None
    inline.take(spec)
    assert inline.find(rows().digest) == rows()
    nothing = RowSet(kind="features", read={1: rows().read[1]}, write={1: np.zeros((2, 3), np.float32)})
    spec = parse_spec({"edits": [{"vector": {"data": base64.b64encode(to_bytes(nothing)).decode()}}]})
    assert spec is not None
    with pytest.raises(SteeringRequestError, match="zero"):
        inline.take(spec)


def test_a_mirror_copies_row_sets_of_a_folder_and_of_a_registry(tmp_path: Path) -> None:
    for name in ("source", "copy"):
        (tmp_path / name).mkdir()
    save(rows(), tmp_path / "source" / "plain.safetensors")
    Registry(tmp_path / "source").put("uploaded", rows(2.0))
    mirror = Mirror(f"file://{tmp_path}/source", tmp_path / "copy")
    mirror.sync()
    assert mirror.faults == {}
    copied = Registry(tmp_path / "copy", strict=True)
    assert copied.rows("plain") == rows()
    assert copied.rows("uploaded") == rows(2.0)
