"""Running a batch: bounded concurrency and memory, one answer per line; answers survive the death of the engine."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from steer_engine.api import batch
from steer_engine.api.batch import Tally, resume, run


def write(path: Path, count: int) -> None:
    with path.open("w") as file:
        for i in range(count):
            line = {"custom_id": f"id {i}", "url": "/v1/completions", "body": {"prompt": str(i)}}
            file.write(json.dumps(line) + "\n")


def answers(path: Path) -> dict[str, Any]:
    return {line["custom_id"]: line for line in map(json.loads, path.read_text().splitlines())}


async def echo(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    await asyncio.sleep(0)
    return 200, {"text": body["prompt"]}


async def test_every_line_is_answered_once(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    write(source, 500)
    with source.open("a") as file:
        file.write("not json\n")
    running: list[int] = []
    most = [0]

    async def send(url: str, body: dict[str, Any]) -> tuple[int, Any]:
        running.append(1)
        most[0] = max(most[0], len(running))
        await asyncio.sleep(0.001)
        running.pop()
        return (400 if body["prompt"] == "7" else 200), {"text": body["prompt"]}

    seen: list[int] = []
    tally = await run(
        source, target, send, finished=resume(target), at_once=16, progress=lambda tally: seen.append(tally.total)
    )
    assert tally == Tally(answered=499, failed=2)
    assert most[0] == 16
    assert seen == list(range(1, 502))
    found = answers(target)
    assert len(found) == 501
    assert found["id 42"]["response"] == {"status_code": 200, "request_id": "line-43", "body": {"text": "42"}}
    assert found["id 7"]["response"]["status_code"] == 400
    assert "not JSON" in found[None]["error"]["message"]


async def test_a_continued_run_sends_only_lines_without_answers(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    write(source, 100)
    sent: Counter[str] = Counter()

    async def dies(url: str, body: dict[str, Any]) -> tuple[int, Any]:
        sent[body["prompt"]] += 1
        if sent.total() == 40:
            raise RuntimeError("dead")
        return await echo(url, body)

    with pytest.raises(RuntimeError, match="dead"):
        await run(source, target, dies, finished=resume(target), at_once=4)
    done = len(answers(target))
    assert 30 < done < 40
    with target.open("ab") as file:
        file.write(b'{"id":"line-')  # as left by a kill during a write
    tally = await run(source, target, echo, finished=resume(target), at_once=4)
    assert (tally.skipped, tally.answered) == (done, 100 - done)
    assert sorted(answers(target)) == sorted(f"id {i}" for i in range(100))


async def test_a_request_that_got_503_is_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "RETRY_SECONDS", (0.001, 0.001))
    source, target = tmp_path / "in", tmp_path / "out"
    write(source, 2)
    tries: Counter[str] = Counter()

    async def busy(url: str, body: dict[str, Any]) -> tuple[int, Any]:
        tries[body["prompt"]] += 1
        return (503 if body["prompt"] == "1" or tries[body["prompt"]] < 3 else 200), {}

    tally = await run(source, target, busy, finished=resume(target), at_once=2)
    assert tally == Tally(answered=1, failed=1)
    assert tries == {"0": 3, "1": 3}


async def test_a_body_nested_too_deeply_to_be_sent_is_one_error_line(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    write(source, 3)

    async def send(url: str, body: dict[str, Any]) -> tuple[int, Any]:
        if body["prompt"] == "1":
            nested: list[Any] = []
            for _ in range(100_000):
                nested = [nested]
            json.dumps(nested)
        return await echo(url, body)

    assert await run(source, target, send, finished=resume(target), at_once=2) == Tally(answered=2, failed=1)
    assert "nested" in answers(target)["id 1"]["error"]["message"]


@pytest.mark.parametrize("count", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
async def test_memory_does_not_grow_with_the_file(tmp_path: Path, count: int) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    write(source, count)
    tracemalloc.start()
    await run(source, target, echo, finished=resume(target), at_once=64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000
    assert target.stat().st_size > source.stat().st_size
