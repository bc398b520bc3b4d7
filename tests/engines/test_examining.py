"""What is planned of an engine before it starts is what it is."""

from __future__ import annotations

from helpers.engines import RUNNER

from steer_engine import LLM
from steer_engine.settings import SteeringConfig
from steer_engine.vllm.examination import footprint, model_runner


def test_the_footprint_is_what_the_engine_allocated(tiny: LLM) -> None:
    vllm_config = tiny.llm_engine.vllm_config
    config = SteeringConfig.from_additional_config(vllm_config.additional_config)
    assert config is not None
    planned = footprint(vllm_config, config)
    worker = tiny.steering_status()["workers"][0]
    assert planned.total == worker["table_bytes"]
    assert planned.bank == worker["bank_rows"] * 64 * 4
    assert planned.capture > planned.routing > 0


def test_the_runner_is_the_one_that_runs(tiny: LLM) -> None:
    name, why = model_runner(tiny.llm_engine.vllm_config)
    assert name.lower() == RUNNER
    assert why == {"v1": "Triton is not usable on this machine", "v2": "VLLM_USE_V2_MODEL_RUNNER=1"}[RUNNER]
