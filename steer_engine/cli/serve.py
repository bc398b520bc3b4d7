"""`steer-engine serve MODEL [any vllm flag] [--steering-...]`: vLLM's own server, armed."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from steer_engine.api import background
from steer_engine.errors import UnsupportedEngineError
from steer_engine.settings import CONFIG_KEY, ApiLimits, EngineLimits, Limits, RegistryLimits, SteeringConfig
from steer_engine.spec import Op, parse_blocks

PLUGIN = "steer_engine"
VECTORS_ENV = "STEER_ENGINE_VECTORS"
STRICT_ENV = "STEER_ENGINE_STRICT"
DEFAULT_PRESET_ENV = "STEER_ENGINE_DEFAULT_PRESET"

SHUTDOWN_TIMEOUT_S = 30
"""vLLM's own default of 0 leaves clients in flight hanging on SIGTERM."""

CPU_KV_CACHE_SHARE = 0.25
"""Share of the free memory that the KV cache takes on a CPU if nothing is said; vLLM's own default is 92 % of all."""

MIN_MIRROR_SECONDS = 1.0

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

logger = logging.getLogger(__name__)


def serve(argv: Sequence[str]) -> int:
    """Run the server until it is stopped; `argv` is everything after `steer-engine serve`. Returns the exit status.

    Raises:
        SteerError: what is asked cannot be served steered; nothing was started.
    """
    args = parse_serve_flags(argv)
    from vllm.entrypoints.cli.serve import ServeSubcommand

    ServeSubcommand.cmd(args)
    return 0


def parse_serve_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of `vllm serve` and ours, ready for an armed start; sets the environment that goes with them.

    Raises:
        SteerError: as `serve`.
    """
    _refuse_unknown_flags(argv)
    # Before vLLM is imported: it picks its platform by plugin then.
    _name_plugins()
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args

    from steer_engine.vllm.launch import CLI_ENV_SETUP

    CLI_ENV_SETUP.get()()
    command = ServeSubcommand()
    args = _parser(command).parse_args(["serve", *argv])
    configure_logging_from_args(args)
    arm(args)
    command.validate(args)
    return args


def _parser(command: Any) -> argparse.ArgumentParser:
    """vLLM's own parser of `serve`, with our flags as one more group, so that --config and --help know them too."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser: argparse.ArgumentParser = FlexibleArgumentParser(prog="steer-engine")
    serve_parser = command.subparser_init(parser.add_subparsers(dest="subparser"))
    serve_parser.usage = "steer-engine serve [model_tag] [options]"
    serve_parser.set_defaults(shutdown_timeout=SHUTDOWN_TIMEOUT_S)
    add_flags(serve_parser.add_argument_group("SteerEngine", description="What is armed, and the vectors it serves."))
    return parser


def add_flags(parser: Any) -> None:
    """The flags of Steer Engine; every one begins with `--steering-`."""
    add = parser.add_argument
    add("--steering-vectors", type=Path, metavar="DIR", help="Folder of control vectors (safetensors or GGUF); the "
        f"file stem is the name. Default: {VECTORS_ENV}, else a folder in the user's data directory.")  # fmt: skip
    add("--steering-mirror", metavar="URL", help="Copy the vectors and presets at this URL, any that fsspec reads "
        "(s3://, gs://, hf://, https://, file://), into the folder at the start, and keep them alike.")  # fmt: skip
    add("--steering-mirror-seconds", type=float, metavar="N", help="How often the mirror is looked at. Default: 60.")
    add("--steering-blocks", metavar="BLOCKS", help="Blocks that can be steered, such as 8-22. Default: all.")
    add("--steering-ops", metavar="OPS", help=f"Operations that requests may use, of {','.join(Op)}. Default: all.")
    add("--steering-rows", type=int, metavar="N", help="Bank rows that one request may need per block. Default: 4.")
    add("--steering-bank-rows", type=int, metavar="N", help="Bank rows in all, one per vector and block in use. "
        "Default: as many as all requests could need at once. With fewer, requests wait for rows.")  # fmt: skip
    add("--steering-capture", metavar="BLOCKS", help="Blocks whose residual stream requests may read, such as 8-22, or "
        "all: their answers return it. Default: none.")  # fmt: skip
    add("--steering-fuse-norm", action="store_true", help="Edit inside the add-and-norm that follows a block, on GPUs: "
        "one launch less a block. That norm rounds once less than vLLM's, so idle output is no longer bit-identical "
        "to plain vLLM's.")  # fmt: skip
    add("--steering-limit", action="append", default=[], metavar="NAME=N", help="Set a limit that GET /v1/steering "
        "publishes, such as max_edits=4; may be given several times.")  # fmt: skip
    add("--steering-default", metavar="PRESET", help="Preset for requests that say nothing of steering.")
    add("--steering-strict", action="store_true", help="Refuse to start if a file of the folder is no usable vector.")


