"""`steer-engine status`: what a running server can do, and how it does."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from steer_engine.commands.remote import DEFAULT_URL, Remote, Url


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
