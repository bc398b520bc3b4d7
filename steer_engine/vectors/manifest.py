"""The layout of a registry on disk, and its manifest: which content each name has.

DIR/.steer-engine/
    manifest.json               name -> digest, name -> preset; always replaced as a whole
    objects/<hex>.safetensors   one vector, named by its digest; never changed
    incoming/                   uploads in progress
    lock                        locked while the manifest changes
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steer_engine.errors import RegistryError
from steer_engine.vectors.storage import FileSignature, file_signature, write_atomically

FOLDER = ".steer-engine"
MANIFEST = "manifest.json"
OBJECTS = "objects"
INCOMING = "incoming"
LOCK = "lock"

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VectorEntry(_Strict):
    """What the manifest says about a vector."""

    digest: Digest
    num_bytes: int = Field(ge=0)


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
    def digests(self) -> frozenset[str]:
        """Digests of all vectors. Computed once: each steered request looks at it."""
        return frozenset(entry.digest for entry in self.vectors.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all distinct vectors."""
        return sum({entry.digest: entry.num_bytes for entry in self.vectors.values()}.values())


State = tuple[Manifest, FileSignature | None]
"""A manifest and the signature of its file; an empty manifest and None if there is no file."""


def read_manifest(path: Path, last: State | None = None) -> State:
    """The manifest as it is on disk now. A large file takes long to parse: `last` is returned if it is still current.

    Raises:
        RegistryError: the file is not a manifest. It is never replaced by an empty one.
    """
    try:
        with path.open("rb") as file:
            # By descriptor: the path could already lead to a newer file.
            signature = file_signature(file.fileno())
            if last is not None and signature == last[1]:
                return last
            raw = file.read()
    except FileNotFoundError:
        return Manifest(), None
    try:
        return Manifest.model_validate(json.loads(raw)), signature
    except (ValueError, RecursionError, ValidationError) as error:
        raise RegistryError(
            f"{path} is not a manifest ({type(error).__name__}); restore it, or move it away to start with an empty "
            "registry."
        ) from None


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Replace the manifest. A crash at any moment leaves the old one or the new one."""
    write_atomically(path, manifest.model_dump_json().encode())


def object_name(digest: str) -> str:
    """Name of the file that holds the content of a digest."""
    return f"{digest.removeprefix('sha256:')}.safetensors"


def preset_digest(spec: dict[str, Any]) -> str:
    """The version of a preset, for `ETag` and `If-Match`: the digest of its JSON."""
    text = json.dumps(spec, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def vectors_of(spec: dict[str, Any]) -> set[str]:
    """The names and digests of the vectors that a spec's JSON uses."""
    edits = [edit for edit in spec.get("edits") or () if isinstance(edit, dict)]
    gates = [edit["gate"] for edit in edits if isinstance(edit.get("gate"), dict)]
    named = [part.get("vector") for part in (*edits, *gates)]
    return {name for name in named if isinstance(name, str)}
