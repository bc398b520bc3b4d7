"""A running server, asked for its vectors and presets. Needs nothing but the standard library."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import quote, urlencode

import typer

from steer_engine.errors import RegistryError

URL_ENV = "STEER_ENGINE_URL"
ADMIN_ENV = "STEER_ENGINE_ADMIN_KEY"
KEY_ENVS = ("STEER_ENGINE_API_KEY", "OPENAI_API_KEY", "VLLM_API_KEY")
DEFAULT_URL = "http://localhost:8000"
TIMEOUT_SECONDS = 60
MAX_ANSWER_BYTES = 1 << 30

Url = Annotated[str, typer.Option(envvar=URL_ENV, help="The server; the keys come from the environment.")]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the keys to wherever it says."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


@dataclass(frozen=True)
class Answer:
    """What a server said: its body, and the digest that it names (`ETag`)."""

    status: int
    body: bytes
    digest: str

    def json(self) -> dict[str, Any]:
        found = json.loads(self.body)
        assert isinstance(found, dict)
        return found


class Remote:
    """One server. Keys come from the environment only: other users of a machine can read its command lines.

    STEER_ENGINE_API_KEY (or OPENAI_API_KEY, VLLM_API_KEY) reads, STEER_ENGINE_ADMIN_KEY changes.
    """

    def __init__(self, url: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise RegistryError(f"{url} is not the URL of a server: it begins with http:// or https://.")
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1/steering"
        admin = os.environ.get(ADMIN_ENV, "")
        key = next((found for name in KEY_ENVS if (found := os.environ.get(name))), admin)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        if admin:
            self._headers["X-Steering-Admin-Key"] = admin

    def get(self, *path: str, **query: Any) -> Answer:
        return self._ask("GET", path, query=query)

    def ready(self) -> None:
        """Raises RegistryError, with the server's reason, unless it is ready to steer."""
        self._ask("GET", (), url=f"{self._base.removesuffix('/v1/steering')}/readyz")

    def put(self, *path: str, body: bytes, content_type: str, replace: bool) -> Answer:
        """Raises RegistryError where the name stands for something else, unless `replace`."""
        headers = {"Content-Type": content_type}
        if replace and (seen := self._digest_of(path)):
            headers["If-Match"] = f'"{seen}"'
        return self._ask("PUT", path, body=body, headers=headers)

    def post(self, *path: str, body: bytes) -> Answer:
        return self._ask("POST", path, body=body, headers={"Content-Type": "application/json"})

    def delete(self, *path: str) -> Answer:
        return self._ask("DELETE", path)

    def pages(self, what: str) -> list[dict[str, Any]]:
        """All entries of a list, page by page."""
        entries: list[dict[str, Any]] = []
        while True:
            page = self.get(what, after=entries[-1]["name"] if entries else "", limit=1000).json()
            entries += page["data"]
            if not page["has_more"]:
                return entries

    def _digest_of(self, path: tuple[str, ...]) -> str | None:
        try:
            return self.get(*path).digest
        except _Absent:
            return None

    def _ask(
        self,
        method: str,
        path: tuple[str, ...],
        *,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        query: dict[str, Any] | None = None,
        url: str | None = None,
    ) -> Answer:
        url = url or "/".join([self._base, *(quote(part, safe="") for part in path)])
        if query:
            url += f"?{urlencode(query)}"
        request = urllib.request.Request(url, data=body, headers=self._headers | (headers or {}), method=method)
        try:
            with _OPENER.open(request, timeout=TIMEOUT_SECONDS) as answer:
                digest = answer.headers.get("ETag", "").strip('"')
                return Answer(answer.status, answer.read(MAX_ANSWER_BYTES), digest)
        except urllib.error.HTTPError as error:
            kind = _Absent if error.code == 404 else RegistryError
            raise kind(f"{method} {url}: {error.code}: {_reason(error)}") from None
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise RegistryError(f"{url} cannot be reached ({reason}); say --url, or set {URL_ENV}.") from None


class _Absent(RegistryError):
    """404."""


def _reason(error: urllib.error.HTTPError) -> str:
    text = error.read(65536).decode(errors="replace")
    hint = f" (the key comes from {ADMIN_ENV} or {KEY_ENVS[0]})" if error.code in (401, 403) else ""
    try:
        found = json.loads(text)["error"]
        return str(found["message"] if isinstance(found, dict) else found) + hint
    except (ValueError, KeyError, TypeError):
        return text[:200].strip() + hint
