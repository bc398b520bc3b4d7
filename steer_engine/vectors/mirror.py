"""A read-only mirror: the operator's vectors at a URL, copied into a folder and kept alike.

The URL is any that fsspec reads (`s3://`, `gs://`, `hf://`, `https://`, `file://`, ...): a folder of vector and preset
files, or the folder of another server's registry. What is copied are files of the local folder like those an operator
puts there, so that a registry serves them, and goes on with them while the URL is away. Only files that came from the
URL are replaced or removed. Given by the operator, never by a client.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field

from steer_engine.errors import RegistryError, SteeringRequestError, UnsupportedEngineError, VectorFileError
from steer_engine.vectors import files, safetensors_format
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.folder import NAME, NAME_RULE, check_preset
from steer_engine.vectors.folder import SUFFIX as PRESET_SUFFIX
from steer_engine.vectors.manifest import Manifest
from steer_engine.vectors.storage import write_atomically, writing
from steer_engine.vectors.uploaded import FOLDER, ShelfLimits, preset_digest

logger = logging.getLogger(__name__)

STATE = ".steer-engine-mirror.json"
LOCK = ".steer-engine-mirror.lock"


class _Copy(BaseModel):
    """A file of the folder that came from the URL. version: what the source said of itself then."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: str
    digest: str | None = None


_BEGUN = _Copy(version="")
"""A file that is about to be copied for the first time."""


class _State(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    url: str
    copies: dict[str, _Copy] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A file at the URL: where, which version, and the content that it must have, if that is known."""

    version: str
    path: str | None = None
    data: bytes | None = None
    digest: str | None = None


class Mirror:
    """Keeps `folder` like `url`. Several processes may share the folder: one at a time copies.

    Raises:
        UnsupportedEngineError: fsspec can't read such a URL (a package is missing: the message names it), the URL
            holds a password, or the folder is a copy of another URL.
    """

    def __init__(self, url: str, folder: Path, limits: ShelfLimits | None = None) -> None:
        self.url, self.folder = url, folder
        self._limits = limits or ShelfLimits.from_environment()
        if "@" in url.partition("://")[2].partition("/")[0]:
            raise UnsupportedEngineError(
                "--steering-mirror: a URL must not hold a password, which logs and process lists show; fsspec takes "
                "credentials from the environment."
            )
        try:
            from fsspec.core import url_to_fs  # type: ignore[import-untyped]

            self._fs, root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UnsupportedEngineError(f"--steering-mirror {url}: {error}") from None
        self._root = str(root).rstrip("/")
        known = self._state()
        if known.url != url:
            raise UnsupportedEngineError(
                f"--steering-mirror {url}: {folder} is a copy of {known.url}; use another folder, or remove "
                f"{STATE} there."
            )
        self.faults: dict[str, str] = {}
        """File -> why its version at the URL was left out."""

    @property
    def has_copies(self) -> bool:
        return (self.folder / STATE).exists()

    def sync(self) -> bool:
        """Copy what is new, remove what is gone. False where another process is at it.

        Raises:
            RegistryError: the URL cannot be read, or the folder not written; what was copied before stays.
        """
        with writing():
            try:
                with FileLock(self.folder / LOCK, timeout=0):
                    self._sync()
            except Timeout:
                return False
        return True

    def _sync(self) -> None:
        sources = self._listing()
        before = self._state().copies
        # Noted before they are written: a file that a killed process left is known as a copy.
        begun = {name: _BEGUN for name in sources if name not in before and not (self.folder / name).exists()}
        copies = before | begun
        self._note(copies)
        faults: dict[str, str] = {}
        try:
            # Presets name vectors: they go first, and come last.
            for name in sorted(set(before) - set(sources), key=lambda name: not name.endswith(PRESET_SUFFIX)):
                logger.info("Mirror: %s is gone.", name)
                (self.folder / name).unlink(missing_ok=True)
                del copies[name]
            for name, source in sorted(sources.items(), key=lambda item: item[0].endswith(PRESET_SUFFIX)):
                try:
                    copies[name] = self._brought(name, source, copies.get(name))
                except (VectorFileError, SteeringRequestError, ValueError, FileNotFoundError) as error:
                    faults[name] = f"{self.url}: {name}: {error}"
        finally:
            self._note({name: copy for name, copy in copies.items() if copy != _BEGUN})
        for name, fault in faults.items():
            if self.faults.get(name) != fault:
                logger.error("%s It is left out.", fault)
        self.faults = faults

    def _note(self, copies: dict[str, _Copy]) -> None:
        state = _State(url=self.url, copies=copies)
        if not self.has_copies or state != self._state():
            write_atomically(self.folder / STATE, state.model_dump_json().encode())

    def _brought(self, name: str, source: _Source, before: _Copy | None) -> _Copy:
        target = self.folder / name
        if before is not None and before.version == source.version and target.exists():
            return before
        if before is None and target.exists():
            raise VectorFileError("the folder has a file of that name, which did not come from there.")
        data = source.data if source.data is not None else self._read(source)
        digest = None
        if name.endswith(PRESET_SUFFIX):
            check_preset(json.loads(data))
        else:
            digest = _vector(name, data).digest
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
        except Exception as error:  # each protocol has its own
            raise RegistryError(f"{self.url} cannot be read: {type(error).__name__}: {error}") from error
        return data

    def _listing(self) -> dict[str, _Source]:
        """File name -> source, of the plain files and of a registry's manifest; the latter's names win."""
        try:
            self._fs.invalidate_cache()
            found = self._registry()
            try:
                entries = self._fs.ls(self._root, detail=True)
            except FileNotFoundError:
                if found is None:
                    raise
                entries = []  # a web server that lists nothing
        except Exception as error:  # each protocol has its own
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
        # A listing over HTTP has names only; a question for each file says its size and date.
        told = self._fs.info(entry["name"]) if entry.get("size") is None else entry
        if (told.get("size") or 0) > self._limits.max_registry_bytes:
            raise RegistryError(f"{self.url}: {entry['name']} is larger than the registry may be.")
        text = json.dumps(told, sort_keys=True, default=str)
        return _Source(version=hashlib.sha256(text.encode()).hexdigest(), path=entry["name"])

    def _registry(self) -> dict[str, _Source] | None:
        """What another server's registry there names; None where there is none."""
        root = f"{self._root}/{FOLDER}"
        try:
            raw = self._fs.cat_file(f"{root}/manifest.json")
        except FileNotFoundError:
            return None
        manifest = Manifest.model_validate(json.loads(raw))
        found = {
            f"{name}.safetensors": _Source(
                version=entry.digest,
                digest=entry.digest,
                path=f"{root}/objects/{entry.digest.removeprefix('sha256:')}.safetensors",
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
            return _State.model_validate_json((self.folder / STATE).read_bytes())
        except FileNotFoundError:
            return _State(url=self.url)
        except (OSError, ValueError) as error:
            raise UnsupportedEngineError(f"{self.folder / STATE} cannot be read ({error}); remove it.") from None


def _stem(name: str) -> str | None:
    for suffix in (*files.SUFFIXES, PRESET_SUFFIX):
        if name.endswith(suffix) and not name.startswith("."):
            return name.removesuffix(suffix)
    return None


def _vector(name: str, data: bytes) -> ControlVector:
    if name.endswith(".safetensors"):
        return safetensors_format.from_bytes(data)
    with tempfile.NamedTemporaryFile(suffix=".gguf") as copy:
        copy.write(data)
        copy.flush()
        return files.load(copy.name)
