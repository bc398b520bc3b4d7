"""The durable part of a registry: vectors and presets that were put there over the API, in a hidden folder of it.

    DIR/.steer-engine/
        manifest.json            name -> digest, name -> preset; always replaced whole
        objects/<hex>.safetensors   content, named by digest, never changed
        incoming/                uploads under way
        lock                     held while the manifest is changed

An object is on the disk before a manifest names it, and a manifest stops naming an object before that is removed: after
a crash at any moment there are only whole vectors, and at most an object too many, which the next start removes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import Field

from steer_engine.errors import (
    CapacityError,
    PreconditionError,
    RegistryConflictError,
    RegistryError,
    RegistryFullError,
    UnknownVectorError,
    VectorFileError,
)
from steer_engine.settings import NamedLimits
from steer_engine.vectors import safetensors_format
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.manifest import Manifest, VectorEntry, read_manifest, signature_of, write_manifest
from steer_engine.vectors.storage import is_left, write_atomically, writing

logger = logging.getLogger(__name__)

FOLDER = ".steer-engine"
LOCK_SECONDS = 10.0
"""How long a change waits for another process to finish its own."""

ANY = "*"
"""If-Match: whatever version there is, but there must be one."""


class ShelfLimits(NamedLimits):
    """How large a registry may grow."""

    max_vectors: int = Field(default=1_000, ge=0)
    max_presets: int = Field(default=1_000, ge=0)
    max_registry_bytes: int = Field(default=10 * 2**30, ge=0)
    max_preset_bytes: int = Field(default=16_384, ge=0)


class Shelf:
    """Names and contents on disk. Every process that serves the folder has one; none trusts its own memory for long."""

    def __init__(self, folder: Path, limits: ShelfLimits | None = None) -> None:
        self.limits = limits or ShelfLimits.from_environment()
        self._root = folder / FOLDER
        self._manifest_path = self._root / "manifest.json"
        self._objects = self._root / "objects"
        self._state = read_manifest(self._manifest_path)
        self.fault: str | None = None
        """Why the disk could not be read at the last look, if so; what was read before it serves on. Clients see it."""

    @property
    def exists(self) -> bool:
        return self._root.is_dir()

    def manifest(self, *, reopen: bool = False) -> Manifest:
        """The manifest as it is on the disk now: one `stat`, and a read only if it was replaced.

        While the disk cannot be read, the one read last; `fault` says so.

        reopen: read it whatever `stat` says. A network file system answers `stat` from a cache, but opens anew.
        """
        try:
            if reopen or signature_of(self._manifest_path) != self._state[1]:
                found = read_manifest(self._manifest_path)
                # It is only ever replaced: one that is gone was not emptied, its volume is away.
                if found[1] is None and self._state[1] is not None:
                    raise FileNotFoundError(errno.ENOENT, "the manifest is gone")
                self._state = found
        except OSError as error:
            self._note(f"The registry's folder cannot be read ({error.strerror}); what was read before serves on.")
        except RegistryError:
            self._note("The registry's manifest is damaged and cannot be read; what was read before serves on.")
        else:
            self._note(None)
        return self._state[0]

    def _note(self, fault: str | None) -> None:
        if fault != self.fault:
            logger.error("%s: %s", self._root, fault) if fault else logger.info("%s can be read again.", self._root)
        self.fault = fault

    def load(self, digest: str) -> ControlVector:
        """The content of a digest. Raises UnknownVectorError if it is gone, VectorFileError if it is damaged."""
        path = self._object(digest)
        try:
            vector = safetensors_format.from_bytes(path.read_bytes())
        except FileNotFoundError:
            raise UnknownVectorError(f"There is no control vector {digest}.", param="vector") from None
        if vector.digest != digest:
            raise VectorFileError(f"{path.name} holds other content than its name says.")
        return vector

    def put(
        self,
        name: str,
        vector: ControlVector,
        *,
        if_match: str | None = None,
        file_presets: Mapping[str, dict[str, Any]] | None = None,
    ) -> bool:
        """Make `name` stand for `vector`; on the disk when this returns. True if the name is new.

        file_presets: presets that the shelf does not know.

        Raises:
            RegistryConflictError: the name stands for another digest, and `if_match` does not say which; or a preset
                names by digest the content that would go.
            PreconditionError: `if_match` is not the digest that the name stands for.
            RegistryFullError: a limit.
        """
        data = safetensors_format.to_bytes(vector)
        with self._changing() as manifest:
            before = manifest.vectors.get(name)
            _check_version(name, None if before is None else before.digest, vector.digest, if_match)
            if before is not None and before.digest == vector.digest:
                self._write_object(vector.digest, data)
                return False
            after = manifest.changed(
                vectors=manifest.vectors | {name: VectorEntry(digest=vector.digest, num_bytes=len(data))}
            )
            self._check_room(after)
            if before is not None:
                _check_unused({before.digest} - _digests(after), name, manifest, file_presets)
            self._write_object(vector.digest, data)
            self._replace(after)
            if before is not None:
                self._remove_unnamed(before.digest, after)
            return before is None

    def delete(
        self, name: str, *, if_match: str | None = None, file_presets: Mapping[str, dict[str, Any]] | None = None
    ) -> str:
        """Forget a name; returns the digest that it stood for.

        file_presets: presets that the shelf does not know.

        Raises:
            UnknownVectorError, PreconditionError; RegistryConflictError if a preset names it, or by digest what would
                go with it.
        """
        with self._changing() as manifest:
            entry = manifest.vectors.get(name)
            if entry is None:
                raise UnknownVectorError(f"There is no control vector {name!r} to delete.", param="name")
            if if_match not in (None, ANY, entry.digest):
                raise PreconditionError(f"{name!r} stands for {entry.digest}, not for {if_match}.")
            vectors = {other: kept for other, kept in manifest.vectors.items() if other != name}
            after = manifest.changed(vectors=vectors)
            _check_unused({name, entry.digest} - _digests(after), name, manifest, file_presets)
            self._replace(after)
            self._remove_unnamed(entry.digest, after)
            return entry.digest

    def put_preset(self, name: str, spec: dict[str, Any], *, if_match: str | None = None) -> bool:
        """Keep a named spec; on the disk when this returns. True if the name is new. Raises as `put` does."""
        with self._changing() as manifest:
            before = manifest.presets.get(name)
            _check_version(name, None if before is None else preset_digest(before), preset_digest(spec), if_match)
            if before == spec:
                return False
            after = manifest.changed(presets=manifest.presets | {name: spec})
            self._check_room(after)
            self._replace(after)
            return before is None

    def delete_preset(self, name: str, *, if_match: str | None = None) -> None:
        """Forget a preset. Raises UnknownVectorError, PreconditionError."""
        with self._changing() as manifest:
            spec = manifest.presets.get(name)
            if spec is None:
                raise UnknownVectorError(f"There is no preset {name!r} to delete.", param="name")
            if if_match not in (None, ANY, preset_digest(spec)):
                raise PreconditionError(f"Preset {name!r} is {preset_digest(spec)}, not {if_match}.")
            self._replace(manifest.changed(presets={k: v for k, v in manifest.presets.items() if k != name}))

    def verify(self) -> dict[str, str]:
        """Read every object. Removes what no name stands for; returns name -> what is wrong with its content."""
        if not self.exists:
            return {}
        try:
            with self._changing() as manifest:
                self._remove_leftovers(manifest)
        except (RegistryError, CapacityError) as error:
            # A mirror is mounted read-only, and of many servers that start together one tidies: all read.
            logger.warning("The registry is read and not tidied: %s", error.message)
        # Not under the lock: reading thousands of vectors takes longer than another server waits for it.
        return self._faults(self.manifest())

    def _faults(self, manifest: Manifest) -> dict[str, str]:
        faults: dict[str, str] = {}
        for name, entry in manifest.vectors.items():
            try:
                self.load(entry.digest)
            except (VectorFileError, UnknownVectorError, OSError) as error:
                if self.manifest().vectors.get(name) == entry:  # or it was deleted or replaced meanwhile
                    faults[name] = f"Control vector {name} ({entry.digest}): {error}"
        return faults

    def _remove_leftovers(self, manifest: Manifest) -> None:
        kept = {self._object(entry.digest) for entry in manifest.vectors.values()}
        leftovers = [*self._root.glob(".*.part"), *(path for path in self._objects.glob("*") if path not in kept)]
        for path in [*leftovers, *self._stale_uploads()]:
            path.unlink(missing_ok=True)

    def incoming(self) -> Path:
        """A folder for uploads under way, on the file system of the objects."""
        folder = self._root / "incoming"
        with writing():
            self._check_here()
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return folder

    def _write_object(self, digest: str, data: bytes) -> None:
        """Nothing if it is there; sending a vector again mends a file that was cut short."""
        path = self._object(digest)
        if not path.exists() or path.stat().st_size != len(data):
            write_atomically(path, data)

    def _object(self, digest: str) -> Path:
        return self._objects / f"{digest.removeprefix('sha256:')}.safetensors"

    @contextmanager
    def _changing(self) -> Iterator[Manifest]:
        """The manifest as it is, which no other process changes meanwhile. Raises RegistryError where it cannot be."""
        with writing():
            # Before anything is made: an empty mount point would become a registry of its own.
            self._check_here()
            self._objects.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self._root / "lock", timeout=LOCK_SECONDS)
            try:
                lock.acquire()
            except Timeout:
                message = "Another change of the registry takes too long; try again."
                raise CapacityError(message, retry_after=5) from None
            try:
                # Read whatever `stat` says: what another server has just acknowledged must not be lost.
                yield self._check_here(reopen=True)
            finally:
                lock.release()

    def _check_here(self, *, reopen: bool = False) -> Manifest:
        """The manifest; raises RegistryError while the disk cannot be read: a change would go to something else."""
        manifest = self.manifest(reopen=reopen)
        if self.fault is not None:
            raise RegistryError(f"The registry cannot be changed now: {self.fault}")
        return manifest

    def _replace(self, manifest: Manifest) -> None:
        write_manifest(self._manifest_path, manifest)
        self._state = manifest, signature_of(self._manifest_path)

    def _check_room(self, manifest: Manifest) -> None:
        limits = self.limits
        for found, limit, what in (
            (len(manifest.vectors), limits.max_vectors, "vectors"),
            (len(manifest.presets), limits.max_presets, "presets"),
            (manifest.num_bytes, limits.max_registry_bytes, "bytes"),
        ):
            if found > limit:
                raise RegistryFullError(f"The registry is full: at most {limit} {what}; delete some first.")

    def _stale_uploads(self) -> list[Path]:
        """Uploads of processes that died."""
        stale = []
        for path in (self._root / "incoming").glob("*"):
            with contextlib.suppress(FileNotFoundError):  # another process has just finished it
                if is_left(path):
                    stale.append(path)
        return stale

    def _remove_unnamed(self, digest: str, manifest: Manifest) -> None:
        if digest not in _digests(manifest):
            self._object(digest).unlink(missing_ok=True)


def vectors_of(spec: dict[str, Any]) -> set[str]:
    """The names and digests that a spec's JSON mentions as vectors."""
    edits = [edit for edit in spec.get("edits") or () if isinstance(edit, dict)]
    gates = [edit["gate"] for edit in edits if isinstance(edit.get("gate"), dict)]
    named = [part.get("vector") for part in (*edits, *gates)]
    return {name for name in named if isinstance(name, str)}


def preset_digest(spec: dict[str, Any]) -> str:
    """The version of a preset: over its JSON, for `ETag` and `If-Match`."""
    text = json.dumps(spec, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _digests(manifest: Manifest) -> set[str]:
    return {entry.digest for entry in manifest.vectors.values()}


def _check_unused(
    gone: set[str], name: str, manifest: Manifest, file_presets: Mapping[str, dict[str, Any]] | None
) -> None:
    """No preset names what would be gone: a name, a digest."""
    presets = {**(file_presets or {}), **manifest.presets}
    users = sorted(preset for preset, spec in presets.items() if gone & vectors_of(spec))
    if users:
        raise RegistryConflictError(f"{name!r} is used by the presets {', '.join(users[:8])}.")


def _check_version(name: str, found: str | None, wanted: str, if_match: str | None) -> None:
    if if_match is not None and (found is None or if_match not in (ANY, found)):
        state = "does not exist" if found is None else f"is {found}"
        raise PreconditionError(f"{name!r} {state}, so it is not {if_match}.")
    if if_match is None and found is not None and found != wanted:
        raise RegistryConflictError(
            f"{name!r} already stands for {found}; to replace it, send that digest as If-Match."
        )
