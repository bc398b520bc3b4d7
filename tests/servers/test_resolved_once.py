"""A server resolves the steering of a request exactly once, whatever the request fans out to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.living import along
from helpers.resolving_server import LINES, requests
from helpers.server_process import SMALL

from steer_engine.vectors.safetensors_format import to_bytes

KINDS = [kind for kind in requests({}) if kind not in ("unsteered", "refused")]


@pytest.fixture(scope="module")
def found(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Kind of request -> status, resolve calls in the API process, and answer."""
    folder = tmp_path_factory.mktemp("resolved_once")
    vectors = folder / "vectors"
    vectors.mkdir()
    (vectors / "house.safetensors").write_bytes(to_bytes(along(5)))
    (vectors / "house.preset.json").write_text(json.dumps({"edits": [{"vector": "house"}]}))
    script = Path(__file__).parents[1] / "helpers" / "resolving_server.py"
    target = folder / "found.json"
    command = [sys.executable, "-P", str(script), tiny_llama, str(vectors), str(target), *SMALL]
    command += ["--enable-scale-out", "--steering-capture", "all"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-6000:]
    result: dict[str, Any] = json.loads(target.read_text())
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_a_steered_request_is_resolved_once(found: dict[str, Any], kind: str) -> None:
    status, calls, answer = found[kind]
    assert status == 200, answer
    assert calls == 1
    if kind != "messages":
        assert answer["steering"]["edits"]


def test_equal_steering_has_one_digest_however_it_is_requested(found: dict[str, Any]) -> None:
    digests = {kind: found[kind][2]["steering"]["digest"] for kind in KINDS if kind != "messages"}
    assert len(set(digests.values())) == 1, digests


def test_an_unsteered_request_resolves_nothing(found: dict[str, Any]) -> None:
    assert found["unsteered"][:2] == [200, 0]
    assert "steering" not in found["unsteered"][2]


def test_a_refused_request_is_resolved_once(found: dict[str, Any]) -> None:
    assert found["refused"][:2] == [404, 1]


def test_each_line_of_a_batch_file_is_resolved_once(found: dict[str, Any]) -> None:
    assert found["batch file"][:2] == [LINES, LINES]
