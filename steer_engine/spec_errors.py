"""How a spec that does not validate is told to the client: the field, the value, what is valid."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, Discriminator, ValidationError
from pydantic_core import PydanticCustomError

from steer_engine.errors import SteeringRequestError

MAX_ECHO_CHARS = 80
"""How much of a client's text an error message repeats."""

_VALUE_HELPS = re.compile(r"_type$|^(wrong_kind|literal_error|enum|finite_number|greater_than_equal|less_than_equal)$")
_REWORDED = {"model_type": "must be an object", "list_type": "must be a list"}


def shown(value: Any) -> str:
    """A client's value as a message repeats it: printable, and at most MAX_ECHO_CHARS long."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, str):
        text = repr(value[:MAX_ECHO_CHARS])
        cut = len(value) > MAX_ECHO_CHARS or len(text) > MAX_ECHO_CHARS
        return f"{text[: MAX_ECHO_CHARS - 4]}...{text[0]}" if cut else text
    if isinstance(value, int):
        return str(value) if abs(value) < 2**63 else "a huge number"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    return f"a {type(value).__name__}"[:MAX_ECHO_CHARS]


def wrong_field(field: str, message: str) -> PydanticCustomError:
    """What a validator of a whole object raises, so that the error can name the field."""
    return PydanticCustomError("wrong_field", "{message}", {"field": field, "message": message})


def told_apart(tag_of: Callable[[Any], str | None], valid: str) -> Discriminator:
    """Tells the branches of a union apart by the kind of the value, so that an error is about the one that was meant.

    Tags stand in angle brackets: no field is called so.
    """
    return Discriminator(tag_of, custom_error_type="wrong_kind", custom_error_message=f"must be {valid}")


def request_error(error: ValidationError, objects: Mapping[str, type[BaseModel]]) -> SteeringRequestError:
    """The first error, with the path of its field.

    objects: the model that each field holds ("steering": the root), to say which fields there are.
    """
    first = error.errors(include_url=False)[0]
    kind, location = first["type"], list(first["loc"])
    message = _REWORDED.get(kind, first["msg"]).removeprefix("Value error, ").replace(" after validation", "")
    if _VALUE_HELPS.search(kind):
        message += f", not {shown(first['input'])}"
    unknown = ""
    if kind == "extra_forbidden":
        field = shown(location.pop())
        holder = next((str(part) for part in reversed(location) if part in objects), "steering")
        message = f"unknown field {field}; there are {', '.join(objects[holder].model_fields)}"
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
