"""Who may change the registry: keys from the environment or a file, compared in constant time."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from steer_engine.vectors.manifest import Signature, signature_of

KEYS_ENV = "STEER_ENGINE_ADMIN_KEYS"
"""Keys, separated by commas. Several at once, so that one can be replaced while the other still works."""

FILE_ENV = "STEER_ENGINE_ADMIN_KEY_FILE"
"""A file of keys, one a line; read again whenever it is replaced."""

HEADER = "x-steering-admin-key"
MIN_KEY_CHARS = 16

logger = logging.getLogger(__name__)


class AdminKeys:
    """Only digests are kept. Never from the command line, which other users of the machine can read."""

    def __init__(self, keys: list[str], file: Path | None = None) -> None:
        self._given = _digests(keys)
        self._file = file
        self._file_state: tuple[Signature | None, tuple[bytes, ...]] = (None, ())

    @classmethod
    def from_environment(cls) -> AdminKeys:
        file = os.environ.get(FILE_ENV)
        keys = os.environ.get(KEYS_ENV, "").split(",")
        return cls(keys, Path(file) if file else None)

    @property
    def configured(self) -> bool:
        """Whether anybody may change anything."""
        return bool(self._digests())

    def plain_keys(self) -> list[str]:
        """The keys themselves, as configured now, for vLLM's own list of keys that may call `/v1`."""
        keys = os.environ.get(KEYS_ENV, "").split(",")
        if self._file is not None and self._file.is_file():
            keys += self._file.read_text().splitlines()
        return [key for key in _stripped(keys) if len(key) >= MIN_KEY_CHARS]

    def allow(self, headers: Mapping[str, str]) -> bool:
        """Whether a request may change the registry: `X-Steering-Admin-Key`, or a bearer token."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = [headers.get(HEADER, ""), token if scheme.lower() == "bearer" else ""]
        known = self._digests()
        allowed = False
        for key in given:
            digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
            for each in known:
                allowed |= bool(key) and secrets.compare_digest(digest, each)
        return allowed

    def _digests(self) -> tuple[bytes, ...]:
        if self._file is None:
            return self._given
        signature = signature_of(self._file)
        if signature != self._file_state[0]:
            try:
                self._file_state = (signature, _digests(self._file.read_text().splitlines()))
            except OSError as error:
                # Keys that were revoked by removing the file must not go on working.
                logger.error("The file of admin keys cannot be read: %s", error.strerror)
                self._file_state = (signature, ())
        return self._given + self._file_state[1]


def _digests(keys: list[str]) -> tuple[bytes, ...]:
    stripped = _stripped(keys)
    for key in stripped:
        if len(key) < MIN_KEY_CHARS:
            logger.error("An admin key has %d characters and is not used; at least %d.", len(key), MIN_KEY_CHARS)
    return tuple(hashlib.sha256(key.encode()).digest() for key in stripped if len(key) >= MIN_KEY_CHARS)


def _stripped(keys: list[str]) -> list[str]:
    """Without empty lines and comments: a remark in the file is nobody's key."""
    return [key.strip() for key in keys if key.strip() and not key.strip().startswith("#")]
