"""Where a request may say its steering, and the refusal of every other place."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from steer_engine.api import foreign_forms
from steer_engine.errors import SteeringRequestError

FIELD = "steering"
XARGS = "vllm_xargs"
MISPLACED = ("extra_body", "extra_args", "sampling_params")
"""Objects in which clients put the field by mistake, and where no carrying endpoint would read it."""

RESERVED_PREFIX = "_steer"
"""Keys of `SamplingParams.extra_args` that only Steer Engine writes."""

MAX_KEY_ECHO = 80


def steering_of(body: Mapping[str, Any]) -> Any:
    """The steering that a request asks; None = not asked, False = none, not even a default.

    `body` holds the request's fields: `steering`, or its JSON text in `vllm_xargs.steering`. `null` is the same as
    leaving it out. Forms of other servers (`foreign_forms`) come out in ours.

    Raises:
        SteeringRequestError: asked in two ways, in a place that nothing would read, or with a reserved key.
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
        in_xargs = _read(in_xargs)
        foreign = [(form, xargs[form]) for form in foreign_forms.XARGS_FORMS if xargs.get(form) is not None]
    top = _read(body.get(FIELD))
    ways = [
        *([FIELD] if top is not None else ()),
        *([f"{XARGS}.{FIELD}"] if in_xargs is not None else ()),
        *(f"{XARGS}.{form}" for form, _ in foreign),
    ]
    if len(ways) > 1:
        raise SteeringRequestError(f"Steering is asked twice, in {' and in '.join(ways)}; give one of them.", ways[0])
    for place in MISPLACED:
        if mentions_steering({place: body.get(place)}):
            raise SteeringRequestError(
                f"Steering inside '{place}' would not be read; 'steering' is a field of the request itself.", place
            )
    for form, text in foreign:
        return foreign_forms.from_hotwire(text) if form == foreign_forms.HOTWIRE else foreign_forms.from_vllm_lens(text)
    if isinstance(top, dict) and foreign_forms.is_easysteer(top):
        return foreign_forms.from_easysteer(top)
    return in_xargs if top is None else top


def mentions_steering(body: Any) -> bool:
    """Whether a decoded JSON body asks for steering in any place where a client could think that it is read."""
    if isinstance(body, list):
        return any(mentions_steering(item) for item in body if isinstance(item, dict))
    if not isinstance(body, Mapping):
        return False
    if _read(body.get(FIELD)) not in (None, False) or any(
        body.get(form) is not None for form in foreign_forms.XARGS_FORMS
    ):
        return True
    return any(
        mentions_steering(inner) or any(isinstance(key, str) and key.startswith(RESERVED_PREFIX) for key in inner)
        for inner in (body.get(place) for place in (XARGS, *MISPLACED))
        if isinstance(inner, Mapping)
    )


def _read(said: Any) -> Any:
    """What JSON text says, where it says that nothing is asked; everything else as it is."""
    return {"null": None, "false": False}.get(said.strip(), said) if isinstance(said, str) else said


def _refuse_reserved_keys(xargs: Mapping[Any, Any]) -> None:
    for key in xargs:
        if isinstance(key, str) and key.startswith(RESERVED_PREFIX):
            param = f"{XARGS}.{key[:MAX_KEY_ECHO]}"
            raise SteeringRequestError(f"{param} is reserved; ask with the field 'steering' instead.", param)


SEPARATOR = ":"


def split_model(model: str | None, served: Collection[str]) -> tuple[str, str] | None:
    """`(served name, preset)` where `model` is such a name; None where it is a served name itself, or neither.

    Served names may hold the separator: an exact match comes first, then the longest served name before one.
    """
    if not model or model in served:
        return None
    cut = model.rfind(SEPARATOR)
    while cut > 0:
        if model[:cut] in served and model[cut + 1 :]:
            return model[:cut], model[cut + 1 :]
        cut = model.rfind(SEPARATOR, 0, cut)
    return None
