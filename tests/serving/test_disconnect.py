"""Clients that hang up in the middle of a stream: their requests end, and nobody else's answer changes."""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import Any

from serving.asking import COMPLETIONS, STRONG
from serving.server_process import Server

CLIENTS, LENGTH = 4, 450


def generated(server: Server) -> float:
    """Tokens that the server has generated so far."""
    found = re.search(r"^vllm:generation_tokens_total\{.*\} (\S+)$", server.get("/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def worker(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = server.get("/v1/steering/stats").json()["engine"]["workers"][0]
    return found


def test_clients_that_hang_up(server: Server) -> None:
    def answers() -> list[str]:
        return [COMPLETIONS.text(COMPLETIONS.ask(server, **fields).json()) for fields in ({}, {"steering": STRONG})]

    before, tokens_before = answers(), generated(server)
    assert before[0] != before[1]
    body = COMPLETIONS.body | {"steering": STRONG, "stream": True, "max_tokens": LENGTH, "ignore_eos": True}
    with ExitStack() as stack:
        for _ in range(CLIENTS):
            lines = stack.enter_context(server.client.stream("POST", COMPLETIONS.path, json=body)).iter_lines()
            assert next(lines).startswith("data: ")
        assert worker(server)["steered_slots"] == CLIENTS
    # Where the streams are closed, no chunk of theirs has been the last one. The next request ends their slots.
    assert answers() == before
    assert generated(server) - tokens_before < CLIENTS * LENGTH / 2
    assert worker(server)["steered_slots"] <= 1, "of the last steered answer"
    assert COMPLETIONS.ask(server).status_code == 200
    assert worker(server)["steered_slots"] == 0
