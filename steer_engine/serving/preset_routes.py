"""Routes of presets: named specs, which clients choose by name or as `BASE:NAME` among the models."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse

from steer_engine.errors import PayloadTooLargeError, SteeringRequestError
from steer_engine.serving.answers import Refused, SteeringRoute, etag, frontend_of, if_match, require_admin
from steer_engine.serving.audit import log_change
from steer_engine.serving.vector_routes import MAX_PAGE, Name
from steer_engine.vectors.preset_files import check_preset
from steer_engine.vectors.shelf import preset_digest, vectors_of

router = APIRouter(prefix="/v1/steering/presets", tags=["steering"], route_class=SteeringRoute)

SPEC_BODY = {
    "requestBody": {
        "required": True,
        # Defined by `openapi.document_field`, together with what it refers to.
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/SteeringSpec"}}},
    }
}


@router.get("")
async def list_presets(
    request: Request, after: str = "", limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100
) -> JSONResponse:
    """Presets in the order of their names, `limit` at a time, beginning after the name `after`."""
    presets = await asyncio.to_thread(frontend_of(request).registry.presets)
    page = [(name, spec) for name, spec in sorted(presets.items()) if name > after]
    data = [{"name": name, "digest": preset_digest(spec), "spec": spec} for name, spec in page[:limit]]
    return JSONResponse({"object": "list", "data": data, "has_more": len(page) > limit})


@router.get("/{name}")
async def show_preset(request: Request, name: Name) -> JSONResponse:
    """One preset as it was written."""
    spec = await asyncio.to_thread(frontend_of(request).registry.preset, name)
    return JSONResponse({"name": name, "digest": preset_digest(spec), "spec": spec}, headers=etag(preset_digest(spec)))


@router.put("/{name}", openapi_extra=SPEC_BODY)
async def put_preset(request: Request, name: Name) -> JSONResponse:
    """Keep a spec under a name: 201 if the name is new, 200 if it has this very spec; `If-Match` replaces one."""
    frontend = frontend_of(request)
    require_admin(request)
    spec = await read_json(request, frontend.registry.limits.max_preset_bytes)
    checked = check_preset(spec)
    try:
        await asyncio.to_thread(_check_kept, checked, frontend)
    except SteeringRequestError as error:
        # The preset is well formed, but not for what this server has.
        raise Refused(error.message, 422, error.param) from None
    is_new = await asyncio.to_thread(frontend.registry.put_preset, name, checked, if_match=if_match(request))
    digest = preset_digest(checked)
    log_change(request, "put" if is_new else "replace", "preset", name, digest)
    body = {"name": name, "digest": digest, "spec": checked}
    return JSONResponse(body, status_code=201 if is_new else 200, headers=etag(digest))


@router.delete("/{name}")
async def delete_preset(request: Request, name: Name) -> JSONResponse:
    """Forget a preset. Requests that chose it before go on."""
    frontend = frontend_of(request)
    require_admin(request)
    spec = await asyncio.to_thread(frontend.registry.preset, name)
    await asyncio.to_thread(frontend.registry.delete_preset, name, if_match=if_match(request))
    log_change(request, "delete", "preset", name, preset_digest(spec))
    return JSONResponse({"name": name, "digest": preset_digest(spec)})


def _check_kept(spec: dict[str, Any], frontend: Any) -> None:
    """It resolves, and by vectors that are kept: not by one that came in a request and is soon forgotten."""
    frontend.resolve(spec)
    for name in sorted(vectors_of(spec)):
        frontend.registry.get(name)


async def read_json(request: Request, max_bytes: int) -> Any:
    """A JSON body of bounded size. Raises SteeringRequestError, PayloadTooLargeError."""
    raw = bytearray()
    async for piece in request.stream():
        raw += piece
        if len(raw) > max_bytes:
            raise PayloadTooLargeError(f"The body may have at most {max_bytes} bytes.", "body")
    try:
        return json.loads(raw, object_pairs_hook=_each_key_once)
    except SteeringRequestError:
        raise
    except (ValueError, RecursionError) as error:
        raise SteeringRequestError(f"The body is not JSON ({type(error).__name__}).", "body") from None


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise SteeringRequestError("A key is given twice in one object of the body.", "body")
    return found
