"""`steer-engine batch` on a real engine: every kind of line in one file, and a second run on a finished one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.server_process import SMALL

from steer_engine.vectors import ControlVector, save

STEERING = {"edits": [{"vector": "east"}]}
CONDITIONAL = {
    "edits": [{"vector": "east", "scope": {"from": "generation", "end": 2}}],
    "when": {"vector": "early", "above": -1.0, "at": "mean_prompt"},
}
SAMPLING = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4} | SAMPLING
TEXT = {"prompt": "abc", "max_tokens": 4} | SAMPLING
RESPONSE = {"input": "hi", "max_output_tokens": 4, "temperature": 0}

LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", CHAT),
    "chat steered": ("/v1/chat/completions", CHAT | {"steering": STEERING}),
    "text": ("/v1/completions", TEXT),
    "text steered": ("/v1/completions", TEXT | {"steering": STEERING}),
    "response steered": ("/v1/responses", RESPONSE | {"steering": STEERING}),
    "text conditional": ("/v1/completions", TEXT | {"steering": CONDITIONAL}),
    "unknown vector": ("/v1/completions", TEXT | {"steering": {"edits": [{"vector": "nobody"}]}}),
    "unknown url": ("/v1/embeddings", {"input": "x"}),
    "streamed": ("/v1/completions", TEXT | {"stream": True}),
    "half a surrogate": ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": "\ud800"}]}),
    "half a surrogate in a name": ("/v1/completions", TEXT | {"steering": {"edits": [{"vector": "\udfff"}]}}),
    "not a number": ("/v1/completions", TEXT | {"steering": {"edits": [{"vector": "east", "scale": float("nan")}]}}),
}


@pytest.fixture
def command(tiny_llama: str, tmp_path: Path) -> list[str]:
    direction = np.zeros(64, np.float32)
    direction[3] = 40.0
    (tmp_path / "vectors").mkdir()
    for name, block in (("early", 0), ("east", 1)):
        save(ControlVector(directions={block: direction}), tmp_path / "vectors" / f"{name}.safetensors")
    with (tmp_path / "in.jsonl").open("w") as file:
        for custom_id, (url, body) in LINES.items():
            file.write(json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body}) + "\n")
        file.write("not json\n")
    return [
        str(Path(sys.executable).with_name("steer-engine")), "batch", str(tmp_path / "in.jsonl"),
        str(tmp_path / "out.jsonl"), "--model", tiny_llama, "--served-model-name", "tiny",
        "--steering-vectors", str(tmp_path / "vectors"), *SMALL,
    ]  # fmt: skip


def test_a_mixed_file(command: list[str], tmp_path: Path) -> None:
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    first = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert first.returncode == 0, first.stderr[-4000:]
    assert "6 answered, 7 failed" in first.stderr
    found = {line["custom_id"]: line for line in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert set(found) == {*LINES, None}

    def answer(custom_id: str) -> dict[str, Any]:
        assert found[custom_id]["error"] is None
        assert found[custom_id]["response"]["status_code"] == 200
        body: dict[str, Any] = found[custom_id]["response"]["body"]
        return body

    for kind in ("chat", "text"):
        plain, steered = answer(kind), answer(f"{kind} steered")
        assert "steering" not in plain
        assert steered["steering"]["edits"][0]["name"] == "east"
        assert steered["choices"][0]["token_ids"] != plain["choices"][0]["token_ids"]
    assert answer("response steered")["steering"]["digest"] == answer("text steered")["steering"]["digest"]
    conditional = answer("text conditional")["steering"]
    assert conditional["edits"][0]["applied_tokens"] == 2
    assert conditional["conditions"][0]["held"] is True
    unknown = found["unknown vector"]["response"]
    assert (unknown["status_code"], unknown["body"]["error"]["param"]) == (404, "steering.edits[0].vector")
    for custom_id in ("half a surrogate", "half a surrogate in a name", "not a number"):
        assert found[custom_id]["response"]["status_code"] >= 400
        assert found[custom_id]["response"]["body"]["error"]["message"]
    for custom_id in ("unknown url", "streamed", None):
        assert found[custom_id]["response"] is None
        assert found[custom_id]["error"]["message"]

    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert (again.returncode, again.stderr.strip()) == (0, "0 answered, 0 failed, 13 already answered")


def test_usage_errors_are_one_line(command: list[str], tmp_path: Path) -> None:
    missing = [*command[:2], str(tmp_path / "no.jsonl"), *command[3:]]
    same = [*command[:3], command[2], *command[4:]]
    no_concurrency = [*command, "--at-once", "0"]
    for wrong, words in ((missing, "There is no file"), (same, "the same file"), (no_concurrency, "at least 1")):
        done = subprocess.run(wrong, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode in (1, 2)
        assert words in done.stderr
        assert "Traceback" not in done.stderr