def arm(args: argparse.Namespace) -> None:
    """Turn parsed flags into an armed start: model, `additional_config`, environment, defaults of the machine.

    Raises:
        SteerError: something asked for cannot be served steered.
    """
    _refuse_unsteerable(args)
    _resolve_model(args)
    additional = dict(args.additional_config or {})
    settings = {**additional.get(CONFIG_KEY, {}), **_settings(args)}
    # Validated here, so that a typo is one line and not a traceback of the engine.
    config = SteeringConfig.from_additional_config({CONFIG_KEY: settings})
    assert config is not None
    args.additional_config = additional | config.to_additional_config()
    os.environ[VECTORS_ENV] = str(_vectors_folder(args.steering_vectors))
    _set_limits(args.steering_limit)
    if args.steering_default is not None:
        os.environ[DEFAULT_PRESET_ENV] = args.steering_default
    _copy_mirror(args)
    if args.steering_strict:
        os.environ[STRICT_ENV] = "1"
        _check_folder(Path(os.environ[VECTORS_ENV]))
    _cpu_defaults(args)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    if args.steering_blocks is not None:
        try:
            parse_blocks(args.steering_blocks)
        except ValueError as error:
            raise UnsupportedEngineError(f"--steering-blocks: {error}") from None
    settings: dict[str, Any] = {
        "blocks": args.steering_blocks,
        "ops": args.steering_ops.split(",") if args.steering_ops else None,
        "rows": args.steering_rows,
        "bank_rows": args.steering_bank_rows,
        "fuse_norm": args.steering_fuse_norm or None,
        "capture": (args.steering_blocks or "all") if args.steering_capture == "all" else args.steering_capture,
    }
    return {key: value for key, value in settings.items() if value is not None}


def _set_limits(given: Sequence[str]) -> None:
    """By the environment, which every API process inherits."""
    groups = (Limits, RegistryLimits, ApiLimits, EngineLimits)
    for each in given:
        name, _, value = each.partition("=")
        group = next((group for group in groups if name in group.model_fields), None)
        if group is None:
            known = ", ".join(name for group in groups for name in group.model_fields)
            raise UnsupportedEngineError(f"--steering-limit {each}: there is no limit {name!r}; there are {known}.")
        os.environ[group.variable(name)] = value
    for group in groups:
        group.from_environment()


def _refuse_unknown_flags(argv: Sequence[str]) -> None:
    """An abbreviated or misspelt flag of ours is an error, and never a prefix of a flag that comes later."""
    own = argparse.ArgumentParser(add_help=False)
    add_flags(own)
    known = set(own._option_string_actions)
    for word in argv:
        name = word.partition("=")[0].replace("_", "-")
        if name.startswith("--steering") and name not in known:
            raise UnsupportedEngineError(f"unknown flag {name}; there are {', '.join(sorted(known))}.")


def _name_plugins() -> None:
    """vLLM loads endpoint plugins only by name, and then general plugins only by name too: name all that would load."""
    given = os.environ.get("VLLM_PLUGINS")
    if given is not None:
        names = [name for name in given.split(",") if name]
    else:
        names = [entry.name for group in _PLUGIN_GROUPS for entry in entry_points(group=group)]
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*names, PLUGIN]))


def _refuse_unsteerable(args: argparse.Namespace) -> None:
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0").strip().lower() in ("1", "true"):
        raise UnsupportedEngineError("VLLM_USE_RUST_FRONTEND=1 serves without Python plugins; unset it.")
    for name, reason in _REFUSED_FLAGS.items():
        if getattr(args, name, False):
            raise UnsupportedEngineError(f"{reason}, so requests could come back unsteered; leave it out.")


def _resolve_model(args: argparse.Namespace) -> None:
    """Replace the name of a packaged model by its folder, and keep the name as the one that is served."""
    from steer_engine.models import resolve_model

    asked = getattr(args, "model_tag", None) or args.model
    resolved = str(resolve_model(asked))
    if resolved != asked and args.served_model_name is None:
        args.served_model_name = [asked]
    args.model_tag = args.model = resolved


def _vectors_folder(asked: Path | None) -> Path:
    import platformdirs

    given = asked or os.environ.get(VECTORS_ENV)
    if given:
        folder = Path(given).expanduser().resolve()
        if not folder.is_dir():
            raise UnsupportedEngineError(f"--steering-vectors {folder} is not a folder.")
        return folder
    folder = Path(platformdirs.user_data_dir("steer-engine"), "vectors")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _copy_mirror(args: argparse.Namespace) -> None:
    """Before anything reads the folder; the API processes go on with it."""
    if args.steering_mirror_seconds is not None:
        if not args.steering_mirror_seconds >= MIN_MIRROR_SECONDS:
            raise UnsupportedEngineError(
                f"--steering-mirror-seconds {args.steering_mirror_seconds:g}: at least {MIN_MIRROR_SECONDS:g}."
            )
        os.environ[background.MIRROR_SECONDS_ENV] = str(args.steering_mirror_seconds)
    if url := args.steering_mirror or os.environ.get(background.MIRROR_URL_ENV):
        background.copy_mirror(url, Path(os.environ[VECTORS_ENV]))
        os.environ[background.MIRROR_URL_ENV] = url


def _check_folder(folder: Path) -> None:
    from steer_engine.vectors import Registry

    Registry(folder, strict=True)


def _cpu_defaults(args: argparse.Namespace) -> None:
    """On a CPU, vLLM's default wants nearly all of the memory; take a share of what is free if nothing is said."""
    import psutil  # type: ignore[import-untyped]
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return
    if args.kv_cache_memory_bytes is None and args.gpu_memory_utilization == EngineArgs.gpu_memory_utilization:
        args.kv_cache_memory_bytes = int(psutil.virtual_memory().available * CPU_KV_CACHE_SHARE)
        logger.info("KV cache: %.1f GiB, a quarter of the free memory", args.kv_cache_memory_bytes / 2**30)
