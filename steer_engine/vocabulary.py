"""The token sequences of triggers: text becomes token ids, and words such as "thinking" become the server's tags."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from steer_engine.errors import SteeringRequestError
from steer_engine.fields import shown
from steer_engine.trigger import Trigger

WORD_CONTEXTS = ((" ", "\n"), (" b", ".", "\n"))
"""What comes before a text that begins with a letter or digit, and after one that ends with one."""
OTHER_CONTEXTS = (("a", "."), ("b", " b"))
"""The same for other texts."""


class Tags(NamedTuple):
    """The texts around a span, as a parser of the server knows them. end: None if the span has no end."""

    start: str
    end: str | None


Encode = Callable[[str], Sequence[int]]
"""Text -> token ids, without special tokens at the ends."""


class Vocabulary:
    """The tokenizer and the tags of one model.

    encode: None if the engine has no tokenizer. size: token ids are below it. find_tags: the tags of "thinking" and of
    "tool_calls", or a sentence that says why there are none.
    """

    def __init__(self, encode: Encode | None, size: int, find_tags: Callable[[str], Tags | str]) -> None:
        self._encode = encode
        self._size = size
        self._tags = lru_cache(find_tags)
        self._ids = lru_cache(maxsize=1024)(self._tokenised)

    def sequence(self, tokens: str | int | Sequence[int], param: str) -> tuple[int, ...]:
        """The token ids of one side of a trigger.

        Raises:
            SteeringRequestError: a token id does not exist, or a text is tokenised differently in context.
        """
        if isinstance(tokens, str):
            ids, problem = self._ids(tokens)
            if problem is not None:
                raise SteeringRequestError(problem, param)
            return ids
        ids = (tokens,) if isinstance(tokens, int) else tuple(tokens)
        if unknown := [token for token in ids if token >= self._size]:
            raise SteeringRequestError(
                f"Token {unknown[0]} does not exist: the vocabulary has 0 to {self._size - 1}.", param
            )
        return ids

    def has_tags(self, word: str) -> bool:
        """Whether "thinking", "answer" or "tool_calls" can be found here."""
        return isinstance(self._tags_of(word), Tags)

    def _tags_of(self, word: str) -> Tags | str:
        return self._tags("thinking" if word == "answer" else word)

    def trigger(self, word: str, param: str) -> Trigger:
        """The windows of "thinking", "answer" or "tool_calls".

        Raises:
            SteeringRequestError: the server's parsers have no such tags.
        """
        tags = self._tags_of(word)
        if isinstance(tags, str):
            raise SteeringRequestError(f"{word!r} has no tags here: {tags}", param)
        start = self.sequence(tags.start, param)
        end = () if tags.end is None else self.sequence(tags.end, param)
        return Trigger(end, start, each=True) if word == "answer" else Trigger(start, end, each=True)

    def _tokenised(self, text: str) -> tuple[tuple[int, ...], str | None]:
        """The ids, and an error message if they cannot be found in running text."""
        if self._encode is None:
            return (), "This engine has no tokenizer; give token ids instead of text."
        ids = tuple(self._encode(text))
        if not ids:
            return (), f"{shown(text)} has no tokens."
        before, after = (
            (WORD_CONTEXTS if edge.isalnum() else OTHER_CONTEXTS)[side] for side, edge in enumerate((text[0], text[-1]))
        )
        for context in ((first, last) for first in before for last in after):
            in_context = tuple(self._encode(f"{context[0]}{text}{context[1]}"))
            if not _contains(in_context, ids):
                return (), (
                    f"{shown(text)} is tokenised differently in context: alone it is {list(ids)}, but "
                    f"{shown(context[0] + text + context[1])} is {list(in_context)}. Give the token ids to look for."
                )
        return ids, None


def _contains(tokens: Sequence[int], part: Sequence[int]) -> bool:
    size = len(part)
    return any(tuple(tokens[start : start + size]) == tuple(part) for start in range(len(tokens) - size + 1))


def encode_with(tokenizer: Any) -> Encode | None:
    """`encode` for a Hugging Face tokenizer or vLLM's wrapper of one; None without a tokenizer."""
    if tokenizer is None:
        return None

    def encode(text: str) -> Sequence[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    return encode
