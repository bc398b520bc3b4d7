"""vLLM's own app and engine in this process, asked without a socket. Known for vLLM 0.32, 0.33.

Wraps nothing: calls what `vllm serve` calls between parsing its flags and opening its port. The answers are those of
the server, errors included, and every hook of ours is in place.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from steer_engine.api.answers import envelope
from steer_engine.api.batch import Ask
from steer_engine.vllm.patching import Symbol

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
    Symbol("vllm.platforms:current_platform"),
    Symbol("vllm.utils.argparse_utils:FlexibleArgumentParser"),
)

MAX_ECHO_CHARS = 200


def _body_of(answer: httpx.Response) -> Any:
    """What it says; an answer that is no JSON (of a server that fails) becomes an error as all are."""
    try:
        return answer.json()
    except ValueError:
        return envelope(answer.text[:MAX_ECHO_CHARS], answer.status_code)


@asynccontextmanager
async def serving_app(args: Any) -> AsyncIterator[Ask]:
    """An engine for `args` (those of `vllm serve`), and a way to ask it; the engine ends with the context.

    Asking raises RuntimeError once the engine is dead.
    """
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.app import build_app

    async with build_async_engine_client(args) as engine_client:
        tasks = await engine_client.get_supported_tasks()
        app = build_app(args, tasks, engine_client.model_config)
        await init_app_state(engine_client, app.state, args, tasks)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        keys = [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]
        headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
        async with httpx.AsyncClient(
            transport=transport, base_url="http://batch", timeout=None, headers=headers
        ) as client:

            async def ask(path: str, body: dict[str, Any]) -> tuple[int, Any]:
                # Not httpx's own way to write JSON: half a surrogate or a NaN of one line would end the whole batch.
                content = json.dumps(body).encode()
                answer = await client.post(path, content=content, headers={"Content-Type": "application/json"})
                if answer.status_code >= 500 and engine_client.errored:
                    raise RuntimeError("The engine has died; start again to go on where it stopped.")
                return answer.status_code, _body_of(answer)

            yield ask
