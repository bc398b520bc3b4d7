"""JSON files with vectors of vllm-lens."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from steer_engine.errors import VectorFileError
from steer_engine.vectors.importers import import_vector

ROWS = np.array([[1.0, -0.5, 3.0], [0.25, 2.0, -8.0]], np.float32)  # exact in bfloat16


def encoded(rows: np.ndarray = ROWS, dtype: str = "float32", *, zstd: bool = True, **changes: Any) -> dict[str, Any]:
    """A tensor as vllm-lens encodes it in JSON."""
    original = f"torch.{dtype}"
    if dtype == "bfloat16":
        stored = (rows.view(np.uint32) >> 16).astype(np.uint16).view(np.int16)
    else:
        stored = rows.astype(dtype)
    raw = stored.tobytes()
    entry: dict[str, Any] = {
        "data": base64.b64encode(zstandard.ZstdCompressor(level=1).compress(raw) if zstd else raw).decode(),
        "dtype": str(stored.dtype),
        "original_dtype": original,
        "shape": list(rows.shape),
    }
    if zstd:
        entry["compression"] = "zstd"
    return {**entry, **changes}


def write(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "v.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("zstd", [True, False])
def test_layers_are_blocks_and_the_scale_is_applied(tmp_path: Path, dtype: str, zstd: bool) -> None:
    content = {"activations": encoded(dtype=dtype, zstd=zstd), "layer_indices": [18, 4], "scale": 2.0}
    for wrapped in (content, [content]):
        vector = import_vector(write(tmp_path, wrapped), "vllm-lens")
        assert vector.blocks == (4, 18)
        assert np.array_equal(vector.directions[18], 2 * ROWS[0])
        assert np.array_equal(vector.directions[4], 2 * ROWS[1])


def test_one_position_for_all_is_a_vector(tmp_path: Path) -> None:
    content = {"activations": encoded(ROWS[:, None, :]), "layer_indices": [0, 1], "norm_match": False}
    assert np.array_equal(import_vector(write(tmp_path, content), "vllm-lens").directions[1], ROWS[1])


GOOD = {"activations": encoded(), "layer_indices": [0, 1]}
BAD: dict[str, tuple[Any, str]] = {
    "not an object": ([1, 2], "not an object"),
    "two vectors": ([GOOD, GOOD], "not an object"),
    "no activations": ({"layer_indices": [1]}, "not an object"),
    "norm_match": ({**GOOD, "norm_match": True}, "not part of a vector"),
    "positions": ({**GOOD, "position_indices": [3]}, "not part of a vector"),
    "a row per position": ({**GOOD, "activations": encoded(np.ones((2, 5, 3), np.float32))}, "one row per position"),
    "one layer for two rows": ({**GOOD, "layer_indices": [1]}, "must name 2 different layers"),
    "a layer twice": ({**GOOD, "layer_indices": [1, 1]}, "must name 2 different layers"),
    "a layer in words": ({**GOOD, "layer_indices": ["1", 2]}, "not whole numbers"),
    "layer -1": ({**GOOD, "layer_indices": [-1, 2]}, "Block -1 is not a block number"),
    "a scale beyond floats": ({**GOOD, "scale": 10**400}, "scale '1000.*' is not a finite number"),
    "a scale that is not a number": ({**GOOD, "scale": float("nan")}, "not a finite number"),
    "a long shape": (
        {**GOOD, "activations": {**GOOD["activations"], "shape": [10**4000, 1]}},
        r"shape \[10{62} is larger",
    ),
    "a long layer": ({**GOOD, "layer_indices": [0, 10**4000]}, "Block a huge number is not a block number"),
    "scale in words": ({**GOOD, "scale": "2"}, "not a finite number"),
    "dtype object": ({**GOOD, "activations": encoded(dtype="float32") | {"dtype": "object"}}, "dtype 'object'"),
    "dtype a list": ({**GOOD, "activations": encoded() | {"dtype": []}}, "is not supported"),
    "int16 that is not bfloat16": (
        {**GOOD, "activations": encoded(dtype="bfloat16", original_dtype="torch.int16")},
        "dtype 'int16' for 'torch.int16'",
    ),
    "shape negative": ({**GOOD, "activations": encoded(shape=[-2, 3])}, "not a list of sizes"),
    "shape too large": ({**GOOD, "activations": encoded(shape=[2**20, 2**20])}, "larger than any"),
    "shape that lies": ({**GOOD, "activations": encoded(shape=[2, 4])}, "has 24 bytes; shape and dtype need 32"),
    "not base64": ({**GOOD, "activations": encoded(data="$$$")}, "not base64"),
    "data a number": ({**GOOD, "activations": encoded(data=3)}, "not base64"),
    "not zstd": ({**GOOD, "activations": encoded(data="AAAA")}, "not zstd"),
    "gzip": ({**GOOD, "activations": encoded(compression="gzip")}, "compression 'gzip'"),
    "NaN": ({**GOOD, "activations": encoded(ROWS * np.nan)}, "not finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_other_content_is_refused(tmp_path: Path, name: str) -> None:
    content, sentence = BAD[name]
    with pytest.raises(VectorFileError, match=rf"v\.json: .*{sentence}"):
        import_vector(write(tmp_path, content), "vllm-lens")


def test_not_json(tmp_path: Path) -> None:
    for text in ("", "{", "[" * 100_000):
        (tmp_path / "v.json").write_text(text)
        with pytest.raises(VectorFileError, match="not JSON"):
            import_vector(tmp_path / "v.json", "vllm-lens")


def test_decompression_is_limited_by_the_shape(tmp_path: Path) -> None:
    bomb = base64.b64encode(zstandard.ZstdCompressor().compress(bytes(1 << 28))).decode()
    content = {"activations": encoded(data=bomb), "layer_indices": [0, 1]}
    with pytest.raises(VectorFileError, match="has 25 bytes; shape and dtype need 24"):
        import_vector(write(tmp_path, content), "vllm-lens")


def test_without_zstandard_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(VectorFileError, match="pip install zstandard"):
        import_vector(write(tmp_path, GOOD), "vllm-lens")
