"""Vectors and presets by name, vectors also by digest: an operator's folder, and what was put there since."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from steer_engine.errors import (
    ModelMismatchError,
    RegistryConflictError,
    RegistryError,
    SteeringRequestError,
    UnknownVectorError,
    VectorFileError,
)
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.folder import MAX_NAME, MAX_SUPERSEDED, NAME, NAME_RULE, Adopted, PresetFiles, check_preset
from steer_engine.vectors.loaded import Loaded
from steer_engine.vectors.uploaded import Shelf, ShelfLimits

__all__ = ["MAX_NAME", "MAX_SUPERSEDED", "NAME_RULE", "Registry"]

logger = logging.getLogger(__name__)

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class Registry:
    """Names and digests -> control vectors; names -> presets. Thread-safe, and shared through its folder.

    Two sources of names: the shelf (what was put over the API, durable) and the folder's own files (see `Adopted`);
    a name on the shelf is never lost to a file of the same name.

    Args:
        directory: the folder; None for a registry in memory only.
        strict: a broken or foreign file raises VectorFileError here instead of being logged and left out.
    """

    def __init__(
        self, directory: Path | str | None = None, *, strict: bool = False, limits: ShelfLimits | None = None
    ) -> None:
        self._adopted = Adopted(directory)
        self._loaded: Loaded[ControlVector] = Loaded()
        self._shelf: Shelf | None = None
        self._preset_files: PresetFiles | None = None
        faults = list(self._adopted.faults)
        if self._adopted.directory is not None:
            self._shelf = Shelf(self._adopted.directory, limits)
            self._preset_files = PresetFiles(self._adopted.directory)
            damaged = self._shelf.verify()
            for fault in damaged.values():
                logger.error("%s It cannot be used until it is put there again.", fault)
            self._preset_files.all()
            faults += [*damaged.values(), *self._preset_files.faults.values()]
        if strict and faults:
            raise VectorFileError(" ".join(faults))

    @property
    def directory(self) -> Path | None:
        return self._adopted.directory

    @property
    def limits(self) -> ShelfLimits:
        return ShelfLimits() if self._shelf is None else self._shelf.limits

    @property
    def fault(self) -> str | None:
        """Why the folder cannot be read now, if so; vectors that were read before are served on."""
        if self._shelf is None:
            return None
        self._shelf.manifest()
        return self._shelf.fault

    @property
    def generation(self) -> int:
        """How many changes were made over the API; the same in every process that serves the folder."""
        return 0 if self._shelf is None else self._shelf.manifest().generation

    def get(self, name_or_digest: str) -> ControlVector:
        """The vector of that name or digest, as of now. Raises UnknownVectorError."""
        found = self._find(name_or_digest)
        if found is None and self._shelf is not None:
            self._shelf.manifest(reopen=True)
            found = self._find(name_or_digest)
        if found is None:
            raise UnknownVectorError(
                f"There is no control vector {name_or_digest[:MAX_NAME]!r}; {self._what_there_is()}.", param="vector"
            )
        return found

    def digest_of(self, name: str) -> str:
        """The digest that a name stands for now. Raises UnknownVectorError."""
        return self._shelved(name) or self.get(name).digest

    def names(self) -> dict[str, str]:
        """Name -> digest of every vector, by name, after a look at the folder."""
        names = {name: vector.digest for name, vector in self._adopted.all().items()}
        if self._shelf is not None:
            names |= {name: entry.digest for name, entry in self._shelf.manifest().vectors.items()}
        return dict(sorted(names.items()))

    def add(self, name: str, vector: ControlVector) -> str:
        """Put a vector in memory under a name, replacing an earlier one of that name; returns its digest.

        Raises:
            SteeringRequestError: the name is not usable, or a file of the folder has it.
        """
        return self._adopted.add(name, vector)

    def put(self, name: str, vector: ControlVector, *, if_match: str | None = None) -> bool:
        """Put a vector on the shelf, durably. True if the name is new.

        Raises:
            SteeringRequestError: the name is not usable. RegistryError: as `Shelf.put`, or there is no folder.
        """
        shelf = self._writable(name)
        if (source := self._adopted.source_of(name)) is not None and self._shelved(name) is None:
            raise RegistryConflictError(f"The name {name!r} belongs to the file {source.name}; choose another.")
        is_new = shelf.put(name, vector, if_match=if_match, file_presets=self._file_presets())
        self._remember(vector)
        return is_new

    def delete(self, name: str, *, if_match: str | None = None) -> str:
        """Take a name off the shelf; returns its digest. Raises as `Shelf.delete`."""
        shelf = self._writable(name)
        if self._shelved(name) is None and (source := self._adopted.source_of(name)) is not None:
            raise RegistryConflictError(f"The name {name!r} belongs to the file {source.name}; remove the file.")
        return shelf.delete(name, if_match=if_match, file_presets=self._file_presets())

    def preset(self, name: str) -> dict[str, Any]:
        """A preset's spec as it was written. Raises UnknownVectorError."""
        found = None
        if NAME.fullmatch(name) is not None:
            if self._shelf is not None:
                found = self._shelf.manifest().presets.get(name)
            if found is None and self._preset_files is not None:
                found = self._preset_files.get(name)
            if found is None and self._shelf is not None:
                found = self._shelf.manifest(reopen=True).presets.get(name)
        if found is None:
            there = ", ".join(list(self.presets())[:8]) or "none"
            raise UnknownVectorError(f"There is no preset {name[:MAX_NAME]!r}; there are: {there}.", param="preset")
        return found

    def presets(self) -> dict[str, dict[str, Any]]:
        """Name -> spec of every preset, by name."""
        found = self._file_presets()
        if self._shelf is not None:
            found |= self._shelf.manifest().presets
        return dict(sorted(found.items()))

    def put_preset(self, name: str, spec: Any, *, if_match: str | None = None) -> bool:
        """Keep a preset, durably. True if the name is new. Raises SteeringRequestError, or as `Shelf.put_preset`."""
        shelf = self._writable(name)
        checked = check_preset(spec)
        if self._is_preset_file(name):
            raise RegistryConflictError(f"The preset {name!r} belongs to a file of the folder; choose another name.")
        return shelf.put_preset(name, checked, if_match=if_match)

    def delete_preset(self, name: str, *, if_match: str | None = None) -> None:
        """Forget a preset. Raises as `Shelf.delete_preset`."""
        shelf = self._writable(name)
        if self._is_preset_file(name):
            raise RegistryConflictError(f"The preset {name!r} belongs to a file of the folder; remove the file.")
        shelf.delete_preset(name, if_match=if_match)

    def incoming(self, name: str) -> Path:
        """A folder for uploads under way. Raises SteeringRequestError for a name that cannot be put, RegistryError."""
        return self._writable(name).incoming()

    def check(self, *, hidden_size: int, num_blocks: int, strict: bool = False) -> dict[str, str]:
        """Names whose vectors do not fit a model -> why. They are logged; a request for one is refused by its message.

        Raises:
            ModelMismatchError: with `strict`, where any does not fit.
        """
        misfits: dict[str, str] = {}
        for name in self.names():
            try:
                self.get(name).check(hidden_size=hidden_size, num_blocks=num_blocks)
            except ModelMismatchError as error:
                misfits[name] = error.message
                logger.warning("Control vector %s does not fit this model: %s", name, error.message)
            except UnknownVectorError:
                continue  # gone since the names were read, or damaged and already in the log
        if strict and misfits:
            raise ModelMismatchError(" ".join(f"{name}: {reason}" for name, reason in misfits.items()))
        return misfits

    def _file_presets(self) -> dict[str, dict[str, Any]]:
        files = {} if self._preset_files is None else self._preset_files.all()
        return {name: spec for name, spec in files.items() if NAME.fullmatch(name)}

    def _find(self, name_or_digest: str) -> ControlVector | None:
        if _DIGEST.fullmatch(name_or_digest):
            return self._by_digest(name_or_digest)
        digest = self._shelved(name_or_digest)
        return self._adopted.find(name_or_digest) if digest is None else self._by_digest(digest)

    def _shelved(self, name: str) -> str | None:
        """The digest that the shelf has for a name now."""
        entry = None if self._shelf is None else self._shelf.manifest().vectors.get(name)
        return None if entry is None else entry.digest

    def _by_digest(self, digest: str) -> ControlVector | None:
        if (loaded := self._loaded.get(digest)) is not None:
            return loaded
        if self._shelf is not None and digest in {entry.digest for entry in self._shelf.manifest().vectors.values()}:
            try:
                vector = self._shelf.load(digest)
            except UnknownVectorError:
                return None  # deleted in this very moment
            except (VectorFileError, OSError) as error:
                logger.error("Control vector %s cannot be read: %s", digest, error)
                raise UnknownVectorError(f"The file of control vector {digest} is damaged.", param="vector") from None
            self._remember(vector)
            return vector
        return self._adopted.find_digest(digest)

    def _remember(self, vector: ControlVector) -> None:
        self._loaded.put(vector.digest, vector, len(vector.blocks) * vector.hidden_size * 4)

    def _writable(self, name: str) -> Shelf:
        if NAME.fullmatch(name) is None:
            raise SteeringRequestError(f"{name[:MAX_NAME]!r} is not usable as a name: {NAME_RULE}.", param="name")
        if self._shelf is None:
            raise RegistryError("This server has no folder of vectors: start it with --steering-vectors DIR.")
        return self._shelf

    def _is_preset_file(self, name: str) -> bool:
        assert self._shelf is not None
        files = self._preset_files
        return name not in self._shelf.manifest().presets and files is not None and files.get(name) is not None

    def _what_there_is(self) -> str:
        names = list(self.names())
        if not names:
            return "none is registered"
        shown = ", ".join(names[:8])
        return f"registered are {shown}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")
