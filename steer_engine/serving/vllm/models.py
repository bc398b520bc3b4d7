"""Wraps `OpenAIServingModels.show_available_models`. Known for vLLM 0.32, 0.33.

Why: a preset is a model to clients that choose from `GET /v1/models`.
"""

from __future__ import annotations

from typing import Any

from steer_engine.runtime.vllm.patching import wrap
from steer_engine.serving.preset_model import SEPARATOR
from steer_engine.serving.vllm import symbols


def hook() -> None:
    wrap(symbols.SHOW_MODELS, _with_presets)


def _with_presets(original: Any) -> Any:
    async def show_available_models(self: Any) -> Any:
        models = await original(self)
        frontend = getattr(self.input_processor, "steering", None)
        if frontend is None or not frontend.armed:
            return models
        bases = {path.name: path for path in self.base_model_paths}
        presets = list(frontend.registry.presets())
        models.data += [
            card.model_copy(update={"id": f"{card.id}{SEPARATOR}{preset}", "parent": card.id, "permission": []})
            for card in models.data
            if card.id in bases
            for preset in presets
        ]
        return models

    return show_available_models
