"""Rows in the dtype that a dump keeps them in, as little-endian bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steer_engine.derive.activations import TextRows
from steer_engine.derive.shard import AGAIN, Shard, StoredDType, write_shard
from steer_engine.derive.texts import Text
from steer_engine.errors import DerivationError
from steer_engine.vectors.storage import write_atomically

NAME = "manifest.json"


class Manifest(BaseModel):
    """`manifest.json` of a dump folder, written before its first shard.

    blocks: sites, ascending; block l = the output of block l, from 0. dataset: digest of the texts. weights: digest of
    the checkpoint, or its commit on a hub. edits: rows are read before any edit of their block, and nothing is edited.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal["activation-dump"] = "activation-dump"
    format_version: Literal[1] = 1
    model: str
    weights: str
    architecture: str
    hidden_size: Annotated[int, Field(ge=1)]
    num_blocks: Annotated[int, Field(ge=1)]
    blocks: Annotated[list[int], Field(min_length=1)]
    dtype: str
    stored: StoredDType
    position: str
    chat: bool
    edits: Literal["none"] = "none"
    dataset: str
    source: str
    num_texts: Annotated[int, Field(ge=2)]
    paired: bool
    versions: dict[str, str]

    def to_bytes(self) -> bytes:
        return self.model_dump_json(indent=2).encode() + b"\n"

    @classmethod
    def parse(cls, data: bytes, where: str) -> Manifest:
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "the file"
            raise DerivationError(f"{where}: not the manifest of a dump ({field}: {first['msg']}).") from None

    def require_same(self, other: Manifest, where: str) -> None:
        """Raise DerivationError unless `other` would write the same rows; names the first field that differs."""
        for name in type(self).model_fields:
            mine, theirs = getattr(self, name), getattr(other, name)
            if name != "source" and mine != theirs:
                raise DerivationError(
                    f"{where} is the dump of something else: its {name} is {str(mine)[:120]}, now it would be "
                    f"{str(theirs)[:120]}. Choose another folder, or repeat the first run's settings to resume it."
                )


_LOCK = ".lock"


class DumpFolder:
    """A dump, whole or in the making. What it holds is what its indexes say; nothing else is stored about progress."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path) -> DumpFolder:
        """A dump that is there. DerivationError where there is none."""
        file = path / NAME
        try:
            data = file.read_bytes()
        except OSError as error:
            raise DerivationError(
                f"{path}: not a dump folder ({NAME}: {error.strerror}). `steer-engine dump` makes one."
            ) from None
        return cls(path, Manifest.parse(data, str(file)))

    @classmethod
    def start(cls, path: Path, manifest: Manifest) -> DumpFolder:
        """A new dump, or one that was begun with the same manifest.

        Raises:
            DerivationError: the folder is a dump of something else, or is full of other files.
        """
        if (path / NAME).exists():
            there = cls.open(path)
            there.manifest.require_same(manifest, str(path))
            return there
        if path.exists() and any(entry.name != _LOCK for entry in path.iterdir()):
            raise DerivationError(f"{path}: there are other files in it and no {NAME}; choose a new folder.")
        try:
            write_atomically(path / NAME, manifest.to_bytes())
        except OSError as error:
            raise DerivationError(f"{path}: cannot be written ({error.strerror}).") from None
        return cls(path, manifest)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """While nobody else writes here; the system gives the lock back when its holder dies, however it dies."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise DerivationError(f"{self.path}: another run is writing this dump; wait for it, or end it.") from None
        try:
            yield
        finally:
            lock.release()

    def clear_leftovers(self) -> None:
        """Remove what a killed run was writing; only inside `writing`."""
        for part in self.path.glob(".shard-*.part"):
            part.unlink(missing_ok=True)

    def shards(self) -> list[Shard]:
        """All shards in canonical order, each as long as it was written.

        Raises:
            DerivationError: one is missing, truncated or overlaps another; names the file.
        """
        shards = sorted((Shard(index) for index in self.path.glob("shard-*.jsonl")), key=lambda s: s.head.first)
        end = 0
        for shard in shards:
            shard.require_whole()
            if shard.head.first < end:
                raise DerivationError(f"{shard.path}: its texts are in another shard too. {AGAIN}")
            end = shard.head.first + shard.head.texts
        if end > self.manifest.num_texts:
            raise DerivationError(
                f"{self.path}: it holds more than the {self.manifest.num_texts} texts of its manifest."
            )
        return shards

    def require_complete(self) -> list[Shard]:
        """All shards; DerivationError unless every text is there."""
        shards = self.shards()
        there = sum(shard.head.texts for shard in shards)
        if there < self.manifest.num_texts:
            raise DerivationError(
                f"{self.path}: {there} of {self.manifest.num_texts} texts are there; "
                "run the same `steer-engine dump` again: it reads only what is missing."
            )
        return shards

    def write(self, first: int, texts: Sequence[Text], rows: Sequence[TextRows]) -> None:
        """Add a shard of consecutive texts; only inside `writing`."""
        numbers = [int(index.stem.removeprefix("shard-")) for index in self.path.glob("shard-*.jsonl")]
        write_shard(
            self.path,
            max(numbers, default=-1) + 1,
            first=first,
            texts=texts,
            rows=rows,
            blocks=self.manifest.blocks,
            stored=self.manifest.stored,
        )
