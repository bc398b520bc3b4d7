"""`steer-engine models`: the models that arrive as Python packages."""

from __future__ import annotations

from typing import Annotated

import typer

from steer_engine.errors import ModelError
from steer_engine.models import PACKAGED, checkpoint_path, get_model

app = typer.Typer(no_args_is_help=True, help="Packaged models: list them, or make one ready.")


@app.command()
def get(name: Annotated[str, typer.Argument(help="Name of a packaged model, such as smollm2-135m.")]) -> None:
    """Convert a packaged model to a normal checkpoint in the cache, and print its folder.

    Does nothing but check hashes if it is there. Example: steer-engine models get smollm2-135m
    """
    if name not in PACKAGED:
        raise ModelError(
            f"No packaged model is called {name!r}; there are: {', '.join(PACKAGED)}. "
            "A Hugging Face id or a path needs no `get`: give it to serve or derive."
        )
    typer.echo(get_model(PACKAGED[name]))


@app.command("list")
def list_models() -> None:
    """Show the packaged models and where their checkpoints are."""
    for model in PACKAGED.values():
        path = checkpoint_path(model)
        where = str(path) if path.exists() else f"not converted yet: steer-engine models get {model.name}"
        typer.echo(f"{model.name}\n  {model.title}\n  {model.license}; package {model.requirement}\n  {where}")
