"""The layout of a registry on disk, and its manifest: which content each name has.

DIR/.steer-engine/
    manifest.json                      name -> vector, name -> preset; always replaced as a whole
    objects/<hex>-<hex>.safetensors    one vector with its metadata, named by its digest and its file's; never changed
    incoming/                          uploads in progress
    lock                               locked while the manifest changes
    reserve                            free bytes that a deletion may use on a full volume
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steer_engine.errors import RegistryError
from steer_engine.vectors.storage import FileSignature, read_file, write_atomically

FOLDER = ".steer-engine"
MANIFEST = "manifest.json"
OBJECTS = "objects"
INCOMING = "incoming"
RESERVE = "reserve"
LOCK = "lock"

MAX_BYTES = 1 << 28
"""Size of a manifest: ten times one with 10,000 vectors and 1,000 presets of the largest size."""

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VectorEntry(_Strict):
    """What the manifest says about a vector.

    file: the first digits of its file's SHA-256, because two names may have the same content with other metadata.
    """

    digest: Digest
    num_bytes: int = Field(ge=0)
    file: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")] | None = None

    @classmethod
    def of(cls, digest: str, data: bytes) -> VectorEntry:
        """The entry of a vector whose file is `data`."""
        return cls(digest=digest, num_bytes=len(data), file=hashlib.sha256(data).hexdigest()[:16])

    @property
    def object_name(self) -> str:
        """Name of the file."""
        parts = [self.digest.removeprefix("sha256:"), *([self.file] if self.file else [])]
        return f"{'-'.join(parts)}.safetensors"


class Manifest(_Strict):
    """The state of a registry after `generation` changes. Presets are stored as they were sent."""

    format: Literal[1] = 1
    generation: int = Field(default=0, ge=0)
    vectors: dict[str, VectorEntry] = Field(default_factory=dict)
    presets: dict[str, dict[str, Any]] = Field(default_factory=dict)

    def changed(self, **update: Any) -> Manifest:
        """The next generation, with some fields replaced."""
        # Not a copy, which would keep the digests of this generation.
        return Manifest.model_construct(**{**dict(self), "generation": self.generation + 1, **update})

    @cached_property
    def by_digest(self) -> dict[str, VectorEntry]:
        """Digest -> an entry of that content. Computed once: each steered request looks at it."""
        return {entry.digest: entry for entry in self.vectors.values()}

    @property
    def object_names(self) -> set[str]:
        """Names of the files of all vectors."""
        return {entry.object_name for entry in self.vectors.values()}

    @property
    def num_bytes(self) -> int:
        """Bytes of the files of all vectors."""
        return sum({entry.object_name: entry.num_bytes for entry in self.vectors.values()}.values())


State = tuple[Manifest, FileSignature | None]
"""A manifest and the signature of its file; an empty manifest and None if there is no file."""


def read_manifest(path: Path, last: State | None = None) -> State:
    """The manifest as it is on disk now. A large file takes long to parse: `last` is returned if it is still current.

    Raises:
        RegistryError: the file is not a manifest. It is never replaced by an empty one.
    """
    try:
        raw, signature = read_file(path, MAX_BYTES)
        if last is not None and signature == last[1]:
            return last
        return Manifest.model_validate(json.loads(raw)), signature
    except FileNotFoundError:
        return Manifest(), None
    except (ValueError, RecursionError, ValidationError) as error:
        raise RegistryError(
            f"{path} is not a manifest ({type(error).__name__}); restore it, or move it away to start with an empty "
            "registry."
        ) from None


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Replace the manifest. A crash at any moment leaves the old one or the new one."""
    write_atomically(path, manifest.model_dump_json().encode())


def preset_digest(spec: dict[str, Any]) -> str:
    """The version of a preset, for `ETag` and `If-Match`: the digest of its JSON."""
    text = json.dumps(spec, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def vectors_of(spec: dict[str, Any]) -> set[str]:
    """The names and digests of the vectors that a spec's JSON uses: of edits, gates and conditions."""
    edits = [edit for edit in spec.get("edits") or () if isinstance(edit, dict)]
    gates = [edit.get("gate") for edit in edits]
    whens = [when for holder in (spec, *edits) if isinstance(when := holder.get("when"), dict)]
    listed = [each for when in whens for name in ("any", "all") for each in when.get(name) or ()]
    named = [part.get("vector") for part in (*edits, *gates, *whens, *listed) if isinstance(part, dict)]
    return {name for name in named if isinstance(name, str)}
