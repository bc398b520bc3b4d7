"""Files of row sets: exact round trips, and hostile ones."""

from __future__ import annotations

import json
import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_engine.errors import UnusableVectorError, VectorFileError
from steer_engine.vectors import ControlVector, RowSet, VectorMetadata, load
from steer_engine.vectors.files import from_bytes as any_from_bytes
from steer_engine.vectors.files import load_any, save
from steer_engine.vectors.row_set import MAX_ROWS, Kind
from steer_engine.vectors.row_set_format import from_bytes, row_set_schema, to_bytes
from steer_engine.vectors.safetensors_format import MAX_HEADER_BYTES, DType
from steer_engine.vectors.safetensors_format import from_bytes as vector_from_bytes
from steer_engine.vectors.safetensors_format import to_bytes as vector_to_bytes

DOCS = Path(__file__).parents[2] / "docs"


def sample(kind: Kind = "features") -> RowSet:
    """Two blocks; for features, thresholds at one of them, numbers and labels."""
    rng = np.random.default_rng(3)
    counts = {4: 2, 7: 3}
    arrays = {name: {b: rng.normal(size=(k, 5)).astype("f") for b, k in counts.items()} for name in ("read", "write")}
    extra: dict[str, Any] = {}
    if kind == "features":
        extra = {
            "threshold": {7: np.array([0.5, 1.5, 2.5], np.float32)},
            "indices": {4: np.array([11, 16383]), 7: np.array([0, 3, 9])},
            "labels": {4: {11: 'quotes " and ünïcode'}, 7: {0: "a", 9: "z"}},
        }
    bias = {4: np.array([0.25, -0.5], np.float32)}
    metadata = VectorMetadata(model="m", num_blocks=12, residual_norms={4: 3.5}, notes="n", extra={"kind": "other"})
    return RowSet(kind=kind, bias=bias, metadata=metadata, **arrays, **extra)


def taken_apart(data: bytes) -> tuple[dict[str, Any], bytes]:
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def put_together(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize("kind", ["features", "low_rank"])
def test_a_round_trip_is_exact(kind: Kind) -> None:
    rows = sample(kind)
    back = from_bytes(to_bytes(rows))
    assert back == rows
    assert back.labels == rows.labels
    assert back.metadata == rows.metadata
    assert to_bytes(back) == to_bytes(rows)
    for name in ("read", "write", "bias", "threshold", "indices"):
        for block, array in getattr(rows, name).items():
            np.testing.assert_array_equal(getattr(back, name)[block], array)


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 11), ("bfloat16", 8)])
def test_16_bit_rows_are_rounded_once_and_biases_are_not(dtype: DType, bits: int) -> None:
    rows = sample()
    back = from_bytes(to_bytes(rows, dtype))
    for block in rows.blocks:
        bound = np.abs(rows.read[block]) * 2.0**-bits
        assert (np.abs(back.read[block] - rows.read[block]) <= bound).all()
        np.testing.assert_array_equal(back.bias[block], rows.bias[block])
    assert from_bytes(to_bytes(back, dtype)) == back
    with pytest.raises(VectorFileError, match="write of block 4 has values too large for F16"):
        to_bytes(RowSet(kind="features", read=rows.read, write={b: v * 1e6 for b, v in rows.write.items()}), "float16")


def test_all_tensors_are_aligned_to_their_numbers() -> None:
    header, _ = taken_apart(to_bytes(sample(), "bfloat16"))
    sizes = {"I64": 8, "F32": 4, "BF16": 2}
    for name, entry in header.items():
        if name.startswith("index"):
            assert entry["data_offsets"][0] % sizes[entry["dtype"]] == 0


