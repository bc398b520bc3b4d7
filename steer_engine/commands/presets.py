"""`steer-engine presets`: the presets of a running server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from steer_engine.commands.remote import DEFAULT_URL, Remote, Url
from steer_engine.errors import SteeringRequestError

app = typer.Typer(no_args_is_help=True, help="Presets of a running server: named steering, also served as models.")

Name = Annotated[str, typer.Argument(help="Name of a preset on the server.")]


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
def show(name: Name, url: Url = DEFAULT_URL) -> None:
    """Print a preset as JSON, as `put` takes it.

    Example: steer-engine presets show calm > calm.json
    """
    typer.echo(json.dumps(Remote(url).get("presets", name).json()["spec"], indent=2, ensure_ascii=False))


@app.command()
def put(
    name: Name,
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
def remove(name: Name, url: Url = DEFAULT_URL) -> None:
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
