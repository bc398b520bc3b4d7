"""A read-only mirror: the vectors and presets at a URL, copied to a local folder and kept in sync.

The operator chooses the URL, never a client. fsspec must be able to read it (`s3://`, `gs://`, `hf://`, `https://`,
`file://`, ...). It is a folder of vector and preset files, or the folder of another server's registry. The copies are
ordinary files of the local folder, so a registry serves them, also while the URL is unreachable. Files that did not
come from the URL are never replaced or removed.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field

from steer_engine.errors import RegistryError, SteeringRequestError, UnsupportedEngineError, VectorFileError
from steer_engine.settings import RegistryLimits
from steer_engine.vectors import files, gguf_format
from steer_engine.vectors.folder import MAX_PRESET_FILE_BYTES, NAME, NAME_RULE, PRESET_SUFFIX, check_preset
from steer_engine.vectors.manifest import FOLDER, MANIFEST, OBJECTS, Manifest, preset_digest
from steer_engine.vectors.storage import disk_errors, read_file, write_atomically

logger = logging.getLogger(__name__)

STATE = ".steer-engine-mirror.json"
LOCK = ".steer-engine-mirror.lock"

MAX_STATE_BYTES = 1 << 26
"""Size of the state: ten times that of 20,000 copies."""


class _Copy(BaseModel):
    """A file of the folder that came from the URL. version: changes whenever the file at the URL changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: str
    digest: str | None = None


_STARTED = _Copy(version="")
"""A file that is being copied for the first time."""


