"""Vectors and presets not uploaded over the API: files in the operator's folder, and vectors added in memory."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

from steer_engine.errors import SteeringRequestError, UnreadableFileError, VectorFileError
from steer_engine.parse import parse_spec
from steer_engine.spec import vectors_in
from steer_engine.vectors.files import SUFFIXES, AnyVector, load_any
from steer_engine.vectors.row_set import RowSet
from steer_engine.vectors.storage import FileSignature, file_signature, read_file

logger = logging.getLogger(__name__)

MAX_NAME = 128
NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME - 1}}}")
NAME_RULE = f"letters, digits, '.', '_' and '-', beginning with a letter or digit, at most {MAX_NAME} characters"

SETTLED_NS = 2 * 10**9
"""A folder that changed less than this long ago may have changed again without a newer time of modification."""

PRESET_SUFFIX = ".preset.json"
MAX_PRESET_FILE_BYTES = 1 << 20


class FolderWatch:
    """Tells a folder that cannot be looked at now, such as an unmounted volume, from one whose files were removed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._identity: tuple[int, int] | None = None
        self.fault()

    def fault(self) -> str | None:
        """Why nothing can be said about the folder's files; None if it shows them. Clients see this text."""
        try:
            identity, is_empty = self._look()
        except OSError as error:
            return f"The registry's folder cannot be read ({error.strerror}); its last known state is served."
        if is_empty and self._identity not in (None, identity):  # an unmounted volume leaves an empty mount point
            return (
                "An empty folder is in the place of the registry's folder, whose volume may not be mounted; its last "
                "known state is served."
            )
        self._identity = identity
        return None

    def _look(self) -> tuple[tuple[int, int], bool]:
        """The folder's device and inode, and whether it is empty. Raises OSError."""
        status = self._folder.stat()
        with os.scandir(self._folder) as entries:
            return (status.st_dev, status.st_ino), next(entries, None) is None


