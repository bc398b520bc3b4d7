"""A server whose registry changes while it serves, and requests to it."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import numpy as np

from helpers.server_process import Server
from steer_engine.vectors import ControlVector, RowSet
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


def features() -> RowSet:
    """Features 3 and 7 of a sparse autoencoder at block 1. Each reads one axis and writes another."""
    read, write = _axes((10, 11), 1.0), _axes((12, 13), 40.0)
    return RowSet(kind="features", read=read, write=write, indices={1: np.array([3, 7])})


def low_rank() -> RowSet:
    """An intervention of rank 2 at block 1."""
    bias = {1: np.array([30.0, -30.0], np.float32)}
    return RowSet(kind="low_rank", read=_axes((14, 15), 0.5), write=_axes((16, 17), 1.0), bias=bias)


def _axes(axes: tuple[int, ...], size: float) -> dict[int, np.ndarray]:
    return {1: np.float32(size * np.eye(HIDDEN_SIZE)[list(axes)])}


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


def streamed(answer: httpx.Response) -> list[int]:
    """The tokens of a stream that came to its proper end."""
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]", answer.text
    chunks = [json.loads(event) for event in events[:-1]]
    assert not [chunk for chunk in chunks if "error" in chunk], answer.text
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    return [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]]


class Follower(threading.Thread):
    """Requests `length` tokens again and again on one connection, until it is refused."""

    def __init__(self, server: Server, length: int, *, stream: bool, vector: str = "house") -> None:
        super().__init__()
        self._url, self._stream, self._vector, self.length = server.url, stream, vector, length
        self.answered: list[list[int]] = []
        """The tokens of its answers."""
        self.num_begun = 0
        self.begun = threading.Event()
        """Set when an answer has begun: at its first token, if it is a stream."""
        self.refused: httpx.Response | Exception | None = None
        self.start()

    def run(self) -> None:
        body = {"model": "tiny", "prompt": "abc", "max_tokens": self.length, "temperature": 0, "ignore_eos": True}
        body |= {"return_token_ids": True, "stream": self._stream, "steering": spec(self._vector)}
        with httpx.Client(base_url=self._url, headers=USER, timeout=60) as client:
            while self.refused is None:
                try:
                    with client.stream("POST", "/v1/completions", json=body) as answer:
                        if answer.status_code == 200:
                            self.num_begun += 1
                            self.begun.set()
                        answer.read()
                except httpx.TransportError as error:
                    self.refused = error
                    return
                if answer.status_code == 200 and '"error":' not in answer.text:
                    self.answered.append(streamed(answer) if self._stream else tokens(answer))
                else:
                    self.refused = answer

    def assert_sent_away(self) -> None:
        """Nothing went wrong before the 503."""
        assert isinstance(self.refused, httpx.Response), self.refused
        assert self.refused.status_code == 503, self.refused.text
        assert int(self.refused.headers["Retry-After"]) >= 1
        assert {len(answer) for answer in self.answered} == {self.length}
