"""A folder of shards with a manifest: what is there, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from steer_engine.derive import manifest as manifests
from steer_engine.derive.manifest import Manifest
from steer_engine.derive.reader import TextRows
from steer_engine.derive.shard import AGAIN, Shard, write_shard
from steer_engine.derive.texts import Text
from steer_engine.errors import DerivationError
from steer_engine.vectors.atomic_write import write_atomically

_LOCK = ".lock"


class DumpFolder:
    """A dump, whole or in the making. What it holds is what its indexes say; nothing else is stored about progress."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path) -> DumpFolder:
        """A dump that is there. DerivationError where there is none."""
        file = path / manifests.NAME
        try:
            data = file.read_bytes()
        except OSError as error:
            raise DerivationError(
                f"{path}: not a dump folder ({manifests.NAME}: {error.strerror}). `steer-engine dump` makes one."
            ) from None
        return cls(path, Manifest.parse(data, str(file)))

    @classmethod
    def start(cls, path: Path, manifest: Manifest) -> DumpFolder:
        """A new dump, or one that was begun with the same manifest.

        Raises:
            DerivationError: the folder is a dump of something else, or is full of other files.
        """
        if (path / manifests.NAME).exists():
            there = cls.open(path)
            there.manifest.require_same(manifest, str(path))
            return there
        if path.exists() and any(entry.name != _LOCK for entry in path.iterdir()):
            raise DerivationError(f"{path}: there are other files in it and no {manifests.NAME}; choose a new folder.")
        try:
            write_atomically(path / manifests.NAME, manifest.to_bytes())
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
