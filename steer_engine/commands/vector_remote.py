"""`steer-engine vectors list`, `add`, `rm` and `pull`: the vectors of a running server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from steer_engine.commands.remote import DEFAULT_URL, Remote, Url
from steer_engine.errors import VectorFileError

if TYPE_CHECKING:
    from steer_engine.vectors import ControlVector

Name = Annotated[str, typer.Argument(help="Name of a vector on the server.")]


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


def remove(name: Name, url: Url = DEFAULT_URL) -> None:
    """Take a vector off a server; requests that run with it finish. Needs STEER_ENGINE_ADMIN_KEY.

    Example: steer-engine vectors rm cheerful
    """
    gone = Remote(url).delete("vectors", name).json()
    typer.echo(f"{name}: {gone['digest']} removed; {gone['in_flight']} requests use it still")


def pull(
    name: Annotated[str, typer.Argument(help="Name or digest of a vector on the server.")],
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
