"""Routes of Steer Engine: readiness, what this server can do, and its vectors."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse

import steer_engine
from steer_engine.errors import CapacityError, SteerError, UnknownVectorError
from steer_engine.serving.envelope import envelope, envelope_of, status_of
from steer_engine.spec import Op

MAX_PAGE = 1000

router = APIRouter(tags=["steering"])


@router.get("/readyz")
async def ready(request: Request) -> JSONResponse:
    """200 when the engine and every worker are armed as this server is; else 503 with the reason. Needs no key."""
    try:
        await request.app.state.steering_readiness.check()
    except SteerError as error:
        return JSONResponse(envelope(error.message, 503), status_code=503, headers={"Retry-After": "5"})
    # No more than that: whoever may probe needs no key.
    return JSONResponse({"status": "ready"})


@router.get("/v1/steering")
async def describe(request: Request) -> JSONResponse:
    """What this server can do: model, blocks, operations, scopes and the limits on one request."""
    frontend = _frontend(request)
    if not frontend.armed:
        return _failed(CapacityError("This server is not armed for steering; start it with 'steer-engine serve'."))
    model = frontend.model
    return JSONResponse(
        {
            "version": steer_engine.__version__,
            "model": request.app.state.openai_serving_models.model_name(),
            "hidden_size": model.hidden_size,
            "num_blocks": model.num_blocks,
            "armed_blocks": list(model.armed_blocks),
            "operations": [op.value for op in Op if op in model.ops],
            "scopes": ["all", "prompt", "generation", {"start": "integer or null", "end": "integer or null"}],
            "limits": frontend.limits.model_dump() | {"rows": model.rows},
        }
    )


@router.get("/v1/steering/vectors")
async def list_vectors(
    request: Request, after: str = "", limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100
) -> JSONResponse:
    """Names and digests in the order of the names, `limit` at a time, beginning after the name `after`."""
    names = sorted(_frontend(request).registry.names().items())
    page = [(name, digest) for name, digest in names if name > after]
    return JSONResponse(
        {
            "object": "list",
            "data": [{"name": name, "digest": digest} for name, digest in page[:limit]],
            "has_more": len(page) > limit,
        }
    )


@router.get("/v1/steering/vectors/{name}")
async def show_vector(request: Request, name: str) -> JSONResponse:
    """One vector by its name or digest: its blocks, norms and where it comes from."""
    try:
        vector = _frontend(request).registry.get(name)
    except UnknownVectorError as error:
        return _failed(error)
    body: dict[str, Any] = {
        "digest": vector.digest,
        "hidden_size": vector.hidden_size,
        "blocks": list(vector.blocks),
        "norms": {str(block): norm for block, norm in vector.norms.items()},
    }
    if not name.startswith("sha256:"):
        body = {"name": name} | body
    return JSONResponse(body, headers={"ETag": f'"{vector.digest}"'})


def _frontend(request: Request) -> Any:
    return request.app.state.steering_frontend


def _failed(error: SteerError) -> JSONResponse:
    headers = {"Retry-After": str(round(error.retry_after))} if isinstance(error, CapacityError) else None
    return JSONResponse(envelope_of(error), status_code=status_of(error), headers=headers)
