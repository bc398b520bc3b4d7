"""The row set: pairs of a read row and a write row per block, for features of sparse autoencoders and low-rank edits.

Shapes: k rows of a block, D the hidden size, x a token row `[D]` of the residual stream at the output of a block.

| kind | row i | formula |
|---|---|---|
| features | read = encoder row e, write = decoder row d | a = relu(<x, e> + bias), 0 unless above threshold |
| low_rank | one rank of LoReFT: read = row of W, write = row of R | x + R^T (W x + bias - R x) |
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from steer_engine.errors import UnusableVectorError, VectorFileError
from steer_engine.fields import shown
from steer_engine.site import Site
from steer_engine.vectors.metadata import MAX_BLOCKS, MAX_HIDDEN_SIZE, VectorMetadata, require_fit

Kind = Literal["features", "low_rank"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

MAX_ROWS = 4096
"""Rows of one block. A request uses a few; a whole dictionary of features (16,384 rows and more) is not a row set."""

MAX_ROW_SET_BYTES = 1 << 28
"""Bytes of all arrays of a row set, as much as the largest control vector has."""

MAX_INDEX = 2**31 - 1
"""Largest number of a feature in its dictionary."""

MAX_LABEL = 512
"""Characters of the label of a row."""

MAX_LABEL_CHARS = 1 << 18
"""Characters of all labels, so that they fit into the header of a file."""

DIGEST_TAG = b"steer-engine row set v1\n"
"""Start of the digested bytes, unlike that of control vectors."""

ORTHONORMAL_BOUND = 2.0**-8
"""Largest deviation of R R^T from the identity in an orthonormal R that was stored in bfloat16 (8 significant bits)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One row. read, write: float32 `[D]`. threshold: None unless JumpReLU. label: empty if unknown."""

    read: Floats
    write: Floats
    bias: float
    threshold: float | None
    label: str


@dataclass(frozen=True, kw_only=True, eq=False)
class RowSet:
    """Read and write rows per block, for the output of block l, counted from 0. Equality depends on the content.

    All arrays are finite and stored as read-only copies. Rows of features are stored by ascending index.

    kind: what the rows mean (see the table of this module).
    read, write: block -> float32 `[k, D]`. Both have the same blocks; k may differ between blocks, D may not.
    bias: block -> float32 `[k]`; zeros where a block is missing. A feature's bias includes the encoder's bias and all
        that the dictionary does to x first: `b_enc - <b_dec, e>`, for an autoencoder that subtracts `b_dec`.
    threshold: features only. block -> float32 `[k]`: a feature is active only where `<x, e> + bias > threshold`
        (JumpReLU). A block that is missing has none (ReLU).
    labels: block -> index of a row -> what it stands for. Not part of the digest.
    indices: features only. block -> int64 `[k]`, the number of each row in the original dictionary. A request names
        rows by it. 0 to k - 1 where a block is missing. Low-rank rows are always numbered from 0.

    Raises:
        VectorFileError: the arrays are not usable, contradict each other or the metadata, or exceed a limit.
    """

    kind: Kind
    read: Mapping[int, Floats]
    write: Mapping[int, Floats]
    bias: Mapping[int, Floats] = field(default_factory=dict)
    threshold: Mapping[int, Floats] = field(default_factory=dict)
    labels: Mapping[int, Mapping[int, str]] = field(default_factory=dict)
    indices: Mapping[int, Indices] = field(default_factory=dict)
    metadata: VectorMetadata = field(default_factory=VectorMetadata)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise VectorFileError(f"Kind {shown(self.kind)} is not a kind of row set; valid are {', '.join(KINDS)}.")
        blocks = _checked_blocks(self.read, self.write)
        for name in ("bias", "threshold", "indices", "labels"):
            if foreign := getattr(self, name).keys() - set(blocks):
                raise VectorFileError(f"There are {name} for block {shown(min(foreign))}, which has no rows.")
        if self.kind == "low_rank" and (self.threshold or self.indices):
            raise VectorFileError("A low-rank edit has no thresholds and no indices; these belong to features.")
        _check_size([*self.read.values(), *self.write.values()])
        hidden_size = np.shape(self.read[blocks[0]])[-1]
        parts: dict[str, dict[int, npt.NDArray[Any]]] = {name: {} for name in ("read", "write", "bias", "threshold")}
        indices: dict[int, Indices] = {}
        for block in blocks:
            count = np.shape(self.read[block])[0]
            if self.kind == "low_rank" and count > hidden_size:
                raise VectorFileError(f"Block {block} has rank {count}, above the hidden size {hidden_size}.")
            indices[block] = _checked_indices(self.indices.get(block), count, block)
            order = np.argsort(indices[block]) if (np.diff(indices[block]) < 0).any() else slice(None)
            bias = np.zeros(count, np.float32) if block not in self.bias else self.bias[block]
            given = {"read": self.read[block], "write": self.write[block], "bias": bias}
            if block in self.threshold:
                given["threshold"] = self.threshold[block]
            for name, array in given.items():
                shape = (count, hidden_size) if name in ("read", "write") else (count,)
                parts[name][block] = _frozen(_checked(array, name, shape, block)[order])
            indices[block] = _frozen(indices[block][order])
        for name, arrays in parts.items():
            object.__setattr__(self, name, MappingProxyType(arrays))
        object.__setattr__(self, "indices", MappingProxyType(indices if self.kind == "features" else {}))
        object.__setattr__(self, "labels", _checked_labels(self.labels, indices))
        object.__setattr__(self, "metadata", _checked_metadata(self.metadata, hidden_size, blocks))

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """Blocks that have rows, ascending."""
        return tuple(self.read)

    @cached_property
    def hidden_size(self) -> int:
        """D, the width of the residual stream."""
        return int(self.read[self.blocks[0]].shape[1])

    @property
    def num_rows(self) -> int:
        """Rows of all blocks."""
        return sum(len(rows) for rows in self.read.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        mappings = (self.read, self.write, self.bias, self.threshold, self.indices)
        return sum(array.nbytes for mapping in mappings for array in mapping.values())

    @property
    def is_zero(self) -> bool:
        """Whether no row can have an effect."""
        return not any(rows.any() for rows in self.write.values())

    def count(self, block: int) -> int:
        """k, the rows of a block; 0 if it has none."""
        return len(self.read[block]) if block in self.read else 0

    def numbers(self, block: int) -> tuple[int, ...]:
        """The numbers by which a request names the rows of a block, ascending."""
        return tuple(self.indices[block].tolist()) if block in self.indices else tuple(range(self.count(block)))

    def position(self, block: int, index: int) -> int:
        """The place of row `index` in the arrays of a block: of the feature with that number in the dictionary.

        Raises:
            VectorFileError: there is no such block or row. The message says which there are.
        """
        if block not in self.read:
            raise VectorFileError(f"There are no rows for block {shown(block)}; there are for {list(self.blocks)}.")
        if isinstance(index, int | np.integer) and not isinstance(index, bool):
            if self.kind == "low_rank":
                if 0 <= index < self.count(block):
                    return int(index)
            elif 0 <= index <= MAX_INDEX:
                place = int(np.searchsorted(self.indices[block], index))
                if place < self.count(block) and self.indices[block][place] == index:
                    return place
        numbers = self.numbers(block)
        some = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
        noun = "feature" if self.kind == "features" else "row"
        raise VectorFileError(f"Block {block} has no {noun} {shown(index)}; it has {some}.")

    def row(self, block: int, index: int) -> Row:
        """Row `index` of a block, named as in a request. Raises VectorFileError as `position` does."""
        place = self.position(block, index)
        return Row(
            read=self.read[block][place],
            write=self.write[block][place],
            bias=float(self.bias[block][place]),
            threshold=float(self.threshold[block][place]) if block in self.threshold else None,
            label=self.labels.get(block, {}).get(int(index), ""),
        )

    def orthonormality_error(self, block: int) -> float:
        """The largest deviation of R R^T from the identity at a block, in float64; R are the write rows.

        LoReFT trains an orthonormal R: then the edit replaces the coordinates of x along R, and nothing else. Above
        `ORTHONORMAL_BOUND` the formula is the same, but the edit also scales x along R.
        """
        rows = self.write[block].astype(np.float64)
        return float(np.abs(rows @ rows.T - np.eye(len(rows))).max())

    @cached_property
    def digest(self) -> str:
        """`"sha256:<64 hex>"` of the content: rows, biases, thresholds, indices, residual norms and site; no labels.

        Digested bytes: the tag; the kind and a newline; then per block, ascending, `<u4 block, u4 k, u4 D, u4 t>` with
        t = 1 if the block has thresholds; k x D float32 of read, the same of write, k of bias, k of threshold (if
        any), and k int64 of the rows' numbers, all little-endian; then per residual norm of a block that has rows,
        ascending, `<u4 block, f8 norm>`; then the name of the site if it is not "block".
        """
        sha = hashlib.sha256(DIGEST_TAG + self.kind.encode() + b"\n")
        for block in self.blocks:
            sha.update(struct.pack("<4I", block, self.count(block), self.hidden_size, block in self.threshold))
            for mapping in (self.read, self.write, self.bias, self.threshold):
                if block in mapping:
                    sha.update(mapping[block].astype("<f4", copy=False).tobytes())
            sha.update(np.array(self.numbers(block), "<i8").tobytes())
        for block, norm in sorted(self.metadata.residual_norms.items()):
            if block in self.read:
                sha.update(struct.pack("<Id", block, norm))
        if self.metadata.site is not Site.BLOCK:
            sha.update(self.metadata.site.value.encode())
        return f"sha256:{sha.hexdigest()}"

    def check(self, *, hidden_size: int, num_blocks: int) -> None:
        """Raise ModelMismatchError unless the rows fit a model of this width and depth."""
        require_fit(
            "row set", "rows", self.hidden_size, self.blocks[-1], self.metadata,
            hidden_size=hidden_size, num_blocks=num_blocks,
        )  # fmt: skip

    def restrict(self, blocks: Iterable[int]) -> RowSet:
        """The same rows at the given blocks only. Raises VectorFileError if none is left."""
        wanted = set(blocks)
        if not wanted & set(self.blocks):
            raise VectorFileError(f"None of the blocks {sorted(wanted)} has rows; it has {list(self.blocks)}.")
        parts = {name: getattr(self, name) for name in ("read", "write", "bias", "threshold", "indices", "labels")}
        kept = {name: {b: each for b, each in part.items() if b in wanted} for name, part in parts.items()}
        return RowSet(kind=self.kind, metadata=self.metadata, **kept)

    def with_metadata(self, **fields: Any) -> RowSet:
        """The same rows with some metadata fields replaced (validated)."""
        metadata = VectorMetadata.checked({**self.metadata.model_dump(), **fields})
        return RowSet(**{**_parts(self), "metadata": metadata})

    def with_labels(self, labels: Mapping[int, Mapping[int, str]]) -> RowSet:
        """The same rows with other labels: block -> number of a row -> text. Raises VectorFileError."""
        return RowSet(**{**_parts(self), "labels": labels})

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, RowSet) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapping proxy cannot be pickled; Ray and spawned processes pickle row sets.
        return _rebuild, (_parts(self),)

    def __repr__(self) -> str:
        return (
            f"RowSet({self.kind}, {self.num_rows} rows in {len(self.blocks)} blocks "
            f"{self.blocks[0]}..{self.blocks[-1]}, hidden_size={self.hidden_size}, {self.digest[:19]})"
        )


def _parts(rows: RowSet) -> dict[str, Any]:
    """The arguments of the constructor that give the same row set; plain and picklable."""
    mappings = {name: dict(getattr(rows, name)) for name in ("read", "write", "bias", "threshold", "indices")}
    labels = {block: dict(each) for block, each in rows.labels.items()}
    return {"kind": rows.kind, **mappings, "labels": labels, "metadata": rows.metadata}


def _rebuild(parts: dict[str, Any]) -> RowSet:
    return RowSet(**parts)


def _checked_blocks(read: Mapping[int, Any], write: Mapping[int, Any]) -> list[int]:
    """The blocks, ascending. Raises VectorFileError unless read and write have the same ones."""
    if not read or read.keys() != write.keys():
        raise VectorFileError("A row set needs read rows and write rows for the same blocks, at least one.")
    for block in read:
        if isinstance(block, bool) or not isinstance(block, int | np.integer) or not 0 <= block < MAX_BLOCKS:
            raise VectorFileError(f"Block {shown(block)} is not a block number; valid are 0 to {MAX_BLOCKS - 1}.")
    return sorted(map(int, read))


def _check_size(arrays: Iterable[Any]) -> None:
    """Raise VectorFileError unless all rows are `[k, D]` within the limits. Nothing is copied."""
    total = 0
    for array in arrays:
        shape = np.shape(array)
        if len(shape) != 2 or not 1 <= shape[0] <= MAX_ROWS or not 1 <= shape[1] <= MAX_HIDDEN_SIZE:
            raise VectorFileError(
                f"Rows of shape {list(shape)} are not usable; [k, D] with k up to {MAX_ROWS} and D up to "
                f"{MAX_HIDDEN_SIZE} is needed. Choose fewer features."
            )
        total += 4 * shape[0] * (shape[1] + 2)  # a row's share of bias, threshold and index is 8 bytes
    if total > MAX_ROW_SET_BYTES:
        raise VectorFileError(f"The rows need {total} bytes, at most {MAX_ROW_SET_BYTES}; choose fewer features.")


def _checked(given: Any, name: str, shape: tuple[int, ...], block: int) -> Floats:
    """A float32 copy. Raises VectorFileError for another shape or dtype, or values that are not finite."""
    array = np.asarray(given)
    if array.dtype.kind != "f":
        raise VectorFileError(f"The {name} of block {block} has dtype {array.dtype}; floating point is needed.")
    if array.shape != shape:
        raise VectorFileError(
            f"The {name} of block {block} has shape {list(array.shape)}; {list(shape)} is needed, as the other rows."
        )
    with np.errstate(over="ignore"):
        copy = np.array(array, dtype=np.float32, order="C")
    if not np.isfinite(copy).all():
        raise UnusableVectorError(f"The {name} of block {block} has values that are not finite in float32.")
    return copy


def _checked_indices(given: Any, count: int, block: int) -> Indices:
    """The numbers of the rows, as they were given. Raises VectorFileError unless they are distinct whole numbers."""
    if given is None:
        return np.arange(count, dtype=np.int64)
    array = np.asarray(given)
    if array.dtype.kind not in "iu" or array.shape != (count,):
        raise VectorFileError(f"The indices of block {block} are not {count} whole numbers, one per row.")
    if array.min() < 0 or array.max() > MAX_INDEX:
        raise VectorFileError(f"The indices of block {block} are not within 0 to {MAX_INDEX}.")
    if len(np.unique(array)) != count:
        raise VectorFileError(f"The indices of block {block} have the same feature twice.")
    return array.astype(np.int64)


def _checked_labels(
    given: Mapping[int, Mapping[int, str]], indices: Mapping[int, Indices]
) -> Mapping[int, Mapping[int, str]]:
    """Read-only copies, by ascending block and row; blocks without labels are left out."""
    checked: dict[int, Mapping[int, str]] = {}
    total = 0
    for block in sorted(given):
        numbers = set(indices[block].tolist())
        for row, label in given[block].items():
            if isinstance(row, bool) or row not in numbers:
                raise VectorFileError(
                    f"There is a label for row {shown(row)} of block {block}, which it does not have."
                )
            # Not printable are control characters, which a terminal would obey, and characters that no file can have.
            if not isinstance(label, str) or not 1 <= len(label) <= MAX_LABEL or not label.isprintable():
                raise VectorFileError(
                    f"The label of row {row} of block {block} is not one printable line of 1 to {MAX_LABEL} characters."
                )
            total += len(label)
        if given[block]:
            checked[int(block)] = MappingProxyType({int(row): given[block][row] for row in sorted(given[block])})
    if total > MAX_LABEL_CHARS:
        raise VectorFileError(f"The labels have {total} characters together, at most {MAX_LABEL_CHARS}.")
    return MappingProxyType(checked)


def _checked_metadata(metadata: VectorMetadata, hidden_size: int, blocks: list[int]) -> VectorMetadata:
    """A copy that says the hidden size. Raises VectorFileError if it contradicts the rows."""
    if metadata.condition is not None or metadata.probe is not None:
        raise VectorFileError("A row set has no condition and no probe; these are fitted for directions.")
    if metadata.hidden_size not in (None, hidden_size):
        raise VectorFileError(f"The metadata says hidden size {metadata.hidden_size} but the rows have {hidden_size}.")
    if metadata.num_blocks is not None and blocks[-1] >= metadata.num_blocks:
        raise VectorFileError(
            f"There are rows for block {blocks[-1]}, but the metadata says that the model has {metadata.num_blocks} "
            f"blocks (0 to {metadata.num_blocks - 1})."
        )
    return metadata.model_copy(update={"hidden_size": hidden_size}, deep=True)


def _frozen(array: Any) -> Any:
    array.flags.writeable = False
    return array
