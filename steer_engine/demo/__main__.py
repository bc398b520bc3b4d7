"""Derive a vector, serve the model, ask, score, stop: `make demo`. Exit status 1 if the effect is not there."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from steer_engine import __version__
from steer_engine.demo import scoring
from steer_engine.demo.scoring import Shift, Side, find_faults, shift
from steer_engine.demo.server import (
    MAX_TOKENS,
    REPETITION_PENALTY,
    Asker,
    Reply,
    Server,
    describe_machine,
    describe_software,
    gpu_name,
    steering,
)
from steer_engine.errors import SteerError
from steer_engine.models import MANIFEST, PACKAGED, cache_dir, get_model, sha256_of
from steer_engine.vectors import save

MODEL = "smollm2-135m"
NAME = "cheerful"
METHOD = "diffmean"
BLOCKS = "8-19"
POSITION = "last"
SCALE = 0.3
"""In units of the derived vector, whose norm is 7 to 18 % of the residual stream's at its blocks."""

SERVER_FLAGS = ["--max-model-len", "1024", "--max-num-seqs", "32"]
CPU_FLAGS = ["--enforce-eager"]
"""Compiling takes longer on two cores than the whole demo does without."""

CPU_DTYPE = "float32"
"""A processor with AVX2 only multiplies bfloat16 matrices 13 times slower (32 rows of 576, one core)."""


HEARTBEAT_SECONDS = 10
"""Without a terminal, a line is printed this often while a step waits."""

WIDTH = 120
"""Columns without a terminal, for example in a log."""

console = Console(highlight=False)
if not console.is_terminal and "COLUMNS" not in os.environ:
    console.width = WIDTH


def main() -> int:
    began = time.monotonic()
    out = console
    out.print(f"[bold]Steer Engine demo[/bold]: {PACKAGED[MODEL].title}")
    out.print(f"on {describe_machine()}; {describe_software()}\n")

    with _step("model: find or convert the checkpoint"):
        model_path = str(get_model(PACKAGED[MODEL], lambda line: out.print(f"   {line}", style="dim")))
    dtype = "auto" if gpu_name() else CPU_DTYPE
    with _step(f"vector: {METHOD} of {pairs_path().name}, blocks {BLOCKS}, read in {dtype}"):
        vectors = derive_once(MODEL, model_path, dtype)

    flags = [*SERVER_FLAGS, "--dtype", dtype, *([] if gpu_name() else CPU_FLAGS)]
    command = [MODEL, "--steering-vectors", str(vectors), *flags]
    with Server(command, cache_dir() / "demo" / "server.log") as server:
        with _step("server: vLLM, armed") as tick:
            server.wait_until_ready(tick)
        faults = ask_and_score(Asker(server.url, MODEL, NAME))
    if server.status != 0:
        faults.append(f"the server ended with status {server.status}; see {server.log}")

    out.print("\n[bold]Go on with[/bold] the same server, and ask it:")
    out.print(f"  .venv/bin/steer-engine serve {shlex.join([*command, '--port', '8000'])}", soft_wrap=True)
    out.print(f"  {curl_line(8000)}\n", soft_wrap=True)
    for fault in faults:
        out.print(f"[bold red]not shown:[/bold red] {fault}")
    verdict = "[bold red]failed[/bold red]" if faults else "[bold green]passed[/bold green]"
    out.print(f"demo {verdict} in {time.monotonic() - began:.0f} s; server log: {server.log}", soft_wrap=True)
    return 1 if faults else 0


def ask_and_score(asker: Asker) -> list[str]:
    """Everything that is asked while the server runs; what was not shown, as sentences."""
    scales = (-SCALE, 0.0, SCALE)
    with _step(f"{len(scoring.SHOWN)} prompts at three scales"):
        shown = asker.ask_sides(scoring.SHOWN, scales)
    _show_answers(scoring.SHOWN, shown)

    mixed = [(prompt, scale) for prompt in scoring.SHOWN for scale in (None, -SCALE, SCALE / 2, SCALE)]
    with _step(f"{len(mixed)} requests in flight at once"):
        replies, num_running = asker.ask_watched(mixed)
    _show_batch(replies, num_running)

    with _step(f"{len(scoring.HELD_OUT)} held-out prompts a side"):
        low, plain, high = asker.ask_sides(scoring.HELD_OUT, scales)
    shifts = [
        shift("gloomy to plain", low, plain),
        shift("plain to cheerful", plain, high),
        shift("gloomy to cheerful", low, high),
    ]
    _show_scores((low, plain, high), shifts, len(scoring.HELD_OUT))

    faults = find_faults(plain, (low, high), shifts)
    if any((reply.scale is None) != (reply.digest is None) for reply in replies):
        faults.append("an answer does not say what it was asked to be steered by")
    if num_running < 2:
        faults.append("the mixed requests were not in one batch")
    return faults


