"""Contrast pairs without a model: from templates and word lists, and from shuffled prompts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random

from steer_engine.derive.pairs import Pair, read_bytes
from steer_engine.errors import DerivationError

SLOT = "{word}"

SHUFFLED_CHARS = 75
"""Of the prompt, permuted: the negatives of Højer et al. (ICLR 2025)."""


def from_template(
    templates: Sequence[str], positive: Sequence[tuple[int, str]], negative: Sequence[tuple[int, str]]
) -> Iterator[Pair]:
    """A pair per template and place in the lists: `{word}` becomes the n-th positive, and the n-th negative, word.

    Word lists are lines with their numbers (see `read_words`).

    Raises:
        DerivationError: a template has no `{word}`, the lists differ in length, or two words are the same.
    """
    for template in templates:
        if SLOT not in template:
            raise DerivationError(f"The template {template[:64]!r} has no {SLOT} in it, where the words go.")
    if not templates or not positive or len(positive) != len(negative):
        raise DerivationError(
            f"{len(templates)} template(s), {len(positive)} positive and {len(negative)} negative words; at least one "
            "template is needed, and as many words on both sides: the n-th stand against each other."
        )
    for (line, good), (_, bad) in zip(positive, negative, strict=True):
        if good == bad:
            raise DerivationError(f"Line {line} of both word lists is {good[:64]!r}; a pair needs two words.")
        for template in templates:
            yield Pair(positive=template.replace(SLOT, good), negative=template.replace(SLOT, bad))


def read_words(path: Path) -> list[tuple[int, str]]:
    """Lines with a word or phrase, with their numbers; empty ones are skipped."""
    try:
        lines = read_bytes(path, "Give a file with one word or phrase a line.").decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise DerivationError(f"{path}: not UTF-8.") from None
    return [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]


def from_shuffled(prompts: Iterable[tuple[int, str]], source: str, *, seed: int = 0) -> Iterator[Pair]:
    """Each prompt against a random permutation of its first 75 characters.

    Raises:
        DerivationError: no permutation differs, since the beginning has only one kind of character; names the line.
    """
    random = Random(f"shuffled prompts {seed}")
    for line, prompt in prompts:
        letters = list(prompt[:SHUFFLED_CHARS])
        if len(set(letters)) < 2:
            raise DerivationError(f"{source}:{line}: {prompt[:16]!r} stays the same however it is shuffled.")
        shuffled = "".join(letters)
        while shuffled == prompt[:SHUFFLED_CHARS] or not shuffled.strip():
            random.shuffle(letters)
            shuffled = "".join(letters)
        yield Pair(positive=prompt, negative=shuffled, line=line)


def to_jsonl(pairs: Iterable[Pair]) -> bytes:
    """The pairs as `load_pairs` reads them."""
    lines = []
    for pair in pairs:
        entry = {"prompt": pair.prompt, "positive": pair.positive, "negative": pair.negative, "id": pair.id}
        lines.append(json.dumps({name: value for name, value in entry.items() if value}, ensure_ascii=False))
    return "".join(line + "\n" for line in lines).encode()
