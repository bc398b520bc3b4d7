"""Gemma 3 270M as it is served: in bfloat16, with BOS, plain and steered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from helpers.server_process import Server, steer_engine_serve

from steer_engine.vectors import ControlVector, VectorMetadata, save

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MODEL, BLOCK, HIDDEN, BOS = "gemma3-270m", 10, 640, 2
COUNTING = "2, 4, 6, 8,"


@pytest.fixture(scope="module")
def server(gemma3: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("gemma")
    direction = np.random.default_rng(0).standard_normal(HIDDEN).astype(np.float32)
    save(ControlVector(directions={BLOCK: direction}, metadata=VectorMetadata()), folder / "noise.safetensors")
    command = steer_engine_serve(MODEL, "--steering-vectors", str(folder), "--dtype", "bfloat16")
    running = Server(command, folder / "server.log")
    yield running
    running.kill()


def complete(server: Server, steering: dict[str, Any] | None = None) -> dict[str, Any]:
    body = {"model": MODEL, "prompt": COUNTING, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
    answer = server.post("/v1/completions", body | ({"steering": steering} if steering else {}))
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def relative(scale: float) -> dict[str, Any]:
    return {"edits": [{"vector": "noise", "op": "add_relative", "scale": scale}]}


def test_plain_and_steered(server: Server) -> None:
    """Without its BOS the model cannot count."""
    about = server.get("/v1/steering").json()
    assert (about["hidden_size"], about["num_blocks"]) == (HIDDEN, 18)
    plain = complete(server)
    assert plain["choices"][0]["prompt_token_ids"][0] == BOS
    assert plain["choices"][0]["text"].startswith(" 10, 12, 14")
    assert complete(server, relative(0.0))["choices"][0]["text"] == plain["choices"][0]["text"]
    steered = complete(server, relative(2.0))
    assert steered["steering"]["edits"][0]["name"] == "noise"
    assert steered["choices"][0]["text"] != plain["choices"][0]["text"]
