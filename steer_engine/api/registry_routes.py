"""The routes of the registry: `/v1/steering/vectors` and `/v1/steering/presets`, and how their bodies are received.

Reads need no admin key. Changes need one, are logged, and are conditional on `If-Match`. An uploaded vector is
streamed to disk up to a size limit, then parsed strictly.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request
from fastapi import Path as PathParameter
from fastapi.responses import JSONResponse
from starlette.responses import Response

from steer_engine.api import metrics
from steer_engine.api.answers import status_of
from steer_engine.api.frontend import Frontend
from steer_engine.api.request_field import object_without_duplicates
from steer_engine.api.routing import Refused, SteeringRoute, etag, frontend_of, if_match, log_change, require_admin
from steer_engine.errors import (
    CapacityError,
    PayloadTooLargeError,
    SteerError,
    SteeringRequestError,
    UnusableVectorError,
)
from steer_engine.vectors import RowSet, files
from steer_engine.vectors.files import AnyVector
from steer_engine.vectors.folder import NAME, check_preset
from steer_engine.vectors.manifest import preset_digest, vectors_of
from steer_engine.vectors.storage import disk_errors, lock_upload
from steer_engine.vectors.suggestion import starting_point

MAX_PAGE = 1000
"""Entries of one page of a list."""

Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]

Entry = TypeVar("Entry")

MEDIA_TYPES = frozenset({"", "application/octet-stream", "application/safetensors", "application/x-safetensors",
                         "application/gguf", "application/x-gguf", "binary/octet-stream",
                         "application/x-www-form-urlencoded"})  # fmt: skip
"""Accepted for uploads. The last one is curl's default for `--data-binary`. The content is checked in any case."""

# For the OpenAPI document only: the registry checks names itself, with a clearer message.
Name = Annotated[
    str,
    PathParameter(
        description="A name, or (to read) `sha256:` and 64 hexadecimal digits.",
        json_schema_extra={"pattern": rf"^({NAME.pattern}|sha256:[0-9a-f]{{64}})$"},
    ),
]

