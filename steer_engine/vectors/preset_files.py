"""Presets as an operator writes them: `NAME.preset.json` beside the vectors, each holding a spec with edits."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from steer_engine.errors import SteeringRequestError
from steer_engine.spec import parse_spec
from steer_engine.vectors.manifest import Signature, signature_of

logger = logging.getLogger(__name__)

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