def test_safetensors_itself_reads_the_file(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    save(sample(), tmp_path / "f.safetensors")
    tensors = load_file(tmp_path / "f.safetensors")
    np.testing.assert_array_equal(tensors["index.4"], [11, 16383])
    np.testing.assert_array_equal(tensors["read.7"], sample().read[7])


def test_one_reader_for_both_versions_each_refuses_the_other(tmp_path: Path) -> None:
    vector = ControlVector(directions={1: np.ones(4, np.float32)})
    rows = sample()
    assert any_from_bytes(to_bytes(rows)) == rows
    assert any_from_bytes(vector_to_bytes(vector)) == vector
    with pytest.raises(
        VectorFileError, match=r"features or a low-rank edit \(format version 2\), but a control vector"
    ):
        vector_from_bytes(to_bytes(rows))
    with pytest.raises(VectorFileError, match=r"a control vector \(format version 1\), but features"):
        from_bytes(vector_to_bytes(vector))
    save(rows, tmp_path / "f.safetensors")
    assert load_any(tmp_path / "f.safetensors") == rows
    with pytest.raises(VectorFileError, match=r"f\.safetensors: The file contains features"):
        load(tmp_path / "f.safetensors")
    with pytest.raises(VectorFileError, match="GGUF has no place for a set of features"):
        save(rows, tmp_path / "f.gguf")


Change = Callable[[dict[str, Any]], Any]


def without(name: str) -> Change:
    return lambda header: header.pop(name)


def meta(**fields: str) -> Change:
    return lambda header: header["__metadata__"].update(fields)


def entry(name: str, **fields: Any) -> Change:
    return lambda header: header[name].update(fields)


ATTACKS: dict[str, tuple[Change, str]] = {
    "no kind": (lambda h: h["__metadata__"].pop("kind"), "kind 'none'; valid are features, low_rank"),
    "a foreign kind": (meta(kind="rotation"), "kind 'rotation'"),
    "version 3": (meta(format_version="3"), "version '3' is not supported"),
    "version 1": (meta(format_version="1"), r"a control vector \(format version 1\)"),
    "no format": (meta(format="pt"), "not a control vector"),
    "low rank with numbers": (meta(kind="low_rank", labels="{}"), "belong to features"),
    "labels that are no JSON": (meta(labels="{"), "labels is not valid JSON"),
    "labels that are a list": (meta(labels="[]"), "labels is not a JSON object"),
    "labels with a key twice": (meta(labels='{"4":{"11":"a","11":"b"}}'), "same key twice"),
    "labels of a block as text": (meta(labels='{"4":"a"}'), "not an object of row -> label"),
    "labels of a strange block": (meta(labels='{"٤":{}}'), "not a number of a block or row"),
    "labels of a row with a zero": (meta(labels='{"4":{"011":"a"}}'), "not a number of a block or row"),
    "labels of a huge row": (meta(labels='{"4":{"%s":"a"}}' % ("9" * 99)), "not a number of a block or row"),
    "labels of another block": (meta(labels='{"5":{"1":"a"}}'), "labels for block 5, which has no rows"),
    "labels of another row": (meta(labels='{"4":{"12":"a"}}'), "label for row 12 of block 4"),
    "a label that is a number": (meta(labels='{"4":{"11":3}}'), "not one printable line"),
    "a label that clears the screen": (meta(labels='{"4":{"11":"\\u001b[2J"}}'), "not one printable line"),
    "a label with half a character": (meta(labels='{"4":{"11":"\\ud800"}}'), "not one printable line"),
    "a probe": (meta(probe='{"at":"mean_prompt","blocks":{"4":{}}}'), "no condition and no probe"),
    "a foreign tensor": (lambda h: h.update(weight=h.pop("bias.4")), "'weight' does not belong"),
    "a direction": (lambda h: h.update({"direction.4": h.pop("bias.4")}), "'direction.4' does not belong"),
    "block 1024": (lambda h: h.update({"bias.1024": h.pop("bias.4")}), "does not belong"),
    "a leading zero": (lambda h: h.update({"bias.04": h.pop("bias.4")}), "does not belong"),
    "no read rows": (without("read.4"), "a gap or an overlap"),
    "a block with a threshold only": (lambda h: h.update({"threshold.9": h.pop("bias.4")}), "no tensor bias.4"),
    "float64 rows": (entry("read.4", dtype="F64"), "dtype 'F64'; valid are F32, F16, BF16"),
    "a bias in F16": (entry("bias.4", dtype="F16"), "dtype 'F16'; valid are F32"),
    "numbers in F32": (entry("index.4", dtype="F32", shape=[4]), "dtype 'F32'; valid are I64"),
    "rows of rank 1": (entry("read.4", shape=[10]), r"shape \[10\]; \[k, D\]"),
    "a bias of rank 2": (entry("bias.4", shape=[1, 2]), r"shape \[1, 2\]; \[k\]"),
    "rows of rank 9": (entry("read.4", shape=[1] * 8 + [10]), "a list of sizes is needed"),
    "rows of another shape": (entry("write.4", shape=[5, 2]), r"write of block 4 has shape \[5, 2\]; \[2, 5\]"),
    "no rows": (entry("read.4", shape=[0, 5]), "do not fit shape and dtype"),
    "a product of 2**64": (entry("read.4", shape=[2**32, 2**32]), "a list of sizes is needed"),
    "a size that is true": (entry("read.4", shape=[True, 10]), "a list of sizes is needed"),
    "offsets 2**64 up": (entry("read.4", data_offsets=[2**64, 2**64 + 40]), "a gap or an overlap"),
    "bytes of another tensor": (lambda h: h.update({"write.4": h["read.4"]}), "a gap or an overlap"),
    "an entry with more": (entry("read.4", x=1), "not described by exactly"),
    "an entry that is a list": (lambda h: h.update({"read.4": []}), "not described by exactly"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_refused_with_its_own_sentence(name: str) -> None:
    change, sentence = ATTACKS[name]
    header, body = taken_apart(to_bytes(sample()))
    assert from_bytes(put_together(header, body)) == sample()
    change(header)
    for read in (from_bytes, any_from_bytes):
        if name == "version 1" and read is any_from_bytes:
            continue  # then it is read as a control vector, which it is not either
        with pytest.raises(VectorFileError, match=sentence) as caught:
            read(put_together(header, body))
        assert len(caught.value.message) < 400
        caught.value.message.encode()


@pytest.mark.parametrize("part", ["read", "write", "bias", "threshold"])
def test_numbers_that_are_not_finite_are_refused(part: str) -> None:
    header, body = taken_apart(to_bytes(sample()))
    begin = header[f"{part}.7"]["data_offsets"][0]
    for value in (np.nan, np.inf, -np.inf):
        damaged = body[:begin] + struct.pack("<f", value) + body[begin + 4 :]
        with pytest.raises(UnusableVectorError, match=f"The {part} of block 7 has values that are not finite"):
            from_bytes(put_together(header, damaged))


@pytest.mark.parametrize("numbers", [(3, 0, 9), (0, 0, 9), (-1, 3, 9), (0, 3, 2**31), (-(2**63), 0, 2**63 - 1)])
def test_numbers_of_rows_must_be_ascending_and_valid(numbers: tuple[int, ...]) -> None:
    header, body = taken_apart(to_bytes(sample()))
    begin, end = header["index.7"]["data_offsets"]
    with pytest.raises(VectorFileError, match=r"not ascending|not within 0"):
        from_bytes(put_together(header, body[:begin] + struct.pack("<3q", *numbers) + body[end:]))


def test_too_many_rows_are_refused_by_the_header() -> None:
    header, body = taken_apart(to_bytes(sample()))
    count = MAX_ROWS + 1
    header["read.4"].update(shape=[count, 5], data_offsets=[0, count * 20])
    with pytest.raises(VectorFileError, match=f"k up to {MAX_ROWS}"):
        from_bytes(put_together(header, body))


def test_a_small_file_cannot_take_much_memory() -> None:
    header, body = taken_apart(to_bytes(sample()))
    header["read.4"].update(shape=[4096, 65536], data_offsets=[0, 4096 * 65536 * 4])
    data = put_together(header, body)
    tracemalloc.start()
    with pytest.raises(VectorFileError, match="gap or an overlap"):
        from_bytes(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000


def test_labels_that_no_reader_would_take_are_not_written() -> None:
    count = 4096
    read = np.ones((count, 1), np.float32)
    labels = {0: dict.fromkeys(range(count), "😀" * 64)}
    rows = RowSet(kind="features", read={0: read}, write={0: read}, labels=labels)
    with pytest.raises(VectorFileError, match=f"at most {MAX_HEADER_BYTES}"):
        to_bytes(rows)


GOOD = to_bytes(sample())


@settings(max_examples=400, deadline=None)
@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255), st.integers(0, len(GOOD)))
def test_any_damage_is_a_vector_file_error_or_a_row_set(at: int, byte: int, cut: int) -> None:
    for damaged in (GOOD[:at] + bytes([byte]) + GOOD[at + 1 :], GOOD[:cut], GOOD[:at] + GOOD[cut:]):
        try:
            read = any_from_bytes(damaged)
        except VectorFileError:
            continue
        assert any_from_bytes(to_bytes(read)) == read if isinstance(read, RowSet) else True


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_change_of_the_header_is_a_vector_file_error_or_a_row_set(data: st.DataObject) -> None:
    header, body = taken_apart(GOOD)
    name = data.draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    number = st.integers(-2, 2**65)
    header[name][field] = data.draw(
        st.none() | st.text(max_size=4) | st.lists(number, max_size=4) | st.floats() | st.sampled_from(["F32", "I64"])
    )
    try:
        read = from_bytes(put_together(header, body))
    except VectorFileError:
        return
    assert read == sample()


def test_the_published_schema_is_the_generated_one() -> None:
    published = json.loads((DOCS / "row_set_format.schema.json").read_text())
    assert published == row_set_schema(), (
        "run: python -m steer_engine.vectors.row_set_format > docs/row_set_format.schema.json"
    )


@pytest.mark.parametrize("kind", ["features", "low_rank"])
def test_what_we_write_fits_the_schema(kind: Kind) -> None:
    schema = row_set_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    header, _ = taken_apart(to_bytes(sample(kind)))
    jsonschema.validate(header, schema)
    if kind == "features":
        content = schema["properties"]["__metadata__"]["properties"]["labels"]["contentSchema"]
        jsonschema.validate(json.loads(header["__metadata__"]["labels"]), content)


@pytest.mark.parametrize(
    "name", ["no kind", "a foreign kind", "version 1", "a foreign tensor", "float64 rows", "rows of rank 1", "no rows"]
)
def test_what_the_reader_refuses_does_not_fit(name: str) -> None:
    header, _ = taken_apart(to_bytes(sample()))
    ATTACKS[name][0](header)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(header, row_set_schema())


def test_the_example_of_the_page_is_a_file() -> None:
    page = (DOCS / "vector_format.md").read_text().partition("## Row sets")[2]
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)
    rows = from_bytes(names["data"])
    assert rows.row(14, 7).label == "praise"
    assert rows.row(14, 7).threshold == 0.5
    assert rows.digest in page