class FolderVectors:
    """Names and digests -> control vectors and row sets. Thread-safe.

    A `*.safetensors` or `*.gguf` file of the folder has its stem as its name. A lookup by name calls `stat` on that
    name's files and reads them only if they changed. A vector is available by digest while a name has it; requests that
    were resolved before keep theirs. If a file becomes unusable, or cannot be looked at for a while, its last good
    version stays, and the log says so.

    Args:
        directory: the folder; None for vectors in memory only.

    Raises:
        VectorFileError: the folder does not exist.
    """

    def __init__(self, directory: Path | str | None = None) -> None:
        self._directory = None if directory is None else Path(directory)
        self._lock = threading.RLock()
        # A file's vector is None if no version of it was usable.
        self._files: dict[Path, tuple[FileSignature, AnyVector | None]] = {}
        self._by_name: dict[str, AnyVector] = {}
        self._sources: dict[str, Path] = {}
        self._names_of: dict[str, dict[str, None]] = {}
        """Digest -> its names, an ordered set."""
        self._scanned: tuple[int, int] | None = None
        """Signature of the folder at the last scan; None if it may have changed since."""
        self._faults: dict[Path, str] = {}
        if self._directory is not None and not self._directory.is_dir():
            raise VectorFileError(f"{self._directory}: the folder of control vectors does not exist.")
        self._watch = None if self._directory is None else FolderWatch(self._directory)
        self._scan()

    @property
    def directory(self) -> Path | None:
        return self._directory

    @property
    def faults(self) -> list[str]:
        """What is wrong with files that are left out, one sentence each."""
        return [self._faults[path] for path in sorted(self._faults)]

    @property
    def fault(self) -> str | None:
        """Why the folder cannot be looked at now; None if it can."""
        with self._lock:
            return self._folder_fault()

    def find(self, name: str) -> AnyVector | None:
        """The current vector of a name."""
        with self._lock:
            self._refresh(name)
            return self._by_name.get(name)

    def find_digest(self, digest: str) -> AnyVector | None:
        """The vector with that digest."""
        with self._lock:
            for name in list(self._names_of.get(digest, ())):
                self._refresh(name)
            if digest not in self._names_of and self._may_have_new_files():
                self._scan()
            names = self._names_of.get(digest)
            return self._by_name[next(iter(names))] if names else None

    @property
    def num_names(self) -> int:
        """How many names there are, without a scan."""
        return len(self._by_name)

    def some_names(self, count: int) -> list[str]:
        """At most `count` of the names, without a scan."""
        with self._lock:
            return list(islice(self._by_name, count))

    def all(self) -> dict[str, AnyVector]:
        """Name -> vector, after a scan of the folder."""
        with self._lock:
            self._scan()
            return dict(self._by_name)

    def source_of(self, name: str) -> Path | None:
        """The file of a name; None for vectors in memory and unknown names."""
        with self._lock:
            self._refresh(name)
            return self._sources.get(name)

    def add(self, name: str, vector: AnyVector) -> str:
        """Add a vector in memory, or replace one; returns its digest.

        Raises:
            SteeringRequestError: the name is not usable, or a file of the folder has it.
        """
        check_name(name)
        with self._lock:
            self._refresh(name)
            if name in self._sources:
                raise SteeringRequestError(
                    f"The name {name!r} belongs to the file {self._sources[name].name}; choose another.", param="name"
                )
            self._bind(name, vector)
            return vector.digest

    def _scan(self) -> None:
        """Refresh all names of the folder."""
        if self._directory is None:
            return
        self._scanned = self._signature()
        try:
            found = sorted(Path(entry.path) for entry in os.scandir(self._directory) if _is_vector_file(entry.name))
        except OSError:
            found = []
        # Vectors of before and vectors in memory stay available. The next scan finds the folder if it comes back.
        if self._folder_fault() is not None:
            return
        for path in found:
            if NAME.fullmatch(path.stem) is None:
                self._report(path, f"{path}: the file's stem is not usable as a name: {NAME_RULE}.")
        for name in {path.stem for path in found if NAME.fullmatch(path.stem)} | set(self._sources):
            self._refresh(name)
        for path in found:
            if path not in self._files and path not in self._faults:
                self._report_unreadable(path)

    def _folder_fault(self) -> str | None:
        if self._watch is None or self._directory is None:
            return None
        if (away := self._watch.fault()) is not None:
            self._report(self._directory, f"{self._directory}: {away}")
        else:
            self._faults.pop(self._directory, None)
        return away

    def _report_unreadable(self, path: Path) -> None:
        """Report a file of the folder that cannot be looked at, such as a loop of symbolic links."""
        try:
            path.stat()
        except FileNotFoundError:
            return  # it was removed meanwhile
        except OSError as error:
            self._report(path, f"{path}: cannot be read ({error.strerror}). It is left out.")

    def _may_have_new_files(self) -> bool:
        """Whether a file may have been added since the last scan. Costs one `stat`."""
        return self._directory is not None and (self._scanned is None or self._scanned != self._signature())

    def _signature(self) -> tuple[int, int] | None:
        """What changes when a file of the folder is added or removed; None if it cannot be told yet."""
        assert self._directory is not None
        try:
            status = self._directory.stat()
        except OSError:
            return None
        if time.time_ns() - status.st_mtime_ns < SETTLED_NS:
            return None
        return status.st_mtime_ns, status.st_ino

    def _refresh(self, name: str) -> None:
        """Update one name from the folder. Costs two `stat`, and a read only if a file changed."""
        if self._directory is None or NAME.fullmatch(name) is None:
            return
        used: Path | None = None
        for suffix in SUFFIXES:
            path = self._directory / f"{name}{suffix}"
            vector = self._vector_of(path)
            if vector is None:
                continue
            if used is not None:
                self._report(path, f"{path}: left out, the name {name!r} is already taken by {used.name}.")
                continue
            used = path
            self._bind(name, vector, path)
        if used is None and name in self._sources:
            logger.info("Control vector %s was removed from the folder.", name)
            del self._sources[name]
            self._unbind(name)

    def _vector_of(self, path: Path) -> AnyVector | None:
        """The vector of a file, which is read only if it changed; None if the file is absent or was never usable."""
        before, vector = self._files.get(path, (None, None))
        try:
            signature = file_signature(path)
        except OSError as error:
            if vector is not None:
                self._report(path, f"{path}: cannot be read ({error.strerror}).{_stays(vector)}")
            return vector
        if signature is None:
            if vector is not None and self._folder_fault() is not None:
                return vector
            self._files.pop(path, None)
            self._faults.pop(path, None)
            return None
        if before == signature:
            return vector
        try:
            vector = load_any(path)
            self._faults.pop(path, None)
        except VectorFileError as error:
            self._report(path, error.message + _stays(vector))
            if isinstance(error, UnreadableFileError):
                return vector  # without the new signature: the next lookup tries again
        self._files[path] = (signature, vector)
        return vector

    def _bind(self, name: str, vector: AnyVector, source: Path | None = None) -> None:
        before = self._by_name.get(name)
        if source is not None:
            self._sources[name] = source
        if before is not None and _same(before, vector):
            return
        if before is not None:
            self._unbind(name)
        self._by_name[name] = vector
        self._names_of.setdefault(vector.digest, {})[name] = None
        if source is not None:
            logger.info("Control vector %s = %s from %s.", name, vector.digest, source.name)

    def _unbind(self, name: str) -> None:
        digest = self._by_name.pop(name).digest
        del self._names_of[digest][name]
        if not self._names_of[digest]:
            del self._names_of[digest]

    def _report(self, path: Path, fault: str) -> None:
        if self._faults.get(path) != fault:  # log it once, not once per request
            self._faults[path] = fault
            logger.error("%s", fault)


