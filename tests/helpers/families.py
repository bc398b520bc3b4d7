"""Tiny random checkpoints of many architectures, and what Hugging Face says of each, steered at every block.

    python families.py FOLDER NAME...

writes FOLDER/NAME (a checkpoint) and FOLDER/NAME.npz: `ids` [1 + blocks, ANSWER], the greedy answers to PROMPT without
steering and steered at each block, and `logprobs` [1 + blocks, T - 1 + ANSWER], of the prompt's tokens but the first
and of the answer's. For architectures of SITE_MODULES, rows follow for each block of each site, and there is `outputs`
[2 * blocks, T, D]: what the modules return in the unsteered prompt, site by site. It runs in a process of its own: an
engine on vLLM's Transformers backend patches Hugging Face's attention in its process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

PROMPT = [int(token) for token in np.random.default_rng(7).integers(3, 250, 24)]
HIDDEN, VOCAB, SCALE, ANSWER = 64, 256, 1.5, 4
_COMMON: dict[str, Any] = {
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
}  # fmt: skip
"""Architecture (Hugging Face's model_type) -> the stream form that the probe must find."""

SITE_MODULES = {
    "llama": ("self_attn", "mlp"),
    "qwen3": ("self_attn", "mlp"),
    # What is added to the stream are the norms of both outputs.
    "gemma3_text": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gpt_neox": ("attention", "mlp"),
    "mixtral": ("self_attn", "mlp"),
}
"""Architecture -> the modules of Hugging Face's blocks whose outputs are the sites "attn" and "mlp"."""

REFUSED = {
    "gemma3n_text": "carries several streams per token",
    "iquestloopcoder": "runs its blocks several times a step",
}
"""Architecture -> why an armed engine refuses it at startup."""

_MLA: dict[str, Any] = {
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
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
}

_SLIDING = ["sliding_attention", "sliding_attention", "full_attention"]

_SPECIAL: dict[str, dict[str, Any]] = {
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
    "deepseek_v2": {**_MLA, "q_lora_rank": None, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {
        **_MLA,
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
    "gpt_bigcode": {"n_embd": HIDDEN, "n_layer": 3, "n_head": 2, "n_positions": 512, "n_inner": 128},
    "lfm2": {
        "tie_word_embeddings": True,
        "layer_types": ["conv", "full_attention", "conv"],
        # Fields of published checkpoints that vLLM reads and Hugging Face's class does not have.
        "conv_dim": HIDDEN,
        "block_dim": HIDDEN,
    },
}


_WITHOUT = {
    "deepseek_v2": ("head_dim",),
    "deepseek_v3": ("head_dim",),
    "falcon": ("head_dim",),
    "gptj": ("num_key_value_heads", "head_dim"),
    "gpt_bigcode": ("num_key_value_heads", "head_dim"),
    "mamba2": ("num_attention_heads", "num_key_value_heads", "intermediate_size"),
    "gpt_neox": ("head_dim", "num_key_value_heads"),
}
"""Fields of the common settings that mislead an architecture that does not have them."""


_CLASS = {"phimoe": "PhiMoEForCausalLM"}
"""What published checkpoints say where Hugging Face's class is called otherwise: vLLM has a model of that name."""


_REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
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
}
"""Architecture -> the model_type of a configuration for it, and the settings that differ from the common ones."""


def make_refused(name: str, folder: Path) -> Path:
    """A checkpoint of one of REFUSED, without weights."""
    from transformers import AutoConfig

    model_type, settings = _REFUSED[name]
    AutoConfig.for_model(model_type, **{**_COMMON, **settings}).save_pretrained(folder / name)
    return folder / name


def directions(num_blocks: int = 3) -> np.ndarray:
    """float32 [blocks, D]: one random direction of length 1 per block."""
    rows = np.random.default_rng(11).standard_normal((num_blocks, HIDDEN))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def make(name: str, folder: Path) -> None:
    """Checkpoint and Hugging Face's answers for one architecture."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = {**_COMMON, **_SPECIAL.get(name, {})}
    for key in _WITHOUT.get(name, ()):
        del settings[key]
    config = AutoConfig.for_model(name, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    model.save_pretrained(folder / name)
    config.architectures = [_CLASS.get(name, type(model).__name__)]
    config.save_pretrained(folder / name)
    blocks = next(
        module for _, module in model.named_modules() if isinstance(module, torch.nn.ModuleList) and len(module) == 3
    )
    answers = [_answer(model)]
    parts = [[getattr(block, module) for block in blocks] for module in SITE_MODULES.get(name, ())]
    for module, direction in [pair for each in (blocks, *parts) for pair in zip(each, directions(), strict=True)]:
        handle = module.register_forward_hook(_adding(torch.tensor(direction) * SCALE))
        answers.append(_answer(model))
        handle.remove()
    ids, logprobs = zip(*answers, strict=True)
    outputs = _outputs(model, [module for each in parts for module in each])
    np.savez(folder / f"{name}.npz", ids=np.array(ids), logprobs=np.array(logprobs), outputs=outputs)


def _adding(edit_D: Any) -> Any:
    def hook(module: Any, args: Any, output: Any) -> Any:
        return (output[0] + edit_D, *output[1:]) if isinstance(output, tuple) else output + edit_D

    return hook


def _outputs(model: Any, modules: list[Any]) -> np.ndarray:
    """float32 [modules, T, D]: what each returns while the model reads PROMPT."""
    import torch

    found: dict[int, np.ndarray] = {}

    def recording(number: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            found[number] = output.reshape(-1, HIDDEN).numpy()

        return hook

    handles = [module.register_forward_hook(recording(number)) for number, module in enumerate(modules)]
    with torch.inference_mode():
        model(torch.tensor([PROMPT]), use_cache=False)
    for handle in handles:
        handle.remove()
    return np.stack([found[number] for number in range(len(modules))]) if found else np.zeros((0, len(PROMPT), HIDDEN))


def _answer(model: Any) -> tuple[list[int], list[float]]:
    """The most likely tokens after PROMPT, and the logprobs of all tokens but the first; no cache of any kind."""
    import torch

    ids = list(PROMPT)
    with torch.inference_mode():
        for _ in range(ANSWER):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        logits_TV = model(torch.tensor([ids]), use_cache=False).logits[0].double()
    logprobs_TV = torch.log_softmax(logits_TV, dim=-1)
    return ids[len(PROMPT) :], [float(logprobs_TV[t, token]) for t, token in enumerate(ids[1:])]


def main() -> None:
    folder = Path(sys.argv[1])
    for name in sys.argv[2:]:
        try:
            make(name, folder)
        except Exception as error:  # one architecture that cannot be built must not hide the others
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
