"""Commands for the registry of a running server: its vectors and presets, and `steer-engine status`.

Requests use the standard library only.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote, urlencode

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from steer_engine.errors import RegistryError, SteeringRequestError, VectorFileError
from steer_engine.fields import block_ranges, without_password
from steer_engine.settings import ADMIN_KEY_ENV, API_KEY_ENVS, URL_ENV

if TYPE_CHECKING:
    from steer_engine.vectors.files import AnyVector

DEFAULT_URL = "http://localhost:8000"
TIMEOUT_SECONDS = 60
MAX_ANSWER_BYTES = 1 << 30
PIPED_WIDTH = 10_000
"""Columns; wider than any table."""

Url = Annotated[str, typer.Option(envvar=URL_ENV, help="URL of the server. Keys are read from the environment.")]
VectorName = Annotated[str, typer.Argument(help="Name of a vector on the server.")]
PresetName = Annotated[str, typer.Argument(help="Name of a preset on the server.")]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Does not follow redirects, because they would send the keys to another server."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


@dataclass(frozen=True)
class Answer:
    """A server's answer. digest: from the header `ETag`."""

    status: int
    body: bytes
    digest: str

    def json(self) -> dict[str, Any]:
        found = json.loads(self.body)
        assert isinstance(found, dict)
        return found


class Remote:
    """A client of one server. All methods raise RegistryError, with the server's reason.

    Keys are read from the environment only, because other users of a machine can read its command lines.
    The first of `API_KEY_ENVS` that is set is for reading, `ADMIN_KEY_ENV` for changes.
    """

    def __init__(self, url: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise RegistryError(f"{url} is not the URL of a server; it must begin with http:// or https://.")
        if (clean := without_password(url)) != url:  # this client would not send it
            raise RegistryError(
                f"The URL {clean} was given with a user or password; keys are read from {ADMIN_KEY_ENV} and "
                f"{API_KEY_ENVS[0]}."
            )
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1/steering"
        admin = os.environ.get(ADMIN_KEY_ENV, "")
        key = next((found for name in API_KEY_ENVS if (found := os.environ.get(name))), admin)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        if admin:
            self._headers["X-Steering-Admin-Key"] = admin

    def get(self, *path: str, **query: Any) -> Answer:
        return self._request("GET", path, query=query)

    def ready(self) -> None:
        """Raise RegistryError unless the server is ready to steer."""
        self._request("GET", (), url=f"{self._base.removesuffix('/v1/steering')}/readyz")

    def put(self, *path: str, body: bytes, content_type: str, replace: bool) -> Answer:
        """Upload `body`. If the name has other content, replace it (`replace`) or raise RegistryError."""
        headers = {"Content-Type": content_type}
        if replace and (found := self._digest_of(path)):
            headers["If-Match"] = f'"{found}"'
        return self._request("PUT", path, body=body, headers=headers)

    def post(self, *path: str, body: bytes) -> Answer:
        return self._request("POST", path, body=body, headers={"Content-Type": "application/json"})

    def delete(self, *path: str) -> Answer:
        return self._request("DELETE", path)

    def pages(self, what: str) -> list[dict[str, Any]]:
        """All entries of a list, fetched page by page."""
        entries: list[dict[str, Any]] = []
        while True:
            page = self.get(what, after=entries[-1]["name"] if entries else "", limit=1000).json()
            entries += page["data"]
            if not page["has_more"]:
                return entries

    def _digest_of(self, path: tuple[str, ...]) -> str | None:
        try:
            return self.get(*path).digest
        except _NotFound:
            return None

    def _request(
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
            kind = _NotFound if error.code == 404 else RegistryError
            with error:  # it holds the connection
                raise kind(f"{method} {url}: {error.code}: {_reason(error)}") from None
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise RegistryError(f"{url} is unreachable ({reason}); set --url or {URL_ENV}.") from None


class _NotFound(RegistryError):
    """The server answered 404."""


def _reason(error: urllib.error.HTTPError) -> str:
    text = error.read(65536).decode(errors="replace")
    hint = f" (the key is read from {ADMIN_KEY_ENV} or {API_KEY_ENVS[0]})" if error.code in (401, 403) else ""
    try:
        found = json.loads(text)["error"]
        return str(found["message"] if isinstance(found, dict) else found) + hint
    except (ValueError, KeyError, TypeError):
        return text[:200].strip() + hint


def status(
    url: Url = DEFAULT_URL,
    counters: Annotated[
        bool, typer.Option("--counters", help="Include the counters of the API process and its engine.")
    ] = False,
) -> None:
    """Print a server's model, blocks, operations and limits as JSON. Fails unless the server is ready to steer.

    Blocks are ranges, such as "0-29"; `GET /v1/steering` lists their numbers.

    Example: steer-engine status --url http://localhost:8000
    """
    remote = Remote(url)
    remote.ready()
    found = remote.get().json()
    for name in ("armed_blocks", "capture_blocks"):
        found[name] = block_ranges(found[name])
    if counters:
        found["stats"] = remote.get("stats").json()
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False))


