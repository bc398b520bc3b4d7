"""Where a request may specify steering: the field, the extra arguments, or the model name. Other places are refused.

Two readers need this: the check of a request that vLLM has parsed (`steering_of`), and the middleware, which reads the
raw body before any handler runs (`requests_steering`). A JSON parser drops information that matters there: of two equal
keys it keeps the last, and our field in another spelling is just an unknown field. So the places where the field may
stand are scanned key by key. Deeper objects, and all values, are left to the C parser: a body of megabytes costs little
more than parsing it once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from steer_engine.api import foreign_forms
from steer_engine.api.frontend import RESERVED_PREFIX
from steer_engine.errors import SteeringRequestError

FIELD = "steering"
XARGS = "vllm_xargs"
MISPLACED = ("extra_body", "extra_args", "sampling_params")
"""Objects where clients put the field by mistake. No endpoint reads it there."""

MAX_KEY_ECHO = 80

SEPARATOR = ":"
"""Between base and preset in a model name."""


WORDS = (b"steer", b"hotwire", b"\xc5\xbfteer", rb"\u")
"""A body without any of these requests no steering in any spelling. Most bodies need no parsing."""

MAX_FIELDS = 10_000
"""Fields of one scanned object. More than any request has."""

_FORM_FIELD = re.compile(rb'name="?(steering)"?[;\r\n]|(?:^|&)steering=')
_MODEL = b'"model"'
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


def steering_of(body: Mapping[str, Any]) -> Any:
    """The steering that a request specifies. None: not specified. False: none, not even the server's default.

    body: the request's fields; steering is in `steering`, or as JSON text in `vllm_xargs.steering`. `null` means not
    specified. Forms of other servers (`foreign_forms`) are translated.

    Raises:
        SteeringRequestError: specified twice, in a place that nothing reads, or with a reserved key.
    """
    xargs = body.get(XARGS)
    in_xargs = None
    foreign: list[Any] = []
    if isinstance(xargs, Mapping):
        _refuse_reserved_keys(xargs)
        in_xargs = xargs.get(FIELD)
        if in_xargs is not None and not isinstance(in_xargs, str):
            raise SteeringRequestError(
                f"{XARGS}.{FIELD} must be a JSON string, not {type(in_xargs).__name__}; an object goes into the "
                "top-level field 'steering'.",
                f"{XARGS}.{FIELD}",
            )
        in_xargs = _parsed_null(in_xargs)
        foreign = [(form, xargs[form]) for form in foreign_forms.XARGS_FORMS if xargs.get(form) is not None]
    top = _parsed_null(body.get(FIELD))
    ways = [
        *([FIELD] if top is not None else ()),
        *([f"{XARGS}.{FIELD}"] if in_xargs is not None else ()),
        *(f"{XARGS}.{form}" for form, _ in foreign),
    ]
    if len(ways) > 1:
        raise SteeringRequestError(
            f"Steering is specified twice, in {' and in '.join(ways)}; specify it once.", ways[0]
        )
    for place in MISPLACED:
        if mentions_steering({place: body.get(place)}):
            raise SteeringRequestError(
                f"Steering inside '{place}' would be ignored; 'steering' is a field of the request itself.", place
            )
    for form, text in foreign:
        return foreign_forms.from_hotwire(text) if form == foreign_forms.HOTWIRE else foreign_forms.from_vllm_lens(text)
    if isinstance(top, dict) and foreign_forms.is_easysteer(top):
        return foreign_forms.from_easysteer(top)
    return in_xargs if top is None else top


def is_absent(requested: Any) -> bool:
    """Whether no steering is specified. Only null and false say so: 0 equals False in Python, and is an error."""
    return requested is None or requested is False


def mentions_steering(body: Any) -> bool:
    """Whether a decoded JSON body specifies steering in any place where a client could expect it to work."""
    if isinstance(body, list):
        return any(mentions_steering(item) for item in body if isinstance(item, dict))
    if not isinstance(body, Mapping):
        return False
    if not is_absent(_parsed_null(body.get(FIELD))) or any(
        body.get(form) is not None for form in foreign_forms.XARGS_FORMS
    ):
        return True
    return any(
        mentions_steering(inner) or any(isinstance(key, str) and key.startswith(RESERVED_PREFIX) for key in inner)
        for inner in (body.get(place) for place in (XARGS, *MISPLACED))
        if isinstance(inner, Mapping)
    )


def _parsed_null(value: Any) -> Any:
    """None and False for the JSON texts of null and false; every other value as it is."""
    return {"null": None, "false": False}.get(value.strip(), value) if isinstance(value, str) else value


def _refuse_reserved_keys(xargs: Mapping[Any, Any]) -> None:
    for key in xargs:
        if isinstance(key, str) and key.startswith(RESERVED_PREFIX):
            param = f"{XARGS}.{key[:MAX_KEY_ECHO]}"
            raise SteeringRequestError(f"{param} is reserved; use the field 'steering'.", param)


def split_model(model: str | None, served: Collection[str]) -> tuple[str, str] | None:
    """`(served name, preset)` for a model name `BASE:PRESET`; None for a served name, or an unknown one.

    Served names may contain the separator: an exact match wins, then the longest served name before a separator.
    """
    if not model or model in served:
        return None
    cut = model.rfind(SEPARATOR)
    while cut > 0:
        if model[:cut] in served and model[cut + 1 :]:
            return model[:cut], model[cut + 1 :]
        cut = model.rfind(SEPARATOR, 0, cut)
    return None


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
