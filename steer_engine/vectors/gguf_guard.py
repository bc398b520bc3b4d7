"""A bounded walk over a GGUF header, before the gguf package reads the file.

That reader trusts every count in the file: an array that declares 2**60 elements keeps it busy for ever, because its
slices past the end are silently empty. Here every length is checked against the file and a named limit first.
"""

from __future__ import annotations

import struct

from steer_engine.errors import VectorFileError
from steer_engine.vectors.metadata import MAX_BLOCKS, MAX_HIDDEN_SIZE

MAX_KEYS = 256
MAX_STRING_BYTES = 1 << 20
MAX_ARRAY_LENGTH = 4096
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_F32 = 0
_MAX_ALIGNMENT = 4096


def require_sane_gguf(data: bytes) -> None:
    """Raise VectorFileError unless header, keys and tensors lie inside `data` and within the limits."""
    _Walk(data).file()


class _Walk:
    """A cursor that cannot leave the bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._alignment = 32

    def file(self) -> None:
        if self._take(4, "magic") != _MAGIC:
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
        elif name == b"general.alignment" and kind == 4:
            self._alignment = self._number("<I", "alignment")
            if not 1 <= self._alignment <= _MAX_ALIGNMENT or self._alignment & (self._alignment - 1):
                raise VectorFileError(f"Alignment {self._alignment} is not a power of two up to {_MAX_ALIGNMENT}.")
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
        if kind not in _SCALAR_BYTES:  # nested arrays too: no control vector needs one
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
