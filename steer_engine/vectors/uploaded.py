"""Vectors and presets uploaded over the API. They are stored durably; `manifest.py` describes the layout on disk.

An object is on disk before a manifest names it, and is removed only after no manifest names it. A crash at any moment
leaves complete vectors, and at most one unused object, which the next startup removes.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from steer_engine.errors import (
    CapacityError,
    PreconditionError,
    RegistryConflictError,
    RegistryError,
    RegistryFullError,
    UnknownVectorError,
    VectorFileError,
)
from steer_engine.fields import shown
from steer_engine.settings import RegistryLimits
from steer_engine.vectors import files
from steer_engine.vectors.files import AnyVector
from steer_engine.vectors.manifest import (
    FOLDER,
    INCOMING,
    LOCK,
    MANIFEST,
    OBJECTS,
    RESERVE,
    Manifest,
    VectorEntry,
    preset_digest,
    read_manifest,
    vectors_of,
    write_manifest,
)
from steer_engine.vectors.storage import (
    NO_SPACE,
    disk_errors,
    file_signature,
    is_abandoned,
    read_file,
    write_atomically,
)

logger = logging.getLogger(__name__)

MIN_RESERVE_BYTES = 1 << 16
"""Room for a small manifest and what a file system needs for one more file."""

LOCK_SECONDS = 10.0
"""How long a change waits for another process to finish its own."""

ANY = "*"
"""As `If-Match`: any version, but the name must exist."""


class Stored(NamedTuple):
    """What `UploadedVectors.put` did. is_new: nothing had the name before."""

    entry: VectorEntry
    is_new: bool


class UploadedVectors:
    """Names and contents on disk. Each process that serves the folder has one; it follows the changes of the others.

    Arguments named `file_presets` are the presets that come from files of the folder.
    """

    def __init__(self, folder: Path, limits: RegistryLimits | None = None) -> None:
        self.limits = limits or RegistryLimits.from_environment()
        self._root = folder / FOLDER
        self._manifest_path = self._root / MANIFEST
        self._objects = self._root / OBJECTS
        self._incoming = self._root / INCOMING
        self._reserve = self._root / RESERVE
        try:
            self._state = read_manifest(self._manifest_path)
        except OSError as error:
            raise RegistryError(f"{self._manifest_path} cannot be read ({error.strerror}).") from None
        self.fault: str | None = None
        """Why the last attempt to read the manifest failed; None if it succeeded. Clients see this text."""

    @property
    def exists(self) -> bool:
        """Whether anything was ever uploaded to this folder."""
        return self._root.is_dir()

    def manifest(self, *, reopen: bool = False) -> Manifest:
        """The manifest as it is on disk now. Costs one `stat`; the file is parsed only if it was replaced.

        While the disk cannot be read, returns the manifest read last, and `fault` says why.

        reopen: open the file whatever `stat` says. A network file system may answer `stat` from a cache, but opening a
            file gives its newest version.
        """
        try:
            if reopen or file_signature(self._manifest_path) != self._state[1]:
                found = read_manifest(self._manifest_path, self._state)
                # A manifest is only ever replaced. If it is missing, its volume is missing too.
                if found[1] is None and self._state[1] is not None:
                    raise FileNotFoundError(errno.ENOENT, "the manifest is missing")
                self._state = found
        except OSError as error:
            self._set_fault(f"The registry's folder cannot be read ({error.strerror}); its last known state is served.")
        except RegistryError:
            self._set_fault("The registry's manifest is damaged; its last known state is served.")
        else:
            self._set_fault(None)
        return self._state[0]

    def load(self, entry: VectorEntry) -> AnyVector:
        """The vector of an entry. Raises UnknownVectorError if it does not exist, VectorFileError if it is damaged."""
        path = self._objects / entry.object_name
        try:
            vector = files.from_safetensors(read_file(path, files.MAX_FILE_BYTES)[0])
        except FileNotFoundError:
            raise UnknownVectorError(f"There is no control vector {entry.digest}.", param="vector") from None
        if vector.digest != entry.digest:
            raise VectorFileError(f"The content of {path.name} is {vector.digest}.")
        return vector

    def put(
        self,
        name: str,
        vector: AnyVector,
        *,
        if_match: str | None = None,
        file_presets: Mapping[str, dict[str, Any]] | None = None,
    ) -> Stored:
        """Store `vector` under `name`, with its metadata. It is on disk when this returns.

        Raises:
            RegistryConflictError: the name has other content and `if_match` is not given, or a preset uses the old
                content by its digest.
            PreconditionError: `if_match` is not the digest of the name.
            RegistryFullError: a limit is reached.
            CapacityError, RegistryError: the registry cannot be changed now.
        """
        data = files.to_bytes(vector)
        entry = VectorEntry.of(vector.digest, data)
        with self._changing() as manifest:
            before = manifest.vectors.get(name)
            _check_version(name, None if before is None else before.digest, vector.digest, if_match)
            if before == entry:
                self._write_object(entry, data)
                return Stored(entry, is_new=False)
            after = manifest.changed(vectors=manifest.vectors | {name: entry})
            self._check_limits(after)
            if before is not None:
                _check_unused({before.digest} - after.by_digest.keys(), name, manifest, file_presets)
            self._write_object(entry, data)
            self._replace(after)
            if before is not None:
                self._remove_unnamed(before, after)
            return Stored(entry, is_new=before is None)

    def delete(
        self, name: str, *, if_match: str | None = None, file_presets: Mapping[str, dict[str, Any]] | None = None
    ) -> str:
        """Delete a name; returns its digest.

        Raises:
            UnknownVectorError: there is no such name.
            PreconditionError: `if_match` is not the digest of the name.
            RegistryConflictError: a preset uses the name, or the content by its digest.
            CapacityError, RegistryError: the registry cannot be changed now.
        """
        with self._changing() as manifest:
            entry = manifest.vectors.get(name)
            if entry is None:
                raise UnknownVectorError(f"There is no control vector {name!r} to delete.", param="name")
            if if_match not in (None, ANY, entry.digest):
                raise PreconditionError(f"{name!r} is {entry.digest}, not {shown(if_match)}.")
            vectors = {other: kept for other, kept in manifest.vectors.items() if other != name}
            after = manifest.changed(vectors=vectors)
            _check_unused({name, entry.digest} - after.by_digest.keys(), name, manifest, file_presets)
            self._replace(after, frees=True)
            self._remove_unnamed(entry, after)
            return entry.digest

    def put_preset(self, name: str, spec: dict[str, Any], *, if_match: str | None = None) -> bool:
        """Store a preset. It is on disk when this returns. True if the name is new. Raises as `put` does."""
        with self._changing() as manifest:
            before = manifest.presets.get(name)
            _check_version(name, None if before is None else preset_digest(before), preset_digest(spec), if_match)
            if before == spec:
                return False
            after = manifest.changed(presets=manifest.presets | {name: spec})
            self._check_limits(after)
            self._replace(after)
            return before is None

    def delete_preset(self, name: str, *, if_match: str | None = None) -> None:
        """Delete a preset. Raises UnknownVectorError, PreconditionError, CapacityError, RegistryError."""
        with self._changing() as manifest:
            spec = manifest.presets.get(name)
            if spec is None:
                raise UnknownVectorError(f"There is no preset {name!r} to delete.", param="name")
            if if_match not in (None, ANY, preset_digest(spec)):
                raise PreconditionError(f"Preset {name!r} is {preset_digest(spec)}, not {shown(if_match)}.")
            kept = {other: spec for other, spec in manifest.presets.items() if other != name}
            self._replace(manifest.changed(presets=kept), frees=True)

    def incoming(self) -> Path:
        """A folder for uploads in progress, on the same file system as the objects. Raises RegistryError."""
        with disk_errors():
            self._check_readable()
            self._incoming.mkdir(parents=True, exist_ok=True)
            if not os.access(self._incoming, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return self._incoming

    def verify(self) -> dict[str, str]:
        """Load every object, and remove the files that no manifest names; returns name -> what is wrong with it."""
        if not self.exists:
            return {}
        try:
            with self._changing() as manifest:
                self._remove_unused_files(manifest)
        except (RegistryError, CapacityError) as error:
            # The folder may be mounted read-only, or another server may be removing the same files.
            logger.warning("Unused files of the registry are not removed: %s", error.message)
        # Without the lock: loading thousands of vectors takes longer than other servers wait for it.
        faults: dict[str, str] = {}
        for name, entry in self.manifest().vectors.items():
            try:
                self.load(entry)
            except (VectorFileError, UnknownVectorError, OSError) as error:
                if self.manifest().vectors.get(name) == entry:  # it was neither deleted nor replaced meanwhile
                    faults[name] = f"Control vector {name} ({entry.digest}): {error}"
        return faults

    @contextmanager
    def _changing(self) -> Iterator[Manifest]:
        """Lock the registry; yields its manifest. Raises CapacityError, RegistryError."""
        with disk_errors():
            # Checked before creating anything: an unmounted volume's empty folder must not become a new registry.
            self._check_readable()
            self._objects.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self._root / LOCK, timeout=LOCK_SECONDS)
            try:
                lock.acquire()
            except Timeout:
                message = "The registry is being changed by another process; retry later."
                raise CapacityError(message, retry_after=5) from None
            try:
                # Read whatever `stat` says: a change that another server has acknowledged must not be lost.
                yield self._check_readable(reopen=True)
                self._keep_reserve()
            finally:
                lock.release()

    def _check_readable(self, *, reopen: bool = False) -> Manifest:
        """The manifest. Raises RegistryError if the disk cannot be read."""
        manifest = self.manifest(reopen=reopen)
        if self.fault is not None:
            raise RegistryError(f"The registry cannot be changed now: {self.fault}")
        return manifest

    def _set_fault(self, fault: str | None) -> None:
        if fault != self.fault:
            logger.error("%s: %s", self._root, fault) if fault else logger.info("%s can be read again.", self._root)
        self.fault = fault

    def _check_limits(self, manifest: Manifest) -> None:
        limits = self.limits
        for found, limit, what in (
            (len(manifest.vectors), limits.max_vectors, "vectors"),
            (len(manifest.presets), limits.max_presets, "presets"),
            (manifest.num_bytes, limits.max_registry_bytes, "bytes"),
        ):
            if found > limit:
                raise RegistryFullError(f"The registry is full: at most {limit} {what}; delete some first.")

    def _replace(self, manifest: Manifest, *, frees: bool = False) -> None:
        """Write the manifest. frees: on a full volume, with the bytes of the reserve."""
        try:
            write_manifest(self._manifest_path, manifest)
        except OSError as error:
            if not frees or error.errno not in NO_SPACE:
                raise
            self._reserve.unlink(missing_ok=True)
            write_manifest(self._manifest_path, manifest)
        self._state = manifest, file_signature(self._manifest_path)

    def _keep_reserve(self) -> None:
        """Allocate the reserve if it is missing or too small for a manifest, as far as the volume has room."""
        try:
            needed = MIN_RESERVE_BYTES + 2 * (self._state[1][1] if self._state[1] else 0)
            if not self._reserve.exists() or self._reserve.stat().st_size < needed:
                with self._reserve.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, needed)
        except OSError:
            with contextlib.suppress(OSError):
                self._reserve.unlink(missing_ok=True)

    def _write_object(self, entry: VectorEntry, data: bytes) -> None:
        """Write an object unless it is on disk. A damaged one is repaired when its vector is uploaded again."""
        path = self._objects / entry.object_name
        try:
            intact = read_file(path, len(data))[0] == data
        except (OSError, VectorFileError):
            intact = False
        if not intact:
            write_atomically(path, data)

    def _remove_unnamed(self, entry: VectorEntry, manifest: Manifest) -> None:
        if entry.object_name not in manifest.object_names:
            (self._objects / entry.object_name).unlink(missing_ok=True)

    def _remove_unused_files(self, manifest: Manifest) -> None:
        named = manifest.object_names
        unused = [*self._root.glob(".*.part"), *(path for path in self._objects.glob("*") if path.name not in named)]
        for path in [*unused, *self._abandoned_uploads()]:
            path.unlink(missing_ok=True)

    def _abandoned_uploads(self) -> list[Path]:
        abandoned = []
        for path in self._incoming.glob("*"):
            with contextlib.suppress(FileNotFoundError):  # its writer has just finished
                if is_abandoned(path):
                    abandoned.append(path)
        return abandoned


def _check_unused(
    removed: set[str], name: str, manifest: Manifest, file_presets: Mapping[str, dict[str, Any]] | None
) -> None:
    """Raise RegistryConflictError if a preset uses one of the removed names and digests."""
    presets = {**(file_presets or {}), **manifest.presets}
    users = sorted(preset for preset, spec in presets.items() if removed & vectors_of(spec))
    if users:
        raise RegistryConflictError(f"{name!r} is used by the presets {', '.join(users[:8])}.")


def _check_version(name: str, found: str | None, new: str, if_match: str | None) -> None:
    """Check that `name`, whose digest is `found`, may become `new`."""
    if if_match is not None and (found is None or if_match not in (ANY, found)):
        state = "does not exist" if found is None else f"is {found}"
        raise PreconditionError(f"{name!r} {state}; If-Match says {shown(if_match)}.")
    if if_match is None and found is not None and found != new:
        raise RegistryConflictError(f"{name!r} already exists as {found}; to replace it, send that digest as If-Match.")