def new_table(*columns: str, folded: tuple[str, ...] = (), title: str | None = None) -> Table:
    """A table without frame: twelve columns of numbers fit 80 characters.

    folded: columns whose cells may take several lines if the terminal is narrow. No cell is cut.
    """
    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    for name in columns:
        table.add_column(name, overflow="fold", no_wrap=name not in folded)
    return table


def print_table(table: Table, *, stderr: bool = False) -> None:
    """Print a table. If the output is piped, it is as wide as the table, so that no cell is cut or wrapped."""
    is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
    Console(stderr=stderr, width=None if is_terminal else PIPED_WIDTH).print(table)


def short_digest(digest: str) -> str:
    """The first 12 hexadecimal digits for a terminal, the whole digest for a pipe."""
    return digest[: len("sha256:") + 12] if sys.stdout.isatty() else digest


def fetched(name: str, url: str) -> AnyVector:
    """A vector or a row set of a server, verified by its digest. Raises RegistryError, VectorFileError."""
    from steer_engine.vectors.files import from_safetensors

    answer = Remote(url).get("vectors", name, download="")
    vector = from_safetensors(answer.body)
    if vector.digest != answer.digest:
        raise VectorFileError(f"The server announced {answer.digest} but sent {vector.digest}.")
    return vector


def list_vectors(url: Url = DEFAULT_URL) -> None:
    """List the vectors of a server.

    Example: steer-engine vectors list --url http://localhost:8000
    """
    table = new_table("name", "digest", folded=("name",))
    for entry in Remote(url).pages("vectors"):
        table.add_row(entry["name"], short_digest(entry["digest"]))
    print_table(table)


