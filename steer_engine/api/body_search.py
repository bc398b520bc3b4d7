"""Searches a request's body for steering, so that a body that asks for it is steered or refused.

Only two places are read: `steering` and `vllm_xargs` (see `request_field`). Elsewhere the field would be dropped
silently, so those places are searched too, except what is the client's own: schemas, tools, texts.

A JSON parser keeps the last of two equal keys. Here an object is decoded into a tuple of pairs `(key, value)`, which
has both. The search visits each object at most once: a body of megabytes costs a few times as much as parsing it.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from steer_engine.api.foreign_forms import XARGS_FORMS
from steer_engine.api.frontend import RESERVED_PREFIX
from steer_engine.api.request_field import FIELD, XARGS, is_absent, parsed_null
from steer_engine.errors import SteeringRequestError
from steer_engine.spelling import edit_distance

MAX_PLACE_ECHO = 80

CONVERSATIONS = frozenset({"messages", "input"})
"""Lists of messages. The keys of a message and of its parts are the protocol's; deeper ones are the client's own."""

METADATA = "metadata"
"""End of the names of fields with a client's own tags: a key and a short text. A tag that is not an object's JSON
specifies nothing."""

OWN = frozenset(
    {
        *("tools", "functions", "tool_choice", "function_call", "tool_calls"),
        *("response_format", "structured_outputs", "guided_json", "text", "format", "output_format", "output_config"),
        *("json_schema", "schema", "properties", "$defs", "definitions", "guided_decoding"),
        *("prompt", "system", "documents", "data", "state", "questions"),
    }
)
"""Fields whose keys are the client's own: schemas, tools, and the texts of a prompt, at any depth."""

TEXTS = frozenset({"extra_body", "extra_args", "extra_params", "sampling_params", "model_kwargs", "options", METADATA})
"""Fields that some clients send as JSON text instead of an object."""

# A body without any of these specifies no steering. Most bodies need no parsing.
_WORDS = (b"steer", b"hotwire", rb"\u")
_MODEL = b'"model"'
_COMPATIBLE = re.compile(
    "[\u017f\u02b0-\u02e4\u1d2c-\u1d6a\u2071-\u209c\u2100-\u2188\u24b6-\u24e9\u33cc\ufb00-\ufb06\uff21-\uff5a"
    "\U0001d400-\U0001d6a3\U0001f12b-\U0001f149]"
)
"""Characters that are letters of `steering` in another form, such as fullwidth ones. A test goes through Unicode."""

_FORM_FIELD = re.compile(rb'name="?(steering)"?[;\r\n]|(?:^|&)steering=')
_LENGTHS = range(6, 33)
"""Lengths of keys that may spell the field. Ligatures are shorter, spaces and invisible characters make it longer."""

_ALIASES = re.compile(r"steer|.*(?:steering|controlvector)")
"""What people call the field, without capitals and separators: `steer`, `steering_vectors`, `control_vectors`."""

_KEY = re.compile(rb'"([a-z0-9_ -]{5,40})"\s*:')
_FAR = 3

MAX_KEYS_CHECKED = 256
"""Keys of one object that are checked for typos. A request has dozens of fields; one of a million is no typo."""


@dataclass(frozen=True)
class Found:
    """Where a body specifies steering.

    place: the field, or the object that has it, such as `vllm_xargs` or `messages[0]`.
    misplaced: no endpoint reads it there.
    """

    place: str
    misplaced: bool

    @property
    def refusal(self) -> SteeringRequestError:
        """The error for a misplaced field."""
        return SteeringRequestError(
            f"Steering inside '{self.place}' would be ignored. Move it to the top level of the request, as the field "
            f"'{FIELD}', or as JSON text into {XARGS}.{FIELD}.",
            self.place,
        )


