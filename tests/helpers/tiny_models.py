"""Tiny random Llama checkpoints, made in a second, that real engines load."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_llama_path(
    folder: Path,
    *,
    num_blocks: int = 3,
    hidden_size: int = 64,
    vocab_size: int = 512,
    dtype: str = "float32",
    seed: int = 0,
    tags: tuple[str, ...] = (),
    **config: Any,
) -> Path:
    """A checkpoint with byte-level tokenizer and chat template under `folder`; made once per set of arguments.

    tags: further tokens of the vocabulary. The chat template opens an answer with the first of them.
    Weights are normal with standard deviation 0.1: large enough for logits that differ clearly between tokens.
    """
    import transformers

    settings = {
        "num_hidden_layers": num_blocks,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_attention_heads": 2,  # heads of 32: the smallest that CPU attention has
        "num_key_value_heads": 1,
        "vocab_size": vocab_size,
        "max_position_embeddings": 2048,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 258,
        **config,
    }
    key = json.dumps([settings, dtype, seed, transformers.__version__, *tags], sort_keys=True)
    final = folder / f"tiny-llama-{num_blocks}x{hidden_size}-{dtype}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if final.exists():
        return final
    staging = final.with_name(f".{final.name}-{os.getpid()}")
    _save(staging, settings, dtype, seed, tags)
    try:
        staging.rename(final)
    except OSError:  # another test process was quicker
        shutil.rmtree(staging)
    return final


def rescaled(source: Path, folder: Path, factors: dict[str, float]) -> Path:
    """A copy of a checkpoint under `folder` whose tensors are multiplied by `factors`, by name."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, factor in factors.items():
        tensors[name] = tensors[name] * factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _save(folder: Path, settings: dict[str, Any], dtype: str, seed: int, tags: tuple[str, ...]) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**settings))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    _tokenizer(settings["vocab_size"], tags).save_pretrained(folder)


def _tokenizer(vocab_size: int, tags: tuple[str, ...]) -> Any:
    """One token a byte, special tokens 256-258, tags, and fillers up to `vocab_size`, so that every id decodes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    fillers = [f"<{number}>" for number in range(vocab_size - len(alphabet) - len(special) - len(tags))]
    vocab = {token: index for index, token in enumerate([*alphabet, *special, *tags, *fillers])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(list(tags))
    template = CHAT_TEMPLATE.replace("assistant\n{% endif %}", f"assistant\n{tags[0]}\n{{% endif %}}" if tags else "")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[2],
        chat_template=template if tags else CHAT_TEMPLATE,
    )
