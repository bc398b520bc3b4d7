"""A response in several turns, with tools between them, is steered in each."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.living import along, spec
from helpers.server_process import Server, steer_engine_serve

from steer_engine.vectors.safetensors_format import to_bytes

MAX_TOKENS = 6


def text_of(answer: dict[str, Any]) -> str:
    return "".join(part["text"] for item in answer["output"] for part in item["content"])


@pytest.mark.slow
def test_every_turn_of_a_tool_loop_is_steered(tiny_llama: str, tmp_path: Path) -> None:
    vector = along(5)
    (tmp_path / "east.safetensors").write_bytes(to_bytes(vector))
    script = Path(__file__).parents[1] / "helpers" / "tool_loop_server.py"
    command = steer_engine_serve(
        tiny_llama, "--served-model-name", "tiny", "--steering-vectors", str(tmp_path), "--enable-log-requests"
    )
    server = Server([sys.executable, "-P", str(script), *command[command.index("serve") :]], tmp_path / "server.log")
    try:

        def ask(**fields: Any) -> dict[str, Any]:
            body = {"model": "tiny", "input": "abc", "temperature": 0, "max_output_tokens": MAX_TOKENS}
            answer = server.post("/v1/responses", body | {"ignore_eos": True} | fields)
            assert answer.status_code == 200, answer.text
            found: dict[str, Any] = answer.json()
            return found

        steered, plain = ask(steering=spec("east")), ask()
        for answer in (steered, plain):
            said = text_of(answer)
            assert answer["usage"]["output_tokens"] == 2 * MAX_TOKENS
            assert said[: len(said) // 2] == said[len(said) // 2 :]  # both turns read the same, and say the same
        assert text_of(steered) != text_of(plain)
        assert steered["steering"]["edits"][0]["vector"] == vector.digest
        assert "steering" not in plain
        lines = [json.loads(line) for line in re.findall(r"steered (\{.*\})", server.log)]
        assert [line["vectors"] for line in lines] == [[vector.digest]] * 2
        assert len({line["request_id"] for line in lines}) == 2
    finally:
        server.kill()
