"""The published schema and page agree with the code."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from steer_engine.vectors import ControlVector, VectorMetadata
from steer_engine.vectors.metadata import JSON_FIELDS, NUMBER_FIELDS, TEXT_FIELDS
from steer_engine.vectors.safetensors_format import from_bytes, header_schema, to_bytes

DOCS = Path(__file__).parents[2] / "docs"


def header(data: bytes) -> Any:
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size])


def test_the_published_schema_is_the_generated_one() -> None:
    published = json.loads((DOCS / "vector_format.schema.json").read_text())
    assert published == header_schema(), (
        "run: python -m steer_engine.vectors.safetensors_format > docs/vector_format.schema.json"
    )


def test_what_we_write_fits_the_schema(vector: ControlVector) -> None:
    schema = header_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    written = header(to_bytes(vector))
    jsonschema.validate(written, schema)
    for name in JSON_FIELDS:  # validators do not check JSON inside text
        content = schema["properties"]["__metadata__"]["properties"][name]["contentSchema"]
        jsonschema.validate(json.loads(written["__metadata__"][name]), content)


@pytest.mark.parametrize(
    "change",
    [
        {"weight": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}},
        {"direction.1024": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}},
        {"direction.2": {"dtype": "F64", "shape": [6], "data_offsets": [0, 48]}},
        {"direction.2": {"dtype": "F32", "shape": [1, 6], "data_offsets": [0, 24]}},
        {"direction.2": {"dtype": "F32", "shape": [65537], "data_offsets": [0, 24]}},
        {"__metadata__": {"format": "pt", "format_version": "1"}},
        {"__metadata__": {"format": "control-vector", "format_version": "1", "hidden_size": "x"}},
        {"__metadata__": {"format": "control-vector", "format_version": "1", "model": 3}},
    ],
)
def test_what_the_reader_refuses_does_not_fit(vector: ControlVector, change: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**header(to_bytes(vector)), **change}, header_schema())


def test_every_metadata_field_has_its_place_in_the_file() -> None:
    assert {*JSON_FIELDS, *NUMBER_FIELDS, *TEXT_FIELDS} == set(VectorMetadata.model_fields)


def test_the_example_of_the_page_is_a_file() -> None:
    page = (DOCS / "vector_format.md").read_text()
    size, text, data = re.search(r"```text\n(.*)\n(.*)\n(.*)\n```", page).groups()  # type: ignore[union-attr]
    file = bytes.fromhex(size) + text.encode() + b" " * 7 + bytes.fromhex(data)
    vector = from_bytes(file)
    assert to_bytes(vector) == file
    assert vector.directions[1].tolist() == [1.0, -2.0]
    assert vector.digest in page


def test_the_code_of_the_page_writes_a_file_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (DOCS / "vector_format.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1), {})  # type: ignore[union-attr]
    vector = from_bytes((tmp_path / "vector.safetensors").read_bytes())
    assert vector.blocks == (14,)
    assert vector.metadata.model == "example/model"
