"""Steer Engine capturing texts to derive a vector: the same calls as in `steer-engine derive`, without Ray."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from steer_bench.arms.stock import engine_facts
from steer_bench.settings import Settings
from steer_engine.derive.capture_config import CAPTURE_ENV

ENVIRONMENT = CAPTURE_ENV


def load(settings: Settings) -> TextCapture:
    from steer_engine.derive.capture_config import CaptureConfig, Position, engine_defaults
    from steer_engine.derive.capture_engine import CaptureEngine

    args = {**engine_defaults(), "dtype": settings.dtype, "gpu_memory_utilization": settings.memory}
    config = CaptureConfig(model=settings.model, position=Position("last"), engine_args=tuple(args.items()))
    return TextCapture(CaptureEngine(config))


class TextCapture:
    """A `CaptureEngine` in this process: last token, all blocks, in chunks as in `derive`."""

    def __init__(self, capture_engine: Any) -> None:
        self.capture_engine = capture_engine
        self.engine_facts = capture_engine.facts()

    def describe(self) -> dict[str, Any]:
        import torch

        import steer_engine

        return {
            "steer_engine": steer_engine.__version__,
            "num_blocks": self.engine_facts.num_blocks,
            "read_blocks": len(self.engine_facts.blocks),
            "threads": torch.get_num_threads(),
            **engine_facts(self.capture_engine._llm.llm_engine),
        }

    def command(self, what: str, **arguments: Any) -> Any:
        if what == "capture":
            return self._capture(arguments["texts"], arguments.get("save"))
        raise ValueError(f"This arm has no command {what!r}.")

    def _capture(self, texts: list[str], save: str | None) -> float:
        """Returns seconds. save: file for the rows, float32 [N, L, D] in the order of the texts.

        Texts are alternately positive and negative, as in a file of pairs. They are not sorted, as in `derive`.
        """
        from steer_engine.derive.actors import PAIRS_PER_CHUNK
        from steer_engine.derive.texts import Pair

        pairs = [Pair(positive=a, negative=b) for a, b in zip(texts[::2], texts[1::2], strict=True)]
        chunks = [pairs[at : at + PAIRS_PER_CHUNK] for at in range(0, len(pairs), PAIRS_PER_CHUNK)]
        start = time.perf_counter()
        captured = [self.capture_engine.capture_pairs(chunk, True) for chunk in chunks]
        seconds = time.perf_counter() - start
        if save is not None:
            sides = [np.stack([chunk.positive_NLD, chunk.negative_NLD], axis=1) for chunk in captured]
            np.save(save, np.concatenate([side.reshape(-1, *side.shape[2:]) for side in sides]))
        return seconds
