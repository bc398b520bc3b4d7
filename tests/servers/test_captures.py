"""Captured rows of a real server equal those of the offline engine, bit for bit."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from helpers.living import HIDDEN_SIZE, NUM_BLOCKS, along
from helpers.server_process import CAN_PAUSE, STEPS, Server, num_waiting, paused, steer_engine_serve
from helpers.server_process import STEERED as STEERED_REQUESTS
from safetensors import safe_open
from safetensors.numpy import load as load_tensors

from steer_engine.vectors.safetensors_format import to_bytes

CHUNK, BLOCK = 32, 32
"""Tokens of a step and of a block of the cache: the prompts take several of both."""

PROMPTS = {"short": list(range(10, 17)), "long": [3 + (7 * i) % 250 for i in range(3 * CHUNK + 5)]}
STEERED = {"edits": [{"vector": "east", "scale": 0.5}]}

CAPTURES: dict[str, tuple[str, Any, Any, bool]] = {
    "last": ("long", "last", None, False),
    "all": ("long", "all", None, False),
    "mean": ("long", "mean", None, False),
    "list": ("long", [-1, 0, 40, -1], None, False),
    "short": ("short", "all", None, False),
    "steered": ("long", "all", STEERED, False),
    "steered after": ("long", "all", STEERED, True),
    "after": ("long", "all", None, True),
}
"""Name -> prompt, positions, steering, after the edit."""

ANSWERS: dict[str, tuple[str, Any, Any, str]] = {
    "generation": ("long", "all", None, "generation"),
    "short generation": ("short", "all", None, "generation"),
    "steered generation": ("long", "all", STEERED, "generation"),
    "prompt and generation": ("long", "all", STEERED, "all"),
    "mean of the generation": ("long", "mean", None, "generation"),
    "last of the generation": ("short", "last", STEERED, "generation"),
}
"""Name -> prompt, positions, steering, scope."""

NUM_TOKENS = 6
"""Of these answers."""

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""A CPU adds up the attention of a decoding step in as many parts as the process has threads."""

MAX_CAPTURES = 2
MAX_ROWS = len(PROMPTS["long"]) + NUM_TOKENS
"""At all blocks."""
MAX_BYTES = NUM_BLOCKS * HIDDEN_SIZE * 4 * MAX_ROWS


@pytest.fixture(scope="module")
def vector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vectors") / "east.safetensors"
    path.write_bytes(to_bytes(along(5)))
    return path


@pytest.fixture(scope="module")
def offline(tiny_llama: str, vector: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("offline")
    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8}
    settings |= {"max_num_batched_tokens": CHUNK, "block_size": BLOCK, "gpu_memory_utilization": 0.2}
    task = {"model": tiny_llama, "vector": str(vector), "llm": settings, "prompts": PROMPTS, "captures": CAPTURES}
    task |= {"answers": ANSWERS, "max_tokens": NUM_TOKENS}
    source, target = folder / "task.json", folder / "rows.npz"
    source.write_text(json.dumps(task))
    script = Path(__file__).parents[1] / "helpers" / "offline_rows.py"
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, **ONE_THREAD}
    subprocess.run([sys.executable, "-P", str(script), str(source), str(target)], check=True, env=environment)
    with np.load(target) as rows:
        return dict(rows)


