"""A server whose registry changes while it serves, and how its tests ask it."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
from serving.server_process import Server

from steer_engine.vectors import ControlVector
from steer_engine.vectors.safetensors_format import to_bytes

INFERENCE, ADMIN = "the-inference-key-of-a-test", "the-admin-key-of-a-test"
USER = {"Authorization": f"Bearer {INFERENCE}"}
OPERATOR = {"Authorization": f"Bearer {ADMIN}"}
NUM_BLOCKS, HIDDEN_SIZE = 3, 64


def along(axis: int, size: float = 40.0) -> ControlVector:
    """A push along one axis, strong enough that greedy text is another one for each."""
    direction = np.zeros(HIDDEN_SIZE, np.float32)
    direction[axis] = size
    return ControlVector(directions={1: direction})


def complete(server: Server, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    body |= {"return_token_ids": True, **fields}
    return server.post("/v1/completions", body, headers=USER)


def tokens(answer: httpx.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"][0]["token_ids"])


def put(server: Server, name: str, vector: ControlVector, **headers: str) -> httpx.Response:
    url = f"{server.url}/v1/steering/vectors/{name}"
    return server.client.put(url, content=to_bytes(vector), headers=OPERATOR | headers)


def spec(vector: str) -> dict[str, Any]:
    return {"edits": [{"vector": vector}]}
