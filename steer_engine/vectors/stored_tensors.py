"""Reads chosen rows and columns of large tensors in a file, without loading the tensors.

A dictionary of features can have 40 GB. A tensor is described by its header; only the bytes of the chosen rows are
read, from a safetensors file, and from an .npz archive whose members are stored as they are. Members that are
compressed are streamed once, in order. Nothing is unpickled.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from steer_engine.errors import UnreadableFileError, VectorFileError
from steer_engine.vectors.safetensors_format import ITEMSIZE, MAX_HEADER_BYTES, checked_entry, decode, parse_header
from steer_engine.vectors.storage import open_regular

Floats = npt.NDArray[np.float32]
Read = Callable[[int, int], bytes]
"""(offset, count) -> exactly that many bytes of a tensor's data."""

MAX_MEMBERS = 64
MAX_NPY_HEADER = 4096
LOCAL_HEADER = 30
"""Bytes of a zip member's own header, before its name."""

MAX_EXPANSION = 256
"""Decompressed bytes per compressed byte. Weights hardly compress; what does is an attack."""

SPARSE = 4096
"""If chosen columns are further apart than this many bytes, they are read one by one instead of with their row."""

_DAMAGED = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OverflowError,
    NotImplementedError,
    RuntimeError,
    UnicodeDecodeError,
)
"""What the modules of the standard library raise for a damaged or encrypted archive."""