@pytest.fixture(scope="module")
def capturing(tiny_llama: str, vector: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = steer_engine_serve(
        tiny_llama, "--served-model-name", "tiny", "--steering-vectors", str(vector.parent), "--enable-scale-out",
        "--max-num-batched-tokens", str(CHUNK), "--block-size", str(BLOCK), "--enable-prompt-tokens-details",
        "--steering-capture", "all", "--steering-limit", f"max_capture_bytes={MAX_BYTES}",
        "--steering-limit", f"max_captures={MAX_CAPTURES}",
    )  # fmt: skip
    running = Server(command, tmp_path_factory.mktemp("capturing") / "server.log", env=CAN_PAUSE | ONE_THREAD)
    yield running
    running.kill()


def ask(server: Server, prompt: Any, steering: Any, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "max_tokens": 2, "temperature": 0, "ignore_eos": True, "prompt": prompt}
    return server.post("/v1/completions", body | {"steering": steering} | fields)


def rows_of(answer: httpx.Response) -> np.ndarray:
    """float32 [blocks, rows, D] of an answer that carries them."""
    assert answer.status_code == 200, answer.text
    capture = answer.json()["steering"]["capture"]
    tensors = load_tensors(base64.b64decode(capture["data"]))
    assert set(tensors) == {f"residual.{block}" for block in capture["blocks"]}
    return np.stack([tensors[f"residual.{block}"] for block in capture["blocks"]])


def worker(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = server.get("/v1/steering/stats").json()["engine"]["workers"][0]
    return found


def captured_bytes(server: Server) -> int:
    return int(worker(server)["captured_bytes"])


def steered_slots(server: Server) -> int:
    return int(worker(server)["steered_slots"])


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", CAPTURES)
def test_rows_are_those_of_the_offline_engine_to_the_bit(
    capturing: Server, offline: dict[str, np.ndarray], name: str
) -> None:
    prompt, positions, steering, after = CAPTURES[name]
    capture = {"capture": {"positions": positions, "after": after}}
    answer = ask(capturing, PROMPTS[prompt], (steering or {}) | capture)
    assert np.array_equal(rows_of(answer), offline[name])
    reported = answer.json()["steering"]
    assert answer.headers["X-Steering"] == reported["digest"]
    length = len(PROMPTS[prompt])
    expected = {"last": [length - 1], "list": [length - 1, 0, 40, length - 1]}.get(name, list(range(length)))
    assert reported["capture"]["positions"] == expected
    assert reported["capture"]["prompt_tokens"] == length
    assert len(reported["edits"]) == (steering is not None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ANSWERS)
def test_rows_of_answers_are_those_of_the_offline_engine_to_the_bit(
    capturing: Server, offline: dict[str, np.ndarray], name: str
) -> None:
    prompt, positions, steering, scope = ANSWERS[name]
    capture = {"capture": {"positions": positions, "scope": scope}}
    answer = ask(capturing, PROMPTS[prompt], (steering or {}) | capture, max_tokens=NUM_TOKENS)
    assert np.array_equal(rows_of(answer), offline[name])
    reported, length = answer.json()["steering"]["capture"], len(PROMPTS[prompt])
    last = length + NUM_TOKENS - 2  # chose the last token
    first = 0 if scope == "all" else last if positions == "last" else length - 1
    assert reported["positions"] == list(range(first, last + 1))
    assert (reported["scope"], reported["prompt_tokens"], reported["completion_tokens"]) == (scope, length, NUM_TOKENS)
    assert captured_bytes(capturing) == 0


@pytest.mark.slow
def test_the_default_is_one_row_for_each_token_that_is_returned(
    capturing: Server, offline: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """Also where a stop string ends an answer that the engine has continued."""
    capture = {"capture": {"scope": "generation"}}
    fields = {"max_tokens": NUM_TOKENS, "return_token_ids": True}
    whole = ask(capturing, PROMPTS["long"], capture, **fields)
    assert np.array_equal(rows_of(whole), offline["generation"])
    choice = whole.json()["choices"][0]
    assert rows_of(whole).shape[1] == len(choice["token_ids"]) == whole.json()["usage"]["completion_tokens"]
    stop = choice["text"][len(choice["text"]) // 2]
    stopped = ask(capturing, PROMPTS["long"], capture, **fields, stop=stop)
    shorter = stopped.json()["choices"][0]
    assert (shorter["finish_reason"], shorter["stop_reason"]) == ("stop", stop)
    number = len(shorter["token_ids"])
    assert number == stopped.json()["usage"]["completion_tokens"] < NUM_TOKENS
    assert shorter["token_ids"] == choice["token_ids"][:number]
    assert np.array_equal(rows_of(stopped), rows_of(whole)[:, :number])
    file = tmp_path / "rows.safetensors"
    file.write_bytes(base64.b64decode(stopped.json()["steering"]["capture"]["data"]))
    with safe_open(file, framework="numpy") as opened:
        found, length = opened.metadata(), len(PROMPTS["long"])
        assert found == {
            "format": "steer-engine/capture/1",
            "scope": "generation",
            "positions": ",".join(str(length - 1 + i) for i in range(number)),
            "prompt_tokens": str(length),
            "edit": "before",
        }
    wait_until(lambda: steered_slots(capturing) == 0)
    assert captured_bytes(capturing) == 0


@pytest.mark.slow
def test_the_rows_of_an_answer_may_be_computed_after_a_cached_prompt(
    capturing: Server, offline: dict[str, np.ndarray]
) -> None:
    capture = {"capture": {"scope": "generation"}}
    answers = [ask(capturing, PROMPTS["long"], capture, max_tokens=NUM_TOKENS) for _ in range(2)]
    assert answers[1].json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 3 * BLOCK
    bound = 2e-5 * np.abs(offline["generation"]).max()
    assert np.abs(rows_of(answers[1]) - offline["generation"]).max() <= bound


@pytest.mark.slow
def test_the_offline_rows_show_the_edit(offline: dict[str, np.ndarray]) -> None:
    """The stream before the edit at its own block, after it at the next; or after it at both, if requested."""
    plain, before, after = offline["all"], offline["steered"], offline["steered after"]
    assert np.array_equal(before[:2], plain[:2])
    assert not np.array_equal(before[2], plain[2])
    difference = after[1] - before[1]
    assert np.abs(difference[:, 5] - 20.0).max() < 1e-4  # scale 0.5 of 40 along axis 5
    assert not np.delete(difference, 5, axis=1).any()
    assert np.array_equal(offline["after"], plain)


@pytest.mark.slow
def test_a_capture_does_not_use_a_warm_prefix_cache(capturing: Server, offline: dict[str, np.ndarray]) -> None:
    plain = {"model": "tiny", "prompt": PROMPTS["long"], "max_tokens": 1}
    warm = [capturing.post("/v1/completions", plain).json()["usage"]["prompt_tokens_details"] for _ in range(2)]
    assert warm[1]["cached_tokens"] == 3 * BLOCK
    answer = ask(capturing, PROMPTS["long"], {"capture": {"positions": "all"}})
    assert np.array_equal(rows_of(answer), offline["all"])
    # Nor does a capture change the cache, or the answer.
    after = capturing.post("/v1/completions", plain).json()["usage"]["prompt_tokens_details"]
    assert after["cached_tokens"] == 3 * BLOCK
    unread = ask(capturing, PROMPTS["long"], None)
    assert unread.json()["choices"][0]["text"] == answer.json()["choices"][0]["text"]
    assert "steering" not in unread.json()


@pytest.mark.slow
def test_chosen_blocks_and_what_the_file_says(
    capturing: Server, offline: dict[str, np.ndarray], tmp_path: Path
) -> None:
    answer = ask(capturing, PROMPTS["long"], {"capture": {"blocks": [2, 0], "positions": [1, -1]}})
    capture = answer.json()["steering"]["capture"]
    assert (capture["blocks"], capture["after"]) == ([0, 2], False)
    assert np.array_equal(rows_of(answer), offline["all"][[0, 2]][:, [1, -1]])
    file = tmp_path / "rows.safetensors"
    file.write_bytes(base64.b64decode(capture["data"]))
    with safe_open(file, framework="numpy") as opened:
        last = len(PROMPTS["long"]) - 1
        assert opened.metadata() == {"format": "steer-engine/capture/1", "positions": f"1,{last}", "edit": "before"}


@pytest.mark.slow
def test_every_endpoint_that_can_carry_it(capturing: Server, offline: dict[str, np.ndarray]) -> None:
    capture = {"capture": {"positions": "all"}}
    by_tokens = capturing.post(
        "/inference/v1/generate",
        {"model": "tiny", "token_ids": PROMPTS["short"], "sampling_params": {"max_tokens": 1}, "steering": capture},
    )
    assert np.array_equal(rows_of(by_tokens), offline["short"])
    messages = [{"role": "user", "content": "abc"}]
    chat = {"model": "tiny", "messages": messages, "max_tokens": 1}
    responses = {"model": "tiny", "input": "abc", "max_output_tokens": 1}
    answers = [
        capturing.post("/v1/chat/completions", chat | {"steering": capture}),
        capturing.post("/v1/responses", responses | {"steering": capture}),
        capturing.post("/v1/chat/completions", chat | {"vllm_xargs": {"steering": json.dumps(capture)}}),
    ]
    rows = [rows_of(answer) for answer in answers]
    assert rows[0].shape[1] > 3  # the template is captured too
    assert np.array_equal(rows[0], rows[1])
    assert np.array_equal(rows[0], rows[2])
    generation = {"steering": {"capture": {"scope": "generation"}}}
    sampling = {"max_tokens": 3, "ignore_eos": True}
    for path, body in (
        ("/v1/chat/completions", chat | {"max_tokens": 3, "ignore_eos": True}),
        ("/v1/responses", responses | {"max_output_tokens": 3, "ignore_eos": True}),
        ("/inference/v1/generate", {"model": "tiny", "token_ids": PROMPTS["short"], "sampling_params": sampling}),
    ):
        answer = capturing.post(path, body | generation)
        assert rows_of(answer).shape[1] == answer.json()["steering"]["capture"]["completion_tokens"] == 3, path


LONG = {"prompt": PROMPTS["long"]}
REFUSED: dict[str, tuple[str, dict[str, Any], Any, str]] = {
    "a block that there is not": ("completions", {}, {"blocks": [1, 3]}, "Blocks 3 cannot be captured here"),
    "blocks that are none": ("completions", {}, {"blocks": "first"}, "'first' is not valid; use 'all', '8-22'"),
    "a position beyond the prompt": ("completions", {}, {"positions": [0, 7]}, "the prompt, which has 7 tokens"),
    "one before it": ("completions", {}, {"positions": [-8]}, "position -8 is outside the prompt"),
    "no position": ("completions", {}, {"positions": []}, "at least 1 item"),
    "another word": ("completions", {}, {"positions": "first"}, "'last', 'mean' or 'all'"),
    "an unknown field": ("completions", {}, {"layers": [1]}, "unknown field 'layers'"),
    "no object": ("completions", {}, True, "steering.capture"),
    "one row too many": (
        "completions", LONG, {"positions": [*range(len(PROMPTS["long"])), *range(NUM_TOKENS + 1)]}, "max_capture_bytes",
    ),
    "a longer prompt": ("completions", {"prompt": [5] * (MAX_ROWS + 1)}, {"positions": "all"}, "limit of"),
    "an answer that may be too long": (
        "completions", {"max_tokens": MAX_ROWS + 1}, {"scope": "generation"},
        f"(max_capture_bytes). Set max_tokens to at most {MAX_ROWS}, or request fewer blocks",
    ),
    "prompt and answer that may be too long": (
        "completions", LONG | {"max_tokens": NUM_TOKENS + 2}, {"scope": "all"},
        f"Set max_tokens to at most {NUM_TOKENS + 1},",
    ),
    "an answer without max_tokens": (
        "chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": None},
        {"scope": "generation", "positions": "last"}, f"Set max_tokens to at most {MAX_ROWS}",
    ),
    "a position of the answer": ("completions", {}, {"scope": "generation", "positions": [0]}, "use 'all', 'mean'"),
    "another scope": ("completions", {}, {"scope": "answer"}, "'generation'"),
    "a stream of the answer": ("completions", {"stream": True}, {"scope": "generation"}, "leave 'stream' out"),
    "a stream": ("completions", {"stream": True}, {}, "leave 'stream' out"),
    "several answers": ("completions", {"n": 2, "temperature": 1}, {}, "one prompt and one answer"),
    "several prompts": ("completions", {"prompt": ["a", "b"]}, {}, "one prompt and one answer"),
    "a messages request": (
        "messages", {"messages": [{"role": "user", "content": "a"}]}, {}, "answer cannot carry captured rows",
    ),
    "chat in batches": (
        "chat/completions/batch", {"messages": [[{"role": "user", "content": "a"}]] * 2}, {},
        "answer cannot carry captured rows",
    ),
    "in the background": ("responses", {"input": "a", "background": True}, {}, "'background'"),
}  # fmt: skip
"""What is wrong -> endpoint, fields, capture, and a part of the sentence."""


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_a_capture_that_is_impossible_is_a_400(capturing: Server, name: str) -> None:
    path, fields, capture, sentence = REFUSED[name]
    body = {"model": "tiny", "max_tokens": 2} | ({"prompt": PROMPTS["short"]} if path == "completions" else {})
    answer = capturing.post(f"/v1/{path}", body | fields | {"steering": {"capture": capture}})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert sentence in error["message"]
    if path != "messages":  # Anthropic's envelope has no such field
        assert error["param"].startswith("steering.capture")


@pytest.mark.slow
@pytest.mark.parametrize("key", ["_steer_capture", "capture"])
def test_the_key_of_the_engine_is_not_for_clients(capturing: Server, key: str) -> None:
    fields = {"vllm_xargs": {key: '{"key": "x", "start": 0, "end": null}'}}
    answer = capturing.post("/v1/completions", {"model": "tiny", "prompt": "abc", "max_tokens": 1, **fields})
    assert (answer.status_code, "reserved" in answer.text) == ((400, True) if key.startswith("_") else (200, False))
    by_tokens = {"model": "tiny", "token_ids": [1, 2], "sampling_params": {"max_tokens": 1, "extra_args": {key: "x"}}}
    assert capturing.post("/inference/v1/generate", by_tokens).status_code == (400 if key.startswith("_") else 200)


@pytest.mark.slow
async def test_more_captures_than_the_limit_wait_and_all_are_answered(capturing: Server) -> None:
    most, num_requests, num_tokens = 0, 8, 400
    body = {"model": "tiny", "prompt": PROMPTS["long"], "max_tokens": num_tokens, "ignore_eos": True}
    body |= {"steering": {"capture": {"positions": "all"}} | STEERED}
    steps, steered = (capturing.metric(name) for name in (STEPS, STEERED_REQUESTS))
    async with httpx.AsyncClient(base_url=capturing.url, timeout=120) as client:
        with paused(capturing):
            asking = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(num_requests)]
            deadline = time.monotonic() + 60
            while capturing.metric(STEERED_REQUESTS) < steered + num_requests or num_waiting(capturing) != MAX_CAPTURES:
                assert time.monotonic() < deadline, f"{num_waiting(capturing)} requests reached the engine"
                await asyncio.sleep(0.05)
        while not all(task.done() for task in asking):
            stats = (await client.get("/v1/steering/stats")).json()
            most = max(most, *(worker["captured_bytes"] for worker in stats["engine"]["workers"]))
        answers = [await task for task in asking]
    assert {rows_of(answer).shape for answer in answers} == {(NUM_BLOCKS, len(PROMPTS["long"]), HIDDEN_SIZE)}
    assert most <= MAX_CAPTURES * MAX_BYTES
    # Each gets a token in a step: no more of them ran at once.
    assert capturing.metric(STEPS) - steps >= num_requests * num_tokens / MAX_CAPTURES
    assert captured_bytes(capturing) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "capture", [{"positions": "all"}, {"scope": "generation", "blocks": [0]}, {"scope": "all", "blocks": [0]}]
)
async def test_captured_rows_of_an_aborted_request_are_dropped(capturing: Server, capture: dict[str, Any]) -> None:
    num_tokens = 200 if "scope" in capture else 400
    body = {"model": "tiny", "prompt": PROMPTS["long"], "max_tokens": num_tokens, "ignore_eos": True}
    body |= {"steering": {"capture": capture} | STEERED}
    num_aborted, deadline = 0, time.monotonic() + 120
    while num_aborted < 3:  # more than the limit of captures: slots are freed too
        assert time.monotonic() < deadline, "no request was seen while its rows were kept"
        async with httpx.AsyncClient(base_url=capturing.url, timeout=60) as client:
            asking = asyncio.create_task(client.post("/v1/completions", json=body))
            kept = 0
            while not kept and not asking.done():
                stats = (await client.get("/v1/steering/stats")).json()
                kept = stats["engine"]["workers"][0]["captured_bytes"]
            # A busy server may have answered both at once; then the next request is tried.
            num_aborted += kept > 0 and not asking.done()
            asking.cancel()
            await asyncio.wait({asking})
        wait_until(lambda: captured_bytes(capturing) == 0)
    assert ask(capturing, PROMPTS["short"], {"capture": {}}).status_code == 200
    wait_until(lambda: steered_slots(capturing) == 0)


@pytest.mark.slow
def test_capture_blocks_are_published_and_checked_by_validate(capturing: Server) -> None:
    described = capturing.get("/v1/steering").json()
    assert described["capture_blocks"] == [0, 1, 2]
    assert described["limits"]["max_capture_bytes"] == MAX_BYTES
    assert described["limits"]["max_captures"] == 2
    requested = {"capture": {"blocks": "1-2", "positions": [-1]}}
    checked = capturing.post("/v1/steering/validate", requested).json()
    assert checked["capture"] == {"blocks": [1, 2], "positions": [-1], "scope": "prompt", "after": False}
    assert checked["edits"] == []


def test_it_is_off_unless_the_operator_allows_it(server: Server) -> None:
    assert server.get("/v1/steering").json()["capture_blocks"] == []
    answer = server.post("/v1/completions", {"model": "smollm2-135m", "prompt": "a", "steering": {"capture": {}}})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "steering.capture"
    assert "--steering-capture" in answer.json()["error"]["message"]
