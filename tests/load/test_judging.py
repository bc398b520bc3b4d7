"""The judges of the load test find what they are there for: each fault, in an answer that is right otherwise."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import httpx
import pytest
from helpers.latency_watch import LatencyWatch
from helpers.load_judging import Answer, Known, Tally, Verdict, judged, judged_beginning
from helpers.load_registry import Name, Version, judge
from helpers.process_memory import FLOOR_MIB, PARTS, History, MemoryWatch, growths

KNOWN = Known(
    name="steered", path="/v1/completions", body={"logprobs": 1, "n": 2}, tokens=(1, 2, 3), logprobs=(-0.1, -0.2, -0.3),
    plain=(7, 8, 9), digest="sha256:a",
)  # fmt: skip
PLAIN = replace(KNOWN, tokens=KNOWN.plain, digest=None)
HEADERS = {"X-Steering": "sha256:a"}
BUSY = {"error": {"message": "The steering queue is full."}}


def body(*choices: tuple[int, ...], logprobs: tuple[float, ...] = KNOWN.logprobs, **fields: Any) -> dict[str, Any]:
    found = [
        {"index": number, "token_ids": list(tokens), "logprobs": {"token_logprobs": list(logprobs)}}
        for number, tokens in enumerate(choices or (KNOWN.tokens, KNOWN.tokens))
    ]
    return {"choices": found, "steering": {"digest": "sha256:a"}} | fields


def answer(status: int, content: Any, headers: dict[str, str] | None = None) -> httpx.Response:
    return httpx.Response(status, headers=headers or {}, content=json.dumps(content).encode())


CASES: dict[str, tuple[Known, httpx.Response, Verdict]] = {
    "right": (KNOWN, answer(200, body(), HEADERS), Verdict.RIGHT),
    "rounding": (KNOWN, answer(200, body(logprobs=(-0.10001, -0.2, -0.3)), HEADERS), Verdict.RIGHT),
    "a wrong token": (KNOWN, answer(200, body((1, 2, 3), (1, 2, 4)), HEADERS), Verdict.WRONG),
    "too short": (KNOWN, answer(200, body((1, 2), (1, 2, 3)), HEADERS), Verdict.WRONG),
    "one choice of two": (KNOWN, answer(200, body((1, 2, 3)), HEADERS), Verdict.WRONG),
    "a wrong logprob": (KNOWN, answer(200, body(logprobs=(-0.1, -0.25, -0.3)), HEADERS), Verdict.WRONG),
    "a logprob of NaN": (KNOWN, answer(200, body(logprobs=(-0.1, float("nan"), -0.3)), HEADERS), Verdict.WRONG),
    "plain tokens": (KNOWN, answer(200, body((7, 8, 9), (7, 8, 9)), HEADERS), Verdict.UNSTEERED),
    "no steering in the body": (KNOWN, answer(200, body(steering=None), HEADERS), Verdict.UNSTEERED),
    "no header": (KNOWN, answer(200, body()), Verdict.UNSTEERED),
    "other steering": (KNOWN, answer(200, body(steering={"digest": "sha256:b"}), HEADERS), Verdict.WRONG),
    "plain": (PLAIN, answer(200, body((7, 8, 9), (7, 8, 9), steering=None)), Verdict.RIGHT),
    "steering that nobody requested": (PLAIN, answer(200, body((7, 8, 9), (7, 8, 9)), HEADERS), Verdict.WRONG),
    "a 500": (KNOWN, answer(500, BUSY), Verdict.SERVER_ERROR),
    "a promised 503": (KNOWN, answer(503, BUSY, {"Retry-After": "2"}), Verdict.BUSY),
    "a 503 without Retry-After": (KNOWN, answer(503, BUSY), Verdict.SERVER_ERROR),
    "a 503 of a plain request": (PLAIN, answer(503, BUSY, {"Retry-After": "2"}), Verdict.SERVER_ERROR),
    "a 400": (KNOWN, answer(400, BUSY), Verdict.REFUSED),
}


@pytest.mark.parametrize("case", CASES)
def test_verdicts(case: str) -> None:
    known, response, expected = CASES[case]
    verdict, reason = judged(known, response)
    assert verdict is expected
    assert bool(reason) is (verdict not in (Verdict.RIGHT, Verdict.BUSY))


def test_streams() -> None:
    known = replace(KNOWN, body={"stream": True})
    parts = [{"choices": [{"index": 0, "token_ids": [token]}]} for token in KNOWN.tokens]
    lines = [f"data: {json.dumps(part)}" for part in [*parts, {"choices": [], "steering": {"digest": "sha256:a"}}]]

    def verdict(*events: str) -> Verdict:
        return judged(known, httpx.Response(200, headers=HEADERS, text="\n\n".join(events)))[0]

    assert verdict(*lines, "data: [DONE]") is Verdict.RIGHT
    assert verdict(*lines) is Verdict.WRONG
    assert verdict(*lines[:3], "data: [DONE]") is Verdict.UNSTEERED
    assert verdict(lines[0], 'data: {"error": {"message": "x"}}', "data: [DONE]") is Verdict.SERVER_ERROR

    def beginning(*events: str, header: str | None = "sha256:a") -> Verdict:
        return judged_beginning(known, Answer.beginning(list(events)), header)[0]

    assert beginning(*lines[:2], "") is beginning(*lines, "data: [DONE]") is Verdict.RIGHT
    assert beginning(lines[1]) is Verdict.WRONG
    assert beginning(lines[0], header=None) is Verdict.UNSTEERED


def test_a_changing_name_has_an_allowed_version() -> None:
    other = replace(KNOWN, tokens=(4, 5, 6), digest="sha256:b")
    first, second = (Version(content=b"", answers=(each,)) for each in (KNOWN, other))
    name = Name("vector", "load-0", (first, second))
    response = answer(200, body(), HEADERS)
    missing = answer(404, {"error": {"message": "unknown"}})
    assert judge(name, 0, response, (first, second, None))[0] is Verdict.RIGHT
    assert judge(name, 0, response, (second,))[0] is Verdict.WRONG
    assert judge(name, 0, response, (None,))[0] is Verdict.WRONG
    assert judge(name, 0, missing, (first, None))[0] is Verdict.RIGHT
    assert judge(name, 0, missing, (first,))[0] is Verdict.REFUSED
    # The steering of one version with the tokens of the other.
    assert judge(name, 0, answer(200, body((4, 5, 6), (4, 5, 6)), HEADERS), (first, second))[0] is Verdict.WRONG


def test_a_fault_names_the_request_and_what_was_expected() -> None:
    tally = Tally()
    assert tally.add_answer("burst", KNOWN, answer(200, body((1, 2, 3), (1, 2, 4)), HEADERS)) is Verdict.WRONG
    assert (tally.num_faults, tally.total(Verdict.RIGHT)) == (1, 0)
    (message,) = tally.messages
    assert "steered: POST /v1/completions" in message
    assert "expected tokens [1, 2, 3], not [1, 2, 4]" in message


def test_flat_and_growing_memory() -> None:
    num_samples = 10 * PARTS
    warm_up = [100.0 + 10 * number for number in range(10)]
    flat = [1000.0] * (num_samples - 10)

    def growth(samples: list[float], first: int = 0) -> bool:
        (found,) = growths({1: History("engine", first, samples)}, num_samples)
        return found.is_flat

    assert growth([*warm_up, *flat])
    assert growth([*warm_up, *flat[:-3], 5000.0, *flat[:2]]), "one body of some size is no growth"
    assert growth([*warm_up, *flat[10:], *[1049.0] * 10])
    assert not growth([*warm_up, *flat[10:], *[1051.0] * 10])
    assert growth([10.0 + FLOOR_MIB * number / num_samples for number in range(num_samples)])
    assert not growth([10.0 + 2 * FLOOR_MIB * number / num_samples for number in range(num_samples)])
    assert not growth(flat, first=10), "it was started under load"
    assert not growth(flat), "it ended under load"


LEAK = "import time\nkept = []\nwhile True: kept.append(bytearray(2**20)); time.sleep(0.01)"


@pytest.mark.parametrize("code", ["import time; time.sleep(60)", LEAK], ids=["flat", "leak"])
def test_memory_of_the_children_of_a_process(code: str) -> None:
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], start_new_session=True)
    try:
        time.sleep(2)
        watch = MemoryWatch(process.pid, poll_seconds=0.1)
        watch.start()
        time.sleep(4)
        watch.close()
        own, child = growths(watch.histories, watch.num_samples)
        assert own.is_flat
        assert child.is_flat is (code != LEAK), str(child)
    finally:
        for pid in watch.histories:
            subprocess.run(["kill", "-9", str(pid)], check=True)
        process.wait(10)


def test_a_path_that_fails_is_a_fault() -> None:
    watch = LatencyWatch("http://127.0.0.1:9", "/health", 0.01)
    watch.start()
    time.sleep(0.5)
    watch.close()
    assert watch.faults
    assert len(watch.seconds) >= len(watch.faults)
