"""What an engine would be like, asked of vLLM before it is deployed: its configuration, and a small armed copy of it.

Calls `EngineArgs.create_engine_config`, `LLMEngine.from_engine_args`, and reads why vLLM picks a model runner. Known
for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from vllm.engine.arg_utils import EngineArgs
from vllm.triton_utils import HAS_TRITON
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.llm_engine import LLMEngine

from steer_engine.engine.runtime import Footprint, allocate_tables
from steer_engine.errors import SteerError
from steer_engine.settings import CONFIG_KEY, EngineLimits, SteeringConfig
from steer_engine.vllm import engine_client
from steer_engine.vllm.arming import most_rows
from steer_engine.vllm.patching import Symbol
from steer_engine.vllm.supported import model_shape

if TYPE_CHECKING:
    from vllm.config import VllmConfig


USED = (
    Symbol("vllm.engine.arg_utils:EngineArgs.create_engine_config", ("usage_context",)),
    Symbol("vllm.engine.arg_utils:EngineArgs.from_cli_args", ("args",)),
    Symbol("vllm.triton_utils:HAS_TRITON"),
    Symbol("vllm.usage.usage_lib:UsageContext"),
    Symbol("vllm.v1.engine.llm_engine:LLMEngine.from_engine_args", ("engine_args",)),
)

PROBE_SETTINGS: dict[str, Any] = {
    "load_format": "dummy",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 512 * 2**20,
    "speculative_config": None,
    "disable_log_stats": True,
}
"""The copy has random weights and room for nothing but its start; neither changes how a block carries the stream."""


def engine_args(args: argparse.Namespace) -> EngineArgs:
    """vLLM's settings of the engine, from the flags of `serve`. One rank of one replica: all are alike."""
    found = EngineArgs.from_cli_args(args)
    return dataclasses.replace(
        found,
        skip_tokenizer_init=True,
        tensor_parallel_size=1,
        data_parallel_size=1,
        distributed_executor_backend=None,
    )


def configuration(asked: EngineArgs) -> VllmConfig:
    """The whole configuration, with every default that vLLM has here. Nothing is loaded."""
    return asked.create_engine_config(UsageContext.OPENAI_API_SERVER)


def footprint(vllm_config: VllmConfig, config: SteeringConfig) -> Footprint:
    """What the buffers of one rank take, by the call that allocates them."""
    shape = model_shape(vllm_config, config)
    tables = allocate_tables(
        config,
        num_sites=len(shape.armed_blocks),
        hidden_size=shape.hidden_size,
        dtype=vllm_config.model_config.dtype,
        device="meta",
        max_requests=vllm_config.scheduler_config.max_num_seqs,
        max_tokens=most_rows(vllm_config),
        captures=config.capture != (),
    )
    return Footprint.of(tables)


def model_runner(vllm_config: VllmConfig) -> tuple[str, str]:
    """The model runner that vLLM takes on this machine, V1 or V2, and why."""
    name = "V2" if vllm_config.use_v2_model_runner else "V1"
    said = os.environ.get("VLLM_USE_V2_MODEL_RUNNER")
    if said is not None:
        return name, f"VLLM_USE_V2_MODEL_RUNNER={said}"
    if name == "V2":
        return name, "vLLM's default where Triton is usable"
    if not HAS_TRITON:
        return name, "Triton is not usable on this machine"
    unsupported: list[str] = getattr(vllm_config, "_get_v2_model_runner_unsupported_features", list)()
    return name, f"V2 does not support {', '.join(unsupported)}" if unsupported else "vLLM's choice"


def start_small(asked: EngineArgs, shrink: Callable[[Any], Any]) -> dict[str, Any]:
    """Start an armed copy in this process, with random weights and `shrink` applied to its configuration.

    Returns what its worker says of itself. Raises UnsupportedEngineError if it cannot be armed, or vLLM's own errors.
    """
    settings = dict(asked.additional_config or {})
    # A copy has fewer blocks than may be named; whatever is armed, each kind of block is asked.
    settings[CONFIG_KEY] = {**settings.get(CONFIG_KEY, {}), "blocks": "all", "capture": ()}
    overrides = asked.hf_overrides or shrink
    copy = dataclasses.replace(asked, **PROBE_SETTINGS, hf_overrides=overrides, additional_config=settings)
    engine = LLMEngine.from_engine_args(copy, usage_context=UsageContext.LLM_CLASS)
    status = engine_client.check_status([engine_client.call(engine, "status")])
    worker: dict[str, Any] = status["workers"][0]
    return worker


