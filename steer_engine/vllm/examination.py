"""Examines whether a model can be served steered: its configuration, and a small armed copy.

The copy of a small model on disk has the model's own weights, any other copy random ones.

Wraps nothing. Calls `EngineArgs.create_engine_config` and `LLMEngine.from_engine_args`, and reports why vLLM chooses a
model runner. Known for vLLM 0.32 and 0.33. Importing this module imports vLLM, so call `name_plugins` and
`hide_kernel_folder` first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vllm.engine.arg_utils import EngineArgs
from vllm.triton_utils import HAS_TRITON
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.llm_engine import LLMEngine

from steer_engine.engine.runtime import Footprint, allocate_tables
from steer_engine.errors import SteerError
from steer_engine.settings import CONFIG_KEY, EngineLimits, SteeringConfig
from steer_engine.site import all_points
from steer_engine.vllm import engine_client, launch, symbols
from steer_engine.vllm.arming import most_rows, num_drafts
from steer_engine.vllm.fused_norm import reason_not_to_fuse
from steer_engine.vllm.patching import Symbol
from steer_engine.vllm.plugin import hide_kernel_folder, register
from steer_engine.vllm.supported import PROMPT_LOGPROBS, check_supported, model_shape, refuses_prompt_logprobs

if TYPE_CHECKING:
    from vllm.config import VllmConfig

USED = (
    Symbol("vllm.engine.arg_utils:EngineArgs.create_engine_config", ("usage_context",)),
    Symbol("vllm.engine.arg_utils:EngineArgs.from_cli_args", ("args",)),
    Symbol("vllm.triton_utils:HAS_TRITON"),
    Symbol("vllm.usage.usage_lib:UsageContext"),
    Symbol("vllm.v1.engine.llm_engine:LLMEngine.from_engine_args", ("engine_args",)),
)

T = TypeVar("T")

MAX_REASON_CHARS = 400

COPY_ARGS: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 512 * 2**20,
    "speculative_config": None,
    "disable_log_stats": True,
}
"""Engine arguments of the copy: little memory, which does not change how a block carries the stream."""

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt")

FEW_BLOCKS = 4
"""Blocks of the copy of a large model, unless it needs more to have one of each kind."""

LARGE = 0.5e9
"""Approximate number of parameters from which the copy is smaller than the model, with random weights."""

MAX_EXPERTS = 16

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(kw_only=True)
class Diagnosis:
    """The result of an examination, as far as it got.

    forms: stream form -> blocks of the copy that have it. memory: bytes per rank.
    """

    model: str
    against: list[str] = field(default_factory=list)
    """Reasons why the model cannot be served steered."""
    vllm: str = ""
    num_symbols: int = 0
    """vLLM symbols that Steer Engine wraps or uses."""
    num_different: int = 0
    """How many of them are missing or have another signature than expected."""
    architecture: str = ""
    hidden_size: int = 0
    num_blocks: int = 0
    dtype: str = ""
    armed_blocks: list[int] = field(default_factory=list)
    sites: list[str] = field(default_factory=list)
    """Where edits may apply besides the outputs of the armed blocks."""
    site_modules: dict[str, list[str]] = field(default_factory=dict)
    """By site, the modules of the copy whose outputs are edited."""
    tensor_parallel_size: int = 1
    """Of the server. The copy is one rank, so it does not show whether each rank has the whole output of a module."""
    ops: list[str] = field(default_factory=list)
    rows: int = 0
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    runner: str = ""
    runner_reason: str = ""
    probed_blocks: int = 0
    """Blocks of the copy; 0 if none was started."""
    weights: str = ""
    """Weights of the copy: "real" or "random"; empty if none was started."""
    forms: dict[str, list[int]] = field(default_factory=dict)
    kernel: str = ""
    fused_blocks: int = 0
    """Blocks of the copy that are edited inside the norm that follows them."""
    memory: dict[str, int] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    """Requests without steering that an armed engine of this configuration refuses."""

    @property
    def serves(self) -> bool:
        return not self.against

    def to_json(self) -> dict[str, Any]:
        return {"serves": self.serves, **asdict(self)}


class _Stopped(Exception):
    """The examination cannot continue; the diagnosis has the reason."""


def examine(argv: Sequence[str], *, probe: bool = True) -> Diagnosis:
    """Examine what `steer-engine serve` with `argv` would start.

    probe: also start a small copy. Without it, only configurations are loaded.
    """
    # The copy runs in this process, so that its errors arrive unchanged.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    diagnosis = Diagnosis(model=argv[0] if argv else "")
    try:
        _check_symbols(diagnosis)
        requested = _attempt(diagnosis, lambda: _engine_args(argv))
        diagnosis.model, diagnosis.tensor_parallel_size = requested.model, requested.tensor_parallel_size
        args = _one_rank(requested)
        vllm_config = _attempt(diagnosis, lambda: _examine_configuration(diagnosis, args))
        if probe:
            _attempt(diagnosis, lambda: _examine_copy(diagnosis, args, vllm_config))
    except _Stopped:
        pass
    return diagnosis


def all_symbols() -> tuple[Symbol, ...]:
    """Every vLLM symbol that Steer Engine wraps or uses, including those of the commands `serve`, `batch`, `doctor`."""
    return (*symbols.engine_symbols(), *symbols.api_symbols(), *launch.USED, *USED)


def _check_symbols(diagnosis: Diagnosis) -> None:
    hide_kernel_folder()
    checked = all_symbols()
    diagnosis.vllm, diagnosis.num_symbols = symbols.vllm_version(), len(checked)
    problems = [problem for symbol in checked if (problem := symbol.problem()) is not None]
    diagnosis.num_different = len(problems)
    diagnosis.against += [f"vLLM {diagnosis.vllm} differs: {problem}" for problem in problems]
    if diagnosis.against:
        raise _Stopped


def _attempt(diagnosis: Diagnosis, step: Callable[[], T]) -> T:
    """The result of `step`. An error becomes a reason against the model, and stops the examination."""
    try:
        return step()
    except SteerError as error:
        diagnosis.against.append(error.message)
    except Exception as error:  # vLLM refuses models and settings with errors of every kind
        message = " ".join(str(error).split())[:MAX_REASON_CHARS]
        diagnosis.against.append(f"vLLM: {type(error).__name__}: {message}")
    raise _Stopped


def _engine_args(argv: Sequence[str]) -> EngineArgs:
    """vLLM's engine arguments from the flags of `serve`."""
    flags = launch.parse_serve_flags(argv)
    register()
    return EngineArgs.from_cli_args(flags)


