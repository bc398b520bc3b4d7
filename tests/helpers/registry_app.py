"""The steering routes on a real registry. The engine is stood in for by its model's shape."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI

from steer_engine.api import registry_routes, routes
from steer_engine.api.frontend import Frontend
from steer_engine.api.middleware import SteeringMiddleware
from steer_engine.api.registry_routes import Uploads
from steer_engine.api.routing import HEADER, AdminKeys
from steer_engine.model_shape import ModelShape
from steer_engine.settings import ALL_OPS, ApiLimits, EngineLimits, Limits, SteeringConfig
from steer_engine.vectors import Registry
from steer_engine.vectors.cache import InlineVectors

KEY = "an-admin-key-of-a-test"
ADMIN = {HEADER: KEY}
MODEL = ModelShape(hidden_size=8, num_blocks=4, armed_blocks=(0, 1, 2, 3), ops=ALL_OPS, rows=4, dtype="float32")


def frontend_of(registry: Registry, model: ModelShape = MODEL) -> Frontend:
    """An armed frontend on `registry`, with a low limit for inline vectors."""
    frontend = Frontend(SteeringConfig(), model)
    frontend.registry = registry
    frontend.limits = Limits(max_inline_bytes=3000)
    frontend.inline = InlineVectors(3000)
    return frontend


def app_of(registry: Registry, keys: AdminKeys, limits: ApiLimits, model: ModelShape = MODEL) -> FastAPI:
    app = FastAPI()
    for router in (routes.router, registry_routes.vector_router, registry_routes.preset_router):
        app.include_router(router)
    frontend = frontend_of(registry, model)
    app.add_middleware(SteeringMiddleware, drain=frontend.drain)

    async def in_flight(digest: str) -> int:
        return 0

    async def check() -> dict[str, Any]:
        return {"workers": []}

    app.state.steering_frontend = frontend
    app.state.steering_admin_keys = keys
    app.state.steering_api_limits = limits
    app.state.steering_engine_limits = EngineLimits()
    app.state.steering_uploads = Uploads(limits.max_upload_bytes, limits.max_uploads)
    app.state.steering_in_flight = in_flight
    app.state.steering_readiness = SimpleNamespace(check=check)
    app.state.openai_serving_models = SimpleNamespace(model_name=lambda: "base")
    return app
