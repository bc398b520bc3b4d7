"""The `vllm.endpoint_plugins` entry: routes, middleware and readiness of an API process.

vLLM skips a plugin whose import fails, and goes on without its routes: nothing that can fail is imported at the top.
What fails inside a method stops the server, which is what a server that was asked to steer should do.
"""

from __future__ import annotations

import os
from argparse import Namespace
from functools import partial
from typing import Any

from steer_engine.errors import UnsupportedEngineError


class SteerEndpointPlugin:
    """Loaded where `VLLM_PLUGINS` names `steer_engine`, which `steer-engine serve` does."""

    name = "steer_engine"
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Add our routes and the middleware; called once while vLLM builds its app, after all its own routes."""
        from steer_engine.config import EngineLimits
        from steer_engine.runtime.door import Door
        from steer_engine.serving import playground, preset_routes, routes, vector_routes
        from steer_engine.serving.admin_keys import AdminKeys
        from steer_engine.serving.api_limits import ApiLimits
        from steer_engine.serving.middleware import SteeringMiddleware
        from steer_engine.serving.openapi import document_field

        for module in (routes, vector_routes, preset_routes, playground):
            app.include_router(module.router)
        app.state.steering_api_limits = ApiLimits.from_environment()
        app.state.steering_engine_limits = EngineLimits.from_environment()
        app.state.steering_admin_keys = keys = AdminKeys.from_environment()
        app.state.steering_door = door = Door()
        app.add_middleware(SteeringMiddleware, max_body_bytes=app.state.steering_api_limits.max_body_bytes, door=door)
        document_field(app)
        _let_admins_in(app.state.args, keys.plain_keys())

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Prove that every engine and worker is armed as this process is.

        Raises:
            UnsupportedEngineError, CapacityError: they are not; the server does not start.
        """
        import asyncio

        from steer_engine.runtime.vllm.shipping import handshake, in_flight, num_waiting
        from steer_engine.serving import mirroring
        from steer_engine.serving.poll import poll
        from steer_engine.serving.queue_length import QueueLength
        from steer_engine.serving.readiness import Readiness
        from steer_engine.serving.upload import Uploads

        frontend = getattr(getattr(engine_client, "input_processor", None), "steering", None)
        if frontend is None:
            raise UnsupportedEngineError(
                "The general plugin 'steer_engine' is not loaded in the API process; start with 'steer-engine serve', "
                "or name the plugin in VLLM_PLUGINS."
            )
        limits = state.steering_api_limits
        state.steering_frontend = frontend
        frontend.log_requests = bool(args.enable_log_requests)
        frontend.door = state.steering_door
        state.steering_readiness = Readiness(partial(handshake, engine_client))
        state.steering_uploads = Uploads(limits.max_upload_bytes, limits.max_uploads)
        state.steering_in_flight = partial(in_flight, engine_client)
        if frontend.armed:
            # The first answer may wait for the engine's first step; the probe's own timeout would be too short.
            await handshake(engine_client)
            if frontend.default_preset is not None:
                frontend.resolve({"preset": frontend.default_preset})
            if frontend.model.bank_rows is not None:
                frontend.queue_length = QueueLength(partial(num_waiting, engine_client), limits.max_bank_queue)
            # Kept on the state: a task that nothing refers to may be collected.
            state.steering_poll = asyncio.create_task(poll(state.steering_readiness, frontend.registry))
            state.steering_mirror = mirroring.from_environment(frontend.registry.directory)


def _let_admins_in(args: Namespace, admin_keys: list[str]) -> None:
    """Where vLLM asks for a key below `/v1`, an admin key is one too; it reads the list after this."""
    inference_keys = [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]
    if inference_keys and admin_keys:
        args.api_key = inference_keys + admin_keys