class PresetFiles:
    """The files `NAME.preset.json` of a folder. An unusable file is left out, and the log says why."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._watch = FolderWatch(folder)
        self._seen: dict[str, tuple[FileSignature, dict[str, Any] | None]] = {}
        self.faults: dict[str, str] = {}

    def get(self, name: str) -> dict[str, Any] | None:
        """The preset's JSON, or None. Costs one `stat`, and a read only if the file changed."""
        path = self._folder / f"{name}{PRESET_SUFFIX}"
        before, spec = self._seen.get(name, (None, None))
        try:
            signature = file_signature(path)
            if signature is None:
                if spec is not None and self._watch.fault() is not None:
                    return spec
                self._seen.pop(name, None)
                self.faults.pop(name, None)
                return None
            if before != signature:
                spec = self._read(name, path)
                self._seen[name] = (signature, spec)
        except OSError as error:
            # The next lookup tries again. Names that are no file's are not reported: clients choose them.
            if spec is not None:
                self._report(name, f"{path}: cannot be read ({error.strerror}). The version read before stays.")
        return spec

    def some_names(self, count: int) -> list[str]:
        """At most `count` of the names, without a scan."""
        # A copy: another thread may scan the folder.
        return [name for name, (_, spec) in islice(self._seen.copy().items(), count) if spec is not None]

    def all(self) -> dict[str, dict[str, Any]]:
        """Name -> preset, after a scan of the folder. While it cannot be read: the presets read before."""
        try:
            found = {entry.name for entry in os.scandir(self._folder) if entry.name.endswith(PRESET_SUFFIX)}
        except OSError:
            found = set()
        names = {name.removesuffix(PRESET_SUFFIX) for name in found if not name.startswith(".")}
        specs = {name: spec for name in sorted(names | set(self._seen)) if (spec := self.get(name)) is not None}
        for name in names - self._seen.keys() - self.faults.keys():
            self._report(name, f"{self._folder / name}{PRESET_SUFFIX}: cannot be read. It is left out.")
        return specs

    def _read(self, name: str, path: Path) -> dict[str, Any] | None:
        try:
            spec = check_preset(json.loads(read_file(path, MAX_PRESET_FILE_BYTES)[0]))
        except (SteeringRequestError, ValueError, RecursionError) as error:
            self._report(name, f"{path}: not a preset: {error} It is left out.")
            return None
        self.faults.pop(name, None)
        return spec

    def _report(self, name: str, fault: str) -> None:
        if self.faults.get(name) != fault:  # log it once, not once per request
            self.faults[name] = fault
            logger.error("%s", fault)


def check_name(name: str) -> None:
    """Raise SteeringRequestError unless vectors and presets may have this name."""
    if NAME.fullmatch(name) is None:
        raise SteeringRequestError(f"{name[:MAX_NAME]!r} is not usable as a name: {NAME_RULE}.", param="name")


def check_preset(spec: Any) -> dict[str, Any]:
    """Check a preset's JSON: edits or probes that name their vectors, without another preset and without a capture.

    Raises:
        SteeringRequestError: it is not a preset; `param` is the field.
    """
    parsed = parse_spec(spec)
    if parsed is None or (parsed.edits is None and parsed.probes is None):
        raise SteeringRequestError("a preset must have edits or probes of its own.", "edits")
    if any(not isinstance(vector, str) for vector in vectors_in(parsed)):
        raise SteeringRequestError("a preset must name its vectors; inline vectors belong in requests.", "edits")
    if parsed.capture is not None:
        raise SteeringRequestError("a preset cannot have a capture; captures belong in requests.", "capture")
    assert isinstance(spec, dict)
    return spec


def _stays(vector: AnyVector | None) -> str:
    return " It is left out." if vector is None else f" The version read before ({vector.digest}) stays."


def _same(a: AnyVector, b: AnyVector) -> bool:
    """Whether two have the same content and the same description."""
    labels = [each.labels if isinstance(each, RowSet) else {} for each in (a, b)]
    return a == b and a.metadata == b.metadata and labels[0] == labels[1]


def _is_vector_file(filename: str) -> bool:
    return not filename.startswith(".") and Path(filename).suffix in SUFFIXES
