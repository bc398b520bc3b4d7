"""What a user writes about model, blocks and engine, as the actors take it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from steer_engine.errors import DerivationError
from steer_engine.models import PACKAGED, resolve_model
from steer_engine.spec import parse_blocks


def model_for_actors(model: str, *, local: bool) -> str:
    """The model as an actor can open it, whatever its working directory.

    A packaged model goes by its name, since another machine keeps it elsewhere; here it is made ready beforehand, where
    the user sees it.
    """
    if model in PACKAGED:
        if local:
            resolve_model(model)
        return model
    return str(Path(model).absolute()) if Path(model).exists() else model


def model_name(model: str) -> str:
    """What files call the model: a folder goes by its name, not by where it is."""
    return Path(model).name if Path(model).exists() else model


READING_ENV = {
    # Texts differ in length, and for each number of tokens in a step oneDNN keeps the primitives of every matrix
    # product: the default of 1,024 is hundreds of MiB after some thousand texts, and a step needs about five.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
}
"""Of a process whose engine reads texts."""


def engine_defaults() -> dict[str, Any]:
    """Reading needs no CUDA graphs or compilation (a minute or two saved), no cache, and no more length than fits."""
    return {"enforce_eager": True, "enable_prefix_caching": False, "max_model_len": -1}


def as_blocks(blocks: str | int | Iterable[int]) -> tuple[int, ...] | None:
    """Block numbers, None for all."""
    try:
        return parse_blocks(blocks if isinstance(blocks, str | int) else list(blocks))
    except ValueError as error:
        raise DerivationError(f"{error}.") from None