_FILE_BODY = {
    "requestBody": {
        "required": True,
        "description": "The unchanged file: a control vector in safetensors or GGUF, or a row set in safetensors.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}

SPEC_BODY = {
    "requestBody": {
        "required": True,
        # `routes.document_field` adds this schema to the OpenAPI document.
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/SteeringSpec"}}},
    }
}

vector_router = APIRouter(prefix="/v1/steering/vectors", tags=["steering"], route_class=SteeringRoute)
preset_router = APIRouter(prefix="/v1/steering/presets", tags=["steering"], route_class=SteeringRoute)


@vector_router.get("")
async def list_vectors(request: Request, after: str = "", limit: Limit = 100) -> JSONResponse:
    """List names and digests, sorted by name: at most `limit`, starting after the name `after`."""
    names = await asyncio.to_thread(frontend_of(request).registry.names)
    return _page(names, lambda digest: {"digest": digest}, after, limit)


@vector_router.get("/{name}")
async def show_vector(request: Request, name: Name, download: str | None = None) -> Response:
    """One vector or row set: its blocks, norms or rows, and origin. With `?download`, the file in safetensors."""
    vector = await asyncio.to_thread(frontend_of(request).registry.find, name)
    if download is not None:
        file_name = f"{vector.digest.removeprefix('sha256:')[:16]}.safetensors"
        headers = etag(vector.digest) | {"Content-Disposition": f'attachment; filename="{file_name}"'}
        return Response(files.to_bytes(vector), media_type="application/octet-stream", headers=headers)
    body = {} if name.startswith("sha256:") else {"name": name}
    return JSONResponse(body | _vector_body(vector), headers=etag(vector.digest))


@vector_router.put("/{name}", openapi_extra=_FILE_BODY)
async def put_vector(request: Request, name: Name) -> JSONResponse:
    """Register a vector under a name. 201: the name is new. 200: the name already has this content, or was replaced.

    To replace other content, send its digest as `If-Match`. An acknowledged upload survives a crash.
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
    body = {"name": name} | _vector_body(vector)
    return JSONResponse(body, status_code=201 if is_new else 200, headers=etag(vector.digest))


@vector_router.delete("/{name}")
async def delete_vector(request: Request, name: Name) -> JSONResponse:
    """Delete a name. `in_flight` counts the running requests that use its content; they are completed."""
    frontend = frontend_of(request)
    require_admin(request)
    digest = await asyncio.to_thread(frontend.registry.delete, name, if_match=if_match(request))
    log_change(request, "delete", "vector", name, digest)
    in_flight = await request.app.state.steering_in_flight(digest)
    return JSONResponse({"name": name, "digest": digest, "in_flight": in_flight})


@preset_router.get("")
async def list_presets(request: Request, after: str = "", limit: Limit = 100) -> JSONResponse:
    """List presets, sorted by name: at most `limit`, starting after the name `after`."""
    presets = await asyncio.to_thread(frontend_of(request).registry.presets)
    return _page(presets, lambda spec: {"digest": preset_digest(spec), "spec": spec}, after, limit)


@preset_router.get("/{name}")
async def show_preset(request: Request, name: Name) -> JSONResponse:
    """One preset, as it was registered."""
    spec = await asyncio.to_thread(frontend_of(request).registry.preset, name)
    return JSONResponse({"name": name, "digest": preset_digest(spec), "spec": spec}, headers=etag(preset_digest(spec)))


@preset_router.put("/{name}", openapi_extra=SPEC_BODY)
async def put_preset(request: Request, name: Name) -> JSONResponse:
    """Register a spec under a name. 201: the name is new. 200: the name already has this spec, or was replaced.

    To replace another spec, send its digest as `If-Match`.
    """
    frontend = frontend_of(request)
    require_admin(request)
    spec = await read_json(request, frontend.registry.limits.max_preset_bytes)
    checked = check_preset(spec)
    try:
        await asyncio.to_thread(_check_usable, checked, frontend)
    except SteeringRequestError as error:
        # Well formed, but this server cannot apply it.
        raise Refused(error.message, 422, error.param) from None
    is_new = await asyncio.to_thread(frontend.registry.put_preset, name, checked, if_match=if_match(request))
    digest = preset_digest(checked)
    log_change(request, "put" if is_new else "replace", "preset", name, digest)
    body = {"name": name, "digest": digest, "spec": checked}
    return JSONResponse(body, status_code=201 if is_new else 200, headers=etag(digest))


@preset_router.delete("/{name}")
async def delete_preset(request: Request, name: Name) -> JSONResponse:
    """Delete a preset. Running requests that use it are completed."""
    frontend = frontend_of(request)
    require_admin(request)
    spec = await asyncio.to_thread(frontend.registry.preset, name)
    await asyncio.to_thread(frontend.registry.delete_preset, name, if_match=if_match(request))
    log_change(request, "delete", "preset", name, preset_digest(spec))
    return JSONResponse({"name": name, "digest": preset_digest(spec)})


class Uploads:
    """Receives uploaded vectors, a limited number at a time.

    max_bytes: per file. at_once: uploads at the same time.
    """

    def __init__(self, max_bytes: int, at_once: int) -> None:
        self.max_bytes = max_bytes
        self._free = at_once

    async def receive(self, request: Request, folder: Path) -> AnyVector:
        """The vector in the request's body. The body is stored in a temporary file in `folder`.

        Raises:
            Refused: 415, another media type.
            PayloadTooLargeError: more than `max_bytes`.
            VectorFileError: not a usable control vector.
            CapacityError: too many uploads at the same time.
            RegistryError: the file cannot be written.
        """
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type not in MEDIA_TYPES:
            raise Refused(f"Send the file as application/octet-stream, not as {media_type[:80]}.", 415)
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self.max_bytes:
            raise self._too_large()
        if self._free == 0:
            raise CapacityError("Too many uploads at once; retry later.", retry_after=2)
        self._free -= 1
        try:
            with disk_errors(), tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                path = Path(file.name)
                lock_upload(file)
                try:
                    async for piece in self._counted(request.stream()):
                        await asyncio.to_thread(file.write, piece)
                    file.close()
                    return await asyncio.to_thread(_load_vector, path)
                finally:
                    path.unlink(missing_ok=True)
        finally:
            self._free += 1

    async def _counted(self, stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        count = 0
        async for piece in stream:
            count += len(piece)
            if count > self.max_bytes:
                raise self._too_large()
            yield piece

    def _too_large(self) -> PayloadTooLargeError:
        return PayloadTooLargeError(f"A vector may have at most {self.max_bytes} bytes.")


async def read_json(request: Request, max_bytes: int) -> Any:
    """The JSON body of a request.

    Raises:
        PayloadTooLargeError: more than `max_bytes`.
        SteeringRequestError: not JSON, or a key is repeated within one object.
    """
    raw = bytearray()
    async for piece in request.stream():
        raw += piece
        if len(raw) > max_bytes:
            raise PayloadTooLargeError(f"The body may have at most {max_bytes} bytes.", "body")
    try:
        return json.loads(raw, object_pairs_hook=object_without_duplicates)
    except SteeringRequestError:
        raise
    except (ValueError, RecursionError) as error:
        raise SteeringRequestError(f"The body is not valid JSON ({type(error).__name__}).", "body") from None


def _page(
    entries: Mapping[str, Entry], describe: Callable[[Entry], dict[str, Any]], after: str, limit: int
) -> JSONResponse:
    """The first `limit` entries after the name `after`, sorted by name; `describe` gives the fields beside the name."""
    names = [name for name in sorted(entries) if name > after]
    data = [{"name": name, **describe(entries[name])} for name in names[:limit]]
    return JSONResponse({"object": "list", "data": data, "has_more": len(names) > limit})


def _vector_body(vector: AnyVector) -> dict[str, Any]:
    """The description of a vector or a row set in answers."""
    about = vector.metadata
    norms = about.residual_norms
    if isinstance(vector, RowSet):
        return {
            "digest": vector.digest,
            "kind": vector.kind,
            "hidden_size": vector.hidden_size,
            "blocks": list(vector.blocks),
            "rows": {str(block): list(vector.numbers(block)) for block in vector.blocks},
            "labels": {str(block): {str(row): text for row, text in by.items()} for block, by in vector.labels.items()},
            "residual_norms": {str(block): norms[block] for block in vector.blocks if block in norms},
            "model": about.model,
            "method": about.method,
            "site": about.site.value,
            "notes": about.notes,
        }
    return {
        "digest": vector.digest,
        "kind": "directions",
        "hidden_size": vector.hidden_size,
        "blocks": list(vector.blocks),
        "norms": {str(block): norm for block, norm in vector.norms.items()},
        "residual_norms": {str(block): norms[block] for block in vector.blocks if block in norms},
        "model": about.model,
        "method": about.method,
        "site": about.site.value,
        "condition": None if about.condition is None else about.condition.model_dump(mode="json", exclude_none=True),
        "probe": None if about.probe is None else about.probe.model_dump(mode="json", exclude_none=True),
        "suggested": starting_point(vector),
        "notes": about.notes,
    }


def _check_usable(spec: dict[str, Any], frontend: Frontend) -> None:
    """Check that this server can apply a preset's spec.

    Its vectors must be in the registry. Resolving alone also accepts inline vectors of earlier requests, which are
    only cached.

    Raises:
        SteeringRequestError: it cannot.
    """
    frontend.resolve(spec)
    for name in sorted(vectors_of(spec)):
        frontend.registry.find(name)


def _load_vector(path: Path) -> AnyVector:
    """Load safetensors or GGUF, as the first bytes indicate.

    Raises:
        VectorFileError: not a usable control vector.
    """
    vector = files.from_bytes(path.read_bytes())
    if vector.is_zero:
        raise UnusableVectorError("All directions of the vector are zero.")
    return vector
