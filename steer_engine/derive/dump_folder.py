"""The folder of an activation dump: `manifest.json`, which says what the rows are, and shards (see `shard.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steer_engine.derive.capture_config import CaptureConfig, model_name
from steer_engine.derive.capture_engine import CapturedText, EngineFacts
from steer_engine.derive.shard import AGAIN, Shard, StoredDType, write_shard
from steer_engine.derive.texts import Text, Texts
from steer_engine.errors import DerivationError
from steer_engine.site import Site
from steer_engine.vectors.metadata import VectorMetadata
from steer_engine.vectors.storage import write_atomically

MANIFEST_FILE = "manifest.json"

_LOCK = ".lock"


class DumpManifest(BaseModel):
    """`manifest.json` of a dump folder, written before its first shard.

    blocks: ascending; block l = the output of block l, from 0. site: what was captured in each; not in the file for the
    stream after a block, of which the norms are in any case. dataset: digest of the texts. weights: digest of the
    checkpoint, or its commit on a hub. edits: rows are captured without any steering.
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
    site: Site = Site.BLOCK
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

    @classmethod
    def of(
        cls, model: str, config: CaptureConfig, facts: EngineFacts, texts: Texts, store: str = "auto"
    ) -> DumpManifest:
        """Of these texts on that engine. model: as the user named it. store: dtype of the rows, or `auto`."""
        return cls.model_validate(
            {
                "model": model_name(model),
                "weights": facts.weights,
                "architecture": facts.architecture,
                "hidden_size": facts.hidden_size,
                "num_blocks": facts.num_blocks,
                "blocks": list(facts.blocks),
                "site": config.site,
                "dtype": facts.dtype,
                "stored": facts.dtype if store == "auto" else store,
                "position": config.position.rule,
                "chat": config.chat,
                "dataset": texts.digest,
                "source": texts.source,
                "num_texts": len(texts),
                "paired": texts.paired,
                "versions": dict(facts.versions),
            }
        )

    @classmethod
    def parse(cls, data: bytes, where: str) -> DumpManifest:
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "the file"
            raise DerivationError(f"{where}: not the manifest of a dump ({field}: {first['msg']}).") from None

    def to_bytes(self) -> bytes:
        unnamed = {"site"} if self.site is Site.BLOCK else set()
        return self.model_dump_json(indent=2, exclude=unnamed).encode() + b"\n"

    def require_same(self, other: DumpManifest, where: str) -> None:
        """Raise DerivationError unless `other` would write the same rows; names the first field that differs."""
        for name in type(self).model_fields:
            mine, theirs = getattr(self, name), getattr(other, name)
            if name != "source" and mine != theirs:
                raise DerivationError(
                    f"{where} is the dump of something else: its {name} is {str(mine)[:120]}, now it would be "
                    f"{str(theirs)[:120]}. Choose another folder, or repeat the first run's settings to resume it."
                )

    def vector_metadata(self, method: str) -> VectorMetadata:
        """Provenance of a vector that is fitted to these rows."""
        units = f"{self.num_texts // 2} pairs" if self.paired else f"{self.num_texts} texts"
        return VectorMetadata(
            model=self.model,
            architecture=self.architecture,
            hidden_size=self.hidden_size,
            num_blocks=self.num_blocks,
            method=method,
            position=self.position,
            site=self.site,
            dataset_digest=self.dataset,
            created_with=self.versions,
            notes=f"{units}, captured in {self.dtype}{', chat template' if self.chat else ''}.",
        )


class DumpFolder:
    """A dump, complete or not. Its progress is what the indexes of its shards say; nothing else records it."""

    def __init__(self, path: Path, manifest: DumpManifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path) -> DumpFolder:
        """An existing dump. Raises DerivationError if there is none."""
        file = path / MANIFEST_FILE
        try:
            data = file.read_bytes()
        except OSError as error:
            raise DerivationError(
                f"{path}: not a dump folder ({MANIFEST_FILE}: {error.strerror}). `steer-engine dump` makes one."
            ) from None
        return cls(path, DumpManifest.parse(data, str(file)))

    @classmethod
    def start(cls, path: Path, manifest: DumpManifest) -> DumpFolder:
        """A new dump, or an existing one with the same manifest.

        Raises:
            DerivationError: the folder is the dump of something else, or contains other files.
        """
        if (path / MANIFEST_FILE).exists():
            existing = cls.open(path)
            existing.manifest.require_same(manifest, str(path))
            return existing
        if path.exists() and any(entry.name != _LOCK for entry in path.iterdir()):
            raise DerivationError(f"{path}: it contains other files and no {MANIFEST_FILE}; choose a new folder.")
        try:
            write_atomically(path / MANIFEST_FILE, manifest.to_bytes())
        except OSError as error:
            raise DerivationError(f"{path}: cannot be written ({error.strerror}).") from None
        return cls(path, manifest)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Exclusive right to write. The system releases the lock if the process dies.

        Raises:
            DerivationError: another process is writing.
        """
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
        """Remove the temporary files of a killed run. Only inside `writing`."""
        for part in self.path.glob(".shard-*.part"):
            part.unlink(missing_ok=True)

    def shards(self) -> list[Shard]:
        """All shards in the order of the texts, each with its full length.

        Raises:
            DerivationError: a shard is missing, truncated or overlaps another; names the file.
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
                f"{self.path}: it contains more than the {self.manifest.num_texts} texts of its manifest."
            )
        return shards

    def require_complete(self) -> list[Shard]:
        """All shards. Raises DerivationError unless every text is there."""
        shards = self.shards()
        count = sum(shard.head.texts for shard in shards)
        if count < self.manifest.num_texts:
            raise DerivationError(
                f"{self.path}: {count} of {self.manifest.num_texts} texts are there; "
                "run the same `steer-engine dump` again: it captures only what is missing."
            )
        return shards

    def write(self, first: int, texts: Sequence[Text], captured: Sequence[CapturedText]) -> None:
        """Add a shard of consecutive texts, the first at index `first`. Only inside `writing`."""
        numbers = [int(index.stem.removeprefix("shard-")) for index in self.path.glob("shard-*.jsonl")]
        write_shard(
            self.path,
            max(numbers, default=-1) + 1,
            first=first,
            texts=texts,
            captured=captured,
            blocks=self.manifest.blocks,
            stored=self.manifest.stored,
        )
