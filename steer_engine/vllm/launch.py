"""Starts vLLM's own server, armed: with a port (`serve`), or without one in this process (`serving_app`, for batches).

Wraps nothing. Calls what `vllm serve` calls. Known for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx

from steer_engine.api.answers import envelope
from steer_engine.api.batch import Send
from steer_engine.settings import WITH_PARENT_ENV
from steer_engine.vllm.flags import add_flags, arm, name_plugins, refuse_unknown_flags, repeated_flags
from steer_engine.vllm.lifetime import exit_on_signal
from steer_engine.vllm.patching import Symbol
from steer_engine.vllm.plugin import inference_keys
from steer_engine.vllm.start_log import hide_routine

CLI_ENV_SETUP = Symbol(
    "vllm.entrypoints.serve.utils.api_utils:cli_env_setup", moved_to="vllm.entrypoints.common.startup:cli_env_setup"
)
USED = (
    Symbol("vllm.entrypoints.launchers.api_server.entry:build_async_engine_client", ("args",)),
    Symbol("vllm.entrypoints.launchers.app:build_app", ("args", "supported_tasks", "model_config")),
    Symbol("vllm.entrypoints.launchers.api_server.app_state:init_app_state", ("engine_client", "state", "args")),
    Symbol("vllm.entrypoints.cli.serve:ServeSubcommand.subparser_init", ("subparsers",)),
    Symbol("vllm.entrypoints.cli.serve:ServeSubcommand.validate", ("args",)),
    Symbol("vllm.entrypoints.cli.serve:ServeSubcommand.cmd", ("args",)),
    CLI_ENV_SETUP,
    Symbol("vllm.logger:configure_logging_from_args"),
    Symbol("vllm.logger:DEFAULT_LOGGING_CONFIG"),
    Symbol("vllm.logging_utils:UvicornAccessLogFilter.__init__", ("excluded_paths",)),
    Symbol("vllm.config.logging:LoggingConfig"),
    Symbol("vllm.platforms:current_platform"),
    Symbol("vllm.utils.argparse_utils:FlexibleArgumentParser"),
    Symbol("vllm.utils.cpu_resource_utils:get_memory_node_info", ("node_id",)),
    Symbol("vllm.utils.cpu_resource_utils:get_visible_memory_node"),
)

MAX_ECHO_CHARS = 200

SHUTDOWN_TIMEOUT_SECONDS = 30
"""Default of --shutdown-timeout. With vLLM's default of 0, SIGTERM drops running requests without an answer."""


def serve(argv: Sequence[str]) -> int:
    """Run the server until it is stopped. argv: everything after `steer-engine serve`. Returns the exit status.

    Raises:
        SteerError: the server cannot serve steered requests with these flags. Nothing was started.
    """
    # The first process of a container ignores SIGTERM until it has a handler. vLLM's own comes after its imports, the
    # conversion of a packaged model, and the copy of a mirror.
    signal.signal(signal.SIGTERM, exit_on_signal)
    args = parse_serve_flags(argv)
    args.says_ready = True
    from vllm.entrypoints.cli.serve import ServeSubcommand

    ServeSubcommand.cmd(args)
    return 0


def parse_serve_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the flags of `vllm serve` and ours, and prepare an armed start: sets environment variables.

    Raises:
        SteerError: as `serve`.
    """
    refuse_unknown_flags(argv)
    name_plugins()
    os.environ[WITH_PARENT_ENV] = "1"
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args

    CLI_ENV_SETUP.get()()
    command = ServeSubcommand()
    args = _parse(command, argv)
    hide_routine(args)
    configure_logging_from_args(args)
    arm(args)
    command.validate(args)
    return args


def _parse(command: Any, argv: Sequence[str]) -> argparse.Namespace:
    """Our flags and vLLM's, from the command line and from the file of --config."""
    with repeated_flags():
        return _parser(command).parse_args(["serve", *argv])


def _parser(command: Any) -> argparse.ArgumentParser:
    """vLLM's parser of `serve` with our flags as one more group, so that --config and --help include them."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser: argparse.ArgumentParser = FlexibleArgumentParser(prog="steer-engine")
    serve_parser = command.subparser_init(parser.add_subparsers(dest="subparser"))
    serve_parser.usage = "steer-engine serve [model_tag] [options]"
    serve_parser.set_defaults(shutdown_timeout=SHUTDOWN_TIMEOUT_SECONDS)
    description = "What is armed for steering, and which vectors are served."
    add_flags(serve_parser.add_argument_group("SteerEngine", description=description))
    return parser


@asynccontextmanager
async def serving_app(args: Any) -> AsyncIterator[Send]:
    """Start an engine with the parsed flags `args`, and yield a function that sends it requests without a socket.

    Answers, errors included, are those of the server. The engine stops when the context ends. If the engine has died,
    the function raises RuntimeError.
    """
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.app import build_app

    async with build_async_engine_client(args) as engine_client:
        tasks = await engine_client.get_supported_tasks()
        app = build_app(args, tasks, engine_client.model_config)
        await init_app_state(engine_client, app.state, args, tasks)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        keys = inference_keys(args)
        headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
        async with httpx.AsyncClient(
            transport=transport, base_url="http://batch", timeout=None, headers=headers
        ) as client:

            async def send(path: str, body: dict[str, Any]) -> tuple[int, Any]:
                # httpx's own encoder raises for a lone surrogate or a NaN, which would end the whole batch.
                content = json.dumps(body).encode()
                answer = await client.post(path, content=content, headers={"Content-Type": "application/json"})
                if answer.status_code >= 500 and engine_client.errored:
                    raise RuntimeError("The engine has died; run the same command again to continue.")
                return answer.status_code, _body_of(answer)

            yield send


def _body_of(answer: httpx.Response) -> Any:
    """The JSON of an answer. Any other text, as from a failing server, becomes an error object."""
    try:
        return answer.json()
    except ValueError:
        return envelope(answer.text[:MAX_ECHO_CHARS], answer.status_code)
