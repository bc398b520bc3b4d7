"""Steering vectors of vllm-lens: JSON, as its clients send it in `apply_steering_vectors`.

    {"activations": {"data": base64, "dtype": "int16", "original_dtype": "torch.bfloat16", "shape": [L, D],
                     "compression": "zstd"},
     "layer_indices": [l, ...], "scale": 1.0, ...}

Row i of the activations times the scale is added to the output of block `layer_indices[i]`. Without `compression` the
data is not compressed.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from steer_engine.errors import VectorFileError
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.metadata import MAX_BLOCKS, MAX_HIDDEN_SIZE
from steer_engine.vectors.storage import read_vector_file

MAX_FILE_BYTES = 1 << 28
MIN_WINDOW_BYTES = 1 << 23
"""Memory that any zstd frame may ask for, as its standard recommends. The library's own limit is 128 MiB."""

MAX_EXPANSION = 256
FREE_EXPANSION = 1 << 20
"""Decompressed bytes for each compressed one, and beside. Directions hardly compress; what does is an attack."""

_STORED = {"torch.float32": "<f4", "torch.float16": "<f2", "torch.float64": "<f8", "torch.bfloat16": "<u2"}
"""NumPy type of the stored values for each torch dtype. bfloat16 is stored as its bits."""


def load(path: Path) -> ControlVector:
    """Read a file with one object, or with a list of one object.

    Raises:
        VectorFileError: not such an object, or one that a control vector cannot express (see `from_object`).
    """
    data = read_vector_file(path, MAX_FILE_BYTES)
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError):
        raise VectorFileError(f"{path}: not JSON.") from None
    if isinstance(parsed, list) and len(parsed) == 1:
        parsed = parsed[0]
    try:
        return from_object(parsed)
    except VectorFileError as error:
        raise VectorFileError(f"{path}: {error.message}") from None


def from_object(parsed: Any) -> ControlVector:
    """A vector from one decoded object. Raises VectorFileError, also for `norm_match` and for rows per position."""
    if not isinstance(parsed, dict) or not isinstance(parsed.get("activations"), dict):
        raise VectorFileError("not an object with `activations` and `layer_indices`.")
    if parsed.get("norm_match") or parsed.get("position_indices"):
        raise VectorFileError("norm_match and position_indices are not part of a vector; set them in the request.")
    rows_LD = _rows(parsed["activations"])
    indices = parsed.get("layer_indices")
    if not isinstance(indices, list) or len(set(map(str, indices))) != len(rows_LD) or len(indices) != len(rows_LD):
        raise VectorFileError(f"`layer_indices` must name {len(rows_LD)} different layers, one per row.")
    if not all(type(index) is int for index in indices):
        raise VectorFileError("`layer_indices` are not whole numbers.")
    scale = parsed.get("scale", 1.0)
    if type(scale) not in (int, float) or not abs(scale) <= sys.float_info.max:  # NaN, and integers beyond floats
        raise VectorFileError(f"scale {str(scale)[:32]!r} is not a finite number.")
    return ControlVector(directions=dict(zip(indices, rows_LD, strict=True))) * float(scale)


def declared_shape(tensor: dict[str, Any]) -> tuple[int, int]:
    """`(L, D)` as the encoded tensor declares it, without decoding. `[L, 1, D]` is one row for all positions.

    Raises:
        VectorFileError: another shape, or larger than any control vector.
    """
    shape = tensor.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape[:4]):
        raise VectorFileError("shape is not a list of sizes.")
    if len(shape) == 3 and shape[1] == 1:
        shape = [shape[0], shape[2]]
    if len(shape) != 2:
        raise VectorFileError(
            f"shape {str(shape[:4])[:64]} is not [layers, hidden size]; one row per position is not supported."
        )
    layers, hidden_size = shape
    if layers > MAX_BLOCKS or hidden_size > MAX_HIDDEN_SIZE:
        raise VectorFileError(f"shape {str(shape)[:64]} is larger than any control vector.")
    return layers, hidden_size


def _rows(tensor: dict[str, Any]) -> npt.NDArray[Any]:
    """The encoded tensor as `[L, D]`."""
    dtype = tensor.get("dtype")
    means = tensor.get("original_dtype", f"torch.{dtype}")
    if (
        not isinstance(means, str)
        or means not in _STORED
        or dtype != means.partition(".")[2].replace("bfloat16", "int16")
    ):
        raise VectorFileError(f"dtype {str(dtype)[:32]!r} for {str(means)[:32]!r} is not supported.")
    shape = declared_shape(tensor)
    expected = math.prod(shape) * np.dtype(_STORED[means]).itemsize
    raw = _raw(tensor, expected)
    if len(raw) != expected:
        raise VectorFileError(f"the data has {len(raw)} bytes; shape and dtype need {expected}.")
    values = np.frombuffer(raw, dtype=_STORED[means]).reshape(shape)
    if means == "torch.bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values


def _raw(tensor: dict[str, Any], expected: int) -> bytes:
    try:
        packed = base64.b64decode(tensor.get("data", ""), validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise VectorFileError("the data is not base64.") from None
    compression = tensor.get("compression")
    if compression is None:
        return packed
    if compression != "zstd":
        raise VectorFileError(f"compression {str(compression)[:32]!r} is not supported.")
    try:
        zstandard = import_module("zstandard")
    except ImportError:
        raise VectorFileError("the data is compressed; install zstandard to read it: pip install zstandard.") from None
    if expected > FREE_EXPANSION + MAX_EXPANSION * len(packed):
        raise VectorFileError(f"{len(packed)} compressed bytes expand to {expected}, which is no vector's data.")
    try:
        unpacker = zstandard.ZstdDecompressor(max_window_size=max(MIN_WINDOW_BYTES, expected))
        with unpacker.stream_reader(packed) as stream:
            # Limited by the shape, whatever the frame says: a few bytes of zstd can expand to terabytes.
            unpacked: bytes = stream.read(expected + 1)
            return unpacked
    except zstandard.ZstdError:
        raise VectorFileError("the data is not zstd.") from None
