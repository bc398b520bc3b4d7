"""The flags of `steer-engine serve`: vLLM's own, and ours, which all begin with `--steering-`.

`arm` turns parsed flags into an armed start: the model, `additional_config`, the environment, defaults of the machine.
Known for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from steer_engine.errors import RegistryError, UnknownVectorError, UnsupportedEngineError
from steer_engine.fields import parse_blocks, shown
from steer_engine.models import resolve_model
from steer_engine.monitor import EXAMPLE, FLAG, parse_monitors
from steer_engine.settings import (
    CONFIG_KEY,
    DEFAULT_PRESET_ENV,
    MIRROR_SECONDS_ENV,
    MIRROR_URL_ENV,
    MONITORS_ENV,
    STRICT_ENV,
    VECTORS_ENV,
    ApiLimits,
    EngineLimits,
    Limits,
    RegistryLimits,
    SteeringConfig,
    mirror_seconds,
)
from steer_engine.site import SITES_IN_BLOCKS
from steer_engine.spec import Op
from steer_engine.vectors.mirror import Mirror
from steer_engine.vectors.registry import Registry

PLUGIN = "steer_engine"

CPU_KV_CACHE_SHARE = 0.25
"""Default share of free memory for the KV cache on a CPU; vLLM's own default is 92 % of all memory."""

_PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)

_REFUSED_FLAGS = {
    "grpc": "--grpc serves without Python plugins",
    "enable_elastic_ep": "--enable-elastic-ep restarts workers, whose banks would be empty",
    "enable_fault_tolerance": "--enable-fault-tolerance restarts workers, whose banks would be empty",
}

REPEATED = ("steering_limit", "steering_monitor")
"""Our flags that may be given several times, as names of parsed flags."""

logger = logging.getLogger(__name__)


def add_flags(parser: Any) -> None:
    """The flags of Steer Engine; every one but `--verbose` begins with `--steering-`."""
    add = parser.add_argument
    add("--steering-vectors", type=Path, metavar="DIR", help="Folder of control vectors (safetensors or GGUF); the "
        f"file stem is the name. Default: {VECTORS_ENV}, else a folder in the user's data directory.")  # fmt: skip
    add("--steering-mirror", metavar="URL", help="Copy the vectors and presets at this URL, any that fsspec reads "
        "(s3://, gs://, hf://, https://, file://), into the folder at startup, and keep it in sync.")  # fmt: skip
    add("--steering-mirror-seconds", type=float, metavar="N", help="Mirror polling interval in seconds. Default: 60.")
    add("--steering-blocks", metavar="BLOCKS", help="Blocks that can be steered, such as 8-22. Default: all.")
    add("--steering-sites", metavar="SITES", help="Where edits, probes and captures may apply besides the outputs "
        "of the blocks: attn,mlp, the outputs of attention and MLP before they are added to the stream. Default: "
        "nowhere else.")  # fmt: skip
    add("--steering-ops", metavar="OPS", help=f"Operations that requests may use, of {','.join(Op)}. Default: all.")
    add("--steering-rows", type=int, metavar="N", help="Bank rows that one request may need per block. Default: 4.")
    add("--steering-bank-rows", type=int, metavar="N", help="Total bank rows, one per vector and block in use. "
        "Default: enough for all requests at once. With fewer, requests wait for rows.")  # fmt: skip
    add("--steering-capture", metavar="BLOCKS", help="Blocks whose residual stream requests may capture, such as 8-22, "
        "or all. Answers return the rows. Default: none.")  # fmt: skip
    add("--steering-fuse-norm", action="store_true", help="Edit inside the add-and-norm that follows a block, on GPUs: "
        "one launch less per block. That norm rounds once less than vLLM's, so unsteered output is no longer "
        "bit-identical to plain vLLM's.")  # fmt: skip
    add("--steering-limit", action="append", default=[], metavar="NAME=N", help="Set a limit that GET /v1/steering "
        "publishes, such as max_edits=4; may be given several times.")  # fmt: skip
    add("--steering-default", metavar="PRESET", help="Preset for requests that do not mention steering.")
    add("--steering-monitor", action="append", default=[], metavar="NAME[=VECTOR:BLOCKS:MEASURE:above=N]",
        help="Watch a vector on all traffic: /metrics has the distribution of its number over the generated tokens, "
        f"and how many are above N. Such as {EXAMPLE}; NAME alone is a vector with a trained probe. Changes no "
        "answer. May be given several times, for 8 numbers per token (max_monitors).")  # fmt: skip
    add("--steering-strict", action="store_true", help="Refuse to start if a file of the folder is unusable.")
    add("--verbose", action="store_true", help="Show every line that vLLM and its dependencies log. Default: warnings, "
        "errors, and what concerns requests.")  # fmt: skip


