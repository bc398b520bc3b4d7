"""Reading JSON lines of texts: every way of being wrong is one sentence with file and line."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, overload

from steer_engine.derive.hub_dataset import is_dataset, read_dataset
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
                yield line, _parse_line(raw, line, required, optional)
            except DerivationError as error:
                raise DerivationError(f"{source}:{line}: {error.message}") from None


def _parse_line(raw: bytes, line: int, required: tuple[str, ...], optional: Set[str]) -> dict[str, str]:
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


PACKAGED = {"sentiment": "cheerful against gloomy first-person sentences"}
"""Pair sets that ship with the package, usable by name wherever a file is."""

MIN_PAIRS = 2
"""One pair gives a difference of two texts, not a direction that they share with others."""

MAX_TEXT_CHARS = 1_000_000
"""Of one text. The model's own limit is in tokens and is checked when the text is read by it."""

_OPTIONAL = {"prompt", "id"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two texts, or two completions of one prompt.

    line: where the pair stands in its file, from 1; 0 if it has none.
    """

    positive: str
    negative: str
    prompt: str = ""
    id: str = ""
    line: int = 0

    def __post_init__(self) -> None:
        for name in ("positive", "negative"):
            text = getattr(self, name)
            if not text.strip():
                raise DerivationError(f"{name!r} is empty; every pair needs two texts.")
            if len(self.prompt) + len(text) > MAX_TEXT_CHARS:
                raise DerivationError(f"{name!r} is longer than {MAX_TEXT_CHARS} characters.")
        if self.positive == self.negative:
            raise DerivationError("positive and negative are the same text, which gives a zero difference.")


@dataclass(frozen=True)
class Pairs(Sequence[Pair]):
    """Pairs in the order of their file."""

    items: tuple[Pair, ...]
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if len(self.items) < MIN_PAIRS:
            raise DerivationError(
                f"{self.source or 'The pairs'}: {len(self.items)} pair(s) are too few; at least {MIN_PAIRS} are needed."
            )

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Pair]: ...
    def __getitem__(self, index: int | slice) -> Pair | Sequence[Pair]:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def digest(self) -> str:
        """`"sha256:..."` over the texts in order; ids, line breaks and key order of the file do not count."""
        sha = hashlib.sha256(b"steer-engine contrast pairs v1\n")
        for pair in self.items:
            texts = [pair.prompt, pair.positive, pair.negative]
            sha.update(json.dumps(texts, ensure_ascii=True, separators=(",", ":")).encode() + b"\n")
        return f"sha256:{sha.hexdigest()}"


def load_pairs(name_or_path: str | os.PathLike[str]) -> Pairs:
    """Read pairs from a JSONL file, a Hugging Face dataset (`hf:NAME?...`), or a packaged set by name.

    One JSON object per line: `positive` and `negative`, optionally `prompt` (both are completions of it) and `id`.
    Empty lines are skipped.

    Raises:
        DerivationError: with file and line, where the file is missing, a line is not such an object, a text is empty,
            a pair's texts are the same, an id is there twice, or there are too few pairs.
    """
    source, data = read_set(name_or_path)
    return pairs_of(data, source)


def pairs_of(data: bytes, source: str) -> Pairs:
    """As `load_pairs`, of bytes that were read from `source`."""
    return Pairs(tuple(_parse(data, source)), source)


def read_set(name_or_path: str | os.PathLike[str]) -> tuple[str, bytes]:
    """What to call a file, a dataset or a packaged set in messages, and its bytes."""
    if is_dataset(name_or_path):
        return str(name_or_path).partition("?")[0], read_dataset(str(name_or_path))
    if str(name_or_path) in PACKAGED and not Path(name_or_path).exists():
        data = resources.files("steer_engine.derive").joinpath(f"data/{name_or_path}.jsonl").read_bytes()
        return f"{name_or_path} (packaged)", data
    return str(name_or_path), read_bytes(
        name_or_path, f"Give a JSONL file, hf:DATASET, or one of: {', '.join(PACKAGED)}."
    )


def _parse(data: bytes, source: str) -> Iterator[Pair]:
    seen: dict[str, int] = {}
    for line, entry in parse_lines(data, source, required=("positive", "negative"), optional=_OPTIONAL):
        try:
            pair = Pair(**entry, line=line)
        except DerivationError as error:
            raise DerivationError(f"{source}:{line}: {error.message}") from None
        if pair.id and seen.setdefault(pair.id, line) != line:
            raise DerivationError(f"{source}:{line}: the id {pair.id[:64]!r} is already that of line {seen[pair.id]}.")
        yield pair
