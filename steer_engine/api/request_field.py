"""Where a request may specify steering: the field, the extra arguments, or the model name.

`steering_of` reads a request that vLLM has parsed. Whether the raw body asks for steering anywhere, the places that
nothing reads included, is the question of `body_search`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from steer_engine.api.foreign_forms import EASYSTEER, XARGS_FORMS, ForeignSteering, is_easysteer
from steer_engine.api.frontend import RESERVED_PREFIX
from steer_engine.errors import SteeringRequestError

FIELD = "steering"
XARGS = "vllm_xargs"

MAX_KEY_ECHO = 80

SEPARATOR = ":"
"""Between base and preset in a model name."""


def steering_of(body: Mapping[str, Any]) -> Any:
    """The steering that a request specifies. None: not specified. False: none, not even the server's default.

    body: the request's fields; steering is in `steering`, or as JSON text in `vllm_xargs.steering`. `null` means not
    specified. A form of another server is returned as `ForeignSteering`.

    Raises:
        SteeringRequestError: specified twice, or with a reserved key.
    """
    xargs = body.get(XARGS)
    in_xargs = None
    foreign: list[tuple[str, Any]] = []
    if isinstance(xargs, Mapping):
        _refuse_reserved_keys(xargs)
        in_xargs = xargs.get(FIELD)
        if in_xargs is not None and not isinstance(in_xargs, str):
            raise SteeringRequestError(
                f"{XARGS}.{FIELD} must be a JSON string, not {type(in_xargs).__name__}; an object goes into the "
                "top-level field 'steering'.",
                f"{XARGS}.{FIELD}",
            )
        in_xargs = parsed_null(in_xargs)
        foreign = [(form, xargs[form]) for form in XARGS_FORMS if xargs.get(form) is not None]
    top = parsed_null(body.get(FIELD))
    ways = [
        *([FIELD] if top is not None else ()),
        *([f"{XARGS}.{FIELD}"] if in_xargs is not None else ()),
        *(f"{XARGS}.{form}" for form, _ in foreign),
    ]
    if len(ways) > 1:
        raise SteeringRequestError(
            f"Steering is specified twice, in {' and in '.join(ways)}; specify it once.", ways[0]
        )
    if foreign:
        return ForeignSteering(*foreign[0])
    if isinstance(top, dict) and is_easysteer(top):
        return ForeignSteering(EASYSTEER, top)
    return in_xargs if top is None else top


def is_absent(requested: Any) -> bool:
    """Whether no steering is specified. Only null and false say so: 0 equals False in Python, and is an error."""
    return requested is None or requested is False


def parsed_null(value: Any) -> Any:
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


def model_of(body: bytes) -> str | None:
    """The model that a body names; None if it names none."""
    try:
        model = json.loads(body).get("model")
    except (ValueError, AttributeError, RecursionError):
        return None
    return model if isinstance(model, str) else None


def object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(..., object_pairs_hook=)`. Raises SteeringRequestError if an object has the same key twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise SteeringRequestError("An object in the body has the same key twice.", "body")
    return found
