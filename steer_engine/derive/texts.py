"""Contrast pairs and single texts: the values, and how they are loaded."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

from steer_engine.derive.text_sources import check_entry, parse_lines, read_set
from steer_engine.errors import DerivationError

LABELS = ("positive", "negative")

PairRow = tuple[str, str] | tuple[str, str, str] | Sequence[str] | Mapping[str, Any]
"""A pair in memory: (positive, negative), (positive, negative, prompt), or a mapping with the keys of a JSONL file."""

MIN_PAIRS = 2
MIN_TEXTS = 2
"""A direction is what several pairs or texts have in common."""

MAX_TEXT_CHARS = 1_000_000
"""Longest text in characters. The model's own limit, in tokens, is checked when the text is tokenised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two texts, or two completions of one prompt. line: of its file, from 1; 0 if it has none."""

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
        """`"sha256:..."` over the texts in order. Ids, line breaks and key order of the file do not count."""
        sha = hashlib.sha256(b"steer-engine contrast pairs v1\n")
        for pair in self.items:
            texts = [pair.prompt, pair.positive, pair.negative]
            sha.update(json.dumps(texts, ensure_ascii=True, separators=(",", ":")).encode() + b"\n")
        return f"sha256:{sha.hexdigest()}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """One text, or one completion of a prompt.

    id: its name in a dump. label: `positive`, `negative`, or empty. pair: id that both sides of a pair share.
    line: of its file, from 1; 0 if it has none.
    """

    id: str
    text: str
    label: str = ""
    pair: str = ""
    prompt: str = ""
    line: int = 0


@dataclass(frozen=True)
class Texts(Sequence[Text]):
    """Texts in the order of their file, but the two sides of a pair are adjacent, the positive first.

    digest: `"sha256:..."` over texts and labels. Ids do not count.
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
        """One sentence per repeated text or pair. A repeated text counts twice in every mean."""
        seen: dict[tuple[str, ...], int] = {}
        step = 2 if self.paired else 1
        for i in range(0, len(self.items), step):
            unit = self.items[i : i + step]
            key = tuple(part for text in unit for part in (text.label, text.prompt, text.text))
            line = seen.setdefault(key, unit[0].line)
            if line != unit[0].line:
                yield f"{self.source}:{unit[0].line}: the same as line {line}; it counts twice."


def load_pairs(name_or_path: str | os.PathLike[str]) -> Pairs:
    """Load pairs from a JSONL file, a Hugging Face dataset (`hf:NAME?...`), or a packaged set.

    Each line is a JSON object with `positive` and `negative`, and optionally `prompt` (both are completions of it) and
    `id`. Empty lines are skipped.

    Raises:
        DerivationError: the file is missing, a line is not such an object, a text is empty, a pair's texts are equal,
            an id is repeated, or there are too few pairs; names file and line.
    """
    source, data = read_set(name_or_path)
    return _parse_pairs(data, source)


def as_pairs(pairs: str | os.PathLike[str] | Pairs | Iterable[Pair | PairRow], source: str = "pairs") -> Pairs:
    """Pairs from a file (see `load_pairs`), or from anything that yields pairs: lists, tuples, rows of a dataset.

    Raises:
        DerivationError: as `load_pairs`; names the item, from 1.
    """
    if isinstance(pairs, Pairs):
        return pairs
    if isinstance(pairs, str | os.PathLike):
        return load_pairs(pairs)
    found: list[Pair] = []
    for number, item in enumerate(pairs, start=1):
        try:
            found.append(item if isinstance(item, Pair) else _pair_of(item, number))
        except DerivationError as error:
            raise DerivationError(f"{source}:{number}: {error.message}") from None
    return Pairs(tuple(found), source)


def _pair_of(item: PairRow, line: int) -> Pair:
    if isinstance(item, Mapping):
        entry = {key: value for key, value in item.items() if value is not None}
        check_entry(entry, LABELS, {"prompt", "id"})
    elif isinstance(item, Sequence) and not isinstance(item, str | bytes) and len(item) in (2, 3):
        entry = dict(zip((*LABELS, "prompt"), item, strict=False))
        check_entry(entry, LABELS, {"prompt"})
    else:
        raise DerivationError(
            f"a {type(item).__name__} is no pair; give (positive, negative), (positive, negative, prompt), or a "
            "mapping with the keys positive and negative. Of a DatasetDict choose a split; of a DataFrame take "
            "to_dict('records')."
        )
    return Pair(**entry, line=line)


