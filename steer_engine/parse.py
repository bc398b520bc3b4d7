"""Reads a request's `steering` field: a mapping, its JSON text, or a parsed spec.

Every error is a `SteeringRequestError` whose `param` is the path of the first wrong field. Names of vectors and presets
are looked up later, in `steer_engine.resolve`.
"""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import ValidationError

from steer_engine.errors import PayloadTooLargeError, SteeringRequestError
from steer_engine.fields import InlineVector, Strict, shown
from steer_engine.probe_spec import ProbeSpec, StopSpec
from steer_engine.scope import AllSpec, AnySpec, ConditionSpec, ExceptSpec, ScheduleSpec, ScopeSpec
from steer_engine.spec import MAX_SPEC_CHARS, CaptureSpec, EditSpec, Gate, SteeringSpec

_SHOW_VALUE = re.compile(r"_type$|^(wrong_kind|literal_error|enum|finite_number|greater_than_equal|less_than_equal)$")
"""Kinds of pydantic errors whose message is clearer with the given value."""
_REWORDED = {"model_type": "must be an object", "list_type": "must be a list"}


def parse_spec(raw: Any, max_chars: int | None = None, max_inline_bytes: int = 0) -> SteeringSpec | None:
    """Parse a request's steering. None, False and their JSON texts mean that no steering is requested.

    raw: a mapping, its JSON text, or a parsed spec. max_chars: of the spec as JSON text without inline vectors; by
    default MAX_SPEC_CHARS for text, and any length for a mapping. max_inline_bytes: of the inline vectors in text.

    Raises:
        SteeringRequestError: `param` names the first field that is wrong.
        PayloadTooLargeError: the spec is longer than `max_chars`.
    """
    if raw is None or raw is False:
        return None
    if isinstance(raw, SteeringSpec):
        return raw
    if isinstance(raw, str):
        # Base64 has four characters for three bytes.
        raw = _from_json(raw, (MAX_SPEC_CHARS if max_chars is None else max_chars) + max_inline_bytes * 4 // 3)
        if raw is None or raw is False:
            return None
    if not isinstance(raw, dict):
        raise SteeringRequestError(
            f"steering must be an object with 'edits' or 'preset', not {shown(raw)}.", "steering"
        )
    if max_chars is not None:
        check_chars(raw, max_chars)
    try:
        return SteeringSpec.model_validate(raw)
    except ValidationError as error:
        raise _request_error(error) from None


def check_chars(spec: dict[str, Any], max_chars: int) -> None:
    """Raise PayloadTooLargeError if a decoded spec is longer as JSON text without spaces and inline vectors.

    Stops at the limit, so that a spec of megabytes costs no more than one at the limit.
    """
    count, pending = 0, list[Any]([spec])
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            count += len(value) + 2
        elif isinstance(value, dict | list):
            count += len(value) * (2 if isinstance(value, dict) else 1) + 1  # brackets, commas, colons
        else:
            # Not `str`, which refuses huge integers. Ten bits are three digits.
            count += max(1, value.bit_length() * 3 // 10) if isinstance(value, int) else len(repr(value))
        if count > max_chars:
            raise _too_long(max_chars)
        if isinstance(value, dict):
            pending += value
            pending += [inner for key, inner in value.items() if key != "data"]
        elif isinstance(value, list):
            pending += value


def _too_long(max_chars: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"steering has more than {max_chars} characters of JSON (max_spec_bytes).", "steering")


def _from_json(text: str, max_chars: int) -> Any:
    if len(text) > max_chars:
        raise _too_long(max_chars)
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        reason = "it is nested too deeply"
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at character {error.pos}"
    except ValueError as error:
        reason = str(error) if "is not a JSON number" in str(error) else "a number in it has too many digits"
    raise SteeringRequestError(f"steering is not valid JSON: {reason}.", "steering")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _request_error(error: ValidationError) -> SteeringRequestError:
    """The first of pydantic's errors, with the path of its field."""
    first = error.errors(include_url=False)[0]
    kind, location = first["type"], list(first["loc"])
    message = _REWORDED.get(kind, first["msg"]).removeprefix("Value error, ").replace(" after validation", "")
    if _SHOW_VALUE.search(kind):
        message += f", not {shown(first['input'])}"
    unknown = ""
    if kind == "extra_forbidden":
        field = shown(location.pop())
        parent = next((str(part) for part in reversed(location) if part in _OBJECTS), "steering")
        message = f"unknown field {field}; valid fields: {', '.join(_OBJECTS[parent].field_names())}"
        unknown = f".{field[1:-1]}"
    elif kind == "invalid_key":
        location.pop()
    elif kind == "wrong_field":
        location.append(first["ctx"]["field"])
    param = "steering"
    for part in location:
        if isinstance(part, int):
            param += f"[{part}]"
        elif not part.startswith("<"):
            param += f".{part}"
    return SteeringRequestError(f"{param}: {message}.", param + unknown)


_OBJECTS: dict[str, type[Strict]] = {
    "steering": SteeringSpec,
    "edits": EditSpec,
    "vector": InlineVector,
    "scope": ScopeSpec,
    "except": ExceptSpec,
    "gate": Gate,
    "schedule": ScheduleSpec,
    "<condition>": ConditionSpec,
    "<any>": AnySpec,
    "<all>": AllSpec,
    "any": ConditionSpec,
    "all": ConditionSpec,
    "probes": ProbeSpec,
    "stop": StopSpec,
    "capture": CaptureSpec,
}
"""The model of each field that is an object, and of each branch of `when`, to list its valid fields."""
