"""The demo's output on a terminal, or in a log."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table

from steer_engine.demo.asking import Reply
from steer_engine.demo.scoring import Shift, Side

HEARTBEAT_S = 10
"""Where there is no terminal to animate, a line this often says that the wait goes on."""

WIDTH = 120
"""Columns where there is no terminal to ask, as in a log."""

console = Console(highlight=False)
if not console.is_terminal and "COLUMNS" not in os.environ:
    console.width = WIDTH


@contextmanager
def step(what: str) -> Iterator[Callable[[float], None]]:
    """One step with a live clock; yields a `tick(seconds)` for steps that wait."""
    began = time.monotonic()
    told = began

    def tick(seconds: float) -> None:
        nonlocal told
        status.update(f"{what} … {seconds:.0f} s")
        if not console.is_terminal and time.monotonic() - told > HEARTBEAT_S:
            told = time.monotonic()
            console.print(f"   … {seconds:.0f} s", style="dim")

    with console.status(f"{what} …") as status:
        if not console.is_terminal:
            console.print(f"-> {what}", style="dim")
        yield tick
    console.print(f"[green]✓[/green] {what} [dim]({time.monotonic() - began:.1f} s)[/dim]")


def show_answers(prompts: Sequence[str], sides: Sequence[Side]) -> None:
    """The same prompts, one column a scale."""
    table = Table(title="The same prompts, greedy, at three scales", show_lines=True)
    table.add_column("prompt", ratio=1, style="bold")
    for side in sides:
        colour = "red" if side.scale < 0 else "green" if side.scale > 0 else None
        table.add_column("plain" if side.scale == 0 else f"cheerful × {side.scale:+g}", ratio=2, style=colour)
    for number, prompt in enumerate(prompts):
        table.add_row(prompt, *(side.answers[number] for side in sides))
    console.print(table)


def show_batch(replies: Sequence[Reply], num_running: int) -> None:
    """Requests that were in flight together, and what the server says it applied to each."""
    table = Table(title=f"One mixed batch: {len(replies)} requests sent at once, {num_running} in one engine step")
    widths = {"prompt": 24, "asked": 6, "applied, as the answer says": 19}
    for name, width in widths.items():
        table.add_column(name, width=width, overflow="ellipsis", no_wrap=True)
    table.add_column("answer", overflow="ellipsis", no_wrap=True)
    for reply in replies:
        asked = "plain" if reply.scale is None else f"{reply.scale:+g}"
        table.add_row(reply.prompt, asked, (reply.digest or "-")[:19], " ".join(reply.text.split()))
    console.print(table)


def show_scores(sides: Sequence[Side], shifts: Sequence[Shift], num_prompts: int) -> None:
    """Sentiment and repetition a side; shifts with their p-values."""
    table = Table(title=f"{num_prompts} held-out prompts a side, scored by vaderSentiment (-1 to 1)")
    for name in ("scale", "mean sentiment", "distinct words", "words an answer"):
        table.add_column(name, justify="right")
    for side in sides:
        sentiment = sum(side.sentiments) / num_prompts
        table.add_row(f"{side.scale:+g}", f"{sentiment:+.3f}", f"{side.distinct:.2f}", f"{side.length:.0f}")
    console.print(table)
    for shift in shifts:
        console.print(f"  {shift.name:20} shift {shift.mean:+.3f}, paired p = {shift.p:.1e} (Wilcoxon, one-sided)")
