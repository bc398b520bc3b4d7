"""Vectors that nobody sent: the files of an operator's folder, and what a program added in memory."""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer_engine.errors import SteeringRequestError, VectorFileError
from steer_engine.spec import parse_spec
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.files import SUFFIXES, load
from steer_engine.vectors.manifest import Signature, signature_of

logger = logging.getLogger(__name__)

MAX_NAME = 128
MAX_SUPERSEDED = 64
"""Vectors kept by digest after their name moved on, so that what was resolved before can still be shipped."""

NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME - 1}}}")


@dataclass(frozen=True, kw_only=True)
class _Adopted:
    """A file as it was last looked at; `vector` is None where it is broken."""

    signature: Signature
    vector: ControlVector | None


class Adopted:
    """Names and digests -> control vectors. Thread-safe.

    A folder's `*.safetensors` and `*.gguf` are adopted under their stem. A lookup by name stats that name's files and
    reads what changed; a lookup by digest needs no disk, because content never changes under a digest. A file that
    turns bad later leaves the version adopted before in place, with an error in the log.

    Args:
        directory: folder to adopt from; None for memory only.
    """

    def __init__(self, directory: Path | str | None = None) -> None:
        self._directory = None if directory is None else Path(directory)
        self._lock = threading.RLock()
        self._files: dict[Path, _Adopted] = {}
        self._by_name: dict[str, ControlVector] = {}
        self._sources: dict[str, Path] = {}
        self._by_digest: OrderedDict[str, ControlVector] = OrderedDict()
        self._complained: dict[Path, str] = {}
        if self._directory is not None and not self._directory.is_dir():
            raise VectorFileError(f"{self._directory}: the folder of control vectors does not exist.")
        self._scan()

    @property
    def directory(self) -> Path | None:
        return self._directory

    @property
    def faults(self) -> list[str]:
        """What is wrong with files that were left out, a sentence each."""
        return [self._complained[path] for path in sorted(self._complained)]

    def find(self, name: str) -> ControlVector | None:
        """The vector that a name stands for now."""
        with self._lock:
            self._refresh(name)
            return self._by_name.get(name)

    def find_digest(self, digest: str) -> ControlVector | None:
        """The vector with that content."""
        with self._lock:
            if digest not in self._by_digest:
                self._scan()
            return self._by_digest.get(digest)

    def all(self) -> dict[str, ControlVector]:
        """Name -> vector, after a look at the folder."""
        with self._lock:
            self._scan()
            return dict(self._by_name)

    def source_of(self, name: str) -> Path | None:
        """The file that a name comes from; None for names in memory and unknown ones."""
        with self._lock:
            self._refresh(name)
            return self._sources.get(name)

    def add(self, name: str, vector: ControlVector) -> str:
        """Put a vector in memory under a name, replacing an earlier one of that name; returns its digest.

        Raises:
            SteeringRequestError: the name is not usable, or a file of the folder has it.
        """
        if NAME.fullmatch(name) is None:
            raise SteeringRequestError(f"{name[:MAX_NAME]!r} is not usable as a name: {NAME_RULE}.", param="name")
        with self._lock:
            self._refresh(name)
            if name in self._sources:
                raise SteeringRequestError(
                    f"The name {name!r} belongs to the file {self._sources[name].name}; choose another.", param="name"
                )
            self._bind(name, vector)
            return vector.digest

    def _scan(self) -> None:
        """Adopt what is new or changed in the folder, forget names whose file is gone."""
        if self._directory is None:
            return
        try:
            found = sorted(Path(entry.path) for entry in os.scandir(self._directory) if _has_suffix(entry.name))
        except OSError as error:
            # Requests for vectors in memory go on; the next scan sees the folder again if it comes back.
            self._complain(self._directory, f"{self._directory}: the folder cannot be read ({error.strerror}).")
            return
        for path in found:
            if NAME.fullmatch(path.stem) is None:
                self._complain(path, f"{path}: the file's stem is not usable as a name: {NAME_RULE}.")
        for name in {path.stem for path in found if NAME.fullmatch(path.stem)} | set(self._sources):
            self._refresh(name)

    def _refresh(self, name: str) -> None:
        """Bring one name in line with the folder: two stats, and a read only where something changed."""
        if self._directory is None or NAME.fullmatch(name) is None:
            return
        adopted: Path | None = None
        for suffix in SUFFIXES:
            path = self._directory / f"{name}{suffix}"
            vector = self._look_at(path)
            if vector is None:
                continue
            if adopted is not None:
                self._complain(path, f"{path}: left out, the name {name!r} is already taken by {adopted.name}.")
                continue
            adopted = path
            self._bind(name, vector, path)
        if adopted is None and name in self._sources:
            logger.info("Control vector %s is gone from the folder.", name)
            del self._sources[name]
            self._retire(self._by_name.pop(name))

    def _look_at(self, path: Path) -> ControlVector | None:
        """The vector of a file, read only if the file changed; None if it is absent or never was good."""
        known = self._files.get(path)
        try:
            status = path.stat()
        except OSError:
            self._files.pop(path, None)
            self._complained.pop(path, None)
            return None
        signature = (status.st_mtime_ns, status.st_size, status.st_ino)
        if known is not None and known.signature == signature:
            return known.vector
        vector = known.vector if known is not None else None
        try:
            if not stat.S_ISREG(status.st_mode):  # a pipe or device would block or never end
                raise VectorFileError(f"{path}: not a regular file.")
            vector = load(path)
            self._complained.pop(path, None)
        except VectorFileError as error:
            kept = f" The version read before ({vector.digest}) stays." if vector is not None else " It is left out."
            self._complain(path, error.message + kept)
        self._files[path] = _Adopted(signature=signature, vector=vector)
        return vector

    def _bind(self, name: str, vector: ControlVector, source: Path | None = None) -> None:
        before = self._by_name.get(name)
        if source is not None:
            self._sources[name] = source
        if before is not None and before.digest == vector.digest:
            return
        self._by_name[name] = vector
        self._by_digest[vector.digest] = vector
        if before is not None:
            self._retire(before)
        if source is not None:
            logger.info("Control vector %s = %s from %s.", name, vector.digest, source.name)

    def _retire(self, vector: ControlVector) -> None:
        """Keep a vector that lost its name by digest only, the oldest of them going first."""
        named = {bound.digest for bound in self._by_name.values()}
        if vector.digest in self._by_digest:
            self._by_digest.move_to_end(vector.digest)
        unnamed = [digest for digest in self._by_digest if digest not in named]
        for digest in unnamed[: max(0, len(unnamed) - MAX_SUPERSEDED)]:
            del self._by_digest[digest]

    def _complain(self, path: Path, message: str) -> None:
        if self._complained.get(path) != message:  # once per fault, not once per request
            self._complained[path] = message
            logger.error("%s", message)


