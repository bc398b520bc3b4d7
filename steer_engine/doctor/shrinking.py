"""A smaller model of the same kind: how a block carries the stream does not depend on how many there are."""

from __future__ import annotations

from typing import Any

FEW_BLOCKS = 4
"""Blocks of a copy of a large model, unless it needs more to have one of each kind."""

LARGE = 0.5e9
"""Parameters, roughly; a smaller model is probed whole."""

MOST_EXPERTS = 16

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def shrunken(config: Any) -> Any:
    """The Hugging Face configuration `config`, changed in place: fewer blocks and experts where it is large."""
    text = text_config(config)
    if not hasattr(text, "hidden_size") or rough_size(text) < LARGE:
        return config
    num_blocks = text.num_hidden_layers
    few = blocks_to_probe(text)
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == num_blocks:
            setattr(text, name, value[:few])
    text.num_hidden_layers = few
    for name in _EXPERTS:
        if isinstance(found := getattr(text, name, None), int):
            setattr(text, name, min(found, MOST_EXPERTS))
    return config


def blocks_to_probe(text: Any) -> int:
    """How many of the first blocks have one of each kind among them."""
    num_blocks: int = text.num_hidden_layers
    kinds = getattr(text, "layer_types", None) or [None]
    first_of_each = max(kinds.index(kind) for kind in set(kinds)) + 1
    dense_first = (getattr(text, "first_k_dense_replace", None) or 0) + 1
    return int(min(num_blocks, max(FEW_BLOCKS, first_of_each, dense_first)))


def rough_size(text: Any) -> float:
    """Parameters, to a factor of two or so."""
    hidden = float(text.hidden_size)
    experts = max([1, *(getattr(text, name, None) or 1 for name in _EXPERTS)])
    wide = getattr(text, "intermediate_size", None) or 4 * hidden
    if experts > 1:
        wide = experts * (getattr(text, "moe_intermediate_size", None) or wide)
    return float(text.num_hidden_layers * hidden * (3 * wide + 4 * hidden) + 2 * text.vocab_size * hidden)