def _one_rank(args: EngineArgs) -> EngineArgs:
    """The arguments for one rank of one replica: all ranks are equal."""
    return replace(
        args,
        skip_tokenizer_init=True,
        tensor_parallel_size=1,
        data_parallel_size=1,
        distributed_executor_backend=None,
    )


def _examine_configuration(diagnosis: Diagnosis, args: EngineArgs) -> VllmConfig:
    """Record what the configuration says, with vLLM's defaults on this machine. Loads no weights."""
    vllm_config = args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    config = SteeringConfig.from_additional_config(vllm_config.additional_config)
    assert config is not None, "the flags of serve arm"
    check_supported(vllm_config)
    shape = model_shape(vllm_config, config)
    diagnosis.architecture = ", ".join(vllm_config.model_config.hf_config.architectures or [])
    diagnosis.hidden_size, diagnosis.num_blocks, diagnosis.dtype = shape.hidden_size, shape.num_blocks, shape.dtype
    diagnosis.armed_blocks, diagnosis.ops = list(shape.armed_blocks), [op.value for op in shape.ops]
    diagnosis.rows, diagnosis.sites = shape.rows, [site.value for site in shape.sites]
    diagnosis.max_num_seqs = vllm_config.scheduler_config.max_num_seqs
    diagnosis.max_num_batched_tokens = vllm_config.scheduler_config.max_num_batched_tokens
    diagnosis.runner, diagnosis.runner_reason = model_runner(vllm_config)
    diagnosis.refused = [PROMPT_LOGPROBS] if refuses_prompt_logprobs(vllm_config) else []
    device = footprint(vllm_config, config)
    diagnosis.memory = {
        "bank": device.bank,
        "programs": device.programs,
        "routing": device.routing,
        "probes": device.probes,
        "device": device.total,
        "host_vector": 4 * shape.hidden_size * shape.num_blocks,
        "host_store": EngineLimits.from_environment().store_bytes,
    }
    return vllm_config


def footprint(vllm_config: VllmConfig, config: SteeringConfig) -> Footprint:
    """Bytes of the buffers of one rank. The call that allocates them in an engine runs here on the device `meta`."""
    shape = model_shape(vllm_config, config)
    points = config.armed_points(shape.num_blocks)
    tables = allocate_tables(
        config,
        num_sites=shape.num_points,
        hidden_size=shape.hidden_size,
        dtype=vllm_config.model_config.dtype,
        device="meta",
        max_requests=vllm_config.scheduler_config.max_num_seqs,
        max_tokens=most_rows(vllm_config),
        num_drafts=num_drafts(vllm_config),
        capture_sites=[points.index(point) for point in all_points(shape.capture_blocks, shape.sites)],
    )
    return Footprint.of(tables)


