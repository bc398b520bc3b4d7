"""The registry: vectors by name or digest, and presets by name, from uploads and from an operator's folder."""

from __future__ import annotations

import logging
import re
from itertools import islice
from pathlib import Path
from typing import Any

from steer_engine.errors import (
    ModelMismatchError,
    RegistryConflictError,
    RegistryError,
    UnknownVectorError,
    VectorFileError,
)
from steer_engine.settings import RegistryLimits
from steer_engine.spelling import MAX_COMPARED, closest
from steer_engine.vectors.cache import VectorCache
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.files import AnyVector, as_directions, as_rows
from steer_engine.vectors.folder import MAX_NAME, NAME, FolderVectors, PresetFiles, check_name, check_preset
from steer_engine.vectors.manifest import Manifest, VectorEntry
from steer_engine.vectors.row_set import RowSet
from steer_engine.vectors.uploaded import UploadedVectors

logger = logging.getLogger(__name__)

MAX_NAMES_SHOWN = 8

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class Registry:
    """Names and digests -> control vectors and row sets; names -> presets. Thread-safe.

    Several processes may share the folder. An uploaded vector takes precedence over a file of the same name.

    Args:
        directory: the folder; None for a registry in memory only.
        strict: raise VectorFileError if a file of the folder is unusable. Otherwise it is logged and left out.
    """

    def __init__(
        self, directory: Path | str | None = None, *, strict: bool = False, limits: RegistryLimits | None = None
    ) -> None:
        self._folder = FolderVectors(directory)
        self._cache = VectorCache[AnyVector]()
        self._uploaded: UploadedVectors | None = None
        self._preset_files: PresetFiles | None = None
        faults = self._folder.faults
        if self._folder.directory is not None:
            self._uploaded = UploadedVectors(self._folder.directory, limits)
            self._preset_files = PresetFiles(self._folder.directory)
            damaged = self._uploaded.verify()
            for fault in damaged.values():
                logger.error("%s It cannot be used until it is uploaded again.", fault)
            self._preset_files.all()
            faults += [*damaged.values(), *self._preset_files.faults.values()]
        if strict and faults:
            raise VectorFileError(" ".join(faults))

    @property
    def directory(self) -> Path | None:
        return self._folder.directory

    @property
    def limits(self) -> RegistryLimits:
        return RegistryLimits() if self._uploaded is None else self._uploaded.limits

    @property
    def fault(self) -> str | None:
        """Why the folder cannot be read now; None if it can. Vectors that were loaded before stay available."""
        if self._uploaded is None:
            return None
        self._uploaded.manifest()
        return self._uploaded.fault or self._folder.fault

    @property
    def generation(self) -> int:
        """How many changes were made over the API. The same in all processes that share the folder."""
        return 0 if self._uploaded is None else self._uploaded.manifest().generation

    def get(self, name_or_digest: str) -> ControlVector:
        """The current control vector of a name or digest.

        Raises:
            SteeringRequestError: it is a row set. UnknownVectorError, RegistryError: as `find`.
        """
        return as_directions(self.find(name_or_digest), name_or_digest)

    def rows(self, name_or_digest: str) -> RowSet:
        """The current row set of a name or digest.

        Raises:
            SteeringRequestError: it is a control vector. UnknownVectorError, RegistryError: as `find`.
        """
        return as_rows(self.find(name_or_digest), name_or_digest)

    def find(self, name_or_digest: str) -> AnyVector:
        """What a name or digest stands for now. Raises UnknownVectorError; RegistryError if it cannot be read now."""
        found = self._find(name_or_digest)
        if found is None and self._uploaded is not None:
            self._uploaded.manifest(reopen=True)
            found = self._find(name_or_digest)
        if found is None:
            raise UnknownVectorError(
                f"There is no control vector {name_or_digest[:MAX_NAME]!r}; {self._registered(name_or_digest)}.",
                param="vector",
            )
        return found

    def digest_of(self, name: str) -> str:
        """The current digest of a name. Raises UnknownVectorError."""
        return self._uploaded_digest(name) or self.find(name).digest

    def names(self) -> dict[str, str]:
        """Name -> digest of every vector, sorted by name, after a scan of the folder."""
        names = {name: vector.digest for name, vector in self._folder.all().items()}
        if self._uploaded is not None:
            names |= {name: entry.digest for name, entry in self._uploaded.manifest().vectors.items()}
        return dict(sorted(names.items()))

    def check(self, *, hidden_size: int, num_blocks: int, strict: bool = False) -> dict[str, str]:
        """Names whose vectors do not fit a model -> why. They are logged; a request that uses one is refused.

        Raises:
            ModelMismatchError: `strict`, and a vector does not fit.
        """
        misfits: dict[str, str] = {}
        for name in self.names():
            try:
                self.find(name).check(hidden_size=hidden_size, num_blocks=num_blocks)
            except ModelMismatchError as error:
                misfits[name] = error.message
                logger.warning("Control vector %s does not fit this model: %s", name, error.message)
            except (UnknownVectorError, RegistryError):
                continue  # it was deleted meanwhile, or it is damaged or unreadable and already logged
        if strict and misfits:
            raise ModelMismatchError(" ".join(f"{name}: {reason}" for name, reason in misfits.items()))
        return misfits

    def add(self, name: str, vector: AnyVector) -> str:
        """Add a vector in memory, or replace one; returns its digest.

        Raises:
            SteeringRequestError: the name is not usable, or a file of the folder has it.
        """
        return self._folder.add(name, vector)

    def put(self, name: str, vector: AnyVector, *, if_match: str | None = None) -> bool:
        """Store an uploaded vector durably. True if the name is new.

        Raises:
            SteeringRequestError: the name is not usable.
            RegistryError: there is no folder, or as `UploadedVectors.put`.
        """
        uploaded = self._writable(name)
        if (source := self._folder.source_of(name)) is not None and self._uploaded_digest(name) is None:
            raise RegistryConflictError(f"The name {name!r} belongs to the file {source.name}; choose another.")
        stored = uploaded.put(name, vector, if_match=if_match, file_presets=self._file_presets())
        self._cache.put(stored.entry.object_name, vector, vector.num_bytes)
        return stored.is_new

    def delete(self, name: str, *, if_match: str | None = None) -> str:
        """Delete an uploaded vector; returns its digest. Raises as `UploadedVectors.delete`."""
        uploaded = self._writable(name)
        if self._uploaded_digest(name) is None and (source := self._folder.source_of(name)) is not None:
            raise RegistryConflictError(f"The name {name!r} belongs to the file {source.name}; remove the file.")
        return uploaded.delete(name, if_match=if_match, file_presets=self._file_presets())

    def incoming(self, name: str) -> Path:
        """A folder for uploads in progress. Raises SteeringRequestError if the name is not usable, RegistryError."""
        return self._writable(name).incoming()

    def preset(self, name: str) -> dict[str, Any]:
        """A preset's spec, as it was sent. Raises UnknownVectorError."""
        found = None
        if NAME.fullmatch(name) is not None:
            if self._uploaded is not None:
                found = self._uploaded.manifest().presets.get(name)
            if found is None and self._preset_files is not None:
                found = self._preset_files.get(name)
            if found is None and self._uploaded is not None:
                found = self._uploaded.manifest(reopen=True).presets.get(name)
        if found is None:
            files = [] if self._preset_files is None else self._preset_files.some_names(MAX_COMPARED)
            uploaded = {} if self._uploaded is None else self._uploaded.manifest().presets
            names = sorted({*files, *islice(uploaded, MAX_COMPARED)})
            known = closest(name[:MAX_NAME], names, MAX_NAMES_SHOWN)
            raise UnknownVectorError(
                f"There is no preset {name[:MAX_NAME]!r}; there are: {', '.join(known) or 'none'}.", param="preset"
            )
        return found

    def presets(self) -> dict[str, dict[str, Any]]:
        """Name -> spec of every preset, sorted by name."""
        found = self._file_presets()
        if self._uploaded is not None:
            found |= self._uploaded.manifest().presets
        return dict(sorted(found.items()))

    def put_preset(self, name: str, spec: Any, *, if_match: str | None = None) -> bool:
        """Store a preset durably. True if the name is new.

        Raises:
            SteeringRequestError: the name is not usable, or the spec is not a preset.
            RegistryError: as `UploadedVectors.put_preset`.
        """
        uploaded = self._writable(name)
        checked = check_preset(spec)
        if self._is_preset_file(name):
            raise RegistryConflictError(f"The preset {name!r} belongs to a file of the folder; choose another name.")
        return uploaded.put_preset(name, checked, if_match=if_match)

    def delete_preset(self, name: str, *, if_match: str | None = None) -> None:
        """Delete a preset. Raises as `UploadedVectors.delete_preset`."""
        uploaded = self._writable(name)
        if self._is_preset_file(name):
            raise RegistryConflictError(f"The preset {name!r} belongs to a file of the folder; remove the file.")
        uploaded.delete_preset(name, if_match=if_match)

    def _find(self, name_or_digest: str) -> AnyVector | None:
        # Once, so that it costs one `stat`, and all that is found here is of the same generation.
        manifest = Manifest() if self._uploaded is None else self._uploaded.manifest()
        if _DIGEST.fullmatch(name_or_digest):
            entry = manifest.by_digest.get(name_or_digest)
            return self._folder.find_digest(name_or_digest) if entry is None else self._load(entry)
        entry = manifest.vectors.get(name_or_digest)
        return self._folder.find(name_or_digest) if entry is None else self._load(entry)

    def _load(self, entry: VectorEntry) -> AnyVector | None:
        """The uploaded vector of an entry, with that entry's metadata; None if it was deleted meanwhile.

        Raises:
            UnknownVectorError: its file is damaged.
            RegistryError: its file cannot be read now.
        """
        if (cached := self._cache.get(entry.object_name)) is not None:
            return cached
        assert self._uploaded is not None
        try:
            vector = self._uploaded.load(entry)
        except (UnknownVectorError, OSError) as error:
            fault = self.fault or ("its file cannot be read" if isinstance(error, OSError) else None)
            if fault is None:
                return None
            logger.error("Control vector %s: %s %s", entry.digest, fault, error)
            raise RegistryError(f"Control vector {entry.digest} cannot be read now; retry later. ({fault})") from None
        except VectorFileError as error:
            logger.error("Control vector %s is damaged: %s", entry.digest, error)
            raise UnknownVectorError(f"The file of control vector {entry.digest} is damaged.", param="vector") from None
        self._cache.put(entry.object_name, vector, vector.num_bytes)
        return vector

    def _uploaded_digest(self, name: str) -> str | None:
        """The current digest of an uploaded vector."""
        entry = None if self._uploaded is None else self._uploaded.manifest().vectors.get(name)
        return None if entry is None else entry.digest

    def _writable(self, name: str) -> UploadedVectors:
        check_name(name)
        if self._uploaded is None:
            raise RegistryError("This server has no folder of vectors; start it with --steering-vectors DIR.")
        if (fault := self._folder.fault) is not None:
            raise RegistryError(f"The registry cannot be changed now: {fault}")
        return self._uploaded

    def _file_presets(self) -> dict[str, dict[str, Any]]:
        files = {} if self._preset_files is None else self._preset_files.all()
        return {name: spec for name, spec in files.items() if NAME.fullmatch(name)}

    def _is_preset_file(self, name: str) -> bool:
        assert self._uploaded is not None
        files = self._preset_files
        return name not in self._uploaded.manifest().presets and files is not None and files.get(name) is not None

    def _registered(self, name: str) -> str:
        """A few names for an error message, the closest to `name` first.

        Costs the same for any number of names: an unknown name is a cheap mistake.
        """
        uploaded = {} if self._uploaded is None else self._uploaded.manifest().vectors
        names = sorted({*self._folder.some_names(MAX_COMPARED), *islice(uploaded, MAX_COMPARED)})
        shown = names[:MAX_NAMES_SHOWN] if _DIGEST.fullmatch(name) else closest(name[:MAX_NAME], names, MAX_NAMES_SHOWN)
        if not shown:
            return "none is registered"
        # A name of both sources counts twice; to find these takes time that grows with the number of names.
        more = self._folder.num_names + len(uploaded) - len(shown)
        return f"registered are {', '.join(shown)}" + (f" and {more} more" if more else "")
