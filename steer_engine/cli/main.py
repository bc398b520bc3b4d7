"""The command line, `steer-engine`. Commands import their modules when they run, so help is fast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from steer_engine import __version__
from steer_engine.cli import condition, features, pairs, probe, registry, vectors
from steer_engine.cli.registry import status
from steer_engine.errors import ModelError, SteerError
from steer_engine.models import PACKAGED, checkpoint_path, get_model

SERVE, DERIVE, MEASURE, MANAGE = "Serve", "Derive vectors", "Measure effects", "Vectors, presets and models"
"""Groups of commands in the help."""

EXTRAS = {"vllm": "cpu", "ray": "derive", "scipy": "derive", "matplotlib": "report", "datasets": "datasets"}
"""Modules that come by an extra. On a GPU machine, vLLM's is `cuda`."""

models_app = typer.Typer(no_args_is_help=True, help="Packaged models: list them, or convert one.")

app = typer.Typer(
    name="steer-engine",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="[bold]Start here[/bold]\n\n"
    "steer-engine derive smollm2-135m --pairs sentiment --blocks 8-19 --out vectors/cheerful.safetensors\n\n"
    "steer-engine vectors show vectors/\n\n"
    "steer-engine serve smollm2-135m --steering-vectors vectors/",
)
app.add_typer(models_app, name="models", rich_help_panel=MANAGE)
app.add_typer(condition.app, name="condition", rich_help_panel=DERIVE)
app.add_typer(pairs.app, name="pairs", rich_help_panel=DERIVE)
app.add_typer(probe.app, name="probe", rich_help_panel=DERIVE)
app.add_typer(features.app, name="features", rich_help_panel=MANAGE)
app.add_typer(registry.app, name="presets", rich_help_panel=MANAGE)
app.add_typer(vectors.app, name="vectors", rich_help_panel=MANAGE)
app.command(rich_help_panel=SERVE)(status)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"steer-engine {__version__}")
        raise typer.Exit


