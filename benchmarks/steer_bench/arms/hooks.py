"""Hugging Face with forward hooks, as in repeng and steering-vectors: one hook per block adds each row's vector.

Requests run in padded batches, sorted by length. A batch ends when its last row has all its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from steer_bench.load import Load, Steering, vector
from steer_bench.settings import Settings
from steer_bench.timing import Stopwatch, Timing

ENVIRONMENT: dict[str, str] = {}
ADD_SCALE = 8.0
BATCH_SIZE = 32


def load(settings: Settings) -> Hooks:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=getattr(torch, settings.dtype))
    return Hooks(model.eval(), settings.num_vectors)


class Hooks:
    """A Llama-like model in this process with a hook on every block.

    Shapes: B rows, T positions, L blocks, D hidden size, V vectors or vocabulary, N output tokens.
    """

    def __init__(self, model: Any, num_vectors: int) -> None:
        import torch

        self.model = model
        self.blocks = model.model.layers
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.batch_size = BATCH_SIZE
        size = (len(self.blocks), model.config.hidden_size)
        self.vectors_VLD = torch.stack([torch.from_numpy(vector(number, *size)) for number in range(num_vectors)])
        self.steer_LBD: Any = None
        self.last_only = False
        for block in range(len(self.blocks)):
            self.blocks[block].register_forward_hook(self._hook(block))

    def _hook(self, block: int) -> Any:
        def add(_module: Any, _inputs: Any, output: Any) -> Any:
            if self.steer_LBD is None:
                return output
            hidden_BTD = output[0] if isinstance(output, tuple) else output
            steer_BD = self.steer_LBD[block]
            if self.last_only:
                hidden_BTD[:, -1] += steer_BD
            else:
                hidden_BTD = hidden_BTD + steer_BD[:, None]
            return (hidden_BTD, *output[1:]) if isinstance(output, tuple) else hidden_BTD

        return add

    def describe(self) -> dict[str, Any]:
        import torch
        import transformers

        return {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "attention": self.model.config._attn_implementation,
            "num_blocks": len(self.blocks),
            "hooked_blocks": len(self.blocks),
            "eager": True,
        }

    def command(self, what: str, **arguments: Any) -> Any:
        if what == "reset_prefix_cache":
            return True  # each batch has its own cache
        if what == "batch_size":
            self.batch_size = int(arguments["value"])
            return self.batch_size
        if what == "threads":
            import torch

            torch.set_num_threads(int(arguments["value"]))
            return torch.get_num_threads()
        if what == "score":
            from steer_bench.arms.hooks_score import score

            return score(self, **arguments)
        raise ValueError(f"This arm has no command {what!r}.")

    def run(self, load: Load, *, check: bool = False) -> Timing:
        """Run the load in batches of `batch_size`; its concurrency is ignored.

        check: also compute log-probabilities of the prompts, and save the output tokens in `applied`.

        Time to first token counts from the start of the load, so it includes the wait for the batch.
        """
        import torch

        if load.steering is Steering.DIRECTIONAL or load.scope != "all":
            raise ValueError(
                f"These hooks support only add in scope all; the load uses {load.steering} in {load.scope}."
            )
        prompts = load.prompts(self.model.config.vocab_size)
        order = sorted(range(len(prompts)), key=lambda request: len(prompts[request]))
        answers: dict[int, list[int]] = {}
        logprobs: dict[int, float] = {}
        watch = Stopwatch()
        for request in order:
            watch.enter(request)
        with torch.inference_mode():
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                self._steer(load, batch)
                if check:
                    logprobs |= zip(batch, self._prompt_logprobs([prompts[request] for request in batch]), strict=True)
                answers |= self._generate(batch, [prompts[request] for request in batch], load.max_tokens, watch)
        self.steer_LBD = None
        return watch.stop(
            output_tokens=sum(map(len, answers.values())),
            prompt_tokens=sum(map(len, prompts)),
            prompt_logprobs=[logprobs[request] for request in range(len(prompts))] if check else [],
            applied={"answers": [answers[request] for request in range(len(prompts))]} if check else {},
        )

    def _steer(self, load: Load, batch: Sequence[int]) -> None:
        """Set each row's vector at every block; zero for unsteered rows."""
        import torch

        numbers = [load.vector_of(request) for request in batch]
        if all(number is None for number in numbers):
            self.steer_LBD = None
            return
        zero_LD = torch.zeros_like(self.vectors_VLD[0])
        rows = [zero_LD if number is None else ADD_SCALE * self.vectors_VLD[number] for number in numbers]
        self.steer_LBD = torch.stack(rows, dim=1).to(self.device, self.dtype)

    def _generate(
        self, batch: Sequence[int], prompts: Sequence[list[int]], max_tokens: int, watch: Stopwatch
    ) -> dict[int, list[int]]:
        """Greedy decoding with a KV cache, exactly `max_tokens` tokens per row."""
        import torch
        from transformers import DynamicCache

        inputs = self.padded(prompts)
        mask_BT = inputs["attention_mask"]
        cache = DynamicCache(config=self.model.config)
        tokens_BN = []
        for number in range(max_tokens):
            logits_BV = self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            token_B = logits_BV.argmax(-1)
            tokens_BN.append(token_B)
            for request in batch:
                watch.tokens(request, number + 1)
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(batch), 1)], dim=1)
            inputs = {
                "input_ids": token_B[:, None],
                "attention_mask": mask_BT,
                "position_ids": mask_BT.sum(1, keepdim=True) - 1,
            }
        return dict(zip(batch, torch.stack(tokens_BN, dim=1).tolist(), strict=True))

    def _prompt_logprobs(self, prompts: Sequence[list[int]]) -> list[float]:
        """Mean log-probability of each prompt's tokens after the first, in nats."""
        inputs = self.padded(prompts)
        logprobs_BTV = self.model(**inputs).logits.float().log_softmax(-1)
        logprobs_BT = logprobs_BTV[:, :-1].gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
        return [
            float(logprobs_T[1 - len(prompt) :].mean()) for logprobs_T, prompt in zip(logprobs_BT, prompts, strict=True)
        ]

    def padded(self, prompts: Sequence[list[int]]) -> dict[str, Any]:
        """The model's inputs for a batch, padded on the left."""
        import torch

        ids_BT, mask_BT = left_padded(prompts)
        mask = torch.from_numpy(mask_BT).to(self.device)
        return {
            "input_ids": torch.from_numpy(ids_BT).to(self.device),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        }


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask, both int64 [B, T]; padding is 0 in both."""
    longest = max(map(len, prompts))
    ids_BT = np.zeros((len(prompts), longest), dtype=np.int64)
    mask_BT = np.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :] = prompt
        mask_BT[row, longest - len(prompt) :] = 1
    return ids_BT, mask_BT
