"""Inspect AI steers by a preset's name and by `extra_body`, as it is: the task of examples/inspect_ai."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.asking import MODEL
from helpers.harness import EXAMPLES, Harness, assert_steered, write_items
from helpers.server_process import STEERED, Server

INSPECT = Harness(script="inspect", variable="INSPECT_AI", packages="inspect_ai openai")
TASK = EXAMPLES / "inspect_ai" / "babi15.py"
NUM_ITEMS = 8

pytestmark = INSPECT.marks


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inspect") / "items.jsonl"
    write_items(path, NUM_ITEMS)
    shutil.copy(TASK, path.parent)
    return path


def evaluate(server: Server, items: Path, model: str, *options: str) -> dict[str, Any]:
    """The log of a run."""
    logs = items.parent / f"{model.replace(':', ' ')} {' '.join(options)}"
    done = INSPECT.run(
        "eval", TASK.name, "--model", f"openai-api/steer/{model}", "-T", f"items={items}", *options,
        "--log-dir", str(logs), "--log-format", "json", "--display", "plain", "--max-retries", "0",
        folder=items.parent, STEER_BASE_URL=f"{server.url}/v1", STEER_API_KEY="none",
    )  # fmt: skip
    (log,) = logs.glob("*.json")
    found: dict[str, Any] = json.loads(log.read_text())
    assert "samples" in found, done.stderr[-3000:]
    return found


def answers(log: dict[str, Any]) -> list[str]:
    assert log["status"] == "success", log.get("error")
    found = sorted(log["samples"], key=lambda sample: sample["id"])
    assert len(found) == NUM_ITEMS
    return [sample["output"]["choices"][0]["message"]["content"] for sample in found]


def test_plain_by_preset_and_by_extra_body(server: Server, items: Path) -> None:
    before = server.metric(STEERED)
    plain = answers(evaluate(server, items, MODEL))
    assert server.metric(STEERED) == before
    loud = answers(evaluate(server, items, f"{MODEL}:loud"))
    assert server.metric(STEERED) == before + NUM_ITEMS
    log = evaluate(server, items, MODEL, "-T", "vector=east", "-T", "scale=60.0")
    assert server.metric(STEERED) == before + 2 * NUM_ITEMS
    assert "east" in json.dumps(log["eval"]), "the log says how the answers were steered"
    for steered in (loud, answers(log)):
        assert_steered(plain, steered)


def test_an_unknown_vector_is_an_error_and_no_answer(server: Server, items: Path) -> None:
    log = evaluate(server, items, MODEL, "-T", "vector=nobody")
    assert log["status"] == "error"
    assert "nobody" in json.dumps(log["error"])
