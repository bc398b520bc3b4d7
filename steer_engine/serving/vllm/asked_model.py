"""The model that a request names: `BASE:PRESET` becomes the base for vLLM, and stands in the answer as it was asked."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from steer_engine.errors import UnknownVectorError
from steer_engine.serving import told
from steer_engine.serving.preset_model import split_model

_ASKED = "_steer_engine_asked_model"
"""Attribute of a request object; set past pydantic, so that no dump shows it."""


def frontend_of(serving: Any) -> Any:
    """The `Frontend` behind a handler; None where it has no engine, or the general plugin is not loaded."""
    client = getattr(serving, "engine_client", None) or getattr(serving.models, "engine_client", None)
    return getattr(getattr(client, "input_processor", None), "steering", None)


def take_preset(serving: Any, request: Any) -> str | None:
    """The preset that the request chooses by its model's name; the name left on the request is then vLLM's own.

    An unknown preset is an unknown model: vLLM answers that, with the names that it has.
    """
    note = told.current.get()
    model = getattr(request, "model", None) or (note and note.model)
    if not isinstance(model, str):
        return None
    served = {path.name for path in serving.models.base_model_paths} | set(serving.models.lora_requests)
    chosen = split_model(model, served)
    frontend = frontend_of(serving)
    if chosen is None or frontend is None or not frontend.armed:
        return None
    base, preset = chosen
    try:
        frontend.registry.preset(preset)
    except UnknownVectorError:
        if not request.model:
            request.model = model  # the wrapper took it off: vLLM must see it to refuse it
        return None
    object.__setattr__(request, _ASKED, model)
    request.model = base
    return preset


def tell_asked_model(original: Callable[..., Any], request: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call `original(*args, **kwargs)` with its parameter `model_name` as the client asked for it."""
    asked = getattr(request, _ASKED, None)
    if asked is None:
        return original(*args, **kwargs)
    bound = inspect.signature(original).bind(*args, **kwargs)
    bound.arguments["model_name"] = asked
    return original(*bound.args, **bound.kwargs)
