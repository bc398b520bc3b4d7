"""A copy keeps one block of each kind, and whatever decides how a block carries the stream."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from steer_engine.vllm.examination import MOST_EXPERTS, blocks_to_probe, rough_size, shrunken

WIDE: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 40}


@pytest.mark.parametrize(
    ("model_type", "settings", "blocks"),
    [
        ("llama", WIDE, 4),
        ("deepseek_v3", WIDE | {"first_k_dense_replace": 5, "n_routed_experts": 256}, 6),
        ("granitemoehybrid", WIDE | {"layer_types": ["mamba"] * 8 + ["attention"] + ["mamba"] * 31}, 9),
    ],
)
def test_large_models_are_shrunk(model_type: str, settings: dict[str, Any], blocks: int) -> None:
    config = AutoConfig.for_model(model_type, **settings)
    assert shrunken(config) is config
    assert config.num_hidden_layers == blocks
    assert config.hidden_size == 4096
    assert len(getattr(config, "layer_types", None) or [None] * blocks) == blocks
    assert getattr(config, "n_routed_experts", 0) <= MOST_EXPERTS


def test_small_models_are_not() -> None:
    config = AutoConfig.for_model("llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30)
    assert shrunken(config).num_hidden_layers == 30


def test_what_is_no_model_of_text_is_left_alone() -> None:
    from transformers import PreTrainedConfig

    config = PreTrainedConfig()
    assert shrunken(config) is config


def test_the_rough_size_of_a_7b_model_is_roughly_that() -> None:
    assert 5e9 < rough_size(AutoConfig.for_model("llama", **WIDE | {"num_hidden_layers": 32})) < 9e9
    assert blocks_to_probe(AutoConfig.for_model("llama", **WIDE | {"num_hidden_layers": 2})) == 2
