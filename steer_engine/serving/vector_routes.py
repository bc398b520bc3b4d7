"""Routes of control vectors: list, show, download, put, delete."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from steer_engine.errors import SteerError
from steer_engine.serving import metrics
from steer_engine.serving.answers import SteeringRoute, etag, frontend_of, if_match, require_admin
from steer_engine.serving.audit import log_change
from steer_engine.serving.envelope import status_of
from steer_engine.vectors import ControlVector, safetensors_format
from steer_engine.vectors.adopted import NAME

MAX_PAGE = 1000

router = APIRouter(prefix="/v1/steering/vectors", tags=["steering"], route_class=SteeringRoute)

# Described, not enforced here: the registry refuses other names with a sentence of its own.
Name = Annotated[
    str,
    Path(
        description="A name, or (to read) `sha256:` and 64 hexadecimal digits.",
        json_schema_extra={"pattern": rf"^({NAME.pattern}|sha256:[0-9a-f]{{64}})$"},
    ),
]

_FILE_BODY = {
    "requestBody": {
        "required": True,
        "description": "The file as it is: a control vector in safetensors or GGUF.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.get("")
async def list_vectors(
    request: Request, after: str = "", limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100
) -> JSONResponse:
    """Names and digests in the order of the names, `limit` at a time, beginning after the name `after`."""
    names = await asyncio.to_thread(frontend_of(request).registry.names)
    page = [(name, digest) for name, digest in sorted(names.items()) if name > after]
    data = [{"name": name, "digest": digest} for name, digest in page[:limit]]
    return JSONResponse({"object": "list", "data": data, "has_more": len(page) > limit})


@router.get("/{name}")
async def show_vector(request: Request, name: Name, download: str | None = None) -> Response:
    """One vector: its blocks, norms and origin. With `?download`, the file (safetensors)."""
    vector = await asyncio.to_thread(frontend_of(request).registry.get, name)
    if download is not None:
        file_name = f"{vector.digest.removeprefix('sha256:')[:16]}.safetensors"
        headers = etag(vector.digest) | {"Content-Disposition": f'attachment; filename="{file_name}"'}
        return Response(safetensors_format.to_bytes(vector), media_type="application/octet-stream", headers=headers)
    body = {} if name.startswith("sha256:") else {"name": name}
    return JSONResponse(body | described(vector), headers=etag(vector.digest))


@router.put("/{name}", openapi_extra=_FILE_BODY)
async def put_vector(request: Request, name: Name) -> JSONResponse:
    """Register a vector under a name: 201 if the name is new, 200 if it stands for this very content already.

    To replace other content, send its digest as `If-Match`. What is acknowledged survives a crash.
    """
    frontend = frontend_of(request)
    try:
        require_admin(request)
        folder = await asyncio.to_thread(frontend.registry.incoming, name)
        vector = await request.app.state.steering_uploads.receive(request, folder)
        vector.check(hidden_size=frontend.model.hidden_size, num_blocks=frontend.model.num_blocks)
        is_new = await asyncio.to_thread(frontend.registry.put, name, vector, if_match=if_match(request))
    except SteerError as error:
        metrics.upload_rejected(status_of(error))
        raise
    log_change(request, "put" if is_new else "replace", "vector", name, vector.digest)
    body = {"name": name} | described(vector)
    return JSONResponse(body, status_code=201 if is_new else 200, headers=etag(vector.digest))


@router.delete("/{name}")
async def delete_vector(request: Request, name: Name) -> JSONResponse:
    """Forget a name. Requests in flight that use its content finish; `in_flight` says how many there are."""
    frontend = frontend_of(request)
    require_admin(request)
    digest = await asyncio.to_thread(frontend.registry.delete, name, if_match=if_match(request))
    log_change(request, "delete", "vector", name, digest)
    in_flight = await request.app.state.steering_in_flight(digest)
    return JSONResponse({"name": name, "digest": digest, "in_flight": in_flight})


def described(vector: ControlVector) -> dict[str, Any]:
    """What an answer says of a vector."""
    about = vector.metadata
    norms = about.residual_norms
    return {
        "digest": vector.digest,
        "hidden_size": vector.hidden_size,
        "blocks": list(vector.blocks),
        "norms": {str(block): norm for block, norm in vector.norms.items()},
        "residual_norms": {str(block): norms[block] for block in vector.blocks if block in norms},
        "model": about.model,
        "method": about.method,
        "notes": about.notes,
    }
