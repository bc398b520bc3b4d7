"""The file of a row set: format version 2 of the control-vector file, described in docs/vector_format.md.

    read.{l}, write.{l}     [k, D]   F32, F16 or BF16
    bias.{l}                [k]      F32
    threshold.{l}           [k]      F32; features only, and only where the block has thresholds
    index.{l}               [k]      I64, ascending; features only

The metadata say `format_version: 2` and `kind`, and may have `labels`. As for control vectors, the reader is a security
boundary, and checks the header against limits and the real size before it allocates anything.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

from steer_engine.errors import VectorFileError
from steer_engine.fields import shown
from steer_engine.vectors.metadata import (
    MAX_BLOCKS,
    MAX_HIDDEN_SIZE,
    ROW_SET_VERSION,
    format_version,
    metadata_from_text,
    metadata_to_text,
    parse_json_object,
)
from steer_engine.vectors.row_set import KINDS, MAX_ROWS, RowSet
from steer_engine.vectors.safetensors_format import (
    DType,
    checked_entry,
    code_of,
    decode,
    encode,
    header_schema,
    joined,
    require_gapless,
    split_header,
    tensor_schema,
)

_FLOATS = ("F32", "F16", "BF16")
_PARTS = {
    "index": ("I64",),
    "read": _FLOATS,
    "write": _FLOATS,
    "bias": ("F32",),
    "threshold": ("F32",),
}
"""Name of a tensor -> its dtypes, in the order of the data: 8-byte numbers come first, so that all are aligned."""

_NAME = re.compile(r"(read|write|bias|threshold|index)\.(0|[1-9][0-9]{0,3})")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,9}")


def to_bytes(rows: RowSet, dtype: DType = "float32") -> bytes:
    """The bytes of a file. Equal row sets with equal metadata and labels give equal bytes.

    dtype: of the read and write rows; 16-bit dtypes round to nearest even. Biases and thresholds stay float32.

    Raises:
        VectorFileError: a value is too large for the dtype, or the labels and the metadata are too long.
    """
    code = code_of(dtype)
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for block, index_k in rows.indices.items():
        tensors[f"index.{block}"] = ("I64", index_k.shape, index_k.astype("<i8").tobytes())
    for block in rows.blocks:
        for name in ("read", "write", "bias", "threshold"):
            mapping = getattr(rows, name)
            if block in mapping:
                stored = code if name in ("read", "write") else "F32"
                payload = encode(mapping[block], stored, f"{name} of block {block}")
                tensors[f"{name}.{block}"] = (stored, mapping[block].shape, payload)
    text = {**metadata_to_text(rows.metadata, ROW_SET_VERSION), "kind": rows.kind}
    if rows.labels:
        labels = {str(block): {str(row): label for row, label in each.items()} for block, each in rows.labels.items()}
        text["labels"] = json.dumps(labels, separators=(",", ":"), ensure_ascii=False)
    return joined(text, dict(sorted(tensors.items(), key=lambda item: list(_PARTS).index(item[0].partition(".")[0]))))


def from_bytes(data: bytes | memoryview) -> RowSet:
    """Read a row set from the bytes of a file.

    Raises:
        VectorFileError: the file does not follow the convention exactly. The message says how, in one sentence.
    """
    return from_header(*split_header(data))


def is_row_set(header: dict[str, Any]) -> bool:
    """Whether a header says that the file is a row set. Raises VectorFileError if it is not a file of this format."""
    return format_version(header.get("__metadata__")) == ROW_SET_VERSION


def from_header(header: dict[str, Any], body: memoryview) -> RowSet:
    """Read a row set from the parts of a file. Raises VectorFileError."""
    tensors = dict(header)
    text = tensors.pop("__metadata__", None)
    format_version(text)
    own = {name: text[name] for name in ("kind", "labels") if name in text}
    metadata = metadata_from_text({name: value for name, value in text.items() if name not in own}, ROW_SET_VERSION)
    kind = own.get("kind", "none")
    if kind not in KINDS:
        raise VectorFileError(f"The file's metadata say kind {shown(kind)}; valid are {', '.join(KINDS)}.")
    checked = {name: _checked_tensor(name, entry) for name, entry in tensors.items()}
    spans = {name: (code, begin, end) for name, (code, _, begin, end) in checked.items()}
    if not spans:
        raise VectorFileError(
            "The file has no tensors; a row set has `read.{l}`, `write.{l}` and `bias.{l}` per block."
        )
    require_gapless(spans, len(body))
    _check_complete(tensors.keys(), kind)
    parts: dict[str, dict[int, Any]] = {name: {} for name in _PARTS}
    for name, (code, shape, begin, end) in checked.items():
        part, _, block = name.partition(".")
        raw = body[begin:end]
        flat = np.frombuffer(raw, "<i8") if code == "I64" else decode(raw, code)
        if part == "index" and not (np.diff(flat) > 0).all():
            raise VectorFileError(f"The tensor {name} is not ascending.")
        parts[part][int(block)] = flat.reshape(shape)
    indices = parts.pop("index")
    return RowSet(kind=kind, indices=indices, labels=_labels(own.get("labels", "{}")), metadata=metadata, **parts)


def _checked_tensor(name: str, entry: Any) -> tuple[str, list[int], int, int]:
    match = _NAME.fullmatch(name)
    if match is None or int(match[2]) >= MAX_BLOCKS:
        raise VectorFileError(
            f"Tensor {name[:64]!r} does not belong here; names are read, write, bias, threshold and index, a dot, and "
            f"a block from 0 to {MAX_BLOCKS - 1}."
        )
    code, shape, begin, end = checked_entry(name, entry, _PARTS[match[1]])
    rank = 2 if match[1] in ("read", "write") else 1
    if len(shape) != rank or not 1 <= shape[0] <= MAX_ROWS or not 1 <= shape[-1] <= MAX_HIDDEN_SIZE:
        wanted = (
            f"[k, D], k up to {MAX_ROWS} and D up to {MAX_HIDDEN_SIZE}," if rank == 2 else f"[k], k up to {MAX_ROWS},"
        )
        raise VectorFileError(f"Tensor {name} has shape {str(shape)[:64]}; {wanted} is needed.")
    return code, shape, begin, end


def _check_complete(names: Any, kind: str) -> None:
    """Raise VectorFileError unless each block has all that its kind needs."""
    needed = ("read", "write", "bias", *(["index"] if kind == "features" else []))
    for block in sorted({name.partition(".")[2] for name in names}, key=int):
        if missing := [part for part in needed if f"{part}.{block}" not in names]:
            raise VectorFileError(f"Block {block} has no tensor {missing[0]}.{block}; {', '.join(needed)} are needed.")


def _labels(text: str) -> dict[int, dict[int, str]]:
    """Block -> row -> label. Raises VectorFileError."""
    labels: dict[int, dict[int, str]] = {}
    for block, each in parse_json_object(text, "the metadata field labels").items():
        if not isinstance(each, dict):
            raise VectorFileError(f"The labels of block {shown(block)} are not an object of row -> label.")
        for number in (block, *each):
            if _NUMBER.fullmatch(number) is None:
                raise VectorFileError(f"The labels contain {shown(number)}, which is not a number of a block or row.")
        labels[int(block)] = {int(row): label for row, label in each.items()}
    return labels


def row_set_schema() -> dict[str, Any]:
    """JSON Schema of the header of a row set's file."""
    metadata = header_schema()["properties"]["__metadata__"]
    block = r"\.(0|[1-9][0-9]{0,2}|10[01][0-9]|102[0-3])$"
    size = {"type": "integer", "minimum": 1}
    kinds = {
        "kind": {"enum": list(KINDS), "description": "What the rows are: features of an autoencoder, or LoReFT."},
        "labels": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {
                "type": "object",
                "additionalProperties": {"type": "object", "additionalProperties": {"type": "string", "minLength": 1}},
            },
            "description": "Block -> number of a row -> what it stands for.",
        },
    }
    fields = {name: field for name, field in metadata["properties"].items() if name not in ("condition", "probe")}
    fields["format_version"] = {"const": ROW_SET_VERSION}
    patterns = {}
    for name, codes in _PARTS.items():
        rows = {**size, "maximum": MAX_ROWS}
        sides = [rows, {**size, "maximum": MAX_HIDDEN_SIZE}] if name in ("read", "write") else [rows]
        shape = {"prefixItems": sides, "minItems": len(sides), "maxItems": len(sides)}
        patterns[f"^{name}{block}"] = tensor_schema(codes, shape)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Header of a control-vector file with a row set (safetensors, format version 2)",
        "type": "object",
        "properties": {
            "__metadata__": {
                **metadata,
                "properties": {**fields, **kinds},
                "required": [*metadata["required"], "kind"],
            }
        },
        "patternProperties": patterns,
        "required": ["__metadata__"],
        "additionalProperties": False,
        "minProperties": 4,
    }


if __name__ == "__main__":
    print(json.dumps(row_set_schema(), indent=2))
