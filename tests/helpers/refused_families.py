"""Architectures that an armed engine refuses, or that plain vLLM does not run on a CPU, and a configuration of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.family_settings import COMMON, MLA, VOCAB

REFUSED = {
    "gemma3n_text": "carries several streams per token",
    "iquestloopcoder": "runs its blocks several times a step",
}
"""Architecture -> why an armed engine refuses it at startup."""

NOT_HERE = {
    "internlm": "vLLM 0.23 was the last with it; InternLM 2 and 3 run",
    "deepseek_v32": "vLLM has no sparse attention for CPUs; untested on a GPU",
    "glm_moe_dsa": "vLLM has no sparse attention for CPUs (GLM-5); untested on a GPU",
}
"""Architecture -> why plain vLLM does not run it on a CPU."""

REFUSED_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3n_text": (
        "gemma3n_text",
        {
            "architectures": ["Gemma3nForCausalLM"],
            "num_hidden_layers": 5,  # as many as no other list of the model has
            "layer_types": ["sliding_attention"] * 4 + ["full_attention"],
            "intermediate_size": [128] * 5,
            "activation_sparsity_pattern": [0.0] * 5,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": VOCAB,
            "laurel_rank": 8,
            "altup_num_inputs": 4,
            "sliding_window": 128,
            "tie_word_embeddings": True,
        },
    ),
    # Its configuration is Llama's with two fields more, and not a part of Hugging Face's library.
    "iquestloopcoder": ("llama", {"architectures": ["IQuestLoopCoderForCausalLM"], "loop_num": 2}),
    "internlm": ("llama", {"architectures": ["InternLMForCausalLM"]}),
    "deepseek_v32": ("deepseek_v32", {**MLA, "architectures": ["DeepseekV32ForCausalLM"], "q_lora_rank": 48}),
    "glm_moe_dsa": ("glm_moe_dsa", {**MLA, "architectures": ["GlmMoeDsaForCausalLM"], "q_lora_rank": 48}),
}
"""Architecture -> the model_type of a configuration for it, and the settings that differ from the common ones."""


def make_refused(name: str, folder: Path) -> Path:
    """A checkpoint of one of REFUSED or NOT_HERE, without weights."""
    from transformers import AutoConfig

    model_type, settings = REFUSED_SETTINGS[name]
    AutoConfig.for_model(model_type, **{**COMMON, **settings}).save_pretrained(folder / name)
    return folder / name