def search_body(body: bytes) -> Found | None:
    """Where the raw body of a request, or of a list of requests, specifies steering. A misplaced one is found first.

    Raises:
        SteeringRequestError: a field that may specify steering is repeated, or ours is misspelled, which a parser would
            drop silently; or the body may specify steering and is nested too deeply.
    """
    encoding = json.detect_encoding(body)
    text = body.decode(encoding, "replace")
    plain = body if encoding == "utf-8" else text.encode("utf-8", "replace")
    lower = plain.lower()
    mentions = any(word in lower for word in _WORDS) or plain.count(_MODEL) > 1 or _has_close_key(lower)
    if not mentions and (plain.isascii() or _COMPATIBLE.search(text) is None):
        return None
    try:
        decoded = json.loads(text, object_pairs_hook=tuple)
    except RecursionError:
        # A handler parses it deeper in the stack, and not every one answers that with a 400.
        raise SteeringRequestError("The body is nested too deeply; send a flatter one.", "body") from None
    except ValueError:
        return Found(FIELD, misplaced=False) if _FORM_FIELD.search(plain) else None
    requests = decoded if isinstance(decoded, list) else [decoded]
    found = [each for request in requests if isinstance(request, tuple) for each in _search(request)]
    return next((each for each in found if each.misplaced), next(iter(found), None))


def search_fields(fields: Mapping[str, Any]) -> Found | None:
    """The same for the decoded fields of one request, whose repeated keys are lost already."""
    found = list(_search(tuple(fields.items())))
    return next((each for each in found if each.misplaced), next(iter(found), None))


def _search(request: tuple[tuple[str, Any], ...]) -> Iterator[Found]:
    """Every place of a request that specifies steering; the keys of places that are read are checked."""
    _check_keys(request, once={"model", XARGS})
    for key, value in request:
        if key == FIELD:
            if _specifies(value):
                yield Found(FIELD, misplaced=False)
        elif key in XARGS_FORMS:
            if value is not None:
                yield Found(key, misplaced=True)
        elif key == XARGS:
            yield from _search_xargs(_decoded(value))
        elif key in CONVERSATIONS:
            yield from _search_messages(key, value)
        elif key not in OWN and _holds_steering(value, key):
            yield Found(key[:MAX_PLACE_ECHO], misplaced=True)


def _search_xargs(xargs: Any) -> Iterator[Found]:
    members = list(_members(xargs))
    _check_keys([each for each in members if not _is_reserved(each[0])], once=set(XARGS_FORMS))
    for key, value in members:
        if key == FIELD:
            if _specifies(value):
                yield Found(XARGS, misplaced=False)
        elif key in XARGS_FORMS:
            if value is not None:
                yield Found(XARGS, misplaced=False)
        elif _is_reserved(key):
            yield Found(XARGS, misplaced=False)
        elif _holds_steering(value, key):
            yield Found(f"{XARGS}.{key[:MAX_PLACE_ECHO]}", misplaced=True)


def _search_messages(field: str, messages: Any) -> Iterator[Found]:
    """The keys of messages and of their parts. A batch of conversations is a list of lists."""
    for number, message in enumerate(messages if isinstance(messages, list) else [messages]):
        for each in message if isinstance(message, list) else [message]:
            for key, value in _members(each):
                parts = value if key == "content" and isinstance(value, list) else ()
                if (_names_field(key) and _specifies(value)) or any(
                    _names_field(inner) and _specifies(text) for part in parts for inner, text in _members(part)
                ):
                    yield Found(f"{field}[{number}]", misplaced=True)


def _holds_steering(value: Any, field: str) -> bool:
    """Whether an object anywhere in the value of `field` has a key that specifies steering."""
    pending = [(_decoded(value) if field in TEXTS else value, field.endswith(METADATA))]
    while pending:
        current, tags = pending.pop()
        if type(current) is list:
            pending += [(item, tags) for item in current if type(item) in _CONTAINERS]
            continue
        for key, inner in _members(current):
            kind = type(inner)
            if tags and kind is str and _decoded(inner) is inner:
                continue
            if _names_field(key):
                if _specifies(inner):
                    return True
            elif key in XARGS_FORMS or _is_reserved(key):
                if inner is not None:
                    return True
            elif key in TEXTS and kind is str:
                pending.append((_decoded(inner), key.endswith(METADATA)))
            elif kind in _CONTAINERS and key not in OWN:
                pending.append((inner, tags or (isinstance(key, str) and key.endswith(METADATA))))
    return False