FEW_BLOCKS = 4
"""Blocks of a copy of a large model, unless it needs more to have one of each kind."""

LARGE = 0.5e9
"""Parameters, roughly; a smaller model is probed whole."""

MOST_EXPERTS = 16

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def shrunken(config: Any) -> Any:
    """The Hugging Face configuration `config`, changed in place: fewer blocks and experts where it is large."""
    text = text_config(config)
    if not hasattr(text, "hidden_size") or rough_size(text) < LARGE:
        return config
    num_blocks = text.num_hidden_layers
    few = blocks_to_probe(text)
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == num_blocks:
            setattr(text, name, value[:few])
    text.num_hidden_layers = few
    for name in _EXPERTS:
        if isinstance(found := getattr(text, name, None), int):
            setattr(text, name, min(found, MOST_EXPERTS))
    return config


def blocks_to_probe(text: Any) -> int:
    """How many of the first blocks have one of each kind among them."""
    num_blocks: int = text.num_hidden_layers
    kinds = getattr(text, "layer_types", None) or [None]
    first_of_each = max(kinds.index(kind) for kind in set(kinds)) + 1
    dense_first = (getattr(text, "first_k_dense_replace", None) or 0) + 1
    return int(min(num_blocks, max(FEW_BLOCKS, first_of_each, dense_first)))


def rough_size(text: Any) -> float:
    """Parameters, to a factor of two or so."""
    hidden = float(text.hidden_size)
    experts = max([1, *(getattr(text, name, None) or 1 for name in _EXPERTS)])
    wide = getattr(text, "intermediate_size", None) or 4 * hidden
    if experts > 1:
        wide = experts * (getattr(text, "moe_intermediate_size", None) or wide)
    return float(text.num_hidden_layers * hidden * (3 * wide + 4 * hidden) + 2 * text.vocab_size * hidden)


@dataclass(kw_only=True)
class Diagnosis:
    """Filled in as far as the examination got; it serves if nothing stands against it.

    forms: stream form -> the blocks of the probed copy that have it. memory: bytes, on each rank.
    """

    model: str
    against: list[str] = field(default_factory=list)
    """Why it can't be served steered."""
    vllm: str = ""
    num_symbols: int = 0
    """Symbols of vLLM that Steer Engine touches."""
    num_different: int = 0
    """Those that are not as it knows them."""
    architecture: str = ""
    hidden_size: int = 0
    num_blocks: int = 0
    dtype: str = ""
    armed_blocks: list[int] = field(default_factory=list)
    ops: list[str] = field(default_factory=list)
    rows: int = 0
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    runner: str = ""
    runner_reason: str = ""
    probed_blocks: int = 0
    """0: nothing was loaded."""
    forms: dict[str, list[int]] = field(default_factory=dict)
    kernel: str = ""
    fused_blocks: int = 0
    """Of the probed ones, whose edit happens inside the norm that follows."""
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def serves(self) -> bool:
        return not self.against

    def to_json(self) -> dict[str, Any]:
        return {"serves": self.serves, **asdict(self)}


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
    from steer_engine.vllm.plugin import hide_kernel_folder

    hide_kernel_folder()

    from steer_engine.vllm.symbols import all_symbols, vllm_version

    symbols = all_symbols()
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
    from steer_engine.cli.serve import parse_serve_flags

    args = parse_serve_flags(argv)
    from steer_engine.vllm.plugin import register

    register()

    return engine_args(args)


def _configure(diagnosis: Diagnosis, asked: Any) -> Any:
    from steer_engine.settings import SteeringConfig
    from steer_engine.vllm.supported import check_supported, model_shape

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
    from steer_engine.vllm.fused_norm import reason_not_to_fuse

    worker = start_small(asked, shrunken)
    diagnosis.probed_blocks = len(worker["armed_blocks"])
    for block, form in worker["forms"].items():
        diagnosis.forms.setdefault(form, []).append(int(block))
    diagnosis.fused_blocks = len(worker["fused_blocks"])
    diagnosis.kernel = "PyTorch" if worker["kernel"] == "torch" else "Triton"
    wanted = (asked.additional_config or {})["steer_engine"].get("fuse_norm", False)
    if wanted and not worker["fused_blocks"]:
        reason = reason_not_to_fuse(vllm_config) or "there is no Triton here, or no norm takes the stream as it is"
        diagnosis.kernel += f", not fused: {reason}"
    elif worker["fused_blocks"]:
        diagnosis.kernel += ", fused with the norms"
