"""The control-vector file: a convention on top of safetensors, described in docs/vector_format.md.

    8 bytes     header length, little-endian unsigned
    header      JSON: "__metadata__" (text -> text) and one entry "direction.{l}" per block
    data        the directions, without gaps

The reader is a security boundary. It checks every number in the header against a named limit and against the real size
before it allocates anything. Each kind of invalid file has its own VectorFileError.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from steer_engine.errors import VectorFileError
from steer_engine.site import Site
from steer_engine.vectors.control_vector import ControlVector, Direction
from steer_engine.vectors.metadata import (
    FORMAT,
    FORMAT_VERSION,
    JSON_FIELDS,
    MAX_BLOCKS,
    MAX_HIDDEN_SIZE,
    NUMBER_FIELDS,
    FittedCondition,
    FittedProbe,
    VectorMetadata,
    metadata_from_text,
    metadata_to_text,
    parse_json_object,
)
from steer_engine.vectors.storage import read_vector_file, write_atomically

MAX_HEADER_BYTES = 1 << 20
"""1,024 blocks need about 100 kB. A longer header is refused unread."""

MAX_FILE_BYTES = 8 + MAX_HEADER_BYTES + MAX_BLOCKS * MAX_HIDDEN_SIZE * 4
"""Size of the largest vector within the limits."""

DType = Literal["float32", "float16", "bfloat16"]
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ITEMSIZE = {"F32": 4, "F16": 2, "BF16": 2}
ITEMSIZE = {**_ITEMSIZE, "F64": 8, "I64": 8}
MAX_RANK = 4
MAX_SIDE = 2**31 - 1
"""Numbers of dimensions, and of one of them, that are multiplied with each other."""

_NAME = re.compile(r"direction\.(0|[1-9][0-9]{0,3})")


def to_bytes(vector: ControlVector, dtype: DType = "float32") -> bytes:
    """The bytes of a file. Equal vectors with equal metadata give equal bytes. 16-bit dtypes round to nearest even.

    Raises:
        VectorFileError: a value is too large for the dtype, or the dtype is unknown.
    """
    code = code_of(dtype)
    tensors = {
        f"direction.{block}": (code, direction.shape, encode(direction, code, f"direction of block {block}"))
        for block, direction in vector.directions.items()
    }
    return joined(metadata_to_text(vector.metadata), tensors)


def code_of(dtype: str) -> str:
    """The code of a dtype in a header. Raises VectorFileError."""
    if dtype not in _CODES:
        raise VectorFileError(f"dtype {dtype!r} is not supported; valid are {', '.join(_CODES)}.")
    return _CODES[dtype]


def joined(metadata: dict[str, str], tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> bytes:
    """The bytes of a file. tensors: name -> (dtype code, shape, data), in the order of the data.

    Raises:
        VectorFileError: the header is too long to be read.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, (code, shape, payload) in tensors.items():
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, offset + len(payload)]}
        offset += len(payload)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # safetensors requires 8-byte alignment of the data
    if len(text) > MAX_HEADER_BYTES:
        raise VectorFileError(f"The metadata is too long: a header of {len(text)} bytes, at most {MAX_HEADER_BYTES}.")
    return struct.pack("<Q", len(text)) + text + b"".join(payload for _, _, payload in tensors.values())


def from_bytes(data: bytes | memoryview) -> ControlVector:
    """Read a control vector from the bytes of a file.

    Raises:
        VectorFileError: the file does not follow the convention exactly. The message says how, in one sentence.
    """
    return from_header(*split_header(data))


def split_header(data: bytes | memoryview) -> tuple[dict[str, Any], memoryview]:
    """The header of a safetensors file and the data after it. Raises VectorFileError."""
    if len(data) > MAX_FILE_BYTES:
        raise VectorFileError(f"{len(data)} bytes are more than the largest control vector ({MAX_FILE_BYTES}).")
    if len(data) < 8:
        raise VectorFileError(f"{len(data)} bytes are too few for a safetensors file.")
    (header_size,) = struct.unpack("<Q", data[:8])
    if header_size > MAX_HEADER_BYTES:
        raise VectorFileError(f"The header says it has {header_size} bytes; at most {MAX_HEADER_BYTES} are read.")
    if 8 + header_size > len(data):
        raise VectorFileError(f"The header says it has {header_size} bytes; only {len(data) - 8} follow.")
    return parse_header(bytes(data[8 : 8 + header_size])), memoryview(data)[8 + header_size :]


