"""Examines a model under the flags that it would be served with: symbols, configuration, memory, and a probe."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from steer_engine.config import EngineLimits
from steer_engine.doctor.diagnosis import Diagnosis
from steer_engine.doctor.shrinking import shrunken
from steer_engine.errors import SteerError

T = TypeVar("T")


class _Stopped(Exception):
    """Nothing more can be found out; the diagnosis says why."""


def examine(argv: Sequence[str], *, probe: bool = True) -> Diagnosis:
    """The diagnosis of what `steer-engine serve` with `argv` would start.

    probe: start a small copy with random weights too; without it, only configurations are read.
    """
    # In this process: the copy's errors come back as they are.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    diagnosis = Diagnosis(model=argv[0] if argv else "")
    try:
        _check_symbols(diagnosis)
        asked = _attempt(diagnosis, lambda: _settings(argv))
        diagnosis.model = asked.model
        vllm_config = _attempt(diagnosis, lambda: _configure(diagnosis, asked))
        if probe and diagnosis.serves:
            _attempt(diagnosis, lambda: _probe(diagnosis, asked, vllm_config))
    except _Stopped:
        pass
    return diagnosis


def _check_symbols(diagnosis: Diagnosis) -> None:
    from steer_engine.runtime.vllm.namespace_guard import hide_kernel_folder

    hide_kernel_folder()

    from steer_engine.runtime.vllm.symbols import all_symbols, vllm_version
    from steer_engine.serving.vllm.symbols import ALL, COMMAND

    symbols = (*all_symbols(), *ALL, *COMMAND)
    diagnosis.vllm, diagnosis.num_symbols = vllm_version(), len(symbols)
    problems = [problem for symbol in symbols if (problem := symbol.problem()) is not None]
    diagnosis.num_different = len(problems)
    diagnosis.against += [f"vLLM {diagnosis.vllm} differs: {problem}" for problem in problems]
    if diagnosis.against:
        raise _Stopped


def _attempt(diagnosis: Diagnosis, step: Callable[[], T]) -> T:
    try:
        return step()
    except SteerError as error:
        diagnosis.against.append(error.message)
    except Exception as error:  # vLLM refuses models and settings by errors of every kind
        diagnosis.against.append(f"vLLM: {type(error).__name__}: {_first_lines(str(error))}")
    raise _Stopped


def _first_lines(text: str) -> str:
    return " ".join(text.split())[:400]


def _settings(argv: Sequence[str]) -> Any:
    from steer_engine.serving.command import parse_serve_flags

    args = parse_serve_flags(argv)
    from steer_engine.runtime.vllm.register import register

    register()
    from steer_engine.runtime.vllm.examining import engine_args

    return engine_args(args)


def _configure(diagnosis: Diagnosis, asked: Any) -> Any:
    from steer_engine.config import SteeringConfig
    from steer_engine.runtime.vllm.examining import configuration, footprint, model_runner
    from steer_engine.runtime.vllm.supported import check_supported, model_shape

    vllm_config = configuration(asked)
    config = SteeringConfig.from_additional_config(vllm_config.additional_config)
    assert config is not None, "the flags of serve arm"
    check_supported(vllm_config)
    shape = model_shape(vllm_config, config)
    diagnosis.architecture = ", ".join(vllm_config.model_config.hf_config.architectures or [])
    diagnosis.hidden_size, diagnosis.num_blocks, diagnosis.dtype = shape.hidden_size, shape.num_blocks, shape.dtype
    diagnosis.armed_blocks, diagnosis.ops = list(shape.armed_blocks), [op.value for op in shape.ops]
    diagnosis.rows = shape.rows
    diagnosis.max_num_seqs = vllm_config.scheduler_config.max_num_seqs
    diagnosis.max_num_batched_tokens = vllm_config.scheduler_config.max_num_batched_tokens
    diagnosis.runner, diagnosis.runner_reason = model_runner(vllm_config)
    device = footprint(vllm_config, config)
    diagnosis.memory = {
        "bank": device.bank,
        "programs": device.programs,
        "routing": device.routing,
        "device": device.total,
        "host_vector": 4 * shape.hidden_size * shape.num_blocks,
        "host_store": EngineLimits.from_environment().store_bytes,
    }
    return vllm_config


def _probe(diagnosis: Diagnosis, asked: Any, vllm_config: Any) -> None:
    from steer_engine.runtime.vllm.examining import start_small
    from steer_engine.runtime.vllm.fused_norm import reason_against

    worker = start_small(asked, shrunken)
    diagnosis.probed_blocks = len(worker["armed_blocks"])
    for block, form in worker["forms"].items():
        diagnosis.forms.setdefault(form, []).append(int(block))
    diagnosis.fused_blocks = len(worker["fused_blocks"])
    diagnosis.kernel = "PyTorch" if worker["kernel"] == "torch" else "Triton"
    wanted = (asked.additional_config or {})["steer_engine"].get("fuse_norm", False)
    if wanted and not worker["fused_blocks"]:
        reason = reason_against(vllm_config) or "there is no Triton here, or no norm takes the stream as it is"
        diagnosis.kernel += f", not fused: {reason}"
    elif worker["fused_blocks"]:
        diagnosis.kernel += ", fused with the norms"
