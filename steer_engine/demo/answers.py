"""Questions to the server through the official OpenAI client, with steering in `extra_body`."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from openai import AsyncOpenAI
from rich.console import Console
from rich.table import Table

from steer_engine.demo.scoring import Shift, Side

MAX_TOKENS = 60
REPETITION_PENALTY = 1.1
"""Greedy text of so small a model goes in circles without it, steered or not."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer, and the digest of the steering that the server says it applied (None: plain)."""

    prompt: str
    scale: float | None
    text: str
    digest: str | None
    tokens: int


def steering(vector: str, scale: float) -> dict[str, Any]:
    """The request field: one vector at its own blocks."""
    return {"edits": [{"vector": vector, "scale": scale}]}


class Asker:
    """Asks one server about one model; `scale=None` asks plainly, without the steering field."""

    def __init__(self, url: str, model: str, vector: str) -> None:
        self._url = url
        self._model = model
        self._vector = vector

    def ask_all(self, questions: Sequence[tuple[str, float | None]]) -> list[Reply]:
        """Answers to `(prompt, scale)` pairs, all in flight at once, in order."""
        return asyncio.run(self._ask_all(questions))

    def ask_sides(self, prompts: Sequence[str], scales: Sequence[float]) -> list[Side]:
        """Answers to all prompts at each scale, as sides to score; scale 0 asks plainly."""
        replies = self.ask_all([(prompt, scale or None) for scale in scales for prompt in prompts])
        texts = [reply.text for reply in replies]
        n = len(prompts)
        return [Side(scale=scale, answers=tuple(texts[k * n : (k + 1) * n])) for k, scale in enumerate(scales)]

    def ask_watched(self, questions: Sequence[tuple[str, float | None]]) -> tuple[list[Reply], int]:
        """As `ask_all`, and the largest number of requests that the engine ran in one step, by its own metrics."""
        return asyncio.run(self._ask_watched(questions))

    async def _ask_all(self, questions: Sequence[tuple[str, float | None]]) -> list[Reply]:
        async with AsyncOpenAI(base_url=f"{self._url}/v1", api_key="none", max_retries=0, timeout=300) as client:
            return list(await asyncio.gather(*(self._ask(client, prompt, scale) for prompt, scale in questions)))

    async def _ask_watched(self, questions: Sequence[tuple[str, float | None]]) -> tuple[list[Reply], int]:
        asking = asyncio.create_task(self._ask_all(questions))
        most = 0
        while not asking.done():
            most = max(most, await asyncio.to_thread(self._num_running))
            await asyncio.sleep(0.1)
        return await asking, most

    async def _ask(self, client: AsyncOpenAI, prompt: str, scale: float | None) -> Reply:
        extra: dict[str, Any] = {"repetition_penalty": REPETITION_PENALTY}
        if scale is not None:
            extra["steering"] = steering(self._vector, scale)
        answer = await client.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            max_tokens=MAX_TOKENS,
            extra_body=extra,
        )
        applied = (answer.model_extra or {}).get("steering")
        return Reply(
            prompt=prompt,
            scale=scale,
            text=(answer.choices[0].message.content or "").strip(),
            digest=applied["digest"] if applied else None,
            tokens=answer.usage.completion_tokens if answer.usage else 0,
        )

    def _num_running(self) -> int:
        """Requests in the engine's batch now, from `/metrics`."""
        import urllib.request

        with urllib.request.urlopen(f"{self._url}/metrics", timeout=5) as answer:
            found = re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", answer.read().decode(), re.MULTILINE)
        return int(sum(map(float, found)))


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
