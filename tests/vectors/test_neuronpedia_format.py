"""Vectors and explanations in the layouts of Neuronpedia, and vectors of steering-lite."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steer_engine.errors import VectorFileError
from steer_engine.vectors import ControlVector, neuronpedia_format
from steer_engine.vectors.neuronpedia_format import MAX_LINE_BYTES, explanations, export_beside, load

INNER = {
    "modelId": "gpt2-small",
    "layer": "6-neuronpedia-resid-pre",
    "index": "12",
    "hookName": "blocks.6.hook_resid_pre",
    "vector": [0.5, -1.25, 3],
    "vectorLabel": "Jedi",
    "vectorDefaultSteerStrength": 15,
}


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    "content",
    [
        INNER,
        {"vector": INNER},
        {"vectors": [INNER]},
        {"modelId": "gpt2-small", "layerNumber": 6, "hookType": "hook_resid_pre", "vector": [0.5, -1.25, 3]},
        {"vector": {"modelId": "gpt2-small", "hookName": "blocks.5.hook_resid_post", "values": [0.5, -1.25, 3]}},
    ],
)
def test_a_vector_of_the_api(tmp_path: Path, content: Any) -> None:
    vector = load(written(tmp_path / "v.json", content))
    assert vector == ControlVector(directions={5: np.array([0.5, -1.25, 3], np.float32)})
    assert vector.metadata.model == "gpt2-small"
    if "vectorLabel" in str(content):
        assert vector.metadata.notes == "Label: Jedi. Neuronpedia's default strength is 15."


@pytest.mark.parametrize("strength", [10**400, float("nan"), float("inf"), True, "15"])
def test_a_strength_that_is_no_finite_number_is_not_told(tmp_path: Path, strength: Any) -> None:
    vector = load(written(tmp_path / "v.json", {**INNER, "vectorDefaultSteerStrength": strength}))
    assert vector.blocks == (5,)
    assert "strength" not in vector.metadata.notes


def test_a_vector_that_we_write_is_read_back_exactly(tmp_path: Path) -> None:
    numbers = np.random.default_rng(1).normal(size=7).astype(np.float32)
    vector = ControlVector(directions={5: numbers}).with_metadata(model="gpt2-small")
    neuronpedia_format.save(vector, tmp_path / "out.json")
    assert load(tmp_path / "out.json") == vector
    sent = json.loads((tmp_path / "out.json").read_text())
    assert (sent["layerNumber"], sent["hookType"], sent["modelId"]) == (6, "hook_resid_pre", "gpt2-small")
    with pytest.raises(VectorFileError, match=r"one direction; this one has blocks \[1, 2\]"):
        neuronpedia_format.save(ControlVector(directions={1: numbers, 2: numbers}), tmp_path / "two.json")
    with pytest.raises(VectorFileError, match="directions of the stream; this one is of site 'mlp'"):
        neuronpedia_format.save(vector.with_metadata(site="mlp"), tmp_path / "mlp.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ([], "not one vector"),
        ({}, "not one vector"),
        ({"vectors": [INNER, INNER]}, "not one vector"),
        ({**INNER, "vector": []}, "not one vector"),
        ({**INNER, "vector": [0.0] * 65537}, "not one vector"),
        ({**INNER, "vector": [1, "2"]}, "not finite numbers"),
        ({**INNER, "vector": [1, True]}, "not finite numbers"),
        ({**INNER, "vector": [1, 10**400]}, "not finite numbers"),
        ('{"vector": [NaN], "hookName": "blocks.6.hook_resid_pre"}', "not finite"),
        ({**INNER, "hookName": "blocks.6.hook_mlp_out"}, "is not the residual stream"),
        ({**INNER, "hookName": None}, "is not the residual stream"),
        ({**INNER, "hookName": "blocks.0.hook_resid_pre"}, "not the output of a block"),
        ({**INNER, "hookName": "blocks.9999.hook_resid_post"}, "not the output of a block"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(VectorFileError, match=message) as caught:
        load(written(tmp_path / "v.json", content))
    assert len(caught.value.message) < 400


LINES = [
    {"modelId": "m", "layer": "6", "index": "3", "description": "  words\nabout   praise "},
    {"modelId": "m", "layer": "6", "index": 7, "description": "blame\u001b[2J"},
    {"modelId": "m", "layer": "6", "index": "3", "description": "a second one"},
    {"modelId": "m", "layer": "6", "index": "none", "description": "x"},
    {"modelId": "m", "layer": "6", "index": "8", "description": None},
    {"modelId": "m", "layer": "6", "index": "9", "explanations": [{"description": "inside"}, 3]},
]
EXPECTED = [(3, "words about praise"), (7, "blame?[2J"), (3, "a second one"), (9, "inside")]


@pytest.mark.parametrize("form", ["lines", "gzip", "array"])
def test_explanations(tmp_path: Path, form: str) -> None:
    lines = "\n".join(map(json.dumps, LINES)) + "\n\n"
    if form == "gzip":
        path = tmp_path / "explanations.jsonl.gz"
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path = written(tmp_path / "explanations.json", lines if form == "lines" else " " + json.dumps(LINES))
    assert list(explanations(path)) == EXPECTED
    assert export_beside(tmp_path) == path
    assert export_beside(tmp_path / "params.npz") == path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no line with a feature's"),
        (b"{}\n{}\n", "no line with a feature's"),
        (b"[1, 2]", "no line with a feature's"),
        (b"hello", "not JSON lines"),
        (b'{"index": 1, "description": "a"}\n{', "not JSON lines"),
        (b"\x1f\x8b broken", "not JSON lines"),
        (b'{"a": "' + b"x" * MAX_LINE_BYTES, "a line of more than"),
    ],
)
def test_exports_that_cannot_be_used(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "e.jsonl").write_bytes(content)
    with pytest.raises(VectorFileError, match=message):
        list(explanations(tmp_path / "e.jsonl"))
    (tmp_path / "e.jsonl.gz").write_bytes(b"\x1f\x8b\x08 broken")
    with pytest.raises(VectorFileError, match="damaged gzip|cannot be read"):
        list(explanations(tmp_path / "e.jsonl.gz"))
    with pytest.raises(VectorFileError, match="cannot be read"):
        list(explanations(tmp_path / "none.jsonl"))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_a_vector_file_error_or_labels(tmp_path: Path, data: st.DataObject) -> None:
    good = gzip.compress("\n".join(map(json.dumps, LINES)).encode(), mtime=0)
    at, cut = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(0, len(good)))
    byte = bytes([data.draw(st.integers(0, 255))])
    for damaged in (good[:at] + byte + good[at + 1 :], good[:cut], good[:at] + good[cut:]):
        (tmp_path / "e.jsonl.gz").write_bytes(damaged)
        try:
            assert all(label.isprintable() for _, label in explanations(tmp_path / "e.jsonl.gz"))
        except VectorFileError:
            continue