def model_runner(vllm_config: VllmConfig) -> tuple[str, str]:
    """The model runner that vLLM uses on this machine, V1 or V2, and the reason."""
    name = "V2" if vllm_config.use_v2_model_runner else "V1"
    override = os.environ.get("VLLM_USE_V2_MODEL_RUNNER")
    if override is not None:
        return name, f"VLLM_USE_V2_MODEL_RUNNER={override}"
    if name == "V2":
        return name, "vLLM's default where Triton is usable"
    if not HAS_TRITON:
        return name, "Triton is not usable on this machine"
    unsupported: list[str] = getattr(vllm_config, "_get_v2_model_runner_unsupported_features", list)()
    return name, f"V2 does not support {', '.join(unsupported)}" if unsupported else "vLLM's choice"


def _examine_copy(diagnosis: Diagnosis, args: EngineArgs, vllm_config: VllmConfig) -> None:
    """Start a small armed copy and record the stream forms of its blocks, and its kernel."""
    real = args.load_format != "dummy" and has_small_weights(args.model, vllm_config.model_config.hf_text_config)
    diagnosis.weights = "real" if real else "random"
    worker = _start_copy(args if real else replace(args, load_format="dummy"))
    diagnosis.probed_blocks = len(worker["armed_blocks"])
    diagnosis.site_modules = worker["site_modules"]
    for block, form in worker["forms"].items():
        diagnosis.forms.setdefault(form, []).append(int(block))
    diagnosis.fused_blocks = len(worker["fused_blocks"])
    diagnosis.kernel = "PyTorch" if worker["kernel"] == "torch" else "Triton"
    requested = (args.additional_config or {})[CONFIG_KEY].get("fuse_norm", False)
    if requested and not worker["fused_blocks"]:
        reason = reason_not_to_fuse(vllm_config) or "Triton is not usable here, or no norm takes the stream unchanged"
        diagnosis.kernel += f", not fused: {reason}"
    elif worker["fused_blocks"]:
        diagnosis.kernel += ", fused with the norms"


def _start_copy(args: EngineArgs) -> dict[str, Any]:
    """Start the copy in this process. Returns the status of its worker.

    Raises:
        UnsupportedEngineError: it cannot be armed. vLLM's own errors pass through.
    """
    settings = dict(args.additional_config or {})
    # The copy has fewer blocks than the flags may name, so all are armed: every kind of block is probed.
    own = settings.get(CONFIG_KEY, {})
    settings[CONFIG_KEY] = {**own, "blocks": "all", "capture": ()}
    if own.get("blocks", "all") != "all":
        # The flags may leave out just those blocks that lack a site.
        settings[CONFIG_KEY]["sites"] = ()
    copy = replace(args, **COPY_ARGS, hf_overrides=args.hf_overrides or shrunken, additional_config=settings)
    engine = LLMEngine.from_engine_args(copy, usage_context=UsageContext.LLM_CLASS)
    status = engine_client.check_status([engine_client.call(engine, "status")])
    worker: dict[str, Any] = status["workers"][0]
    return worker


def has_small_weights(model: str, text: Any) -> bool:
    """Whether `model` is a folder with the weights of a model that is not too large to load for an examination.

    text: its Hugging Face configuration.
    """
    files = (path for pattern in WEIGHT_FILES for path in Path(model).glob(pattern))
    return rough_size(text) < LARGE and any(files)


def shrunken(config: Any) -> Any:
    """The Hugging Face configuration `config`, changed in place: fewer blocks and experts if the model is large."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
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
            setattr(text, name, min(found, MAX_EXPERTS))
    return config


def blocks_to_probe(text: Any) -> int:
    """How many blocks, counted from the first, contain one of each kind."""
    num_blocks: int = text.num_hidden_layers
    kinds = getattr(text, "layer_types", None) or [None]
    first_of_each = max(kinds.index(kind) for kind in set(kinds)) + 1
    dense_first = (getattr(text, "first_k_dense_replace", None) or 0) + 1
    return int(min(num_blocks, max(FEW_BLOCKS, first_of_each, dense_first)))


def rough_size(text: Any) -> float:
    """Number of parameters, within a factor of about two."""
    hidden = float(text.hidden_size)
    experts = max([1, *(getattr(text, name, None) or 1 for name in _EXPERTS)])
    wide = getattr(text, "intermediate_size", None) or 4 * hidden
    if experts > 1:
        wide = experts * (getattr(text, "moe_intermediate_size", None) or wide)
    return float(text.num_hidden_layers * hidden * (3 * wide + 4 * hidden) + 2 * text.vocab_size * hidden)
