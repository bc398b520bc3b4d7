"""Files of control vectors and row sets: reading and writing by suffix, or reading by content."""

from __future__ import annotations

import os
from pathlib import Path

from steer_engine.errors import SteeringRequestError, VectorFileError
from steer_engine.fields import shown
from steer_engine.vectors import gguf_format, row_set_format, safetensors_format
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.row_set import RowSet
from steer_engine.vectors.storage import read_vector_file, write_atomically

SUFFIXES = (".safetensors", ".gguf")
MAX_FILE_BYTES = max(safetensors_format.MAX_FILE_BYTES, gguf_format.MAX_FILE_BYTES)

AnyVector = ControlVector | RowSet
"""What a file, a name or a digest can stand for."""


def load(path: str | os.PathLike[str]) -> ControlVector:
    """Read a `.safetensors` or `.gguf` file. Raises VectorFileError, which names the file and what is wrong with it."""
    return gguf_format.load(path) if _suffix(path) == ".gguf" else safetensors_format.load(path)


def load_any(path: str | os.PathLike[str]) -> AnyVector:
    """Read a file of a control vector or a row set. Raises VectorFileError, which names the file."""
    if _suffix(path) == ".gguf":
        return gguf_format.load(path)
    data = read_vector_file(Path(path), MAX_FILE_BYTES)
    try:
        return from_safetensors(data)
    except VectorFileError as error:
        raise type(error)(f"{path}: {error.message}") from None


def save(vector: AnyVector, path: str | os.PathLike[str]) -> None:
    """Write a file atomically, in the format of its suffix. GGUF is written as llama.cpp reads it.

    Raises:
        VectorFileError: the format cannot express it, or the file cannot be written.
    """
    suffix = _suffix(path)
    if suffix == ".gguf" and isinstance(vector, RowSet):
        raise VectorFileError(f"{path}: GGUF has no place for {noun(vector)}; write a .safetensors file.")
    try:
        if suffix == ".gguf" and isinstance(vector, ControlVector):
            gguf_format.save(vector, path)
        else:
            write_atomically(Path(path), to_bytes(vector))
    except OSError as error:
        raise VectorFileError(f"{path}: cannot be written ({error.strerror}); choose another place.") from None


def from_bytes(data: bytes) -> AnyVector:
    """A control vector or a row set from the content of a file; the first bytes say which format it has.

    Raises:
        VectorFileError: not such a file.
    """
    if data.startswith(gguf_format.MAGIC):
        return gguf_format.from_bytes(data)
    return from_safetensors(data)


def from_safetensors(data: bytes) -> AnyVector:
    """A control vector or a row set from the content of a safetensors file. Raises VectorFileError."""
    header, body = safetensors_format.split_header(data)
    module = row_set_format if row_set_format.is_row_set(header) else safetensors_format
    found: AnyVector = module.from_header(header, body)
    return found


def to_bytes(vector: AnyVector) -> bytes:
    """The bytes of a safetensors file. Raises VectorFileError if the metadata are too long."""
    return row_set_format.to_bytes(vector) if isinstance(vector, RowSet) else safetensors_format.to_bytes(vector)


def noun(vector: AnyVector) -> str:
    """What it is, for messages."""
    if isinstance(vector, ControlVector):
        return "a control vector"
    return "a set of features" if vector.kind == "features" else "a low-rank edit"


def as_directions(found: AnyVector, name: str) -> ControlVector:
    """The value of a name, which must be a control vector. Raises SteeringRequestError."""
    if isinstance(found, ControlVector):
        return found
    op = "feature" if found.kind == "features" else "low_rank"
    raise SteeringRequestError(
        f'{shown(name)} is {noun(found)}, not a control vector; use it in an edit with "op": "{op}".', "vector"
    )


def as_rows(found: AnyVector, name: str) -> RowSet:
    """The value of a name, which must be a row set. Raises SteeringRequestError."""
    if isinstance(found, RowSet):
        return found
    raise SteeringRequestError(
        f"{shown(name)} is a control vector; operations on features and low-rank edits need a file with rows "
        "(steer-engine vectors import).",
        "vector",
    )


def _suffix(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix
    if suffix not in SUFFIXES:
        raise VectorFileError(f"{path}: the name of a control-vector file must end in {' or '.join(SUFFIXES)}.")
    return suffix
