"""A running server, asked for its vectors and presets. Needs nothing but the standard library."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote, urlencode

import typer
from rich.console import Console
from rich.table import Table

from steer_engine.errors import RegistryError, SteeringRequestError, VectorFileError

if TYPE_CHECKING:
    from steer_engine.vectors import ControlVector


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


def status(
    url: Url = DEFAULT_URL,
    counters: Annotated[bool, typer.Option("--counters", help="Also the counters of the API and its engine.")] = False,
) -> None:
    """Print as JSON what a server can do: model, blocks, operations, limits; fails unless it is ready to steer.

    Example: steer-engine status --url http://localhost:8000
    """
    remote = Remote(url)
    remote.ready()
    found = remote.get().json()
    if counters:
        found["stats"] = remote.get("stats").json()
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False))


VectorName = Annotated[str, typer.Argument(help="VectorName of a vector on the server.")]


def fetched(name: str, url: str) -> ControlVector:
    """A vector of a server, after checking that it is what its digest says. Raises RegistryError, VectorFileError."""
    from steer_engine.vectors.safetensors_format import from_bytes

    answer = Remote(url).get("vectors", name, download="")
    vector = from_bytes(answer.body)
    if vector.digest != answer.digest:
        raise VectorFileError(f"The server promised {answer.digest} and sent {vector.digest}.")
    return vector


def list_vectors(url: Url = DEFAULT_URL) -> None:
    """List the vectors of a server.

    Example: steer-engine vectors list --url http://localhost:8000
    """
    table = Table("name", "digest")
    for entry in Remote(url).pages("vectors"):
        table.add_row(entry["name"], entry["digest"])
    Console(soft_wrap=True).print(table)


def add(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A control vector, safetensors or GGUF.")],
    name: Annotated[str, typer.Option(help="Its name on the server; the file's stem if not given.")] = "",
    replace: Annotated[bool, typer.Option("--replace", help="Replace what the name stands for now.")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Put a vector on a server, where it steers the next request. Needs STEER_ENGINE_ADMIN_KEY.

    Example: steer-engine vectors add cheerful.safetensors --url http://localhost:8000
    """
    from steer_engine.vectors import load

    vector = load(file)  # so that a broken file is named here, in one sentence
    answer = Remote(url).put(
        "vectors", name or file.stem, body=file.read_bytes(), content_type="application/octet-stream", replace=replace
    )
    if answer.digest != vector.digest:
        raise VectorFileError(f"The server keeps {answer.digest}, but {file} is {vector.digest}.")
    typer.echo(f"{name or file.stem}: {answer.digest}{' (new)' if answer.status == 201 else ''}")


def remove_vector(name: VectorName, url: Url = DEFAULT_URL) -> None:
    """Take a vector off a server; requests that run with it finish. Needs STEER_ENGINE_ADMIN_KEY.

    Example: steer-engine vectors rm cheerful
    """
    gone = Remote(url).delete("vectors", name).json()
    typer.echo(f"{name}: {gone['digest']} removed; {gone['in_flight']} requests use it still")


def pull(
    name: Annotated[str, typer.Argument(help="VectorName or digest of a vector on the server.")],
    out: Annotated[Path | None, typer.Option(help="File to write; NAME.safetensors if not given.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if there is one.")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Fetch a vector from a server and write it as a file, after checking that it is what its digest says.

    Example: steer-engine vectors pull cheerful --out cheerful.gguf
    """
    from steer_engine.vectors.files import SUFFIXES, save

    target = out or Path(f"{name.removeprefix('sha256:')[:128]}.safetensors")
    if target.suffix not in SUFFIXES:
        raise VectorFileError(f"{target}: the file's name must end in {' or '.join(SUFFIXES)}.")
    if target.exists() and not force:
        raise VectorFileError(f"{target}: there is such a file already; choose another with --out, or --force.")
    vector = fetched(name, url)
    save(vector, target)
    typer.echo(f"{target}: {vector.digest}")


app = typer.Typer(no_args_is_help=True, help="Presets of a running server: named steering, also served as models.")

PresetName = Annotated[str, typer.Argument(help="PresetName of a preset on the server.")]


@app.command("list")
def list_presets(url: Url = DEFAULT_URL) -> None:
    """List the presets of a server, and the vectors that they use.

    Example: steer-engine presets list --url http://localhost:8000
    """
    table = Table("name", "vectors", "digest")
    for entry in Remote(url).pages("presets"):
        vectors = ", ".join(str(edit["vector"]) for edit in entry["spec"]["edits"])
        table.add_row(entry["name"], vectors, entry["digest"][: len("sha256:") + 12])
    Console(soft_wrap=True).print(table)


@app.command()
def show(name: PresetName, url: Url = DEFAULT_URL) -> None:
    """Print a preset as JSON, as `put` takes it.

    Example: steer-engine presets show calm > calm.json
    """
    typer.echo(json.dumps(Remote(url).get("presets", name).json()["spec"], indent=2, ensure_ascii=False))


@app.command()
def put(
    name: PresetName,
    spec: Annotated[str, typer.Argument(help="A JSON file, or the JSON itself: what a request's `steering` says.")],
    replace: Annotated[bool, typer.Option("--replace", help="Replace what the name stands for now.")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Keep steering under a name on a server. Needs STEER_ENGINE_ADMIN_KEY.

    Example: steer-engine presets put calm '{"edits": [{"vector": "cheerful", "scale": -0.2}]}'
    """
    body = json.dumps(_read(spec)).encode()
    answer = Remote(url).put("presets", name, body=body, content_type="application/json", replace=replace)
    typer.echo(f"{name}: {answer.digest}{' (new)' if answer.status == 201 else ''}")


@app.command()
def check(
    spec: Annotated[str, typer.Argument(help="A JSON file, or the JSON itself: what a request's `steering` says.")],
    url: Url = DEFAULT_URL,
) -> None:
    """Print what a request with this steering would get from a server: digest, edits, rows, dose. Keeps nothing.

    Example: steer-engine presets check '{"edits": [{"vector": "cheerful", "scale": -0.2}]}'
    """
    body = json.dumps(_read(spec)).encode()
    typer.echo(json.dumps(Remote(url).post("validate", body=body).json(), indent=2, ensure_ascii=False))


@app.command("rm")
def remove_preset(name: PresetName, url: Url = DEFAULT_URL) -> None:
    """Take a preset off a server. Needs STEER_ENGINE_ADMIN_KEY.

    Example: steer-engine presets rm calm
    """
    Remote(url).delete("presets", name)
    typer.echo(f"{name}: removed")


def _read(spec: str) -> Any:
    where = "The text" if spec.lstrip().startswith("{") else spec
    try:
        return json.loads(spec if where == "The text" else Path(spec).read_text())
    except OSError as error:
        raise SteeringRequestError(
            f"{spec[:200]} is neither JSON nor a file that can be read: {error.strerror}."
        ) from None
    except ValueError as error:
        raise SteeringRequestError(f"{where[:200]} is not JSON: {error}.") from None