def curl_line(port: int) -> str:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": scoring.SHOWN[0]}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "repetition_penalty": REPETITION_PENALTY,
        "steering": steering(NAME, SCALE),
    }
    return f"curl -s localhost:{port}/v1/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'"


@contextmanager
def _step(what: str) -> Iterator[Callable[[float], None]]:
    """One step with a live clock; yields a `tick(seconds)` for steps that wait."""
    began = time.monotonic()
    reported = began

    def tick(seconds: float) -> None:
        nonlocal reported
        status.update(f"{what} … {seconds:.0f} s")
        if not console.is_terminal and time.monotonic() - reported > HEARTBEAT_SECONDS:
            reported = time.monotonic()
            console.print(f"   … {seconds:.0f} s", style="dim")

    with console.status(f"{what} …") as status:
        if not console.is_terminal:
            console.print(f"-> {what}", style="dim")
        yield tick
    console.print(f"[green]✓[/green] {what} [dim]({time.monotonic() - began:.1f} s)[/dim]")


def _show_answers(prompts: Sequence[str], sides: Sequence[Side]) -> None:
    """The same prompts, one column per scale."""
    table = Table(title="The same prompts, greedy, at three scales", show_lines=True)
    table.add_column("prompt", ratio=1, style="bold")
    for side in sides:
        colour = "red" if side.scale < 0 else "green" if side.scale > 0 else None
        table.add_column("plain" if side.scale == 0 else f"cheerful × {side.scale:+g}", ratio=2, style=colour)
    for number, prompt in enumerate(prompts):
        table.add_row(prompt, *(side.answers[number] for side in sides))
    console.print(table)


def _show_batch(replies: Sequence[Reply], num_running: int) -> None:
    """Concurrent requests, and what the server reports for each."""
    table = Table(title=f"One mixed batch: {len(replies)} requests sent at once, {num_running} in one engine step")
    fixed = (("prompt", 20), ("scale", 5), ("applied", 14))
    for name, width in fixed:
        table.add_column(name, width=width, overflow="ellipsis", no_wrap=True)
    # Cut here: in a narrow terminal rich would take the room from the other columns.
    room = max(10, console.width - sum(width + 3 for _, width in fixed) - 4)
    table.add_column("answer", width=room, no_wrap=True)
    for reply in replies:
        scale = "plain" if reply.scale is None else f"{reply.scale:+g}"
        table.add_row(
            reply.prompt, scale, (reply.digest or "-").removeprefix("sha256:")[:14], " ".join(reply.text.split())
        )
    console.print(table)


def _show_scores(sides: Sequence[Side], shifts: Sequence[Shift], num_prompts: int) -> None:
    """Sentiment and repetition per scale; shifts with their p-values."""
    table = Table(title=f"{num_prompts} held-out prompts per scale, scored by vaderSentiment (-1 to 1)")
    for name in ("scale", "mean sentiment", "distinct words", "words per answer"):
        table.add_column(name, justify="right")
    for side in sides:
        sentiment = sum(side.sentiments) / num_prompts
        table.add_row(f"{side.scale:+g}", f"{sentiment:+.3f}", f"{side.distinct:.2f}", f"{side.length:.0f}")
    console.print(table)
    for each in shifts:
        console.print(f"  {each.name:20} shift {each.mean:+.3f}, paired p = {each.p:.1e} (Wilcoxon, one-sided)")


def pairs_path() -> Path:
    """The contrast pairs that ship with the package."""
    return Path(str(files("steer_engine.derive").joinpath("data", "sentiment.jsonl")))


def vector_folder(model_path: str, dtype: str) -> Path:
    """Folder of the vector for these inputs; another model, pairs, settings or version is another folder."""
    weights = Path(model_path, MANIFEST)
    inputs = [sha256_of(weights), sha256_of(pairs_path()), METHOD, BLOCKS, POSITION, dtype, __version__]
    return cache_dir() / "demo" / hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]


def derive_once(model: str, model_path: str, dtype: str) -> Path:
    """The folder that holds the vector's file, derived if it is not there yet. `model` is what the vector calls it."""
    folder = vector_folder(model_path, dtype)
    file = folder / f"{NAME}.safetensors"
    if not file.exists():
        # Imported here: only a first run needs Ray.
        from steer_engine.derive import derive

        vector = derive(model, pairs_path(), method=METHOD, blocks=BLOCKS, position=POSITION, dtype=dtype)
        folder.mkdir(parents=True, exist_ok=True)
        save(vector, file)
    return folder


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except SteerError as error:
        console.print("[bold red]error:[/bold red]", Text(error.message), soft_wrap=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
