"""Control-vector files: reading and writing by suffix, or reading by content."""

from __future__ import annotations

import os
from pathlib import Path

from steer_engine.errors import VectorFileError
from steer_engine.vectors import gguf_format, safetensors_format
from steer_engine.vectors.control_vector import ControlVector

SUFFIXES = (".safetensors", ".gguf")
MAX_FILE_BYTES = max(safetensors_format.MAX_FILE_BYTES, gguf_format.MAX_FILE_BYTES)


def load(path: str | os.PathLike[str]) -> ControlVector:
    """Read a `.safetensors` or `.gguf` file. Raises VectorFileError, which names the file and what is wrong with it."""
    return gguf_format.load(path) if _suffix(path) == ".gguf" else safetensors_format.load(path)


def save(vector: ControlVector, path: str | os.PathLike[str]) -> None:
    """Write a file atomically, in the format of its suffix. GGUF is written as llama.cpp reads it."""
    if _suffix(path) == ".gguf":
        gguf_format.save(vector, path)
    else:
        safetensors_format.save(vector, path)


def from_bytes(data: bytes) -> ControlVector:
    """A vector from the content of a file; the first bytes say which format it has. Raises VectorFileError."""
    if data.startswith(gguf_format.MAGIC):
        return gguf_format.from_bytes(data)
    return safetensors_format.from_bytes(data)


def _suffix(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix
    if suffix not in SUFFIXES:
        raise VectorFileError(f"{path}: the name of a control-vector file must end in {' or '.join(SUFFIXES)}.")
    return suffix
