"""Questions to the server through the official OpenAI client, with steering in `extra_body`."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openai import AsyncOpenAI

from steer_engine.demo.scoring import Side

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