@app.callback()
def steer_engine(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Serve steered language models: control vectors per request, on vLLM.

    MODEL is a Hugging Face id, a path, or a packaged model (`steer-engine models list`).
    """


_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Settings of a command that passes all its arguments to another parser, imported when the command runs."""


@app.command(add_help_option=False, context_settings=_PASS_ON, rich_help_panel=SERVE)
def serve(context: typer.Context) -> None:
    """Serve MODEL through vLLM's own OpenAI-compatible server, armed for steering."""
    from steer_engine.cli.checks import check_start
    from steer_engine.cli.serve import help_text, wants_help

    if wants_help(context.args):
        typer.echo(help_text())
        return
    check_start(context.args)
    from steer_engine.vllm.launch import serve as run

    raise typer.Exit(run(context.args))


@app.command(add_help_option=False, context_settings=_PASS_ON, rich_help_panel=SERVE)
def doctor(context: typer.Context) -> None:
    """Check whether MODEL can be served steered, how, and with how much memory; if not, why."""
    from steer_engine.cli.doctor import doctor as run

    raise typer.Exit(run(context.args))


@app.command(add_help_option=False, context_settings=_PASS_ON, rich_help_panel=SERVE)
def batch(context: typer.Context) -> None:
    """Answer a file of requests in OpenAI's batch format. A second run continues where the first stopped.

    Example:

        steer-engine batch in.jsonl out.jsonl --model smollm2-135m --steering-vectors vectors/
    """
    from steer_engine.cli.batch import batch as run

    raise typer.Exit(run(context.args))


@app.command(add_help_option=False, context_settings=_PASS_ON, rich_help_panel=DERIVE)
def derive(context: typer.Context) -> None:
    """Derive a control vector from contrast pairs, with the engine that serves it."""
    from steer_engine.cli.derive import derive_command

    _run_parser(context, derive_command)


@app.command(add_help_option=False, context_settings=_PASS_ON, rich_help_panel=DERIVE)
def dump(context: typer.Context) -> None:
    """Capture the residual stream of texts into a folder. A second run continues where the first stopped."""
    from steer_engine.cli.derive import dump_command

    _run_parser(context, dump_command)


@app.command(add_help_option=False, context_settings=_PASS_ON, rich_help_panel=DERIVE)
def fit(context: typer.Context) -> None:
    """Fit a control vector to an activation dump."""
    from steer_engine.cli.derive import fit_command

    _run_parser(context, fit_command)


@app.command("eval", add_help_option=False, context_settings=_PASS_ON, rich_help_panel=MEASURE)
def evaluate(context: typer.Context) -> None:
    """Measure the effect of a control vector on a task, its side effects, and controls."""
    from steer_engine.cli.evaluate import eval_command

    _run_parser(context, eval_command)


@app.command(add_help_option=False, context_settings=_PASS_ON, rich_help_panel=MEASURE)
def search(context: typer.Context) -> None:
    """Try vectors, blocks and strengths on tasks, and test the best point of each against controls and prompts."""
    from steer_engine.cli.evaluate import search_command

    _run_parser(context, search_command)


@app.command(add_help_option=False, context_settings=_PASS_ON, rich_help_panel=MEASURE)
def paper(context: typer.Context) -> None:
    """Run the protocol of Højer et al. (ICLR 2025) on a model, and a stricter one."""
    from steer_engine.cli.evaluate import paper_command

    _run_parser(context, paper_command)


@app.command(add_help_option=False, context_settings=_PASS_ON, rich_help_panel=MEASURE)
def calibrate(context: typer.Context) -> None:
    """Find the dose that helps a task most within a bound on KL, and store it in the vector's file."""
    from steer_engine.cli.evaluate import calibrate_command

    _run_parser(context, calibrate_command)


@models_app.command("get")
def get_packaged_model(
    name: Annotated[str, typer.Argument(help="Name of a packaged model, such as smollm2-135m.")],
    accept_license: Annotated[
        bool, typer.Option("--accept-license", help="Accept the model's licence, if it has terms of its own.")
    ] = False,
) -> None:
    """Convert a packaged model to a normal checkpoint in the cache, and print its folder.

    If it is there already, only checks its hashes. Without --accept-license, says where the terms are of a model that
    has some. Example: steer-engine models get smollm2-135m
    """
    if name not in PACKAGED:
        raise ModelError(
            f"There is no packaged model {name!r}; valid names: {', '.join(PACKAGED)}. "
            "A Hugging Face id or a path needs no `get`: pass it to serve or derive."
        )
    typer.echo(get_model(PACKAGED[name], accept_license=accept_license))


@models_app.command("list")
def list_models() -> None:
    """Show the packaged models and where their checkpoints are."""
    for model in PACKAGED.values():
        path = checkpoint_path(model)
        where = str(path) if path.exists() else f"not converted yet: steer-engine models get {model.name}"
        terms = f" ({model.terms.url})" if model.terms else ""
        package = f"package {model.requirement}"
        typer.echo(f"{model.name}\n  {model.title}\n  {model.license}{terms}; {package}\n  {where}")


def _run_parser(context: typer.Context, function: Callable[..., None]) -> None:
    """Run a command with a parser of its own."""
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    command.command(context_settings={"help_option_names": ["-h", "--help"]})(function)
    command(args=context.args, prog_name=context.command_path)


def main() -> None:
    """Entry point of the console script. Prints a user's error as one line, without a traceback."""
    try:
        app()
    except SteerError as error:
        message = error.message
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS:
            raise
        name = "vLLM" if module == "vllm" else module
        message = f"{name} is missing: pip install 'steer-engine[{EXTRAS[module]}]'"
        if module == "vllm":
            message += ", or on a GPU machine 'steer-engine[cuda]'"
    else:
        return
    Console(stderr=True, soft_wrap=True, highlight=False).print("[bold red]error:[/bold red]", Text(message))
    raise SystemExit(1)
