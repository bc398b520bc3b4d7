"""Reading JSON lines of texts: every way of being wrong is one sentence with file and line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from steer_engine.errors import DerivationError

Lines = Iterator[tuple[int, dict[str, str]]]
"""Line number, from 1, and the object there."""


def read_bytes(path: str | os.PathLike[str], instead: str = "Give a JSONL file.") -> bytes:
    """The content of a file; DerivationError says what to give `instead` where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DerivationError(f"{path}: cannot be read ({error.strerror}). {instead}") from None


def parse_lines(data: bytes, source: str, *, required: tuple[str, ...], optional: Set[str]) -> Lines:
    """Objects of text to text, one a line; empty lines are skipped.

    Raises:
        DerivationError: with `source` and line, for a line that is not such an object.
    """
    if not data.strip():
        wanted = " and ".join(map(repr, required))
        raise DerivationError(f"{source}: the file is empty; each line is an object with {wanted}.")
    for line, raw in enumerate(data.split(b"\n"), start=1):
        if raw.strip():
            try:
                yield line, _parse(raw, line, required, optional)
            except DerivationError as error:
                raise DerivationError(f"{source}:{line}: {error.message}") from None


def _parse(raw: bytes, line: int, required: tuple[str, ...], optional: Set[str]) -> dict[str, str]:
    try:
        entry: Any = json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
    except UnicodeDecodeError:
        raise DerivationError("not UTF-8.") from None
    except (ValueError, RecursionError) as error:
        raise DerivationError(f"not JSON ({error}).") from None
    if not isinstance(entry, dict):
        raise DerivationError(f"not a JSON object with {' and '.join(map(repr, required))}.")
    for name in required:
        if name not in entry:
            raise DerivationError(f"the key {name!r} is missing.")
    if unknown := entry.keys() - optional - set(required):
        known = ", ".join(sorted(optional | set(required)))
        raise DerivationError(f"unknown key {sorted(unknown)[0][:64]!r}; known are {known}.")
    for name, value in entry.items():
        if not isinstance(value, str):
            raise DerivationError(f"{name!r} is not text.")
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise DerivationError(f"{name!r} has half a surrogate pair in it, which no tokenizer takes.")
    return entry
