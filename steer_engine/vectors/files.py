"""Reading and writing a control vector by the suffix of its file."""

from __future__ import annotations

import os
from pathlib import Path

from steer_engine.errors import VectorFileError
from steer_engine.vectors import gguf_format, safetensors_format
from steer_engine.vectors.control_vector import ControlVector

SUFFIXES = (".safetensors", ".gguf")


def load(path: str | os.PathLike[str]) -> ControlVector:
    """Read a `.safetensors` or `.gguf` control vector; VectorFileError names the file and what is wrong with it."""
    return gguf_format.load(path) if _suffix(path) == ".gguf" else safetensors_format.load(path)


def save(vector: ControlVector, path: str | os.PathLike[str]) -> None:
    """Write a control vector atomically, in the format that the suffix names (GGUF as llama.cpp takes it)."""
    if _suffix(path) == ".gguf":
        gguf_format.save(vector, path)
    else:
        safetensors_format.save(vector, path)


def _suffix(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix
    if suffix not in SUFFIXES:
        raise VectorFileError(f"{path}: a control vector's file ends in {' or '.join(SUFFIXES)}.")
    return suffix
