"""Routes for readiness, description, validation, statistics and the playground; the field in the OpenAPI page."""

from __future__ import annotations

import asyncio
from functools import cache
from importlib.resources import files
from pathlib import PurePath
from typing import Any, get_args

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

import steer_engine
from steer_engine.api import metrics
from steer_engine.api.frontend import Frontend
from steer_engine.api.registry_routes import SPEC_BODY, read_json
from steer_engine.api.request_field import FIELD, steering_of
from steer_engine.api.routing import SteeringRoute, failed, frontend_of
from steer_engine.containment import largest_dose
from steer_engine.errors import CapacityError, SteerError, SteeringRequestError
from steer_engine.scope import ScopeWord, TriggerWord
from steer_engine.site import Site
from steer_engine.spec import Op, SteeringSpec

router = APIRouter(tags=["steering"], route_class=SteeringRoute)


@router.get("/readyz")
async def ready(request: Request) -> JSONResponse:
    """200 if the engine and every worker are armed like this server, otherwise 503 with the reason. Needs no key."""
    try:
        request.app.state.steering_frontend.drain.check_open()
        await request.app.state.steering_readiness.check()
    except SteerError as error:
        return failed(CapacityError(error.message, retry_after=5))
    # Nothing more: this route needs no key.
    return JSONResponse({"status": "ready"})


@router.get("/v1/steering")
async def describe(request: Request) -> JSONResponse:
    """What this server can do: model, blocks, operations, scopes, and the limits on a request."""
    frontend = frontend_of(request)
    model = frontend.model
    state = request.app.state
    limits = frontend.limits.model_dump() | state.steering_api_limits.model_dump()
    limits |= state.steering_engine_limits.model_dump()
    return JSONResponse(
        {
            "version": steer_engine.__version__,
            "model": request.app.state.openai_serving_models.model_name(),
            "hidden_size": model.hidden_size,
            "num_blocks": model.num_blocks,
            "armed_blocks": list(model.armed_blocks),
            "sites": [Site.BLOCK, *model.sites],
            "operations": [op.value for op in Op if op in model.ops],
            "scopes": _scopes(frontend),
            "limits": limits
            | frontend.registry.limits.model_dump()
            | {"rows": model.rows, "bank_rows": model.bank_rows}
            # So many edits without gates fit at one block, whatever their operations and scopes.
            | {"max_edits_per_block": min(frontend.limits.max_edits, model.rows)},
            "generation": await asyncio.to_thread(lambda: frontend.registry.generation),
            "capture_blocks": list(model.capture_blocks),
            "default_preset": frontend.default_preset,
        }
    )


def _scopes(frontend: Frontend) -> list[Any]:
    """The forms of a scope, with those of the words "thinking", "answer" and "tool_calls" that have tags here."""
    span = {"start": "integer or null", "end": "integer or null"}
    trigger = {"after": "tokens", "until": "tokens", "each": "true or false", "tokens": "integer"}
    untagged = {word for word in get_args(TriggerWord) if not frontend.vocabulary.has_tags(word)}
    words = [word for word in get_args(ScopeWord) if word not in untagged]
    return [*words, span, {"from": "generation", **span}, trigger, {"except": trigger}]


@router.post("/v1/steering/validate", openapi_extra=SPEC_BODY)
async def validate(request: Request) -> JSONResponse:
    """What a request with this spec would get: the digest and the edits, or the same error."""
    frontend = frontend_of(request)
    limits = frontend.limits
    body = await read_json(request, limits.max_spec_bytes + limits.max_inline_bytes // 3 * 4)
    resolved = await asyncio.to_thread(frontend.resolve, steering_of({FIELD: body}), can_capture=True)
    if resolved is None:
        raise SteeringRequestError("The body specifies no steering.", "steering")
    return JSONResponse(
        resolved.report()
        | {
            "rows": resolved.template.rows,
            "dose": largest_dose([each.edit for each in resolved.edits], resolved.vectors),
        }
    )


@router.get("/v1/steering/stats")
async def stats(request: Request) -> JSONResponse:
    """Counters of this API process, and the state of the engine and its workers."""
    frontend = frontend_of(request)
    engine = await request.app.state.steering_readiness.check()
    names = await asyncio.to_thread(frontend.registry.names)
    fault = await asyncio.to_thread(lambda: frontend.registry.fault)
    return JSONResponse(
        {
            "api": metrics.snapshot(),
            "registry": {"vectors": len(names), "generation": frontend.registry.generation, "fault": fault},
            "engine": engine,
        }
    )


playground_router = APIRouter(include_in_schema=False)
"""One static page that compares plain and steered answers. It needs no key; the requests it sends may."""

_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript"}

HEADERS = {
    # Nothing from other origins and nothing inline: a model's text can never run as code here.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@playground_router.get("/playground")
async def page() -> Response:
    return _file("playground.html")


@playground_router.get("/playground/{name}")
async def part(name: str) -> Response:
    """The style sheet, or a module of the page's script. Other names are a 404."""
    path = f"playground/{name}"
    return _file(path) if path in _contents() else Response(status_code=404, headers=HEADERS)


def _file(path: str) -> Response:
    return Response(_contents()[path], media_type=_TYPES[PurePath(path).suffix], headers=HEADERS)


@cache
def _contents() -> dict[str, bytes]:
    """Every file of the page, by its path."""
    static = files("steer_engine.api").joinpath("static")
    parts = {f"playground/{each.name}": each.read_bytes() for each in static.joinpath("playground").iterdir()}
    return {"playground.html": static.joinpath("playground.html").read_bytes(), **parts}


REQUESTS = (
    "ChatCompletionRequest",
    "BatchChatCompletionRequest",
    "CompletionRequest",
    "ResponsesRequest",
    "AnthropicMessagesRequest",
    "GenerateRequest",
)


def document_field(app: Any) -> None:
    """Make `app.openapi()` describe the field `steering` on every request that carries it."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        page: dict[str, Any] = original()
        schemas = page.setdefault("components", {}).setdefault("schemas", {})
        spec = SteeringSpec.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(spec.pop("$defs", {}))
        schemas["SteeringSpec"] = spec
        field = {
            "anyOf": [{"$ref": "#/components/schemas/SteeringSpec"}, {"const": False}, {"type": "null"}],
            "description": "Steer this request. false: no steering, not even the server's default preset.",
        }
        for name in REQUESTS:
            if name in schemas:
                schemas[name].setdefault("properties", {})["steering"] = field
        return page

    app.openapi = openapi