def refuse_unknown_flags(argv: Sequence[str]) -> None:
    """Raise UnsupportedEngineError for a misspelt or abbreviated flag of ours."""
    own = argparse.ArgumentParser(add_help=False)
    add_flags(own)
    known = {name for name in own._option_string_actions if name.startswith("--steering")}
    for word in argv:
        name = word.partition("=")[0].replace("_", "-")
        if name.startswith("--steering") and name not in known:
            raise UnsupportedEngineError(f"unknown flag {name}; valid flags: {', '.join(sorted(known))}.")


def own_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Our flags among those of `serve`, without vLLM's parser, which takes seconds to import."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_flags(parser)
    named = [word.partition("=") for word in argv]
    spelt = [name.replace("_", "-") + sign + value if name.startswith("--") else name + sign + value
             for name, sign, value in named]  # fmt: skip
    return parser.parse_known_args(spelt)[0]


class RepeatedFlags(logging.Filter):
    """Drops our flags from vLLM's warning about flags that are given twice: these may be."""

    FORMAT = "Found duplicate keys %s"

    def filter(self, record: logging.LogRecord) -> bool:
        if record.msg != self.FORMAT or not isinstance(record.args, tuple):
            return True
        names = str(record.args[0]).split(", ")
        kept = [name for name in names if name.removeprefix("--").replace("-", "_") not in REPEATED]
        record.args = (", ".join(kept),)
        return bool(kept)


@contextmanager
def repeated_flags() -> Iterator[None]:
    """While vLLM parses a command line: no warning about our flags that may be given several times."""
    parsing, dropping = logging.getLogger("vllm.utils.argparse_utils"), RepeatedFlags()
    parsing.addFilter(dropping)
    try:
        yield
    finally:
        parsing.removeFilter(dropping)


def name_plugins() -> None:
    """Name every plugin in VLLM_PLUGINS: vLLM loads endpoint plugins by name only, and then general plugins as well.

    Must run before vLLM is imported, which picks its platform by plugin.
    """
    given = os.environ.get("VLLM_PLUGINS")
    if given is not None:
        names = [name for name in given.split(",") if name]
    else:
        names = [entry.name for group in _PLUGIN_GROUPS for entry in entry_points(group=group)]
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*names, PLUGIN]))


def arm(args: argparse.Namespace) -> None:
    """Turn parsed flags into an armed start: model, `additional_config`, environment, defaults of the machine.

    Raises:
        SteerError: the flags describe something that cannot be served steered.
    """
    _refuse_unsteerable(args)
    _resolve_model(args)
    additional = dict(args.additional_config or {})
    settings = {**additional.get(CONFIG_KEY, {}), **_settings(args)}
    # Validated here, so that a typo gives one line and not a traceback from the engine.
    config = SteeringConfig.from_additional_config({CONFIG_KEY: settings})
    assert config is not None
    args.additional_config = additional | config.to_additional_config()
    os.environ[VECTORS_ENV] = str(vectors_folder(args.steering_vectors))
    _set_limits(args.steering_limit)
    if args.steering_default is not None:
        os.environ[DEFAULT_PRESET_ENV] = args.steering_default
    _copy_mirror(args)
    if args.steering_strict:
        os.environ[STRICT_ENV] = "1"
        Registry(os.environ[VECTORS_ENV], strict=True)
    _set_monitors(args.steering_monitor)
    _cpu_defaults(args)


def _set_monitors(texts: Sequence[str]) -> None:
    """Set the monitors through the environment, which every process inherits. Their vectors must be registered.

    Without a flag the environment's own count.
    """
    texts = texts or os.environ.get(MONITORS_ENV, "").split()
    specs = parse_monitors(texts, EngineLimits.from_environment())
    registry = Registry(os.environ[VECTORS_ENV]) if specs else None
    for spec in specs:
        try:
            assert registry is not None
            registry.get(spec.vector)
        except UnknownVectorError as error:
            raise UnsupportedEngineError(f"{FLAG} {spec.text}: {error.message}") from None
    os.environ[MONITORS_ENV] = " ".join(texts)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    if args.steering_blocks is not None:
        try:
            parse_blocks(args.steering_blocks)
        except ValueError as error:
            raise UnsupportedEngineError(f"--steering-blocks: {error}") from None
    settings: dict[str, Any] = {
        "blocks": args.steering_blocks,
        "sites": parse_sites(args.steering_sites) if args.steering_sites is not None else None,
        "ops": args.steering_ops.split(",") if args.steering_ops else None,
        "rows": args.steering_rows,
        "bank_rows": args.steering_bank_rows,
        "fuse_norm": args.steering_fuse_norm or None,
        "capture": (args.steering_blocks or "all") if args.steering_capture == "all" else args.steering_capture,
    }
    return {key: value for key, value in settings.items() if value is not None}