NAME_RULE = f"letters, digits, '.', '_' and '-', beginning with a letter or digit, at most {MAX_NAME} characters"


def _has_suffix(filename: str) -> bool:
    return not filename.startswith(".") and Path(filename).suffix in SUFFIXES


SUFFIX = ".preset.json"
MAX_FILE_BYTES = 1 << 20


class PresetFiles:
    """Adopts the preset files of a folder; a broken one is named in the log and left out."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[str, tuple[Signature, dict[str, Any] | None]] = {}
        self.faults: dict[str, str] = {}

    def get(self, name: str) -> dict[str, Any] | None:
        """The preset of that name as JSON, or None; one `stat`, and a read only if the file changed."""
        path = self._folder / f"{name}{SUFFIX}"
        signature = signature_of(path)
        if signature is None:
            self._seen.pop(name, None)
            self.faults.pop(name, None)
            return None
        known = self._seen.get(name)
        if known is None or known[0] != signature:
            known = (signature, self._read(name, path))
            self._seen[name] = known
        return known[1]

    def all(self) -> dict[str, dict[str, Any]]:
        """Name -> preset, after a look at the folder."""
        try:
            found = sorted(entry.name for entry in os.scandir(self._folder) if entry.name.endswith(SUFFIX))
        except OSError:
            return {}
        names = [name.removesuffix(SUFFIX) for name in found if not name.startswith(".")]
        return {name: spec for name in names if (spec := self.get(name)) is not None}

    def _read(self, name: str, path: Path) -> dict[str, Any] | None:
        try:
            raw = path.read_bytes()
            if len(raw) > MAX_FILE_BYTES:
                raise SteeringRequestError(f"{len(raw)} bytes are more than a preset takes ({MAX_FILE_BYTES}).")
            spec = check_preset(json.loads(raw))
        except (SteeringRequestError, OSError, ValueError, RecursionError) as error:
            self.faults[name] = f"{path}: not a preset: {error} It is left out."
            logger.error("%s", self.faults[name])
            return None
        self.faults.pop(name, None)
        return spec


def check_preset(spec: Any) -> dict[str, Any]:
    """A preset's JSON, checked: a spec with edits by name or digest, and no preset inside.

    Raises:
        SteeringRequestError: it is not; `param` says where.
    """
    parsed = parse_spec(spec)
    if parsed is None or parsed.edits is None:
        raise SteeringRequestError("a preset must have edits of its own.", "edits")
    if any(not isinstance(edit.vector, str) for edit in parsed.edits):
        raise SteeringRequestError("a preset names its vectors; inline ones belong in requests.", "edits")
    if parsed.capture is not None:
        raise SteeringRequestError("a preset steers; what is read belongs in requests.", "capture")
    assert isinstance(spec, dict)
    return spec