_CONTAINERS = frozenset({list, tuple, dict})


def _members(value: Any) -> Iterable[tuple[Any, Any]]:
    """The members of an object, decoded into pairs or into a mapping; none for any other value."""
    if type(value) is tuple:
        return value
    return value.items() if isinstance(value, Mapping) else ()


def _is_reserved(key: Any) -> bool:
    return isinstance(key, str) and key.startswith(RESERVED_PREFIX)


def _specifies(value: Any) -> bool:
    return not is_absent(parsed_null(value))


def _names_field(key: Any) -> bool:
    """Whether a key is our field, in any capitals, compatible characters or with invisible ones around it."""
    if key == FIELD:
        return True
    if not isinstance(key, str) or len(key) not in _LENGTHS:
        return False
    if key.isascii():
        return key.strip().lower() == FIELD
    # A short key: normalising takes quadratic time in the worst case.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", key).casefold())
    return "".join(each for each in folded if unicodedata.category(each) != "Cf").strip() == FIELD


def _decoded(value: Any) -> Any:
    """The object of a JSON text; any other value as it is."""
    if not isinstance(value, str) or not _is_object(value):
        return value
    try:
        return json.loads(value, object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        return value


def _is_object(text: str) -> bool:
    return text.lstrip()[:1] == "{"


def _check_keys(members: Iterable[tuple[str, Any]], once: set[str]) -> None:
    """Raise SteeringRequestError for a repeated or misspelled key among those of an object that is read."""
    seen: set[str] = set()
    for number, (key, value) in enumerate(members):
        if _names_field(key):
            if FIELD in seen:
                raise SteeringRequestError(f"'{FIELD}' is specified twice in one object; specify it once.", FIELD)
            if key != FIELD:
                raise SteeringRequestError(f"The field is named '{FIELD}', not {key[:40]!r}.", FIELD)
            seen.add(FIELD)
        elif key in once:
            if key in seen:
                raise SteeringRequestError(f"'{key}' is specified twice in the body; specify it once.", key)
            seen.add(key)
        elif number < MAX_KEYS_CHECKED and _misspells_field(key, value):
            raise SteeringRequestError(
                f"The field is named '{FIELD}', not {key!r}, which would be ignored. Its value is an object, such as "
                '{"edits": [{"vector": NAME}]}.',
                FIELD,
            )


def _misspells_field(key: Any, value: Any) -> bool:
    """Whether an unknown field is ours with a typo or another name. Two typos need a value that can be steering.

    `string` is two letters away from `steering`, so for such a key the value decides.
    """
    if not isinstance(key, str) or value is None or key in XARGS_FORMS:
        return False
    gap = _gap(key)
    return gap < 2 or (gap == 2 and (isinstance(value, tuple | dict) or (isinstance(value, str) and _is_object(value))))


@lru_cache(maxsize=4096)
def _gap(key: str) -> int:
    """Typos between a key and the field's name; 0 for its aliases, _FAR for any other word."""
    if len(key) not in range(5, 41):
        return _FAR
    words = [word for word in re.split("[^a-z0-9]+", key.lower()) if word]
    whole = "".join(words)
    if _ALIASES.match(whole):
        return 0
    near = [edit_distance(word, FIELD) if abs(len(word) - len(FIELD)) < _FAR else _FAR for word in (whole, *words)]
    return 1 if min(near) == 1 else near[0]


def _has_close_key(lower: bytes) -> bool:
    """Whether a body in lower case may have a misspelled key somewhere; only its parsed form says where."""
    keys = set(_KEY.findall(lower))
    return len(keys) > MAX_KEYS_CHECKED or any(_gap(key.decode()) < _FAR for key in keys)
