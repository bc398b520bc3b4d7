"""A LoRA adapter never takes the model name of a preset: the load is refused, over HTTP and at startup."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.openai.models.protocol import BaseModelPath, LoRAModulePath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

from steer_engine.api.answers import current_note
from steer_engine.api.frontend import Frontend
from steer_engine.model_shape import ModelShape
from steer_engine.settings import ALL_OPS, SteeringConfig
from steer_engine.vectors import Registry
from steer_engine.vllm import check_model
from steer_engine.vllm.plugin import register, register_api

SHAPE = ModelShape(hidden_size=4, num_blocks=2, armed_blocks=(0, 1), ops=ALL_OPS, rows=4, dtype="float32")


class Engine:
    """What vLLM's list of models needs of an engine; `loaded` are the names of its adapters."""

    def __init__(self, frontend: Frontend) -> None:
        self.loaded: list[str] = []
        self.model_config = SimpleNamespace(max_model_len=10)
        self.renderer = None
        self.input_processor = SimpleNamespace(steering=frontend)

    async def add_lora(self, request: Any) -> None:
        self.loaded.append(request.lora_name)


@pytest.fixture(scope="module", autouse=True)
def _patched() -> None:
    register()
    register_api()


@pytest.fixture
def frontend(tmp_path: Path) -> Frontend:
    (tmp_path / "calm.preset.json").write_text(json.dumps({"edits": [{"vector": "a"}]}))
    frontend = Frontend(SteeringConfig(), SHAPE)
    frontend.registry = Registry(tmp_path)
    return frontend


def models_of(frontend: Frontend, **adapters: str) -> tuple[Engine, OpenAIServingModels]:
    engine = Engine(frontend)
    modules = [LoRAModulePath(name=name, path=path) for name, path in adapters.items()]
    paths = [BaseModelPath(name="base", model_path="base")]
    return engine, OpenAIServingModels(engine, paths, lora_modules=modules)  # type: ignore[arg-type]


async def load(models: OpenAIServingModels, name: str) -> Any:
    return await models.load_lora_adapter(LoadLoRAAdapterRequest(lora_name=name, lora_path="/adapters/x"))


async def test_the_name_of_a_preset_is_refused_and_others_load(frontend: Frontend) -> None:
    engine, models = models_of(frontend)
    for name in ("adapter", "calm", "base:loud", "other:calm"):
        assert "Success" in await load(models, name)
    for name in ("base:calm", "adapter:calm"):
        refused = (await load(models, name)).error
        assert (refused.code, refused.param) == (400, "lora_name")
        assert f"'{name}'" in refused.message
        assert "another name" in refused.message
    assert engine.loaded == ["adapter", "calm", "base:loud", "other:calm"]


async def test_at_startup_the_server_does_not_start(frontend: Frontend) -> None:
    engine, models = models_of(frontend, **{"base:calm": "/adapters/x"})
    with pytest.raises(ValueError, match="model name of a preset"):
        await models.init_static_loras()
    assert engine.loaded == []


async def test_an_unarmed_server_has_no_presets() -> None:
    engine, models = models_of(Frontend(None, None))
    await load(models, "base:calm")
    assert engine.loaded == ["base:calm"]


async def test_a_preset_that_comes_later_wins(frontend: Frontend, tmp_path: Path) -> None:
    _, models = models_of(frontend)
    await load(models, "base:late")
    request = SimpleNamespace(model="base:late")
    serving = SimpleNamespace(models=models, engine_client=models.engine_client)
    assert current_note.get() is None
    assert check_model._take_preset(serving, request) == (None, None)
    (tmp_path / "late.preset.json").write_text(json.dumps({"edits": [{"vector": "a"}]}))
    assert check_model._take_preset(serving, request) == ("late", "base:late")
    assert request.model == "base"
