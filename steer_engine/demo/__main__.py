"""`make demo`: derives a vector, serves the model, sends requests and scores the answers.

The exit status is 1 if steering has no significant effect, or damages the text.
"""

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
    Client,
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
"""On two CPU cores, compilation takes longer than the whole eager demo."""

CPU_DTYPE = "float32"
"""A CPU with no more than AVX2 multiplies bfloat16 matrices 13 times slower (32 rows of 576, one core)."""

HEARTBEAT_SECONDS = 10
"""Interval of progress lines while a step waits, when the output is not a terminal."""

WIDTH = 120
"""Columns when the output is not a terminal, for example in a log."""

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
    with _step(f"vector: {METHOD} of {pairs_path().name}, blocks {BLOCKS}, captured in {dtype}"):
        vectors = derive_once(MODEL, model_path, dtype)

    flags = [*SERVER_FLAGS, "--dtype", dtype, *([] if gpu_name() else CPU_FLAGS)]
    command = [MODEL, "--steering-vectors", str(vectors), *flags]
    with Server(command, cache_dir() / "demo" / "server.log") as server:
        with _step("server: vLLM with steering") as tick:
            server.wait_until_ready(tick)
        faults = send_and_score(Client(server.url, MODEL, NAME))
    if server.status != 0:
        faults.append(f"the server exited with status {server.status}; see {server.log}")

    out.print("\n[bold]Start[/bold] the same server, and send a request:")
    out.print(f"  .venv/bin/steer-engine serve {shlex.join([*command, '--port', '8000'])}", soft_wrap=True)
    out.print(f"  {curl_line(8000)}\n", soft_wrap=True)
    for fault in faults:
        out.print(f"[bold red]fault:[/bold red] {fault}")
    verdict = "[bold red]failed[/bold red]" if faults else "[bold green]passed[/bold green]"
    out.print(f"demo {verdict} in {time.monotonic() - began:.0f} s; server log: {server.log}", soft_wrap=True)
    return 1 if faults else 0


def send_and_score(client: Client) -> list[str]:
    """Send all requests and print the results. Returns the ways in which steering failed, as sentences."""
    scales = (-SCALE, 0.0, SCALE)
    with _step(f"{len(scoring.SHOWN)} prompts at three scales"):
        shown = client.collect_sides(scoring.SHOWN, scales)
    _show_answers(scoring.SHOWN, shown)

    mixed = [(prompt, scale) for prompt in scoring.SHOWN for scale in (None, -SCALE, SCALE / 2, SCALE)]
    with _step(f"{len(mixed)} requests in flight at once"):
        replies, num_running = client.send_watched(mixed)
    _show_batch(replies, num_running)

    with _step(f"{len(scoring.HELD_OUT)} held-out prompts at three scales"):
        low, plain, high = client.collect_sides(scoring.HELD_OUT, scales)
    shifts = [
        shift("gloomy to plain", low, plain),
        shift("plain to cheerful", plain, high),
        shift("gloomy to cheerful", low, high),
    ]
    _show_scores((low, plain, high), shifts, len(scoring.HELD_OUT))

    faults = find_faults(plain, (low, high), shifts)
    if any((reply.scale is None) != (reply.digest is None) for reply in replies):
        faults.append("an answer does not report the steering that it was requested with")
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
    """Show one step with its elapsed time. Yields `tick(seconds)`, which a waiting step calls repeatedly."""
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
    """Print the answers to the same prompts, one column per scale."""
    table = Table(title="The same prompts, greedy, at three scales", show_lines=True)
    table.add_column("prompt", ratio=1, style="bold")
    for side in sides:
        colour = "red" if side.scale < 0 else "green" if side.scale > 0 else None
        table.add_column("plain" if side.scale == 0 else f"cheerful × {side.scale:+g}", ratio=2, style=colour)
    for number, prompt in enumerate(prompts):
        table.add_row(prompt, *(side.answers[number] for side in sides))
    console.print(table)


def _show_batch(replies: Sequence[Reply], num_running: int) -> None:
    """Print concurrent requests, with the digest of the applied steering that the server reports for each."""
    table = Table(title=f"One mixed batch: {len(replies)} requests sent at once, {num_running} in one engine step")
    fixed = (("prompt", 20), ("scale", 5), ("applied", 14))
    for name, width in fixed:
        table.add_column(name, width=width, overflow="ellipsis", no_wrap=True)
    # A fixed width: in a narrow terminal, rich would shrink the other columns instead of this one.
    room = max(10, console.width - sum(width + 3 for _, width in fixed) - 4)
    table.add_column("answer", width=room, no_wrap=True)
    for reply in replies:
        digest = (reply.digest or "-").removeprefix("sha256:")[:14]
        table.add_row(reply.prompt, _scale_text(reply.scale), digest, " ".join(reply.text.split()))
    console.print(table)


def _scale_text(scale: float | None) -> str:
    return f"{scale:+g}" if scale else "plain"


def _show_scores(sides: Sequence[Side], shifts: Sequence[Shift], num_prompts: int) -> None:
    """Print sentiment and repetition per scale, and the shifts with their p-values."""
    table = Table(title=f"Sentiment of {num_prompts} held-out prompts per scale (VADER, -1 to 1)")
    for name in ("scale", "mean sentiment", "distinct words", "words per answer"):
        table.add_column(name, justify="right")
    for side in sides:
        sentiment = sum(side.sentiments) / num_prompts
        table.add_row(_scale_text(side.scale), f"{sentiment:+.3f}", f"{side.distinct:.2f}", f"{side.length:.0f}")
    console.print(table)
    for each in shifts:
        console.print(f"  {each.name:20} shift {each.mean:+.3f}, paired p = {each.p:.1e} (Wilcoxon, one-sided)")


def pairs_path() -> Path:
    """The packaged contrast pairs."""
    return Path(str(files("steer_engine.derive").joinpath("data", "sentiment.jsonl")))


def vector_folder(model_path: str, dtype: str) -> Path:
    """Folder of the vector for these inputs. Each combination of model, pairs, settings and version has its own."""
    weights = Path(model_path, MANIFEST)
    inputs = [sha256_of(weights), sha256_of(pairs_path()), METHOD, BLOCKS, POSITION, dtype, __version__]
    return cache_dir() / "demo" / hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]


def derive_once(model: str, model_path: str, dtype: str) -> Path:
    """Derive the vector unless its file exists. Returns its folder. `model` is the name noted in the metadata."""
    folder = vector_folder(model_path, dtype)
    file = folder / f"{NAME}.safetensors"
    if not file.exists():
        # Imported here, because only the first run needs Ray.
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