_CODES = {"<f4": "F32", "<f2": "F16", "<f8": "F64"}
FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of floats in a file. turned: it is stored by columns (Fortran order)."""

    name: str
    code: str
    shape: tuple[int, ...]
    read: Read
    turned: bool = False

    def whole(self) -> Floats:
        """All of a 1-D tensor, float32."""
        return self._decoded(self.read(0, self.shape[0] * ITEMSIZE[self.code]))

    def rows(self, chosen: Sequence[int]) -> Floats:
        """Rows of a 2-D tensor, or numbers of a 1-D one: float32 `[len(chosen), ...]`, in the given order."""
        if len(self.shape) == 1:
            return self._columns(1, self.shape[0], chosen).reshape(-1)
        count, width = self.shape
        return self._columns(width, count, chosen).T.copy() if self.turned else self._rows(count, width, chosen)

    def columns(self, chosen: Sequence[int]) -> Floats:
        """Columns of a 2-D tensor as rows: float32 `[len(chosen), shape[0]]`, in the given order."""
        count, width = self.shape
        return self._rows(width, count, chosen) if self.turned else self._columns(count, width, chosen).T.copy()

    def _rows(self, count: int, width: int, chosen: Sequence[int]) -> Floats:
        size = width * ITEMSIZE[self.code]
        found = np.empty((len(chosen), width), np.float32)
        for place in np.argsort(chosen):  # ascending, because a compressed member can only be read forwards
            assert 0 <= chosen[place] < count
            found[place] = self._decoded(self.read(chosen[place] * size, size))
        return found

    def _columns(self, count: int, width: int, chosen: Sequence[int]) -> Floats:
        """`[count, len(chosen)]` of a tensor `[count, width]`."""
        size = ITEMSIZE[self.code]
        order = np.argsort(chosen)
        found = np.empty((count, len(chosen)), np.float32)
        one_by_one = width * size > SPARSE * len(chosen)
        for row in range(count):
            start = row * width * size
            if one_by_one:
                raw = b"".join(self.read(start + chosen[place] * size, size) for place in order)
                found[row, order] = self._decoded(raw)
            else:
                found[row] = self._decoded(self.read(start, width * size))[list(chosen)]
        return found

    def _decoded(self, raw: bytes) -> Floats:
        if self.code != "F64":
            return decode(raw, self.code)
        with np.errstate(over="ignore"):  # a row set checks that its values are finite
            return np.frombuffer(raw, "<f8").astype(np.float32)


@contextmanager
def open_tensors(path: Path) -> Iterator[Mapping[str, StoredTensor]]:
    """Name -> tensor of a `.safetensors` or `.npz` file, while it is open. Tensors that are not floats are left out.

    Raises:
        VectorFileError: it is not such a file, or cannot be read. The message names the file.
    """
    try:
        with os.fdopen(open_regular(path), "rb", buffering=0) as file:
            if path.suffix == ".npz":
                with zipfile.ZipFile(path) as archive:
                    yield _npz(archive, file.fileno())
            else:
                yield _safetensors(file.fileno())
    except UnreadableFileError:
        raise
    except VectorFileError as error:
        raise type(error)(f"{path}: {error.message}") from None
    except OSError as error:
        raise UnreadableFileError(f"{path}: cannot be read ({error.strerror}).") from None
    except _DAMAGED:
        raise VectorFileError(f"{path}: not an .npz file, or a damaged one.") from None


def _safetensors(handle: int) -> dict[str, StoredTensor]:
    total = os.fstat(handle).st_size
    size = int.from_bytes(_exactly(handle, 0, 8), "little") if total >= 8 else MAX_HEADER_BYTES + 1
    if size > min(MAX_HEADER_BYTES, total - 8):
        raise VectorFileError("not a safetensors file: the length of its header is not usable.")
    header = parse_header(_exactly(handle, 8, size))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.get("dtype") not in FLOATS:
            continue
        code, shape, begin, end = checked_entry(name[:64], entry, FLOATS)
        if 8 + size + end > total:
            raise VectorFileError(f"tensor {name[:64]!r} ends at byte {8 + size + end}, after the end of the file.")
        found[name] = StoredTensor(name, code, tuple(shape), _reader(handle, 8 + size + begin, end - begin))
    return found


def _npz(archive: zipfile.ZipFile, handle: int) -> dict[str, StoredTensor]:
    infos = archive.infolist()
    if len(infos) > MAX_MEMBERS or len({info.filename for info in infos}) < len(infos):
        raise VectorFileError(f"the archive has {len(infos)} members; at most {MAX_MEMBERS} different ones are read.")
    found = {}
    for info in infos:
        name = info.filename.removesuffix(".npy")
        if name != info.filename and (tensor := _npy(archive, info, name, handle)) is not None:
            found[name] = tensor
    return found


def _npy(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, handle: int) -> StoredTensor | None:
    with archive.open(info) as stream:
        npy: Any = np.lib.format
        try:
            read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(stream)]
            shape, turned, dtype = read_header(stream, max_header_size=MAX_NPY_HEADER)
        except (*_DAMAGED, OSError):
            raise
        except Exception:  # numpy evaluates the header as a literal, which can raise nearly anything
            raise VectorFileError(f"the array {name[:64]!r} has no valid header.") from None
        begin = stream.tell()
    code = _CODES.get(dtype.str)
    if dtype.hasobject or (code is None and dtype.kind == "f"):
        raise VectorFileError(f"the array {name[:64]!r} has dtype {dtype.str[:16]!r}; little-endian floats are needed.")
    if code is None:
        return None
    size = math.prod(shape) * ITEMSIZE[code]
    if info.file_size - begin != size:
        raise VectorFileError(f"the array {name[:64]!r} has {info.file_size - begin} bytes; its shape needs {size}.")
    if info.compress_type == zipfile.ZIP_STORED:
        local = _exactly(handle, info.header_offset, LOCAL_HEADER)
        before = LOCAL_HEADER + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        return StoredTensor(name, code, shape, _reader(handle, info.header_offset + before + begin, size), turned)
    if info.file_size > MAX_EXPANSION * max(1, info.compress_size):
        raise VectorFileError(f"the array {name[:64]!r} expands from {info.compress_size} to {info.file_size} bytes.")
    return StoredTensor(name, code, shape, _streamed(archive, info, begin), turned)


def _reader(handle: int, begin: int, size: int) -> Read:
    def read(offset: int, count: int) -> bytes:
        assert 0 <= offset <= offset + count <= size
        return _exactly(handle, begin + offset, count)

    return read


def _streamed(archive: zipfile.ZipFile, info: zipfile.ZipInfo, begin: int) -> Read:
    """Reads of a compressed member. They are fast if the offsets ascend."""
    stream = archive.open(info)

    def read(offset: int, count: int) -> bytes:
        stream.seek(begin + offset)
        data = stream.read(count)
        if len(data) != count:
            raise VectorFileError("the file ends within a tensor.")
        return data

    return read


def _exactly(handle: int, offset: int, count: int) -> bytes:
    data = os.pread(handle, count, offset)
    while len(data) < count:
        more = os.pread(handle, count - len(data), offset + len(data))
        if not more:
            raise VectorFileError("the file ends within a tensor.")
        data += more
    return data
