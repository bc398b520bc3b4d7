"""Tiny random checkpoints of many architectures, and what Hugging Face says of each, steered at every block.

    python -m helpers.families FOLDER NAME...

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

from helpers.family_settings import (
    CLASS,
    COMMON,
    HIDDEN,
    REFERENCE,
    SITE_MODULES,
    SPECIAL,
    WITHOUT,
)

PROMPT = [int(token) for token in np.random.default_rng(7).integers(3, 250, 24)]
SCALE, ANSWER = 1.5, 4


def directions(num_blocks: int = 3) -> np.ndarray:
    """float32 [blocks, D]: one random direction of length 1 per block."""
    rows = np.random.default_rng(11).standard_normal((num_blocks, HIDDEN))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def make(name: str, folder: Path) -> None:
    """Checkpoint and Hugging Face's answers for one architecture."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = {**COMMON, **SPECIAL.get(name, {})}
    config = AutoConfig.for_model(
        REFERENCE.get(name, name), **{key: value for key, value in settings.items() if key not in WITHOUT.get(name, ())}
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    renamed = {"internlm2": _as_internlm2}.get(name)
    model.save_pretrained(folder / name, state_dict=None if renamed is None else renamed(model))
    config.architectures = [CLASS.get(name, type(model).__name__)]
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


def _as_internlm2(model: Any) -> dict[str, Any]:
    """Llama's weights with InternLM2's names: queries, keys and values are one matrix, by group of heads."""
    import torch

    groups, head_dim = model.config.num_key_value_heads, model.config.head_dim
    state = model.state_dict()
    for block in range(model.config.num_hidden_layers):
        attention = f"model.layers.{block}.self_attn."
        parts = [state.pop(f"{attention}{part}_proj.weight").unflatten(0, (groups, -1, head_dim)) for part in "qkv"]
        state[f"{attention}wqkv.weight"] = torch.cat(parts, dim=1).flatten(0, 2).contiguous()
    names = {
        "self_attn.o_proj": "attention.wo", "self_attn": "attention", "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm", "embed_tokens": "tok_embeddings", "lm_head": "output",
    }  # fmt: skip
    for old, new in names.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    return state


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
