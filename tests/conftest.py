"""Fixtures that every test folder may use: the real small model, and tiny random ones."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from helpers.tiny_models import tiny_llama_path
from hypothesis import settings

from steer_engine.errors import ModelError
from steer_engine.models import PACKAGED, get_model, resolve_model

# Before anything reads them: no test looks for a model on a hub, and nothing reports usage.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

# How long an example takes says how busy the machine is.
settings.register_profile("steer-engine", deadline=None)
settings.load_profile("steer-engine")


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Path of the real 135M model (30 blocks, D = 576, bfloat16), converted on first use."""
    return resolve_model("smollm2-135m")


@pytest.fixture(scope="session")
def gemma3() -> str:
    """Path of the real Gemma 3 270M (18 blocks, D = 640), where it is installed and its terms are accepted."""
    model = PACKAGED["gemma3-270m"]
    try:
        distribution(model.distribution)
    except PackageNotFoundError:
        pytest.skip("gemma3-270m is not installed: scripts/install_model.sh gemma3-270m")
    try:
        return str(get_model(model))
    except ModelError as error:
        pytest.skip(error.message)


@pytest.fixture(scope="session")
def tiny_models_dir(pytestconfig: pytest.Config) -> Path:
    """Where tiny checkpoints are kept between runs; pass it to `tiny_models.tiny_llama_path` for other shapes."""
    return pytestconfig.cache.mkdir("tiny_models")


@pytest.fixture(scope="session")
def tiny_llama(tiny_models_dir: Path) -> str:
    """Path of a random Llama: 3 blocks, D = 64, vocabulary 512, float32."""
    return str(tiny_llama_path(tiny_models_dir))
