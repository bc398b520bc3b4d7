"""Reads and writes the tensors of a `.pt` file of `torch.save`, without torch and without running anything.

Such a file is a zip archive: a pickle that describes the tensors, and one member with the bytes of each storage. A
tensor is a view of a storage, and a view may be far larger than its storage, or reach beyond it. So every number is
checked against the bytes that the file has before an array is made.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from steer_engine.errors import VectorFileError
from steer_engine.vectors.metadata import MAX_BLOCKS, MAX_HIDDEN_SIZE
from steer_engine.vectors.storage import read_vector_file

MAX_FILE_BYTES = 1 << 29
"""Room for the directions of every block in float64, at the largest hidden size."""

MAX_TENSOR_BYTES = MAX_BLOCKS * MAX_HIDDEN_SIZE * 4
"""Of all tensors of a file, as float32."""

MAX_NUMBER = 1 << 40
"""Of a tensor's shape, strides and offset; beyond it, numpy's arithmetic could overflow."""

MAX_PICKLE_BYTES = 1 << 20
MAX_MEMBERS = 4 * MAX_BLOCKS

Array = npt.NDArray[np.float32]

_STORED = {"FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2", "BFloat16Storage": "<u2"}
"""NumPy type of the stored values. bfloat16 is stored as its bits."""

_WHOLE_NUMBERS = frozenset({"LongStorage", "IntStorage", "ShortStorage", "CharStorage", "ByteStorage", "BoolStorage"})

_OPCODES = re.compile(
    "PROTO|FRAME|STOP|MARK|(STACK_)?GLOBAL|REDUCE|BINPERSID|NONE|NEWTRUE|NEWFALSE|(EMPTY_)?(TUPLE|DICT)|TUPLE[123]|"
    "EMPTY_LIST|APPENDS?|SETITEMS?|BININT[12]?|LONG1|BINFLOAT|(SHORT_)?BINUNICODE|(LONG_)?BIN(PUT|GET)|MEMOIZE|BUILD"
)
"""What tensors, numbers, text and plain containers need. BUILD: the versions in a module's state (`_Unpickler`)."""


class NotOnlyTensorsError(VectorFileError):
    """The file has objects that are more than tensors and plain containers. Loading them could run any code."""


@dataclass(frozen=True)
class Tensor:
    """A tensor that is described but not yet made. strides: in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Storage:
    """Bytes of the file. kind: the name of torch's class."""

    kind: str
    data: bytes


def load(path: Path, *, whole_numbers: bool = False) -> Any:
    """What the file contains, with tensors as float32 arrays: an array, a dict of them, or other plain values.

    whole_numbers: leave out tensors of whole numbers, such as the buffers in a module's state. Otherwise they are
        refused.

    Raises:
        VectorFileError: it cannot be read, is not such a file, or its tensors are not dense floating-point ones of the
            size of a vector. The message names the file.
        NotOnlyTensorsError: it needs code to load.
    """
    data = read_vector_file(path, MAX_FILE_BYTES)
    try:
        return _read(data, whole_numbers)
    except VectorFileError as error:
        raise type(error)(f"{path}: {error.message}") from None


