"""What the handlers of our own routes share: the state of the app, errors as answers, and who may change things."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from steer_engine.errors import CapacityError, SteerError, SteeringRequestError
from steer_engine.serving.envelope import envelope_of, status_of
from steer_engine.spec_errors import shown


class Refused(SteeringRequestError):
    """A request that is refused for another reason than what it asks: 401, 403, 415."""

    def __init__(self, message: str, status: int, param: str | None = None) -> None:
        super().__init__(message, param)
        self.status = status


def failed(error: SteerError) -> JSONResponse:
    """An error as an answer."""
    headers = {}
    if status_of(error) == 503:
        headers["Retry-After"] = str(max(1, round(getattr(error, "retry_after", 1.0))))
    if status_of(error) == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(envelope_of(error), status_code=status_of(error), headers=headers)


class SteeringRoute(APIRoute):
    """A route whose handler may raise a SteerError. What FastAPI refuses itself is told alike, its value cut short."""

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
                # Nobody reads it; without an answer the server would log 70 lines of its own stack.
                response = failed(SteeringRequestError("The request broke off.", "body"))
            return response

        return handler


def _wrong_parameter(invalid: RequestValidationError) -> SteeringRequestError:
    first = invalid.errors()[0]
    name = str(first["loc"][-1])
    return SteeringRequestError(f"{name}: {first['msg']}, not {shown(first.get('input'))}.", name)


def frontend_of(request: Request) -> Any:
    """The armed `Frontend` of this process. Raises CapacityError where it is not armed."""
    frontend = request.app.state.steering_frontend
    if not frontend.armed:
        raise CapacityError("This server is not armed for steering; start it with 'steer-engine serve'.")
    return frontend


def require_admin(request: Request) -> None:
    """Raise unless the caller may change the registry."""
    keys = request.app.state.steering_admin_keys
    if not keys.configured:
        raise Refused(
            "Changes are switched off: this server has no admin key (STEER_ENGINE_ADMIN_KEYS or "
            "STEER_ENGINE_ADMIN_KEY_FILE).",
            403,
        )
    if not keys.allow(request.headers):
        raise Refused("An admin key is needed: as bearer token, or in X-Steering-Admin-Key.", 401)


def if_match(request: Request) -> str | None:
    """The digest that the caller has seen, `*` for any, None where nothing is said."""
    value: str | None = request.headers.get("if-match")
    return None if value is None else value.strip().strip('"')


def etag(digest: str) -> dict[str, str]:
    return {"ETag": f'"{digest}"'}
