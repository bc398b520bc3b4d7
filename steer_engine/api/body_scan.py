"""Finds out, before any handler runs, whether the body of an HTTP request specifies steering.

A JSON parser drops information that matters here: of two equal keys it keeps the last, and our field in another
spelling is just an unknown field. So the places where the field may stand are scanned key by key. Deeper objects, and
all values, are left to the C parser: a body of megabytes costs little more than parsing it once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from steer_engine.api.request_field import FIELD, MISPLACED, XARGS, mentions_steering
from steer_engine.errors import SteeringRequestError

WORDS = (b"steer", b"hotwire", b"\xc5\xbfteer", rb"\u")
"""A body without any of these requests no steering in any spelling. Most bodies need no parsing."""

MAX_FIELDS = 10_000
"""Fields of one scanned object. More than any request has."""

_FORM_FIELD = re.compile(rb'name="?(steering)"?[;\r\n]|(?:^|&)steering=')
_MODEL = b'"model"'
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


def requests_steering(body: bytes) -> bool:
    """Whether a body specifies steering in any place where a client could expect it to work.

    Raises:
        SteeringRequestError: a field is given twice, or ours is misspelled; a parser would drop it silently.
    """
    text = body.decode(json.detect_encoding(body), "replace")
    plain = body if json.detect_encoding(body) == "utf-8" else text.encode("utf-8", "replace")
    # A key may be spelled with \u escapes, which only a JSON parser resolves.
    lower = plain.lower()
    if not any(word in lower for word in WORDS) and plain.count(_MODEL) < 2:
        return False
    try:
        decoded = json.loads(text)
        for index in _objects(text):
            _check_fields(text, index)
    except (ValueError, RecursionError) as error:
        if isinstance(error, SteeringRequestError):
            raise
        return _FORM_FIELD.search(plain) is not None
    return mentions_steering(decoded)


def model_of(body: bytes) -> str | None:
    """The model that a body names; None if it names none."""
    try:
        model = json.loads(body).get("model")
    except (ValueError, AttributeError, RecursionError):
        return None
    return model if isinstance(model, str) else None


def _objects(text: str) -> Iterator[int]:
    """Where the objects of a body begin: the body itself, or the first MAX_FIELDS elements of a list."""
    index = _skip(text, 0)
    if text[index] == "{":
        yield index
    if text[index] != "[":
        return
    for _ in range(MAX_FIELDS):
        index = _skip(text, index + 1)  # past the bracket or the comma
        if text[index] == "]":
            return
        if text[index] == "{":
            yield index
        _, index = _DECODER.raw_decode(text, index)
        index = _skip(text, index)
        if text[index] == "]":
            return


def _check_fields(text: str, index: int) -> None:
    """Check the keys of the object at `index`, and of the objects in it that may hold the field.

    Deeper keys, for example in a tool's schema, are the client's own.
    """
    nested = (XARGS, *MISPLACED)
    top = list(_members(text, index))
    _check_keys([key for key, _ in top], once={"model", *nested})
    for key, start in top:
        if key in nested and text[start] == "{":
            _check_keys([inner for inner, _ in _members(text, start)], once=set())


def _check_keys(keys: list[str], once: set[str]) -> None:
    spelled = [key for key in keys if key.strip().casefold() == FIELD]
    if len(spelled) > 1:
        raise SteeringRequestError(f"'{FIELD}' is specified twice in one object; specify it once.", FIELD)
    if spelled and spelled[0] != FIELD:
        raise SteeringRequestError(f"The field is named '{FIELD}', not {spelled[0][:40]!r}.", FIELD)
    for key in once:
        if keys.count(key) > 1:
            raise SteeringRequestError(f"'{key}' is specified twice in the body; specify it once.", key)


def _members(text: str, index: int) -> Iterator[tuple[str, int]]:
    """Key and start of the value of each member of the JSON object at `index`, repeated keys included."""
    index = _skip(text, index + 1)
    if text[index] == "}":
        return
    for _ in range(MAX_FIELDS):
        key: Any
        key, index = _DECODER.raw_decode(text, index)
        start = _skip(text, _skip(text, index) + 1)  # past the colon
        yield key, start
        _, index = _DECODER.raw_decode(text, start)
        index = _skip(text, index)
        if text[index] == "}":
            return
        index = _skip(text, index + 1)  # past the comma
    raise SteeringRequestError(f"The body has an object with more than {MAX_FIELDS} fields.", FIELD)


def _skip(text: str, index: int) -> int:
    """The index of the next character that is not white space."""
    found = _SPACE.match(text, index)
    assert found is not None
    return found.end()
