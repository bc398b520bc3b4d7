"""The manifest of a registry: which names stand for which content. One JSON file, always replaced whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steer_engine.errors import RegistryError
from steer_engine.vectors.storage import write_atomically

Signature = tuple[int, int, int]
"""(mtime in ns, size, inode): changes whenever a file is replaced."""

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VectorEntry(_Strict):
    """What the manifest knows of a vector without opening its file."""

    digest: Digest
    num_bytes: int = Field(ge=0)


class Manifest(_Strict):
    """The state of a registry after `generation` changes. Presets are kept as they were written."""

    format: Literal[1] = 1
    generation: int = Field(default=0, ge=0)
    vectors: dict[str, VectorEntry] = Field(default_factory=dict)
    presets: dict[str, dict[str, Any]] = Field(default_factory=dict)

    def changed(self, **update: Any) -> Manifest:
        """The next generation, with some fields replaced."""
        return self.model_copy(update={"generation": self.generation + 1, **update})

    @property
    def num_bytes(self) -> int:
        """Bytes of all distinct vectors."""
        return sum({entry.digest: entry.num_bytes for entry in self.vectors.values()}.values())


def read_manifest(path: Path) -> tuple[Manifest, Signature | None]:
    """The manifest and the signature of its file; an empty one and None where there is no file.

    Raises:
        RegistryError: the file is there but is no manifest. It is never replaced by an empty one.
    """
    try:
        with path.open("rb") as file:
            # Of the open file: a signature taken by name could be of a newer one.
            signature = signature_of(file.fileno())
            raw = file.read()
    except FileNotFoundError:
        return Manifest(), None
    try:
        return Manifest.model_validate(json.loads(raw)), signature
    except (ValueError, RecursionError, ValidationError) as error:
        raise RegistryError(
            f"{path} is not a manifest ({type(error).__name__}); restore it, or move it away to begin anew."
        ) from None


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Replace the manifest so that a crash at any moment leaves the old one or the new one."""
    write_atomically(path, manifest.model_dump_json().encode())


def signature_of(path: Path | int) -> Signature | None:
    """Of a file by name or descriptor; None where there is none."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return (status.st_mtime_ns, status.st_size, status.st_ino)