def from_header(header: dict[str, Any], body: memoryview) -> ControlVector:
    """Read a control vector from the parts of a file. Raises VectorFileError."""
    tensors = dict(header)
    metadata = metadata_from_text(tensors.pop("__metadata__", None))
    spans = {name: _checked_span(name, entry) for name, entry in tensors.items()}
    if not spans:
        raise VectorFileError("The file has no tensors; a control vector has one `direction.{l}` per block.")
    require_gapless(spans, len(body))
    directions = {int(name.partition(".")[2]): decode(body[a:b], code) for name, (code, a, b) in spans.items()}
    return ControlVector(directions=directions, metadata=metadata)


def load(path: str | os.PathLike[str]) -> ControlVector:
    """Read a file. Raises VectorFileError, which names the file."""
    data = read_vector_file(Path(path), MAX_FILE_BYTES)
    try:
        return from_bytes(data)
    except VectorFileError as error:
        raise type(error)(f"{path}: {error.message}") from None


def save(vector: ControlVector, path: str | os.PathLike[str], dtype: DType = "float32") -> None:
    """Write a file atomically. Raises VectorFileError as `to_bytes` does."""
    write_atomically(Path(path), to_bytes(vector, dtype))


def parse_header(raw: bytes) -> dict[str, Any]:
    """The JSON of a header. Raises VectorFileError."""
    if not raw.startswith(b"{"):  # a rule of safetensors; it also refuses other kinds of files early
        raise VectorFileError("The header does not begin with '{'; this is not a safetensors file.")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise VectorFileError("The header is not UTF-8.") from None
    return parse_json_object(text, "the header")


def _checked_span(name: str, entry: Any) -> tuple[str, int, int]:
    """(dtype code, begin, end) of one tensor, after checking that its entry is valid and consistent."""
    match = _NAME.fullmatch(name)
    if match is None or int(match[1]) >= MAX_BLOCKS:
        raise VectorFileError(
            f"Tensor {name[:64]!r} does not belong here; names are direction.0 to direction.{MAX_BLOCKS - 1}."
        )
    code, shape, begin, end = checked_entry(name, entry, tuple(_ITEMSIZE))
    if len(shape) != 1 or not 1 <= shape[0] <= MAX_HIDDEN_SIZE:
        raise VectorFileError(f"Tensor {name} has shape {str(shape)[:64]}; [D], D up to {MAX_HIDDEN_SIZE}, is needed.")
    return code, begin, end


def checked_entry(name: str, entry: Any, codes: tuple[str, ...]) -> tuple[str, list[int], int, int]:
    """(dtype code, shape, begin, end) of an entry of a header. The data has exactly the size that shape and dtype say.

    Raises:
        VectorFileError: the entry is not valid, or its dtype is none of `codes`.
    """
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise VectorFileError(f"Tensor {name} is not described by exactly dtype, shape and data_offsets.")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in codes:
        raise VectorFileError(f"Tensor {name} has dtype {str(code)[:32]!r}; valid are {', '.join(codes)}.")
    if not _whole_numbers(shape) or len(shape) > MAX_RANK or max(shape, default=0) > MAX_SIDE:
        raise VectorFileError(f"Tensor {name} has shape {str(shape)[:64]}, but a list of sizes is needed.")
    size = math.prod(shape) * ITEMSIZE[code]
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != size:
        raise VectorFileError(f"Tensor {name} has data_offsets {str(offsets)[:64]} that do not fit shape and dtype.")
    return code, shape, offsets[0], offsets[1]


def require_gapless(spans: dict[str, tuple[str, int, int]], size: int) -> None:
    """Raise VectorFileError unless the tensors cover the data exactly: no gap, no overlap, nothing before or after."""
    end_of_last = 0
    for name, (_, begin, end) in sorted(spans.items(), key=lambda item: item[1][1:]):
        if begin != end_of_last:
            raise VectorFileError(f"Tensor {name} begins at byte {begin}, not {end_of_last}: a gap or an overlap.")
        end_of_last = end
    if end_of_last != size:
        raise VectorFileError(f"The tensors need {end_of_last} bytes of data but the file has {size}.")


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def decode(raw: bytes | memoryview, code: str) -> Direction:
    """The numbers of a tensor, widened to float32, flat."""
    if code == "BF16":
        return (np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, dtype="<f4" if code == "F32" else "<f2").astype(np.float32)


def encode(array: npt.NDArray[np.float32], code: str, what: str) -> bytes:
    """The data of a tensor. what: for the VectorFileError about a value that is too large for the dtype."""
    if code == "F32":
        return array.astype("<f4").tobytes()
    if code == "F16":
        with np.errstate(over="ignore"):
            half = array.astype("<f2")
        fits = bool(np.isfinite(half).all())
        encoded = half.tobytes()
    else:
        bits = array.view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")  # to nearest even
        fits = bool(np.isfinite((rounded.astype(np.uint32) << 16).view(np.float32)).all())
        encoded = rounded.tobytes()
    if not fits:
        raise VectorFileError(f"The {what} has values too large for {code}; save it as float32.")
    return encoded


