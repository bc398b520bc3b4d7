"""A part of a model alone: which blocks it has, and how the probe detects where they carry the stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.engines import SETTINGS
from helpers.tiny_models import tiny_llama_path
from vllm.config import set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model
from vllm.sequence import IntermediateTensors

from steer_engine import LLM
from steer_engine.engine.stream import StreamForm
from steer_engine.errors import UnsupportedEngineError
from steer_engine.settings import SteeringConfig
from steer_engine.vllm.arming import arm, runtime_of
from steer_engine.vllm.blocks import Stage, find_blocks, summed_stream

pytestmark = pytest.mark.v1_only  # loading a model is the same for both runners

BLOCKS = 5
CPU = torch.device("cpu")

Load = Callable[..., Any]


@pytest.fixture
def load(tiny_models_dir: Any, tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Loads the part of a model that one stage has, as vLLM's loader does; its groups are those of `tiny`."""
    path = str(tiny_llama_path(tiny_models_dir, num_blocks=BLOCKS))

    def runner(rank: int, size: int, **steering: Any) -> Any:
        additional = SteeringConfig(**steering).to_additional_config()
        arguments = EngineArgs(
            model=path, dtype="float32", enforce_eager=True, additional_config=additional, **SETTINGS
        )
        config = arguments.create_engine_config()
        group = SimpleNamespace(
            rank_in_group=rank, world_size=size, is_first_rank=rank == 0, is_last_rank=rank == size - 1
        )
        monkeypatch.setattr(parallel_state, "_PP", group)
        with set_current_vllm_config(config):
            model = get_model(vllm_config=config)
        return SimpleNamespace(vllm_config=config, model=model, device=CPU)

    yield runner
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("rank", "size", "blocks"), [(0, 2, (0, 1, 2)), (1, 2, (3, 4)), (0, 1, (0, 1, 2, 3, 4))], ids=str
)
def test_a_stage_arms_the_blocks_that_it_has(load: Load, rank: int, size: int, blocks: tuple[int, ...]) -> None:
    runner = load(rank, size)
    assert Stage.of(find_blocks(runner.model, BLOCKS)).blocks == blocks
    arm(runner)
    runtime = runtime_of(runner)
    assert runtime is not None
    assert runtime.armed_blocks == runtime.stage_blocks == blocks
    assert runtime.requested_blocks == tuple(range(BLOCKS))
    assert runtime.forms == dict.fromkeys(blocks, StreamForm.SPLIT)
    assert runtime.tables.entries_SLEW.shape[1] == len(blocks), "tables for the blocks that are here"


def test_only_requested_blocks_are_armed_and_a_stage_may_have_none(load: Load) -> None:
    for rank, armed in ((0, (2,)), (1, ())):
        runner = load(rank, 2, blocks=(2,))
        arm(runner)
        runtime = runtime_of(runner)
        assert runtime is not None
        assert runtime.armed_blocks == armed
        assert runtime.requested_blocks == (2,)


def test_the_block_that_ends_a_stage_needs_another_of_its_class(load: Load) -> None:
    """How the next stage combines the two parts is not visible, so an earlier block of the same class is probed."""
    runner = load(0, BLOCKS)
    with pytest.raises(UnsupportedEngineError, match="ends a stage"):
        arm(runner)
    arm(load(BLOCKS - 1, BLOCKS))  # followed by the norm


def test_the_stream_passed_to_the_next_stage_is_the_sum() -> None:
    hidden, residual = torch.ones(2, 4), torch.full((2, 4), 3.0)
    assert (
        summed_stream(IntermediateTensors({"hidden_states": hidden, "residual": residual})).tolist() == [[4.0] * 4] * 2
    )
    assert summed_stream(IntermediateTensors({"hidden_states": hidden})).tolist() == [[1.0] * 4] * 2
    assert summed_stream((hidden, [])) is hidden
    with pytest.raises(UnsupportedEngineError, match="deepstack"):
        summed_stream(IntermediateTensors({"hidden_states": hidden, "deepstack_input_embeds_0": hidden}))
