"""Monitors on a running server: no answer changes, and their histograms are those of the same probes of clients."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.asking import ANTHROPIC, CHAT, COMPLETIONS, MAX_TOKENS, RESPONSES, STRONG, TOKENS, Endpoint, events
from helpers.server_process import Server, steer_engine_serve

SERIES = [("west", "10"), ("west", "11"), ("push", "14"), ("trained", "12")]
KINDS = {"west": "cosine", "push": "dot", "trained": "probability"}
SAME = [
    {"name": "west", "vector": "west", "blocks": [10, 11]},
    {"name": "push", "vector": "east", "blocks": 14, "measure": "dot"},
    {"name": "trained", "vector": "trained", "blocks": 12, "measure": "probability"},
]
"""The same numbers as probes of a request."""
BESIDE = {"probes": [{"name": "own", "vector": "west", "blocks": [9, 10]}]}
LONG = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


def series(server: Server) -> Counter[tuple[str, str, str, str]]:
    """(name without prefix, monitor, block, bound of the bucket) -> value."""
    found: Counter[tuple[str, str, str, str]] = Counter()
    for name, labels, value in re.findall(
        r"^steer_engine_monitor_(\w+)\{(.*)\} (\S+)$", server.get("/metrics").text, re.MULTILINE
    ):
        of = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        found[name, of["monitor"], of["block"], of.get("le", "")] = float(value)
    return found


def measured(server: Server) -> float:
    return series(server)["tokens_total", "push", "14", ""]


def test_every_monitor_has_its_series_from_the_start(monitored: Server) -> None:
    found = series(monitored)
    assert {(monitor, block) for name, monitor, block, _ in found if name == "tokens_total"} == set(SERIES)
    assert {(name.removesuffix("_bucket"), monitor) for name, monitor, _, bound in found if bound} == {
        (kind, monitor) for monitor, kind in KINDS.items()
    }
    thresholds = {(monitor, block): found["threshold", monitor, block, ""] for monitor, block in SERIES}
    assert thresholds == {
        ("west", "10"): 0.01, ("west", "11"): 0.01, ("push", "14"): -1.5,
        ("trained", "12"): pytest.approx(1 / (1 + np.exp(-(0.2 * 1.0 - 0.1)))),
    }  # fmt: skip


ASKED: dict[str, tuple[Endpoint, dict[str, Any]]] = {
    "chat": (CHAT, {"logprobs": True, "top_logprobs": 5}),
    "chat, edited": (CHAT, {"logprobs": True, "top_logprobs": 5, "steering": STRONG}),
    "chat, probed": (CHAT, {"logprobs": True, "top_logprobs": 5, "steering": STRONG | BESIDE}),
    "completions": (COMPLETIONS, {"logprobs": 5, "return_token_ids": True}),
    "completions, two": (
        COMPLETIONS,
        {"n": 2, "temperature": 1.0, "seed": 7},
    ),  # timing decides which rows share a step, and so the last bits
    "completions, edited": (COMPLETIONS, {"logprobs": 5, "steering": STRONG, "return_token_ids": True}),
    "completions, probed": (COMPLETIONS, {"logprobs": 5, "steering": BESIDE}),
    "streamed": (COMPLETIONS, {"logprobs": 5, "stream": True, "stream_options": {"include_usage": True}}),
    "responses": (RESPONSES, {}),
    "messages": (ANTHROPIC, {"steering": STRONG}),
    "tokens": (TOKENS, {"sampling_params": {"temperature": 0, "max_tokens": MAX_TOKENS, "logprobs": 3}}),
}


def told(body: Any) -> Any:
    """An answer without what differs between two answers of one server: ids and times."""
    if isinstance(body, dict):
        return {key: told(value) for key, value in body.items() if key not in DIFFERENT}
    return [told(each) for each in body] if isinstance(body, list) else body


def num_tokens(body: Any) -> int:
    """Of all answers, as the server says; events of a stream, or one body."""
    last = body[-1] if isinstance(body, list) else body
    usage = last.get("usage") or {}
    counted = usage.get("completion_tokens") or usage.get("output_tokens")
    return int(counted or sum(len(choice["token_ids"]) for choice in last["choices"]))


DIFFERENT = {"id", "created", "created_at", "completed_at", "request_id", "metrics", "kv_transfer_params"}


@pytest.mark.parametrize("name", ASKED)
def test_nobodys_answer_changes_by_a_bit(server: Server, monitored: Server, name: str) -> None:
    """Every field of it, logprobs included, and nothing about monitors is added."""
    endpoint, fields = ASKED[name]
    before = measured(monitored)
    answers = [endpoint.ask(each, **fields) for each in (server, monitored)]
    assert [answer.status_code for answer in answers] == [200, 200], answers[1].text
    bodies = [told(events(answer) if fields.get("stream") else answer.json()) for answer in answers]
    assert bodies[0] == bodies[1]
    assert len(json.dumps(bodies[1])) > 100
    assert [answer.headers.get("X-Steering") for answer in answers] == [answers[0].headers.get("X-Steering")] * 2
    assert "_steer" not in answers[1].text
    assert measured(monitored) - before == num_tokens(bodies[1]) > 0


def test_a_long_prompt_still_comes_from_the_cache(monitored: Server) -> None:
    body = COMPLETIONS.body | {"prompt": [7 + i % 900 for i in range(300)], "max_tokens": 2}
    cached = [
        monitored.post(COMPLETIONS.path, body | fields).json()["usage"]["prompt_tokens_details"]
        for fields in ({}, {}, {"steering": BESIDE}, {"steering": False})
    ]
    assert [(each or {}).get("cached_tokens", 0) >= 128 for each in cached] == [False, True, True, True]


def numbers_of(bodies: list[dict[str, Any]]) -> dict[tuple[str, str], list[float]]:
    """What the probes of clients returned, by monitor and block."""
    found: dict[tuple[str, str], list[float]] = {each: [] for each in SERIES}
    choices = [choice for body in bodies for choice in body["choices"] if "steering" in choice]
    for monitor, block in SERIES:
        for choice in choices:
            found[monitor, block] += choice["steering"]["probes"][monitor][block]
    return found


def test_the_histograms_are_exactly_those_of_the_same_probes(monitored: Server) -> None:
    """Plain and steered, streamed and not, several choices, and an answer that a stop string ends."""
    before = series(monitored)
    asked = [
        {},
        {"steering": STRONG},
        {"n": 2, "temperature": 1.0, "seed": 3},
        {"stream": True},
        {"stream": True, "steering": STRONG, "n": 2, "temperature": 1.5, "seed": 4},
        {"stop": [" the", "e", "."]},
    ]
    bodies: list[dict[str, Any]] = []
    for number, fields in enumerate(asked):
        steering = fields.get("steering", {}) | {"probes": SAME}
        prompt = f"Once upon a time, in year {number},"
        answer = COMPLETIONS.ask(monitored, **LONG | fields | {"prompt": prompt, "steering": steering})
        assert answer.status_code == 200, answer.text
        bodies += events(answer) if fields.get("stream") else [answer.json()]
    change = series(monitored)
    change.subtract(before)
    for (monitor, block), numbers in numbers_of(bodies).items():
        assert len(numbers) > 80
        bounds = [bound for name, of, at, bound in before if (of, at) == (monitor, block) and bound]
        found = {bound: change[f"{KINDS[monitor]}_bucket", monitor, block, bound] for bound in bounds}
        assert found == {bound: sum(number <= float(bound) for number in numbers) for bound in bounds}
        assert len(set(found.values())) > 3, "the numbers fall into several buckets"
        assert change["tokens_total", monitor, block, ""] == len(numbers)
        threshold = before["threshold", monitor, block, ""]
        above = sum(number > threshold for number in numbers)
        assert change["tokens_above_total", monitor, block, ""] == above
        assert 0 < above < len(numbers)


@pytest.mark.parametrize(
    ("monitor", "words"),
    [
        ("nobody", "--steering-monitor nobody: There is no control vector 'nobody'"),
        ("east:29", "--steering-monitor 'east:29': The vector has no direction at blocks 29"),
        ("east:99", "--steering-monitor 'east:99': Block 99 does not exist"),
        ("east", "--steering-monitor 'east': The vector's file has no trained probe"),
    ],
)
def test_a_server_that_cannot_watch_does_not_start(vectors_dir: Path, monitor: str, words: str) -> None:
    """One clear line, before an engine starts."""
    command = steer_engine_serve("smollm2-135m", "--steering-vectors", str(vectors_dir), "--port", "0")
    done = subprocess.run(
        [*command, "--steering-monitor", monitor], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert words in line
    assert "Traceback" not in done.stderr + done.stdout