def header_schema() -> dict[str, Any]:
    """JSON Schema of the header: `__metadata__` (text to text) and one entry per block."""
    side = {"type": "integer", "minimum": 1, "maximum": MAX_HIDDEN_SIZE}
    tensor = {
        "description": "The direction added to the output of this block, counted from 0 over the whole model.",
        **tensor_schema(tuple(_ITEMSIZE), {"items": side, "minItems": 1, "maxItems": 1}),
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Header of a control-vector file (safetensors)",
        "type": "object",
        "properties": {"__metadata__": _metadata_schema()},
        "patternProperties": {r"^direction\.(0|[1-9][0-9]{0,2}|10[01][0-9]|102[0-3])$": tensor},
        "required": ["__metadata__"],
        "additionalProperties": False,
        "minProperties": 2,
    }


def tensor_schema(codes: Sequence[str], shape: Mapping[str, Any]) -> dict[str, Any]:
    """Schema of a tensor's entry. shape: what the array of its sizes has."""
    offsets = {"items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2}
    return {
        "type": "object",
        "properties": {
            "dtype": {"enum": list(codes)},
            "shape": {"type": "array", **shape},
            "data_offsets": {"type": "array", **offsets},
        },
        "required": ["dtype", "shape", "data_offsets"],
        "additionalProperties": False,
    }


def _metadata_schema() -> dict[str, Any]:
    """Schema of the text map. `contentSchema` describes JSON values, `pattern` describes whole numbers."""
    properties: dict[str, Any] = {
        "format": {"const": FORMAT},
        "format_version": {"const": FORMAT_VERSION},
    }
    for name, field in VectorMetadata.model_json_schema()["properties"].items():
        if name in JSON_FIELDS:
            if name in _MODELS:
                whole = _MODELS[name].model_json_schema()
                field = _without_references(whole, whole.pop("$defs", {}))
            content = {key: value for key, value in field.items() if key not in ("title", "description")}
            properties[name] = {"type": "string", "contentMediaType": "application/json", "contentSchema": content}
        elif name in NUMBER_FIELDS:
            properties[name] = {"type": "string", "pattern": "^[0-9]{1,9}$"}
        elif name == "site":
            properties[name] = {"enum": [site.value for site in Site]}
        else:
            properties[name] = {key: field[key] for key in ("type", "maxLength", "pattern") if key in field}
        properties[name]["description"] = _DESCRIPTIONS[name]
    return {
        "type": "object",
        "properties": properties,
        "required": ["format", "format_version"],
        "additionalProperties": {"type": "string"},
    }


def _without_references(schema: Any, definitions: dict[str, Any]) -> Any:
    """The schema with each `$ref` replaced by its definition: in a `contentSchema`, a reference leads nowhere."""
    if isinstance(schema, list):
        return [_without_references(each, definitions) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        found = definitions[schema["$ref"].removeprefix("#/$defs/")]
        schema = {key: value for key, value in found.items() if key not in ("title", "description")}
    return {key: _without_references(value, definitions) for key, value in schema.items()}


_MODELS: dict[str, type[BaseModel]] = {"condition": FittedCondition, "probe": FittedProbe}

_DESCRIPTIONS = {
    "model": "The model that the vector was derived on: a Hugging Face id or a name.",
    "architecture": "The model's architecture, as in its config.json.",
    "hidden_size": "D, the length of every direction.",
    "num_blocks": "Number of blocks of the model. Block numbers of directions are below it.",
    "method": "How it was derived: diffmean, pca, ...",
    "position": "Which token rows were captured: last, mean, token numbers, answer last or answer mean.",
    "site": "Where it was derived, and applies: after a block (the default), or at attn or mlp. Part of the digest.",
    "residual_norms": "Block -> mean Euclidean norm of a token row of the stream at its output. Part of the digest.",
    "separation": "Block -> AUROC of the direction on texts that it was not derived from; 0.5 is chance.",
    "explained_variance": "Block -> share of the squared differences of the pairs that lies along the direction.",
    "condition": "When to steer: a threshold on the projection of the prompt's stream, and its held-out quality.",
    "probe": "A trained probe: per block the threshold of <x, v>, its calibration, and its held-out quality.",
    "dataset_digest": "SHA-256 of the texts it was derived from.",
    "created_with": "Package -> version.",
    "notes": "Free text.",
    "extra": "Keys of other tools. Unknown keys of the map are kept here.",
}


if __name__ == "__main__":
    print(json.dumps(header_schema(), indent=2))
