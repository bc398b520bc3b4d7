"""One shard of a dump: a safetensors file of rows, and an index that maps them to texts.

    shard-000000.safetensors    `site.{l}` [R, D] per block, `norm_sum` [N, L] F64, `norm_count` [N] I32
    shard-000000.jsonl          first line: name, size and SHA-256 of that file, and the index of its first text;
                                then one line per text, with the range of its rows

The rows are written first and the index last. Each is written to a temporary name, synced and renamed. So a shard is
complete if its index exists.

Shape suffixes: N texts, R rows, L blocks, D hidden size.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from steer_engine.derive.capture_engine import CapturedText
from steer_engine.derive.moments import Array, Rows
from steer_engine.derive.texts import Text
from steer_engine.errors import DerivationError
from steer_engine.vectors.storage import write_atomically

AGAIN = "Remove it and its .jsonl, and run the same dump again: it captures only what is missing."
"""Advice in every error about a damaged shard."""

_HASHED_AT_ONCE = 1 << 22  # bytes

StoredDType = Literal["float32", "bfloat16", "float16"]
CODES: dict[str, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
ITEMSIZE = {"F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True, kw_only=True)
class TextEntry:
    """A text's line in the index. rows: `[begin, end)` in the shard's tensors. line: of the input file."""

    id: str
    label: str
    pair: str
    line: int
    rows: tuple[int, int]
    tokens: int
    tokens_sha256: str


@dataclass(frozen=True, kw_only=True)
class ShardHead:
    """First line of an index. first: index of the first text among all texts of the dump."""

    shard: str
    sha256: str
    bytes: int
    first: int
    texts: int


class Shard:
    """An existing shard. The constructor reads its index; rows are read on demand."""

    def __init__(self, index: Path) -> None:
        self.index = index
        self.path = index.with_suffix(".safetensors")
        lines = index.read_bytes().splitlines()
        try:
            self.head = ShardHead(**json.loads(lines[0]))
            entries = [json.loads(line) for line in lines[1:]]
            self.entries = tuple(TextEntry(**{**entry, "rows": tuple(entry["rows"])}) for entry in entries)
        except (ValueError, TypeError, KeyError, IndexError):
            raise DerivationError(f"{index}: not the index of a shard. {AGAIN}") from None
        if self.head.shard != self.path.name or self.head.texts != len(self.entries):
            raise DerivationError(f"{index}: it describes {self.head.shard} with {self.head.texts} texts. {AGAIN}")

    def require_whole(self) -> None:
        """Raise DerivationError unless the file of rows exists and has its full length."""
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            raise DerivationError(f"{self.path}: missing, but its index is there. {AGAIN}") from None
        if size != self.head.bytes:
            raise DerivationError(f"{self.path}: truncated, {size} bytes of {self.head.bytes}. {AGAIN}")

    def require_digest(self) -> None:
        """Raise DerivationError unless the file of rows has the SHA-256 of the index."""
        self.require_whole()
        sha = hashlib.sha256()
        with self.path.open("rb") as stream:
            while part := stream.read(_HASHED_AT_ONCE):
                sha.update(part)
        if sha.hexdigest() != self.head.sha256:
            raise DerivationError(f"{self.path}: damaged, its SHA-256 is not the one in its index. {AGAIN}")

    def rows_RD(self, block: int) -> Rows:
        """All rows of a block."""
        raw, code, shape = self._tensor(f"site.{block}")
        return decode(raw, code).reshape(shape)

    def norms(self) -> tuple[Array, np.ndarray]:
        """Sum of |x| over the token rows of each text at each block `[N, L]`, and the number of these rows `[N]`."""
        sums, _, shape = self._tensor("norm_sum")
        counts, _, _ = self._tensor("norm_count")
        return np.frombuffer(sums, dtype="<f8").reshape(shape), np.frombuffer(counts, dtype="<i4")

    def _tensor(self, name: str) -> tuple[bytes, str, list[int]]:
        header, start = self._header
        if name not in header:
            raise DerivationError(f"{self.path}: there is no tensor {name}. {AGAIN}")
        begin, end = header[name]["data_offsets"]
        with self.path.open("rb") as stream:
            stream.seek(start + begin)
            return stream.read(end - begin), header[name]["dtype"], header[name]["shape"]

    @cached_property
    def _header(self) -> tuple[dict[str, Any], int]:
        with self.path.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            return json.loads(stream.read(size)), 8 + size


def write_shard(
    folder: Path,
    number: int,
    *,
    first: int,
    texts: Sequence[Text],
    captured: Sequence[CapturedText],
    blocks: Sequence[int],
    stored: str,
) -> None:
    """Write rows and index of consecutive texts, the first at index `first`. stored: dtype of the rows.

    Raises:
        DerivationError: a value is too large for `stored`, or the disk is full. No partial shard remains.
    """
    path = folder / f"shard-{number:06}.safetensors"
    try:
        data = _encoded(captured, blocks, CODES[stored])
        head = ShardHead(
            shard=path.name, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data), first=first, texts=len(texts)
        )
        write_atomically(path, data)
        write_atomically(path.with_suffix(".jsonl"), _index(head, texts, captured))
    except OSError as error:
        raise DerivationError(
            f"{path}: cannot be written ({error.strerror}). Earlier shards are complete; the same command resumes."
        ) from None


def _encoded(captured: Sequence[CapturedText], blocks: Sequence[int], code: str) -> bytes:
    num_rows = sum(text.rows_LPD.shape[1] for text in captured)
    hidden_size = captured[0].rows_LPD.shape[2]
    parts: dict[str, tuple[str, list[int], int]] = {
        f"site.{block}": (code, [num_rows, hidden_size], num_rows * hidden_size * ITEMSIZE[code]) for block in blocks
    }
    parts["norm_sum"] = ("F64", [len(captured), len(blocks)], 8 * len(captured) * len(blocks))
    parts["norm_count"] = ("I32", [len(captured)], 4 * len(captured))
    header: dict[str, Any] = {"__metadata__": {"format": "activation-dump", "format_version": "1"}}
    offset = 0
    for name, (dtype, shape, size) in parts.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # safetensors requires 8-byte alignment of the data
    data = bytearray(struct.pack("<Q", len(text)) + text)
    for index in range(len(blocks)):
        data += encode(np.concatenate([text.rows_LPD[index] for text in captured]), code)
    data += np.stack([text.norm_L for text in captured]).astype("<f8").tobytes()
    data += np.array([text.norm_count for text in captured], dtype="<i4").tobytes()
    return bytes(data)


def _index(head: ShardHead, texts: Sequence[Text], captured: Sequence[CapturedText]) -> bytes:
    lines: list[dict[str, Any]] = [asdict(head)]
    begin = 0
    for text, rows in zip(texts, captured, strict=True):
        end = begin + rows.rows_LPD.shape[1]
        entry = TextEntry(
            id=text.id,
            label=text.label,
            pair=text.pair,
            line=text.line,
            rows=(begin, end),
            tokens=rows.num_tokens,
            tokens_sha256=rows.tokens_digest.removeprefix("sha256:"),
        )
        lines.append(asdict(entry))
        begin = end
    return b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines)


def encode(rows: Rows, code: str) -> bytes:
    """Little-endian bytes of a dtype code, rounded to nearest, ties to even.

    Raises:
        DerivationError: a value is too large for the dtype.
    """
    if code == "F32":
        return rows.astype("<f4", copy=False).tobytes()
    if code == "F16":
        with np.errstate(over="ignore"):
            stored = rows.astype("<f2")
        fits = bool(np.isfinite(stored).all())
    else:
        bits = np.ascontiguousarray(rows, dtype=np.float32).view(np.uint32).astype(np.uint64)
        stored = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        fits = bool(((stored & 0x7F80) != 0x7F80).all())
    if not fits:
        raise DerivationError(f"Values up to {np.abs(rows).max():.3g} do not fit {code}; keep float32 (--store).")
    return stored.tobytes()


def decode(raw: bytes | memoryview, code: str) -> Rows:
    """Inverse of `encode`, as a flat array."""
    if code == "BF16":
        return (np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, dtype="<f4" if code == "F32" else "<f2").astype(np.float32)
