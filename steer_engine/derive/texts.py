"""Texts of one class or the other, paired or not: what an activation dump holds the rows of."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

from steer_engine.derive.pairs import MAX_TEXT_CHARS, Pair, Pairs, pairs_of, parse_lines, read_set
from steer_engine.errors import DerivationError

LABELS = ("positive", "negative")

MIN_TEXTS = 2
"""One text has no direction that it shares with others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """One text, or one completion of a prompt.

    id: its name in the dump. label: `positive`, `negative`, or empty. pair: id that both sides of a pair have.
    line: where it stands in its file, from 1; 0 if it has none.
    """

    id: str
    text: str
    label: str = ""
    pair: str = ""
    prompt: str = ""
    line: int = 0


@dataclass(frozen=True)
class Texts(Sequence[Text]):
    """Texts in canonical order: that of the file, but the two sides of a pair next to each other, the positive first.

    digest: `"sha256:..."` over texts and labels, never over ids.
    """

    items: tuple[Text, ...]
    digest: str
    source: str = field(default="texts", compare=False)

    def __post_init__(self) -> None:
        if len(self.items) < MIN_TEXTS:
            raise DerivationError(f"{self.source}: {len(self.items)} text is too few; at least {MIN_TEXTS} are needed.")

    @overload
    def __getitem__(self, index: int) -> Text: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Text]: ...
    def __getitem__(self, index: int | slice) -> Text | Sequence[Text]:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    @property
    def paired(self) -> bool:
        return bool(self.items[0].pair)

    def duplicates(self) -> Iterator[str]:
        """A sentence per text, or pair of texts, that is there a second time: it counts twice in every mean."""
        seen: dict[tuple[str, ...], int] = {}
        step = 2 if self.paired else 1
        for i in range(0, len(self.items), step):
            same = self.items[i : i + step]
            key = tuple(part for text in same for part in (text.label, text.prompt, text.text))
            line = seen.setdefault(key, same[0].line)
            if line != same[0].line:
                yield f"{self.source}:{same[0].line}: the same as line {line}; it counts twice."


def from_pairs(pairs: Pairs) -> Texts:
    """Both sides of each pair; a pair without an id is called by its place, from 0."""

    def sides(place: int, pair: Pair) -> Iterator[Text]:
        name = pair.id or str(place)
        for label, text in zip(LABELS, (pair.positive, pair.negative), strict=True):
            yield Text(id=f"{name}/{label}", text=text, label=label, pair=name, prompt=pair.prompt, line=pair.line)

    items = tuple(text for place, pair in enumerate(pairs) for text in sides(place, pair))
    if len({text.id for text in items}) < len(items):
        raise DerivationError(f"{pairs.source}: an id equals the place of a pair without one; give ids to all or none.")
    return Texts(items, pairs.digest, pairs.source or "pairs")


def load_texts(name_or_path: str | os.PathLike[str]) -> Texts:
    """Read a JSONL file or dataset of pairs (see `load_pairs`) or of texts, or a packaged set by name.

    A line of texts has `text`, and optionally `label` (`positive` or `negative`), `pair` (the id that the other side
    has too), `prompt` (the text completes it) and `id`.

    Raises:
        DerivationError: with file and line, for what is not such a file: an empty text, an id twice, a pair without
            its other side, another label.
    """
    source, data = read_set(name_or_path)
    first = next((line for line in data.split(b"\n") if line.strip()), b"")
    if b'"text"' not in first:
        return from_pairs(pairs_of(data, source))
    lines = parse_lines(data, source, required=("text",), optional={"label", "pair", "prompt", "id"})
    texts: list[Text] = []
    seen: dict[str, int] = {}
    for line, entry in lines:
        text = Text(**{"id": str(len(texts)), **entry}, line=line)
        if problem := _problem(text, seen):
            raise DerivationError(f"{source}:{line}: {problem}")
        texts.append(text)
    return Texts(tuple(_beside_each_other(texts, source)), _digest(texts), source)


def _problem(text: Text, seen: dict[str, int]) -> str:
    if not text.text.strip():
        return "'text' is empty."
    if len(text.prompt) + len(text.text) > MAX_TEXT_CHARS:
        return f"'text' is longer than {MAX_TEXT_CHARS} characters."
    if text.label not in ("", *LABELS):
        return f"the label {text.label[:64]!r} is none of {', '.join(LABELS)}."
    if text.pair and not text.label:
        return "a text of a pair needs a label."
    if seen.setdefault(text.id, text.line) != text.line:
        return f"the id {text.id[:64]!r} is already that of line {seen[text.id]}."
    return ""


def _beside_each_other(texts: list[Text], source: str) -> Iterator[Text]:
    """The texts, pairs together; raises for a pair that is not two sides, and for pairs among unpaired texts."""
    if not any(text.pair for text in texts):
        yield from texts
        return
    sides: dict[str, dict[str, Text]] = {}
    for text in texts:
        if not text.pair:
            raise DerivationError(
                f"{source}:{text.line}: the text belongs to no pair, but others do: pair all or none."
            )
        pair = sides.setdefault(text.pair, {})
        if text.label in pair:
            raise DerivationError(
                f"{source}:{text.line}: the pair {text.pair[:64]!r} has its {text.label} already, "
                f"in line {pair[text.label].line}."
            )
        pair[text.label] = text
    for name, pair in sides.items():
        for label in LABELS:
            if label not in pair:
                line = next(iter(pair.values())).line
                raise DerivationError(f"{source}:{line}: the pair {name[:64]!r} has no {label}.")
            yield pair[label]


def _digest(texts: Sequence[Text]) -> str:
    sha = hashlib.sha256(b"steer-engine texts v1\n")
    places = {name: str(i) for i, name in enumerate(dict.fromkeys(text.pair for text in texts))}
    for text in texts:
        parts = [text.label, places[text.pair] if text.pair else "", text.prompt, text.text]
        sha.update(json.dumps(parts, ensure_ascii=True, separators=(",", ":")).encode() + b"\n")
    return f"sha256:{sha.hexdigest()}"