def to_bytes(tensors: Mapping[str, Array]) -> bytes:
    """A file with a dict of float32 tensors, as `torch.save` writes it: an archive with the tensors' pickle.

    The pickle is written here, opcode by opcode, because it names functions of torch.
    """
    text = [b"\x80\x02}("]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for number, (name, array) in enumerate(tensors.items()):
            stored = np.ascontiguousarray(array, "<f4")
            strides = [stride // 4 for stride in stored.strides]
            storage = [b"(", _text("storage"), b"ctorch\nFloatStorage\n", _text(str(number)), _text("cpu")]
            storage += [_number(stored.size), b"tQ"]
            view = [_number(0), b"(", *map(_number, stored.shape), b"t(", *map(_number, strides), b"t"]
            hooks = b"\x89ccollections\nOrderedDict\n)R"
            text += [_text(name), b"ctorch._utils\n_rebuild_tensor_v2\n(", *storage, *view, hooks, b"tR"]
            archive.writestr(f"archive/data/{number}", stored.tobytes())
        archive.writestr("archive/data.pkl", b"".join([*text, b"u."]))
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/version", b"3\n")
    return out.getvalue()


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def _number(number: int) -> bytes:
    return b"J" + number.to_bytes(4, "little", signed=True)


def _read(data: bytes, whole_numbers: bool) -> Any:
    members = _members(data)
    described = [name for name in members if name.endswith("/data.pkl")]
    if len(described) != 1:
        raise VectorFileError("not a file of torch.save: it needs exactly one data.pkl.")
    folder = described[0].removesuffix("data.pkl")
    if members.get(f"{folder}byteorder", b"little") != b"little":
        raise VectorFileError("the tensors are big-endian; save them on a little-endian machine.")
    text = members[described[0]]
    _check_opcodes(text)
    try:
        found = _Unpickler(text, members, folder, whole_numbers).load()
    except VectorFileError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise VectorFileError(f"its data.pkl cannot be read ({type(error).__name__}).") from None
    return _made(found)


def _members(data: bytes) -> dict[str, bytes]:
    """Name -> content of each member. Nothing is decompressed: torch.save stores members as they are."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            if len(infos) > MAX_MEMBERS:
                raise VectorFileError(f"the archive has {len(infos)} members; at most {MAX_MEMBERS} are read.")
            if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
                raise VectorFileError("the archive is compressed, which torch.save never does; save it again.")
            if sum(info.file_size for info in infos) > len(data):
                raise VectorFileError("the members of the archive are larger than the file.")
            return {info.filename: archive.read(info) for info in infos}
    except VectorFileError:
        raise
    except Exception:  # so can a damaged archive
        raise VectorFileError("not a file of torch.save; save the tensors again with PyTorch 1.6 or newer.") from None


def _check_opcodes(text: bytes) -> None:
    """Raise unless the pickle uses `_OPCODES` only, and memo numbers that fit its length.

    The unpickler allocates its memo up to the largest number.
    """
    if len(text) > MAX_PICKLE_BYTES:
        raise VectorFileError(f"its data.pkl has {len(text)} bytes; at most {MAX_PICKLE_BYTES} are read.")
    try:
        for opcode, argument, _ in pickletools.genops(text):
            if _OPCODES.fullmatch(opcode.name) is None:
                raise NotOnlyTensorsError("this pickle contains more than tensors, and loading it could run any code.")
            if opcode.name in ("BINPUT", "LONG_BINPUT") and int(argument or 0) > len(text):
                raise VectorFileError("its data.pkl is damaged.")
    except VectorFileError:
        raise
    except Exception:
        raise VectorFileError("its data.pkl is damaged.") from None


class _Unpickler(pickle._Unpickler):
    """Knows storages and dense tensors, and no other class or function.

    Python's own implementation, in which the meaning of an opcode can be changed: BUILD sets attributes of any object,
    here it only passes over the versions that a module's state has as an attribute.
    """

    def __init__(self, text: bytes, members: dict[str, bytes], folder: str, whole_numbers: bool) -> None:
        super().__init__(io.BytesIO(text))
        self._members, self._folder, self._whole_numbers = members, folder, whole_numbers

    stack: list[Any]

    def load_build(self) -> None:
        self.stack.pop()
        if type(self.stack[-1]) is not OrderedDict:
            raise NotOnlyTensorsError("this pickle contains more than tensors, and loading it could run any code.")

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name.endswith("Storage"):
            return _StorageKind(name)
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _describe_or_leave_out if self._whole_numbers else _describe
        if module == "torch._utils" and name == "_rebuild_parameter":
            return _parameter
        if module == "torch._utils" and name.startswith("_rebuild"):
            raise VectorFileError("contains a tensor that is not dense (sparse, quantised or meta); use to_dense().")
        raise NotOnlyTensorsError("this pickle contains more than tensors, and loading it could run any code.")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, key = pid[1], pid[2]
        if pid[0] != "storage" or not isinstance(kind, _StorageKind) or not isinstance(key, str):
            raise VectorFileError("its data.pkl is damaged.")
        data = self._members.get(f"{self._folder}data/{key}")
        if data is None:
            raise VectorFileError("a storage is missing in the archive.")
        return _Storage(kind.name, data)


@dataclass(frozen=True)
class _StorageKind:
    name: str


def _describe(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    """Replaces torch's function: checks that the view lies inside its storage and is not larger."""
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or len(shape) != len(strides) or not all(type(n) is int for n in numbers):
        raise VectorFileError("its data.pkl is damaged.")
    if storage.kind not in _STORED:
        kind = storage.kind.removesuffix("Storage").lower()[:32]
        raise VectorFileError(f"contains a tensor of {kind}; a floating-point tensor is needed.")
    size = np.dtype(_STORED[storage.kind]).itemsize
    count, last = 1, offset
    for length, stride in zip(shape, strides, strict=True):
        count *= length
        last += (length - 1) * stride
    if min(numbers) < 0 or max(numbers) > MAX_NUMBER or len(shape) > 4 or max(shape, default=1) > MAX_HIDDEN_SIZE:
        raise VectorFileError(f"a tensor of shape {str(list(shape))[:64]} is not a vector.")
    if count and max(count, last + 1) * size > len(storage.data):
        raise VectorFileError(f"a tensor of shape {str(list(shape))[:64]} is larger than its storage.")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


def _describe_or_leave_out(storage: Any, *view: Any) -> Any:
    """None for a tensor of whole numbers."""
    return None if isinstance(storage, _Storage) and storage.kind in _WHOLE_NUMBERS else _describe(storage, *view)


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _made(found: Any) -> Any:
    """`found` with its tensors made, in a dict or alone; their bytes are counted before."""
    tensors = list(found.values()) if isinstance(found, dict) else [found]
    total = sum(4 * int(np.prod(each.shape, dtype=np.int64)) for each in tensors if isinstance(each, Tensor))
    if total > MAX_TENSOR_BYTES or len(tensors) > MAX_BLOCKS:
        raise VectorFileError(f"{len(tensors)} tensors of {total} bytes are more than any vector has.")
    if isinstance(found, dict):
        return {key: _array(value) if isinstance(value, Tensor) else value for key, value in found.items()}
    return _array(found) if isinstance(found, Tensor) else found


def _array(tensor: Tensor) -> Array:
    dtype = np.dtype(_STORED[tensor.storage.kind])
    stored = np.frombuffer(tensor.storage.data, dtype=dtype, count=len(tensor.storage.data) // dtype.itemsize)
    strides = [stride * stored.itemsize for stride in tensor.strides]
    view = np.lib.stride_tricks.as_strided(stored[tensor.offset :], tensor.shape, strides, writeable=False)
    if tensor.storage.kind == "BFloat16Storage":
        return (view.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # a vector checks that its values are finite
        return view.astype(np.float32)
