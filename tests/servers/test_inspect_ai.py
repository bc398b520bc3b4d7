"""Inspect AI steers by a preset's name and by `extra_body`, as it is: the task of examples/inspect_ai."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.asking import MODEL
from helpers.server_process import STEERED, Server

INSPECT = os.environ.get("INSPECT_AI") or shutil.which("inspect")
"""Its console script; it needs an environment of its own (`pip install inspect_ai openai`)."""

ROOT = Path(__file__).resolve().parents[2]
TASK = ROOT / "examples" / "inspect_ai" / "babi15.py"
NUM_ITEMS = 8

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(INSPECT is None, reason="needs inspect_ai (INSPECT_AI names its script)"),
]


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    command = [sys.executable, "-P", str(ROOT / "examples" / "lm_eval" / "items.py"), str(NUM_ITEMS)]
    done = subprocess.run(command, capture_output=True, check=True, timeout=240)
    path = tmp_path_factory.mktemp("inspect") / "items.jsonl"
    path.write_bytes(done.stdout)
    shutil.copy(TASK, path.parent)
    return path


def evaluate(server: Server, items: Path, model: str, *options: str) -> dict[str, Any]:
    """The log of a run."""
    assert INSPECT is not None
    folder = items.parent / f"{model.replace(':', ' ')} {' '.join(options)}"
    command = [
        INSPECT, "eval", TASK.name, "--model", f"openai-api/steer/{model}", "-T", f"items={items}", *options,
        "--log-dir", str(folder), "--log-format", "json", "--display", "plain", "--max-retries", "0",
    ]  # fmt: skip
    environment = os.environ | {
        "STEER_BASE_URL": f"{server.url}/v1",
        "STEER_API_KEY": "none",
        "HOME": str(items.parent),
    }
    environment.pop("PYTHONPATH", None)  # its environment is its own
    done = subprocess.run(
        command, cwd=items.parent, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    (log,) = folder.glob("*.json")
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
        assert sum(a != b for a, b in zip(plain, steered, strict=True)) > NUM_ITEMS // 2


def test_an_unknown_vector_is_an_error_and_no_answer(server: Server, items: Path) -> None:
    log = evaluate(server, items, MODEL, "-T", "vector=nobody")
    assert log["status"] == "error"
    assert "nobody" in json.dumps(log["error"])
