"""What the handlers of our own routes share: admin keys, errors as answers, conditional requests, the change log."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from steer_engine.api.answers import envelope_of, status_of
from steer_engine.api.frontend import Frontend
from steer_engine.errors import CapacityError, SteerError, SteeringRequestError, VectorFileError
from steer_engine.fields import shown
from steer_engine.settings import ADMIN_KEY_FILE_ENV, ADMIN_KEYS_ENV
from steer_engine.vectors.storage import FileSignature, file_signature, read_file

HEADER = "x-steering-admin-key"
MIN_KEY_CHARS = 16
MAX_KEY_FILE_BYTES = 1 << 20

MAX_REQUEST_ID_CHARS = 128

logger = logging.getLogger(__name__)
change_log = logging.getLogger("steer_engine.registry")


class AdminKeys:
    """The keys that may change the registry, from the environment or a file, compared in constant time.

    Only digests are kept. Keys never come from the command line, which other users of the machine can read.
    """

    def __init__(self, keys: list[str], file: Path | None = None) -> None:
        self._given = _digests(keys)
        self._file = file
        self._file_state: tuple[FileSignature | None, tuple[bytes, ...]] = (None, ())

    @classmethod
    def from_environment(cls) -> AdminKeys:
        file = os.environ.get(ADMIN_KEY_FILE_ENV)
        keys = os.environ.get(ADMIN_KEYS_ENV, "").split(",")
        return cls(keys, Path(file) if file else None)

    @property
    def configured(self) -> bool:
        """Whether there is any key."""
        return bool(self._digests())

    def plain_keys(self) -> list[str]:
        """The keys as configured now, for vLLM's own list of keys that may call `/v1`."""
        keys = os.environ.get(ADMIN_KEYS_ENV, "").split(",")
        if self._file is not None:
            keys += _read_keys(self._file)
        return [key for key in _stripped(keys) if len(key) >= MIN_KEY_CHARS]

    def allow(self, headers: Mapping[str, str]) -> bool:
        """Whether the headers hold an admin key: in `X-Steering-Admin-Key`, or as bearer token."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = [headers.get(HEADER, ""), token if scheme.lower() == "bearer" else ""]
        known = self._digests()
        allowed = False
        for key in given:
            digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
            for each in known:
                allowed |= bool(key) and secrets.compare_digest(digest, each)
        return allowed

    def _digests(self) -> tuple[bytes, ...]:
        if self._file is None:
            return self._given
        try:
            signature = file_signature(self._file)
        except OSError as error:
            logger.error("The admin key file %s cannot be read: %s.", self._file, error.strerror)
            return self._given
        if signature != self._file_state[0]:
            self._file_state = (signature, _digests(_read_keys(self._file)))
        return self._given + self._file_state[1]


def _read_keys(file: Path) -> list[str]:
    """The lines of a key file. A file that cannot be read has no keys: removing it revokes them."""
    try:
        return read_file(file, MAX_KEY_FILE_BYTES)[0].decode("utf-8-sig").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError, VectorFileError) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "message", "it is not UTF-8 text").rstrip(".")
        logger.error("The admin key file %s cannot be read: %s.", file, reason)
        return []


def _digests(keys: list[str]) -> tuple[bytes, ...]:
    stripped = _stripped(keys)
    for key in stripped:
        if len(key) < MIN_KEY_CHARS:
            logger.error("An admin key has %d characters and is ignored; the minimum is %d.", len(key), MIN_KEY_CHARS)
    return tuple(hashlib.sha256(key.encode()).digest() for key in stripped if len(key) >= MIN_KEY_CHARS)


def _stripped(keys: list[str]) -> list[str]:
    """The keys without empty lines and comments."""
    return [key.strip() for key in keys if key.strip() and not key.strip().startswith("#")]


class Refused(SteeringRequestError):
    """A refusal that is not about the request's content: 401, 403, 415."""

    def __init__(self, message: str, status: int, param: str | None = None) -> None:
        super().__init__(message, param)
        self.status = status


def failed(error: SteerError) -> JSONResponse:
    """The answer for an error."""
    headers = {}
    if status_of(error) == 503:
        headers["Retry-After"] = str(max(1, round(getattr(error, "retry_after", 1.0))))
    if status_of(error) == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(envelope_of(error), status_code=status_of(error), headers=headers)


class SteeringRoute(APIRoute):
    """A route whose handler may raise a SteerError. FastAPI's own validation errors get the same form, with short
    values."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                response: Response = await handle(request)
            except RequestValidationError as invalid:
                response = failed(_wrong_parameter(invalid))
            except SteerError as error:
                response = failed(error)
            except ClientDisconnect:
                # Nobody reads this answer; without one the server would log a stack of 70 lines.
                response = failed(SteeringRequestError("The client closed the connection.", "body"))
            return response

        return handler


def _wrong_parameter(invalid: RequestValidationError) -> SteeringRequestError:
    first = invalid.errors()[0]
    name = str(first["loc"][-1])
    return SteeringRequestError(f"{name}: {first['msg']}, not {shown(first.get('input'))}.", name)


def frontend_of(request: Request) -> Frontend:
    """The armed frontend of this process. Raises CapacityError where it is not armed."""
    frontend: Frontend = request.app.state.steering_frontend
    if not frontend.armed:
        raise CapacityError("This server is not armed for steering; start it with 'steer-engine serve'.")
    return frontend


def require_admin(request: Request) -> None:
    """Raise unless the caller may change the registry."""
    keys = request.app.state.steering_admin_keys
    if not keys.configured:
        raise Refused(
            f"Changes are disabled: this server has no admin key ({ADMIN_KEYS_ENV} or {ADMIN_KEY_FILE_ENV}).",
            403,
        )
    if not keys.allow(request.headers):
        raise Refused("This request needs an admin key, as bearer token or in X-Steering-Admin-Key.", 401)


def if_match(request: Request) -> str | None:
    """The digest in `If-Match`, `*` for any version, None without the header."""
    value: str | None = request.headers.get("if-match")
    return None if value is None else value.strip().strip('"')


def etag(digest: str) -> dict[str, str]:
    return {"ETag": f'"{digest}"'}


def log_change(request: Request, change: str, what: str, name: str, digest: str) -> None:
    """Log a change of the registry as one line of JSON.

    change: put, replace or delete. what: vector or preset. digest: the new content, or the deleted one.
    """
    line = {"change": change, what: name, "digest": digest}
    if request_id := request.headers.get("x-request-id"):
        line["request_id"] = request_id[:MAX_REQUEST_ID_CHARS]
    change_log.info("changed %s", json.dumps(line, separators=(",", ":")))
