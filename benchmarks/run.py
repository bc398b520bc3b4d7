"""Measure the cost of steering. `make bench` runs this; `benchmarks/README.md` explains the method."""

from __future__ import annotations

import time
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from steer_bench.answer import Answer, claims_of
from steer_bench.machine import machine
from steer_bench.process import ArmFailed
from steer_bench.report import TABLE, document, show
from steer_bench.settings import Settings

QUESTIONS = ("serve", "distinct", "prefix", "when", "language", "admission", "startup", "http")
QUICK = ("serve",)
PEERS = ("peers", "where", "derive", "evaluate")
RESULTS = Path(__file__).parent / "results"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def bench(
    questions: Annotated[
        list[str] | None,
        typer.Argument(help=f"Any of {', '.join((*QUESTIONS, *PEERS))}. Default: all but the last four."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One eager engine, steered compared with idle: minutes.")
    ] = False,
    peers: Annotated[bool, typer.Option("--peers", help="Also compare with other projects.")] = False,
    model: Annotated[str, typer.Option(help="Packaged model, path or Hugging Face id.")] = "smollm2-135m",
    dtype: Annotated[str, typer.Option(help="Dtype of weights and activations, for every arm.")] = "float32",
    memory: Annotated[float, typer.Option(help="--gpu-memory-utilization of each engine.")] = 0.2,
    out: Annotated[Path, typer.Option(help="Results folder: one JSON file per question, and a table.")] = RESULTS
    / "latest",
    again: Annotated[
        bool, typer.Option("--again", help="Measure questions again that have an answer in the folder.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Check these arguments and the flags of the servers, and measure nothing.")
    ] = False,
) -> None:
    """Run benchmarks with interleaved runs. A question with an answer in the folder is shown, not measured again.

    Example: python benchmarks/run.py serve --quick
    """
    from steer_engine.models import resolve_model

    console = Console(stderr=True)
    chosen = questions or [*(QUICK if quick else QUESTIONS), *(PEERS if peers else ())]
    unknown = set(chosen) - {*QUESTIONS, *PEERS}
    if unknown:
        raise typer.BadParameter(f"Unknown: {', '.join(sorted(unknown))}. Valid: {', '.join((*QUESTIONS, *PEERS))}.")
    if quick and out == RESULTS / "latest":
        out = RESULTS / "quick"
    settings = Settings(model=resolve_model(model), dtype=dtype, memory=memory)
    if plan:
        for name in chosen:
            _plan(name, settings)
        return
    about = {"machine": machine(), "settings": {**settings.to_json(), "model": model}, "quick": quick}
    console.print(f"{about['machine']['cpu']}, {about['machine']['cores']} cores, {model} in {dtype}", highlight=False)
    failed = [
        name for name in chosen if not _measure(name, settings, about, out, quick=quick, again=again, console=console)
    ]
    _write_table(out)
    console.print(f"Results in {out}")
    raise typer.Exit(1 if failed else 0)


def _plan(name: str, settings: Settings) -> None:
    """Import a question, and parse the flags of the server that it starts."""
    question = import_module(f"steer_bench.questions.{name}")
    assert callable(question.measure)
    if name == "http":
        from steer_bench.server import parse_flags

        parse_flags(settings)


def _measure(
    name: str, settings: Settings, about: dict[str, object], out: Path, *, quick: bool, again: bool, console: Console
) -> bool:
    """Measure one question, or show its saved answer. Returns False if an arm failed."""
    path = out / f"{name}.json"
    if path.exists() and not again:
        answer, _ = Answer.load(path)
        console.print(f"{name}: saved answer in {path}; use --again to measure again")
        show(answer, console)
        return True
    start = time.monotonic()
    with _progress(console) as progress:
        try:
            answer = import_module(f"steer_bench.questions.{name}").measure(settings, progress, quick=quick)
        except ArmFailed as error:
            console.print(f"{name}: {error}", markup=False, highlight=False, style="red")
            return False
        except AssertionError:
            # The setup is not as expected, so its timing would be wrong. The other questions can still run.
            console.print_exception()
            return False
    answer.save(path, {**about, "took_s": round(time.monotonic() - start)})
    show(answer, console)
    return True


def _progress(console: Console) -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True)


def _write_table(out: Path) -> None:
    """Write all claims of the folder as a Markdown table."""
    if claims := claims_of(out):
        (out / TABLE).write_text(document(claims))


if __name__ == "__main__":
    app()
