"""The copy of a large model has one block of each kind, and few experts."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from steer_engine.vllm.examination import MAX_EXPERTS, blocks_to_probe, rough_size, shrunken

WIDE: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 40}


@pytest.mark.parametrize(
    ("model_type", "settings", "blocks"),
    [
        ("llama", WIDE, 4),
        ("deepseek_v3", WIDE | {"first_k_dense_replace": 5, "n_routed_experts": 256}, 6),
        ("granitemoehybrid", WIDE | {"layer_types": ["mamba"] * 8 + ["attention"] + ["mamba"] * 31}, 9),
    ],
)
def test_a_large_model_gets_few_blocks_and_experts(model_type: str, settings: dict[str, Any], blocks: int) -> None:
    config = AutoConfig.for_model(model_type, **settings)
    assert shrunken(config) is config
    assert config.num_hidden_layers == blocks
    assert config.hidden_size == 4096
    assert len(getattr(config, "layer_types", None) or [None] * blocks) == blocks
    assert getattr(config, "n_routed_experts", 0) <= MAX_EXPERTS


def test_a_small_model_is_unchanged() -> None:
    config = AutoConfig.for_model("llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30)
    assert shrunken(config).num_hidden_layers == 30


def test_a_configuration_without_a_hidden_size_is_unchanged() -> None:
    from transformers import PreTrainedConfig

    config = PreTrainedConfig()
    assert shrunken(config) is config


def test_the_estimated_size_of_a_7b_model() -> None:
    assert 5e9 < rough_size(AutoConfig.for_model("llama", **WIDE | {"num_hidden_layers": 32})) < 9e9
    assert blocks_to_probe(AutoConfig.for_model("llama", **WIDE | {"num_hidden_layers": 2})) == 2
