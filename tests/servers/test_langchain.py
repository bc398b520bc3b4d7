"""The example for LangChain does what it says: by the field, and by a preset's name as the model."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from helpers.asking import MODEL
from helpers.server_process import STEERED, Server

LANGCHAIN = os.environ.get("LANGCHAIN_PYTHON")
"""A Python that has langchain-openai."""

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "langchain_chat.py"


@pytest.mark.slow
@pytest.mark.skipif(LANGCHAIN is None, reason="needs langchain-openai: LANGCHAIN_PYTHON names a Python that has it")
def test_the_example(server: Server) -> None:
    assert LANGCHAIN is not None
    before = server.metric(STEERED)
    command = [LANGCHAIN, str(EXAMPLE), MODEL, "east", "How are you?", "loud"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"STEER_ENGINE_URL": server.url, "LANGSMITH_TRACING": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert list(answers) == ["plain", "steered", "preset"]
    assert answers["preset"] != answers["plain"]
    assert server.metric(STEERED) == before + 2
