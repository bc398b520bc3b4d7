"""Commands that capture texts share their engine options."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from steer_engine.cli.condition import fit
from steer_engine.cli.derive import derive_command, dump_command
from steer_engine.cli.engine_options import CaptureOptions, EngineChoice, ModelOption, captures, starts_engine
from steer_engine.cli.evaluate import calibrate_command, eval_command, paper_command, search_command
from steer_engine.cli.pairs import answers

GIVEN = [
    "--chat", "--dtype", "float32", "--actors", "3", "--ray-address", "auto", "--gpus-per-actor", "0.5",
    "--tensor-parallel-size", "2", "--max-model-len", "64", "--gpu-memory-utilization", "0.25",
]  # fmt: skip


def test_all_options_reach_the_arguments_of_the_function() -> None:
    found: list[dict[str, Any]] = []
    app = typer.Typer()

    @app.command()
    @captures
    def command(model: ModelOption, *, capture: CaptureOptions, force: bool = False) -> None:
        found.append({"model": model, "force": force, **capture.arguments})

    done = CliRunner().invoke(app, ["--model", "m", *GIVEN, "--force"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert CliRunner().invoke(app, ["--model", "m"]).exit_code == 0
    assert found == [
        {
            "model": "m", "force": True, "chat": True, "dtype": "float32", "actors": 3, "ray_address": "auto",
            "gpus_per_actor": 0.5,
            "engine_args": {
                "dtype": "float32", "tensor_parallel_size": 2, "max_model_len": 64, "gpu_memory_utilization": 0.25
            },
        },
        {
            "model": "m", "force": False, "chat": False, "dtype": "auto", "actors": 1, "ray_address": None,
            "gpus_per_actor": None, "engine_args": {"dtype": "auto", "tensor_parallel_size": 1},
        },
    ]  # fmt: skip


@pytest.mark.parametrize("command", [fit, derive_command, dump_command])
def test_commands_that_capture_have_the_options(command: Any) -> None:
    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    for option in GIVEN:
        assert not option.startswith("--") or option in done.output


@pytest.mark.parametrize("command", [eval_command, search_command, calibrate_command, paper_command, answers])
def test_commands_that_start_one_engine_have_the_same_options(command: Any) -> None:
    names = [name for name in inspect.signature(command).parameters if name in EngineChoice.__dataclass_fields__]
    assert names == list(EngineChoice.__dataclass_fields__)


def test_the_options_of_one_engine_reach_the_engine() -> None:
    found: list[dict[str, Any]] = []
    app = typer.Typer()

    @app.command()
    @starts_engine
    def command(model: ModelOption, *, engine: EngineChoice) -> None:
        found.append({"model": model, **engine.engine_args})

    one = ["--dtype", "float32", "--tensor-parallel-size", "2", "--max-model-len", "64"]
    for given in (one, []):
        assert CliRunner().invoke(app, ["--model", "m", *given], catch_exceptions=False).exit_code == 0
    assert found == [
        {"model": "m", "dtype": "float32", "tensor_parallel_size": 2, "max_model_len": 64},
        {"model": "m", "dtype": "auto", "tensor_parallel_size": 1},
    ]
    assert CliRunner().invoke(app, ["--model", "m", "--max-model-len", "1"]).exit_code == 2