def load_texts(name_or_path: str | os.PathLike[str]) -> Texts:
    """Load pairs (see `load_pairs`) or single texts from a JSONL file, a dataset, or a packaged set.

    A line of a single text has `text`, and optionally `label` (`positive` or `negative`), `pair` (the id that the other
    side has too), `prompt` (the text completes it) and `id`.

    Raises:
        DerivationError: a text is empty, an id is repeated, a pair has only one side, or a label is unknown; names file
            and line.
    """
    source, data = read_set(name_or_path)
    first = next((line for line in data.split(b"\n") if line.strip()), b"")
    if b'"text"' not in first:
        return from_pairs(_parse_pairs(data, source))
    texts: list[Text] = []
    line_of_id: dict[str, int] = {}
    for line, entry in parse_lines(data, source, required=("text",), optional={"label", "pair", "prompt", "id"}):
        text = Text(**{"id": str(len(texts)), **entry}, line=line)
        if problem := _problem(text, line_of_id):
            raise DerivationError(f"{source}:{line}: {problem}")
        texts.append(text)
    return Texts(tuple(_pairs_adjacent(texts, source)), digest_of(texts), source)


def from_pairs(pairs: Pairs) -> Texts:
    """Both sides of each pair. A pair without an id gets its index, from 0."""

    def sides(index: int, pair: Pair) -> Iterator[Text]:
        name = pair.id or str(index)
        for label, text in zip(LABELS, (pair.positive, pair.negative), strict=True):
            yield Text(id=f"{name}/{label}", text=text, label=label, pair=name, prompt=pair.prompt, line=pair.line)

    items = tuple(text for index, pair in enumerate(pairs) for text in sides(index, pair))
    if len({text.id for text in items}) < len(items):
        raise DerivationError(
            f"{pairs.source}: an id equals the index of a pair without an id; give ids to all pairs or to none."
        )
    return Texts(items, pairs.digest, pairs.source or "pairs")


def _parse_pairs(data: bytes, source: str) -> Pairs:
    pairs: list[Pair] = []
    line_of_id: dict[str, int] = {}
    for line, entry in parse_lines(data, source, required=LABELS, optional={"prompt", "id"}):
        try:
            pair = Pair(**entry, line=line)
        except DerivationError as error:
            raise DerivationError(f"{source}:{line}: {error.message}") from None
        if pair.id and line_of_id.setdefault(pair.id, line) != line:
            raise DerivationError(
                f"{source}:{line}: the id {pair.id[:64]!r} is already that of line {line_of_id[pair.id]}."
            )
        pairs.append(pair)
    return Pairs(tuple(pairs), source)


def _problem(text: Text, line_of_id: dict[str, int]) -> str:
    if not text.text.strip():
        return "'text' is empty."
    if len(text.prompt) + len(text.text) > MAX_TEXT_CHARS:
        return f"'text' is longer than {MAX_TEXT_CHARS} characters."
    if text.label not in ("", *LABELS):
        return f"the label {text.label[:64]!r} is none of {', '.join(LABELS)}."
    if text.pair and not text.label:
        return "a text of a pair needs a label."
    if line_of_id.setdefault(text.id, text.line) != text.line:
        return f"the id {text.id[:64]!r} is already that of line {line_of_id[text.id]}."
    return ""


def _pairs_adjacent(texts: list[Text], source: str) -> Iterator[Text]:
    """The texts, with both sides of each pair adjacent.

    Raises:
        DerivationError: a pair does not have exactly two sides, or only some texts belong to pairs.
    """
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


def digest_of(texts: Sequence[Text]) -> str:
    sha = hashlib.sha256(b"steer-engine texts v1\n")
    index_of_pair = {name: str(i) for i, name in enumerate(dict.fromkeys(text.pair for text in texts))}
    for text in texts:
        parts = [text.label, index_of_pair[text.pair] if text.pair else "", text.prompt, text.text]
        sha.update(json.dumps(parts, ensure_ascii=True, separators=(",", ":")).encode() + b"\n")
    return f"sha256:{sha.hexdigest()}"
