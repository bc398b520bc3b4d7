"""What `steer-engine serve` and `batch` print: no routine lines of vLLM and its dependencies, and one block at the end.

A logging configuration file, which vLLM gives to all its processes (`--log-config-file`) and to uvicorn, has one filter
for all of them: `RoutineFilter`. It hides what every start prints. Warnings that ask for something, all errors, and
what a running server logs stay. `--verbose` leaves the file out, and so does any logging setting of the user's own.

Wraps nothing. Known for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import copy
import json
import logging
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import steer_engine
from steer_engine.fields import block_ranges

RUNNING = ("steer_engine", "vllm.v1.metrics.loggers", "vllm.entrypoints.serve.utils.request_logger", "uvicorn.access")
"""Loggers whose information is about a running server, or ours."""

ROUTINE_WARNINGS = (
    ("vllm.config.vllm", "Enforce eager set"),  # a flag of the user's, and CPU builds set it by themselves
    ("vllm.config.vllm", "Inductor compilation was disabled by user settings"),
    ("vllm.config.vllm", "Model Runner V2 requires Triton"),  # steer-engine doctor tells the runner and why
    ("vllm.platforms.cpu", "Triton is not installed"),
    ("vllm.platforms.cpu", "Reset SSM cache type"),
)
"""Logger and beginning of each warning of vLLM that every start of some machines prints and that asks for nothing."""

PYTHON_WARNINGS = "ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning"
"""vLLM's search for Triton kernels touches a deprecated name of torch's, in every process."""

USERS_OWN = ("VLLM_LOGGING_LEVEL", "VLLM_LOGGING_CONFIG_PATH", "VLLM_CONFIGURE_LOGGING")
"""Variables of vLLM by which a user chooses what is logged."""

READY_LOGGER = "steer_engine.ready"

FOLDER_LOGGER = "steer_engine.vectors.folder"
"""Names every vector that it finds. Until the server is ready these lines are hidden: the block names the vectors."""

_ready = Event()

MAX_NAMES = 6
"""Vectors that the block names."""

POLL_SECONDS = 0.02


class RoutineFilter(logging.Filter):
    """Hides what every start prints."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            return True
        if record.levelno >= logging.WARNING:
            return not any(
                record.name == name and record.getMessage().startswith(beginning)
                for name, beginning in ROUTINE_WARNINGS
            )
        if record.name == FOLDER_LOGGER:
            return _ready.is_set()
        return any(record.name == name or record.name.startswith(f"{name}.") for name in RUNNING)


def hide_routine(args: argparse.Namespace) -> None:
    """Hide routine lines in this process and in those that vLLM will start, unless the user chose what is logged.

    args: parsed flags of `serve`. Call this before vLLM configures its logging.
    """
    if args.verbose or _chosen_by_user(args):
        return
    path = str(_write(_configuration(args)))
    args.log_config_file = os.environ["VLLM_LOGGING_CONFIG_PATH"] = path
    if getattr(args, "logging_config", None) is not None:
        args.logging_config = replace(args.logging_config, pylogging_config_file=path)
    given = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = f"{given},{PYTHON_WARNINGS}" if given else PYTHON_WARNINGS
    if not sys.stderr.isatty():
        args.use_tqdm_on_load = False  # progress bars; in a file, each of their states is a line


def _chosen_by_user(args: argparse.Namespace) -> bool:
    from vllm.config.logging import LoggingConfig

    given = getattr(args, "logging_config", None)
    return (
        any(name in os.environ for name in USERS_OWN)
        or any(getattr(args, name, None) is not None for name in ("log_config_file", "log_level"))
        or (given is not None and given != LoggingConfig())
    )


def _configuration(args: argparse.Namespace) -> dict[str, Any]:
    """vLLM's and uvicorn's own configurations in one, with the filter, and a plain logger for the block."""
    from uvicorn.config import LOGGING_CONFIG
    from vllm.logger import DEFAULT_LOGGING_CONFIG

    made: dict[str, Any] = copy.deepcopy(DEFAULT_LOGGING_CONFIG)
    for section in ("formatters", "handlers", "loggers"):
        made[section] |= copy.deepcopy(LOGGING_CONFIG[section])
    hidden = [path.strip() for path in (args.disable_access_log_for_endpoints or "").split(",") if path.strip()]
    made["filters"] = {
        "routine": {"()": f"{__name__}.{RoutineFilter.__name__}"},
        "paths": {"()": "vllm.logging_utils.UvicornAccessLogFilter", "excluded_paths": hidden},
    }
    made["handlers"]["vllm"]["filters"] = ["routine"]
    made["handlers"]["default"]["filters"] = ["routine"]  # uvicorn's
    made["handlers"]["access"]["filters"] = ["paths"]
    made["formatters"]["plain"] = {"format": "%(message)s"}
    made["handlers"]["plain"] = made["handlers"]["vllm"] | {"formatter": "plain"}
    made["loggers"][READY_LOGGER] = {"handlers": ["plain"], "level": "INFO", "propagate": False}
    return made


def _write(configuration: dict[str, Any]) -> Path:
    """A file that lasts as long as this process: vLLM's processes read it when they start."""
    descriptor, name = tempfile.mkstemp(prefix="steer-engine-logging-", suffix=".json")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(configuration, file)
    atexit.register(Path(name).unlink, missing_ok=True)
    return Path(name)


async def say_ready(state: Any, args: argparse.Namespace) -> None:
    """Log the block once the server listens. state: of the app, when our plugin has set it up."""
    while not getattr(getattr(state, "server", None), "started", False):
        await asyncio.sleep(POLL_SECONDS)
    text = await asyncio.to_thread(ready_text, state, args)
    _ready.set()
    logging.getLogger(READY_LOGGER).info("%s", text)


def ready_text(state: Any, args: argparse.Namespace) -> str:
    """What a user needs after a start, a line each: where, what, and who may use it."""
    frontend = state.steering_frontend
    model = frontend.model
    names = sorted(frontend.registry.names())
    listed = ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")
    url, note = _url(args)
    clients = "on" if args.api_key or os.environ.get("VLLM_API_KEY") else "off (--api-key, VLLM_API_KEY)"
    changes = "with admin key" if state.steering_admin_keys.configured else "off (STEER_ENGINE_ADMIN_KEYS)"
    blocks = f"blocks {block_ranges(model.armed_blocks)} of {model.num_blocks}"
    blocks += "".join(f", {site}" for site in model.sites)
    rows = {
        "URL": f"{url}/v1{note}",
        "playground": f"{url}/playground",
        "model": state.openai_serving_models.model_name(),
        "armed": f"{blocks}; {', '.join(op.value for op in model.ops)}",
        "vectors": f"{len(names)} in {frontend.registry.directory}{': ' if names else ''}{listed}",
        "keys": f"clients {clients}; changes of vectors and presets {changes}",
    }
    lines = [f"  {name:10}  {value}" for name, value in rows.items()]
    return "\n".join([f"Steer Engine {steer_engine.__version__} is ready.", *lines])


def _url(args: argparse.Namespace) -> tuple[str, str]:
    """The server's URL for a client on this machine, and a remark."""
    if args.uds:
        return "http://localhost", f" (Unix socket {args.uds})"
    scheme = "https" if args.ssl_keyfile and args.ssl_certfile else "http"
    everywhere = args.host in (None, "", "0.0.0.0", "::")
    host = "localhost" if everywhere else f"[{args.host}]" if ":" in args.host else args.host
    remark = " (listens on every address; --host 127.0.0.1 for this machine only)" if everywhere else ""
    return f"{scheme}://{host}:{args.port}", remark