def add(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A vector file, safetensors or GGUF.")],
    name: Annotated[str, typer.Option(help="Name on the server (default: the file's stem).")] = "",
    replace: Annotated[bool, typer.Option("--replace", help="Replace the current content of the name.")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Upload a vector to a server. The next request can use it. Needs STEER_ENGINE_ADMIN_KEY.

    Example: steer-engine vectors add cheerful.safetensors --url http://localhost:8000
    """
    from steer_engine.vectors.files import load_any

    vector = load_any(file)  # reports an unusable file before it is sent
    answer = Remote(url).put(
        "vectors", name or file.stem, body=file.read_bytes(), content_type="application/octet-stream", replace=replace
    )
    if answer.digest != vector.digest:
        raise VectorFileError(f"The server stored {answer.digest}, but {file} is {vector.digest}.")
    typer.echo(f"{name or file.stem}: {answer.digest}{' (new)' if answer.status == 201 else ''}")


def remove_vector(name: VectorName, url: Url = DEFAULT_URL) -> None:
    """Delete a vector from a server. Running requests that use it are completed. Needs STEER_ENGINE_ADMIN_KEY.

    Example: steer-engine vectors rm cheerful
    """
    removed = Remote(url).delete("vectors", name).json()
    typer.echo(f"{name}: {removed['digest']} removed; {removed['in_flight']} running requests use it")


def pull(
    name: Annotated[
        str,
        typer.Argument(
            help="Name or digest of a vector on the server, or hf://OWNER/REPO@REVISION/FILE, where @REVISION and "
            "/FILE may be left out."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="File to write (default: NAME.safetensors).")] = None,
    kind: Annotated[str, typer.Option(help="Kind of a single file of the hub, as in `vectors import`.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Download a vector from a server, verified by its digest, or from a repository of the Hugging Face hub.

    On the hub: files of Steer Engine, GGUF control vectors, and files of other tools, such as persona vectors (.pt),
    which are read without running code. HF_TOKEN opens private repositories, HF_ENDPOINT names another hub. Without
    FILE, the repository must have one vector only.

    Examples:

    steer-engine vectors pull cheerful --out cheerful.gguf

    steer-engine vectors pull hf://OWNER/vectors/cheerful.safetensors

    steer-engine vectors pull hf://OWNER/persona@main/evil_response_avg_diff.pt --out evil.safetensors
    """
    from steer_engine.vectors import hub
    from steer_engine.vectors.files import SUFFIXES, save

    is_on_hub = name.startswith(hub.PREFIX)
    stem = hub.Address.parse(name).stem if is_on_hub else name.removeprefix("sha256:")[:128]
    target = out or Path(f"{stem}.safetensors")
    if target.suffix not in SUFFIXES:
        raise VectorFileError(f"{target}: the name of the file must end in {' or '.join(SUFFIXES)}.")
    if kind != "auto" and not is_on_hub:
        raise VectorFileError(f"--kind is for files of the hub (hf://OWNER/REPO/FILE); {name} is a server's vector.")
    if target.exists() and not force:
        raise VectorFileError(f"{target}: the file exists; choose another with --out, or replace it with --force.")
    vector = hub.pull(name, kind=kind) if is_on_hub else fetched(name, url)
    save(vector, target)
    typer.echo(f"{target}: {vector.digest}")


app = typer.Typer(no_args_is_help=True, help="Presets of a running server: named steering, also available as models.")


@app.command("list")
def list_presets(url: Url = DEFAULT_URL) -> None:
    """List the presets of a server and the vectors that they use.

    Example: steer-engine presets list --url http://localhost:8000
    """
    from steer_engine.vectors.manifest import vectors_of

    table = new_table("name", "vectors", "digest", folded=("name", "vectors"))
    for entry in Remote(url).pages("presets"):
        vectors = sorted(vectors_of(entry["spec"]))
        table.add_row(entry["name"], ", ".join(vectors), short_digest(entry["digest"]))
    print_table(table)


@app.command()
def show(name: PresetName, url: Url = DEFAULT_URL) -> None:
    """Print a preset as JSON, in the form that `put` accepts.

    Example: steer-engine presets show calm > calm.json
    """
    typer.echo(json.dumps(Remote(url).get("presets", name).json()["spec"], indent=2, ensure_ascii=False))


@app.command()
def put(
    name: PresetName,
    spec: Annotated[str, typer.Argument(help="A JSON file, or JSON: the value of a request's `steering`.")],
    replace: Annotated[bool, typer.Option("--replace", help="Replace the current content of the name.")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Store steering under a name on a server. Needs STEER_ENGINE_ADMIN_KEY.

    Example: steer-engine presets put calm '{"edits": [{"vector": "cheerful", "scale": -0.2}]}'
    """
    body = json.dumps(_read_json(spec)).encode()
    answer = Remote(url).put("presets", name, body=body, content_type="application/json", replace=replace)
    typer.echo(f"{name}: {answer.digest}{' (new)' if answer.status == 201 else ''}")


@app.command()
def check(
    spec: Annotated[str, typer.Argument(help="A JSON file, or JSON: the value of a request's `steering`.")],
    url: Url = DEFAULT_URL,
) -> None:
    """Print what a server would apply for this steering: digest, edits, rows, dose. Stores nothing.

    Example: steer-engine presets check '{"edits": [{"vector": "cheerful", "scale": -0.2}]}'
    """
    body = json.dumps(_read_json(spec)).encode()
    typer.echo(json.dumps(Remote(url).post("validate", body=body).json(), indent=2, ensure_ascii=False))


@app.command("rm")
def remove_preset(name: PresetName, url: Url = DEFAULT_URL) -> None:
    """Delete a preset from a server. Needs STEER_ENGINE_ADMIN_KEY.

    Example: steer-engine presets rm calm
    """
    Remote(url).delete("presets", name)
    typer.echo(f"{name}: removed")


def _read_json(spec: str) -> Any:
    where = "The text" if spec.lstrip().startswith("{") else spec
    try:
        return json.loads(spec if where == "The text" else Path(spec).read_text())
    except OSError as error:
        raise SteeringRequestError(f"{spec[:200]} is neither JSON nor a readable file: {error.strerror}.") from None
    except ValueError as error:
        raise SteeringRequestError(f"{where[:200]} is not JSON: {error}.") from None
