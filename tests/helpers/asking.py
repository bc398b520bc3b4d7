"""The same question on each endpoint, and where its answer has the text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import httpx

from helpers.server_process import Server

MODEL = "smollm2-135m"
PROMPT = "Describe the weather today in one sentence."
MAX_TOKENS = 6
TOKENS_PATH = "/inference/v1/generate"

STRONG: dict[str, Any] = {"edits": [{"vector": "east", "scale": 60.0, "blocks": "8-21"}]}
"""Far more than any rounding: greedy text changes at once."""


@dataclass(frozen=True)
class Endpoint:
    path: str
    body: dict[str, Any]

    def ask(self, server: Server, **fields: Any) -> httpx.Response:
        return server.post(self.path, self.body | fields)

    def text(self, answer: dict[str, Any]) -> str:
        """The generated text of an answer's JSON."""
        if "choices" in answer:
            choice = answer["choices"][0]
            if self.path == TOKENS_PATH:
                return str(choice["token_ids"])
            return str(choice["text"] if "text" in choice else choice["message"]["content"])
        parts = answer["content"] if "content" in answer else answer["output"][0]["content"]
        return str(parts[0]["text"])


MESSAGES = [{"role": "user", "content": PROMPT}]
CHAT = Endpoint(
    "/v1/chat/completions", {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": MAX_TOKENS}
)
BATCH = Endpoint(
    "/v1/chat/completions/batch",
    {"model": MODEL, "messages": [MESSAGES, MESSAGES], "temperature": 0, "max_tokens": MAX_TOKENS},
)
COMPLETIONS = Endpoint(
    "/v1/completions", {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": MAX_TOKENS}
)
RESPONSES = Endpoint(
    "/v1/responses", {"model": MODEL, "input": PROMPT, "temperature": 0, "max_output_tokens": MAX_TOKENS}
)
ANTHROPIC = Endpoint("/v1/messages", {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": MAX_TOKENS})
INVOCATIONS = Endpoint("/invocations", CHAT.body)
TOKENS = Endpoint(
    TOKENS_PATH,
    {"model": MODEL, "token_ids": [504, 2365, 282], "sampling_params": {"temperature": 0, "max_tokens": MAX_TOKENS}},
)

CARRYING = {each.path: each for each in (CHAT, BATCH, COMPLETIONS, RESPONSES, ANTHROPIC, INVOCATIONS, TOKENS)}
STREAMING = (CHAT, COMPLETIONS, RESPONSES, TOKENS)


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The JSON of a stream's events, without the final [DONE]."""
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]
