"""The architectures of the tests of families: what is expected of each, and the settings of its tiny checkpoint."""

from __future__ import annotations

from typing import Any

HIDDEN, VOCAB = 64, 256
COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "vocab_size": VOCAB,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
_MOE: dict[str, Any] = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FORM = {
    "llama": "split", "mistral": "split", "qwen2": "split", "qwen3": "split", "gemma2": "split", "gemma3_text": "split",
    "gemma4_text": "one", "phi3": "split", "olmo2": "one", "gpt_neox": "one", "gpt2": "one", "opt": "one",
    "falcon": "one",
    "starcoder2": "one", "stablelm": "hidden-only", "cohere": "hidden-only", "granite": "one", "mixtral": "split",
    "qwen3_moe": "split", "granitemoehybrid": "hidden-only", "phimoe": "hidden-only", "deepseek_v2": "split",
    "deepseek_v3": "split", "lfm2": "split", "glm": "one", "glm4": "split", "glm4_moe": "split", "nemotron": "split",
    "nemotron_h": "split", "exaone4": "hidden-only", "falcon_h1": "one", "gpt_oss": "split", "ernie4_5": "split",
    "ernie4_5_moe": "split", "llama4_text": "split", "mamba2": "split", "olmo": "one", "olmo3": "one", "olmoe": "split",
    "hunyuan_v1_dense": "one", "gptj": "one", "smollm3": "one", "granitemoe": "one", "granitemoeshared": "one",
    "seed_oss": "one", "arcee": "one", "gemma": "split", "qwen2_moe": "split", "phi": "one", "cohere2": "hidden-only",
    "gpt_bigcode": "one", "ministral": "one", "helium": "one",
    "ministral3": "split",
    "internlm2": "split", "internlm3": "split", "minicpm": "one", "minicpm3": "one", "hyperclovax": "hidden-only",
    "granite_swa": "one", "granitemoe_swa": "one",
}  # fmt: skip
"""Architecture (Hugging Face's model_type, or see REFERENCE) -> the stream form that the probe must find."""

SITE_MODULES = {
    "llama": ("self_attn", "mlp"),
    "qwen3": ("self_attn", "mlp"),
    # What is added to the stream are the norms of both outputs.
    "gemma3_text": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gpt_neox": ("attention", "mlp"),
    "mixtral": ("self_attn", "mlp"),
}
"""Architecture -> the modules of Hugging Face's blocks whose outputs are the sites "attn" and "mlp"."""

_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

MLA: dict[str, Any] = {
    "num_key_value_heads": 2,
    "kv_lora_rank": 512,  # with 64 for the rotary part, the only size of vLLM's MLA kernel for CPUs
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    # As published checkpoints have it. Without, vLLM takes its eager rotary kernel; see test_families.py.
    "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
}

_SLIDING = ["sliding_attention", "sliding_attention", "full_attention"]

