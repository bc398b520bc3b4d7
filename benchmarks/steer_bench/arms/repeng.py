"""repeng 0.4.0 capturing texts to derive a vector: its `batched_get_hiddens` on a Hugging Face model."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import numpy as np

from steer_bench.settings import Settings

ENVIRONMENT: dict[str, str] = {}


def load(settings: Settings) -> Repeng:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # repeng uses np.float_ in a type annotation; NumPy 2 removed it.
    vars(np).setdefault("float_", np.float64)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=getattr(torch, settings.dtype))
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return Repeng(model.eval(), tokenizer)


class Repeng:
    """A Hugging Face model in this process, captured with repeng."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer

    def describe(self) -> dict[str, Any]:
        import torch
        import transformers

        return {
            "repeng": version("repeng"),
            "outside_supported": f"requires numpy < 2; this is numpy {np.__version__}",
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "attention": self.model.config._attn_implementation,
            "num_blocks": self.model.config.num_hidden_layers,
        }

    def command(self, what: str, **arguments: Any) -> Any:
        if what == "threads":
            import torch

            torch.set_num_threads(int(arguments["value"]))
            return torch.get_num_threads()
        if what == "capture":
            return self._capture(**arguments)
        raise ValueError(f"This arm has no command {what!r}.")

    def _capture(self, texts: list[str], batch_size: int, save: str | None = None) -> float:
        """Returns seconds. save: file for the rows, float32 [N, L, D] in the order of the texts.

        Texts are sorted by length before timing, longest first, so that batches have little padding.
        """
        import torch
        from repeng.extract import batched_get_hiddens  # type: ignore[import-not-found]

        lengths = [len(self.tokenizer.encode(text)) for text in texts]
        order = sorted(range(len(texts)), key=lambda text: -lengths[text])
        blocks = list(range(self.model.config.num_hidden_layers))
        start = time.perf_counter()
        with torch.inference_mode():
            hiddens = batched_get_hiddens(self.model, self.tokenizer, [texts[i] for i in order], blocks, batch_size)
        seconds = time.perf_counter() - start
        if save is not None:
            sorted_NLD = np.stack([hiddens[block] for block in blocks], axis=1)
            rows_NLD = np.empty_like(sorted_NLD)
            rows_NLD[order] = sorted_NLD
            np.save(save, rows_NLD)
        return seconds
