"""Presets that stock clients choose by the name of a model: `BASE:PRESET`."""

from __future__ import annotations

from collections.abc import Collection

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