class _State(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    url: str
    copies: dict[str, _Copy] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A file at the URL. Either `path` or `data` is given.

    digest: the content that it must have, if known. size: in bytes; 0 if unknown.
    """

    version: str
    size: int = 0
    path: str | None = None
    data: bytes | None = None
    digest: str | None = None


class Mirror:
    """Keeps `folder` in sync with `url`. Several processes may share the folder; one at a time copies.

    Raises:
        UnsupportedEngineError: fsspec cannot read such a URL (if a package is missing, the message names it), the URL
            contains a password, or the folder is a copy of another URL.
    """

    def __init__(self, url: str, folder: Path, limits: RegistryLimits | None = None) -> None:
        self.url, self.folder = url, folder
        self._limits = limits or RegistryLimits.from_environment()
        if "@" in url.partition("://")[2].partition("/")[0]:
            raise UnsupportedEngineError(
                "--steering-mirror: the URL must not contain a password, because logs and process lists show it. "
                "fsspec reads credentials from the environment."
            )
        try:
            from fsspec.core import url_to_fs  # type: ignore[import-untyped]

            self._fs, root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UnsupportedEngineError(f"--steering-mirror {url}: {error}") from None
        self._root = str(root).rstrip("/")
        self._state()
        self.faults: dict[str, str] = {}
        """File -> why its version at the URL is left out."""

    @property
    def has_copies(self) -> bool:
        """Whether the folder has been in sync before."""
        return (self.folder / STATE).exists()

    def sync(self) -> bool:
        """Copy new and changed files; remove files that were removed. False if another process is doing this.

        Raises:
            RegistryError: the URL cannot be read or the folder cannot be written. Earlier copies stay.
        """
        with disk_errors():
            try:
                with FileLock(self.folder / LOCK, timeout=0):
                    self._sync()
            except Timeout:
                return False
        return True

    def _sync(self) -> None:
        sources = self._listing()
        before = self._state().copies
        # Saved before the files are written, so that a file left by a killed process is known to be a copy.
        started = {name: _STARTED for name in sources if name not in before and not (self.folder / name).exists()}
        copies = before | started
        self._save(copies)
        faults: dict[str, str] = {}
        try:
            # Presets use vectors: they are removed first and copied last.
            for name in sorted(set(before) - set(sources), key=lambda name: not name.endswith(PRESET_SUFFIX)):
                logger.info("Mirror: %s was removed at the URL.", name)
                (self.folder / name).unlink(missing_ok=True)
                del copies[name]
            for name, source in sorted(sources.items(), key=lambda item: item[0].endswith(PRESET_SUFFIX)):
                try:
                    copies[name] = self._copy(name, source, copies.get(name))
                except (VectorFileError, SteeringRequestError, ValueError, RecursionError, FileNotFoundError) as error:
                    faults[name] = f"{self.url}: {name}: {error}"
        finally:
            self._save({name: copy for name, copy in copies.items() if copy != _STARTED})
        for name, fault in faults.items():
            if self.faults.get(name) != fault:
                logger.error("%s It is left out.", fault)
        self.faults = faults

    def _save(self, copies: dict[str, _Copy]) -> None:
        state = _State(url=self.url, copies=copies)
        if not self.has_copies or state != self._state():
            write_atomically(self.folder / STATE, state.model_dump_json().encode())

    def _copy(self, name: str, source: _Source, before: _Copy | None) -> _Copy:
        """Copy a file unless its version is unchanged. Raises if its content is not usable."""
        target = self.folder / name
        if before is not None and before.version == source.version and target.exists():
            return before
        if before is None and target.exists():
            raise VectorFileError("the folder has another file of that name, which did not come from the URL.")
        limit = MAX_PRESET_FILE_BYTES if name.endswith(PRESET_SUFFIX) else files.MAX_FILE_BYTES
        if source.size > limit:
            raise VectorFileError(f"the file has {source.size} bytes; at most {limit} are read.")
        data = source.data if source.data is not None else self._read(source)
        digest = None
        if name.endswith(PRESET_SUFFIX):
            check_preset(json.loads(data))
        else:
            digest = (gguf_format.from_bytes if name.endswith(".gguf") else files.from_safetensors)(data).digest
            if source.digest not in (None, digest):
                raise VectorFileError(f"its content is {digest}, not {source.digest}.")
        write_atomically(target, data)
        logger.info("Mirror: copied %s%s.", name, f" = {digest}" if digest else "")
        return _Copy(version=source.version, digest=digest)

    def _read(self, source: _Source) -> bytes:
        try:
            data: bytes = self._fs.cat_file(source.path)
        except FileNotFoundError:
            raise
        except Exception as error:  # each protocol has its own error classes
            raise RegistryError(f"{self.url} cannot be read: {type(error).__name__}: {error}") from error
        return data

    def _listing(self) -> dict[str, _Source]:
        """File name -> source: plain files, and the names of a registry's manifest, which take precedence."""
        try:
            self._fs.invalidate_cache()
            found = self._registry()
            try:
                entries = self._fs.ls(self._root, detail=True)
            except FileNotFoundError:
                if found is None:
                    raise
                entries = []  # a web server that lists no files
        except Exception as error:  # each protocol has its own error classes
            raise RegistryError(f"{self.url} cannot be read: {type(error).__name__}: {error}") from error
        plain = {}
        for entry in entries:
            name = PurePosixPath(str(entry["name"])).name
            if entry.get("type", "file") == "file" and (stem := _stem(name)) is not None:
                if NAME.fullmatch(stem) is None:
                    logger.warning("%s: %s is left out: %s.", self.url, name[:200], NAME_RULE)
                    continue
                plain[name] = self._plain(entry)
        sources = plain | (found or {})
        limit = self._limits.max_vectors + self._limits.max_presets
        if len(sources) > limit:
            raise RegistryError(f"{self.url} has {len(sources)} files; the registry takes at most {limit}.")
        return sources

    def _plain(self, entry: Mapping[str, Any]) -> _Source:
        # A listing over HTTP has names only; size and date take one more request per file.
        info = self._fs.info(entry["name"]) if entry.get("size") is None else entry
        text = json.dumps(info, sort_keys=True, default=str)
        version = hashlib.sha256(text.encode()).hexdigest()
        return _Source(version=version, size=info.get("size") or 0, path=entry["name"])

    def _registry(self) -> dict[str, _Source] | None:
        """The files that another server's registry at the URL names; None if there is no registry."""
        root = f"{self._root}/{FOLDER}"
        try:
            raw = self._fs.cat_file(f"{root}/{MANIFEST}")
        except FileNotFoundError:
            return None
        manifest = Manifest.model_validate(json.loads(raw))
        found = {
            f"{name}.safetensors": _Source(
                version=entry.object_name,
                size=entry.num_bytes,
                digest=entry.digest,
                path=f"{root}/{OBJECTS}/{entry.object_name}",
            )
            for name, entry in manifest.vectors.items()
            if NAME.fullmatch(name)
        }
        for name, spec in manifest.presets.items():
            if NAME.fullmatch(name):
                found[f"{name}{PRESET_SUFFIX}"] = _Source(version=preset_digest(spec), data=json.dumps(spec).encode())
        return found

    def _state(self) -> _State:
        try:
            state = _State.model_validate_json(read_file(self.folder / STATE, MAX_STATE_BYTES)[0])
        except FileNotFoundError:
            return _State(url=self.url)
        except (OSError, ValueError) as error:
            raise UnsupportedEngineError(
                f"{self.folder / STATE} cannot be read ({str(error)[:200]}); remove it."
            ) from None
        if state.url != self.url:
            raise UnsupportedEngineError(
                f"--steering-mirror {self.url}: {self.folder} is a copy of {state.url[:200]}; use another folder, or "
                f"remove {STATE} there."
            )
        return state


def _stem(name: str) -> str | None:
    for suffix in (*files.SUFFIXES, PRESET_SUFFIX):
        if name.endswith(suffix) and not name.startswith("."):
            return name.removesuffix(suffix)
    return None