def parse_sites(text: str) -> list[str]:
    """The sites of `--steering-sites`. Raises UnsupportedEngineError for an unknown one."""
    names = text.split(",")
    if unknown := [name for name in names if name not in SITES_IN_BLOCKS]:
        raise UnsupportedEngineError(
            f"--steering-sites: {shown(unknown[0])} is not a site; valid: {', '.join(SITES_IN_BLOCKS)}. The outputs of "
            "the blocks are always armed."
        )
    return names


def _set_limits(given: Sequence[str]) -> None:
    """Set limits through the environment, which every process inherits."""
    groups = (Limits, RegistryLimits, ApiLimits, EngineLimits)
    for each in given:
        name, _, value = each.partition("=")
        group = next((group for group in groups if name in group.model_fields), None)
        if group is None:
            known = ", ".join(name for group in groups for name in group.model_fields)
            raise UnsupportedEngineError(f"--steering-limit {each}: unknown limit {name!r}; valid limits: {known}.")
        os.environ[group.variable(name)] = value
    for group in groups:
        group.from_environment()


def _refuse_unsteerable(args: argparse.Namespace) -> None:
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0").strip().lower() in ("1", "true"):
        raise UnsupportedEngineError("VLLM_USE_RUST_FRONTEND=1 serves without Python plugins; unset it.")
    for name, reason in _REFUSED_FLAGS.items():
        if getattr(args, name, False):
            raise UnsupportedEngineError(f"{reason}, so requests could run unsteered; leave it out.")


def _resolve_model(args: argparse.Namespace) -> None:
    """Replace the name of a packaged model by its folder, and serve it under that name."""
    requested = getattr(args, "model_tag", None) or args.model
    resolved = str(resolve_model(requested))
    if resolved != requested and args.served_model_name is None:
        args.served_model_name = [requested]
    args.model_tag = args.model = resolved


def vectors_folder(requested: Path | None) -> Path:
    """The folder of `--steering-vectors`, or its default, which is made."""
    import platformdirs

    given = requested or os.environ.get(VECTORS_ENV)
    if given:
        folder = Path(given).expanduser().resolve()
        if not folder.is_dir():
            raise UnsupportedEngineError(
                f"--steering-vectors {folder} is not a folder. Make it, or name the folder of your control vectors."
            )
        if not os.access(folder, os.R_OK | os.X_OK):
            raise UnsupportedEngineError(f"--steering-vectors {folder} cannot be read; change its permissions.")
        return folder
    try:
        folder = Path(platformdirs.user_data_dir("steer-engine"), "vectors")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # the second: the user has no home
        raise UnsupportedEngineError(
            f"The default folder for vectors cannot be made ({error}). Name a folder: --steering-vectors DIR, or "
            f"{VECTORS_ENV}."
        ) from None
    return folder


def _copy_mirror(args: argparse.Namespace) -> None:
    """Copy the mirror before anything reads the folder. The API processes keep it in sync."""
    if args.steering_mirror_seconds is not None:
        os.environ[MIRROR_SECONDS_ENV] = str(args.steering_mirror_seconds)
    mirror_seconds()  # raises for a bad number
    if url := args.steering_mirror or os.environ.get(MIRROR_URL_ENV):
        copy_mirror(url, Path(os.environ[VECTORS_ENV]))
        os.environ[MIRROR_URL_ENV] = url


def copy_mirror(url: str, folder: Path) -> None:
    """Copy `url` into `folder`. An unreachable URL is not an error if an earlier copy exists.

    Raises:
        SteerError: the URL cannot be read, and there is no earlier copy.
    """
    mirror = Mirror(url, folder)
    try:
        mirror.sync()
    except RegistryError as error:
        if not mirror.has_copies:
            raise
        logger.error("%s Serving the earlier copy.", error.message)


def _cpu_defaults(args: argparse.Namespace) -> None:
    """On a CPU, give the KV cache a share of the free memory, unless its size is specified."""
    from vllm.engine.arg_utils import EngineArgs

    if args.kv_cache_memory_bytes is None and args.gpu_memory_utilization == EngineArgs.gpu_memory_utilization:
        args.kv_cache_memory_bytes = cpu_kv_cache_bytes(args.tensor_parallel_size * args.pipeline_parallel_size)


def cpu_kv_cache_bytes(num_workers: int) -> int | None:
    """Default size of each worker's KV cache on a CPU: together a share of the free memory of the smallest NUMA node
    or container. None: vLLM decides, as the environment says.

    vLLM's own default is a share of all memory, and it does not start if other programs use more than the rest.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return None
    from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node

    free = min(get_memory_node_info(node).available_memory for node in get_visible_memory_node())
    size = int(free * CPU_KV_CACHE_SHARE) // num_workers
    logger.info("KV cache: %.1f GiB per worker, together a quarter of the free memory", size / 2**30)
    return size