SPECIAL: dict[str, dict[str, Any]] = {
    "cohere": {"tie_word_embeddings": True, "logit_scale": 1.0, "use_qk_norm": False},
    "gemma2": {
        "tie_word_embeddings": True,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "query_pre_attn_scalar": 32,
    },
    "gemma3_text": {"tie_word_embeddings": True, "query_pre_attn_scalar": 32, "sliding_window": 128},
    # No block shares the KV cache of another: then a second list holds the same blocks (see find_blocks).
    "gemma4_text": {
        "tie_word_embeddings": True,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCAB,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "global_head_dim": 32,
        "sliding_window": 128,
    },
    "phi3": {"original_max_position_embeddings": 512, "partial_rotary_factor": 1.0},
    "gpt2": {"n_embd": HIDDEN, "n_layer": 3, "n_head": 2, "n_positions": 512, "n_inner": 128},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": HIDDEN, "activation_function": "relu"},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "alibi": False},
    "mixtral": _MOE,
    "qwen3_moe": _MOE,
    "granitemoehybrid": {
        **_MOE,
        "layer_types": ["mamba", "attention", "mamba"],
        "shared_intermediate_size": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
    },
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True},
    "deepseek_v2": {**MLA, "q_lora_rank": None, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {
        **MLA,
        "q_lora_rank": 48,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "num_mtp_layers": 0,
    },
    "glm4": {"partial_rotary_factor": 0.5},
    "glm4_moe": {
        **_MOE,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
    },
    "nemotron_h": {
        "hybrid_override_pattern": "M*-",
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "ssm_state_size": 16,
        "n_groups": 1,
        "chunk_size": 16,
        "attention_head_dim": 32,
    },
    "exaone4": {"sliding_window": 128, "sliding_window_pattern": "LLG", "layer_types": _SLIDING},
    "falcon_h1": {
        "mamba_d_ssm": 128,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
    },
    "gpt_oss": {**_MOE, "sliding_window": 128, "layer_types": _SLIDING},
    "ernie4_5_moe": {
        **_MOE,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
        "moe_layer_interval": 1,
    },
    "llama4_text": {
        **_MOE,
        "intermediate_size_mlp": 128,
        "interleave_moe_layer_step": 2,
        "num_experts_per_tok": 1,
        "use_qk_norm": True,
        "attention_chunk_size": 128,
    },
    "mamba2": {"num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 1, "chunk_size": 16, "expand": 2},
    "olmo3": {"sliding_window": 128, "layer_types": _SLIDING},
    "olmoe": _MOE,
    "gptj": {"n_embd": HIDDEN, "n_layer": 3, "n_head": 2, "n_positions": 512, "n_inner": 128, "rotary_dim": 16},
    "granitemoe": _MOE,
    "granitemoeshared": {**_MOE, "shared_intermediate_size": 64},
    "gemma": {"tie_word_embeddings": True},
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 64},
    "phi": {"partial_rotary_factor": 0.5},
    "cohere2": {"tie_word_embeddings": True, "logit_scale": 1.0, "sliding_window": 128, "layer_types": _SLIDING},
    "ministral3": {"rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.1}},
    "internlm3": {"attention_bias": True},
    # What MiniCPM calls otherwise, and its vLLM model reads.
    "minicpm": {
        "embedding_multiplier": 12.0,
        "scale_emb": 12.0,
        "residual_multiplier": 1.4 / 3**0.5,
        "scale_depth": 1.4,
        "logits_scaling": HIDDEN / 16,
        "dim_model_base": 16,
        "attention_multiplier": 32**-0.5,
    },
    "minicpm3": {
        "num_key_value_heads": 2,
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "dim_model_base": 32,
    },
    "hyperclovax": {"attention_multiplier": 32**-0.5, "residual_multiplier": 0.7},
    "granite_swa": {"attention_multiplier": 32**-0.5, "sliding_window": 128, "layer_types": _SLIDING},
    "granitemoe_swa": {
        **_MOE,
        "attention_multiplier": 32**-0.5,
        "sliding_window": 128,
        "layer_types": _SLIDING,
        "shared_intermediate_size": 64,
    },
    "gpt_bigcode": {"n_embd": HIDDEN, "n_layer": 3, "n_head": 2, "n_positions": 512, "n_inner": 128},
    "lfm2": {
        "tie_word_embeddings": True,
        "layer_types": ["conv", "full_attention", "conv"],
        # Fields of published checkpoints that vLLM reads and Hugging Face's class does not have.
        "conv_dim": HIDDEN,
        "block_dim": HIDDEN,
    },
}


WITHOUT = {
    "deepseek_v2": ("head_dim",),
    "deepseek_v3": ("head_dim",),
    "falcon": ("head_dim",),
    "gptj": ("num_key_value_heads", "head_dim"),
    "gpt_bigcode": ("num_key_value_heads", "head_dim"),
    "mamba2": ("num_attention_heads", "num_key_value_heads", "intermediate_size"),
    "gpt_neox": ("head_dim", "num_key_value_heads"),
    "minicpm3": ("head_dim",),
}
"""Fields of the common settings that mislead an architecture that does not have them."""


CLASS = {
    "phimoe": "PhiMoEForCausalLM",
    "internlm2": "InternLM2ForCausalLM",
    "internlm3": "InternLM3ForCausalLM",
    "minicpm": "MiniCPMForCausalLM",
}
"""What published checkpoints say where Hugging Face's class is called otherwise: vLLM has a model of that name."""

REFERENCE = {
    "internlm2": "llama",  # the same model with other names of its weights
    "internlm3": "llama",
    "minicpm": "granite",  # the same model with other names of its multipliers
}
"""Architecture -> the model_type to compare with, where Hugging Face's library has none of that name."""
