"""The `vllm.endpoint_plugins` entry: routes, middleware and readiness of an API process.

vLLM skips a plugin whose import fails, and goes on without its routes: nothing that can fail is imported at the top.
What fails inside a method stops the server, which is what a server that was asked to steer should do.
"""

from __future__ import annotations

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
        from steer_engine.serving.middleware import SteeringMiddleware
        from steer_engine.serving.routes import router

        app.include_router(router)
        app.add_middleware(SteeringMiddleware)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Prove that every engine and worker is armed as this process is.

        Raises:
            UnsupportedEngineError, CapacityError: they are not; the server does not start.
        """
        from steer_engine.runtime.vllm.shipping import handshake
        from steer_engine.serving.readiness import Readiness

        frontend = getattr(getattr(engine_client, "input_processor", None), "steering", None)
        if frontend is None:
            raise UnsupportedEngineError(
                "The general plugin 'steer_engine' is not loaded in the API process; start with 'steer-engine serve', "
                "or name the plugin in VLLM_PLUGINS."
            )
        state.steering_frontend = frontend
        state.steering_readiness = Readiness(partial(handshake, engine_client))
        if frontend.armed:
            # The first answer may wait for the engine's first step; the probe's own timeout would be too short.
            await handshake(engine_client)
