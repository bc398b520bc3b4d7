"""lm-evaluation-harness steers by a preset's name, as it is: the task of examples/lm_eval on a local file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from serving.asking import MODEL
from serving.server_process import Server

LM_EVAL = os.environ.get("LM_EVAL") or shutil.which("lm_eval")
"""Its console script; it needs an environment of its own (`pip install "lm_eval[api]"`)."""

ROOT = Path(__file__).resolve().parents[2]
NUM_ITEMS = 24

pytestmark = [pytest.mark.slow, pytest.mark.skipif(LM_EVAL is None, reason="needs lm_eval (LM_EVAL names its script)")]


def evaluate(server: Server, model: str, out: Path) -> list[str]:
    """The answers that the harness saw, in the order of the items."""
    assert LM_EVAL is not None
    arguments = f"model={model},base_url={server.url}/v1/completions,tokenizer_backend=none,num_concurrent=4"
    command = [
        LM_EVAL, "--model", "local-completions", "--include_path", "examples/lm_eval", "--tasks", "deduction_mini",
        "--model_args", arguments, "--log_samples", "--output_path", str(out),
    ]  # fmt: skip
    environment = os.environ | {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "home")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = out.rglob("samples_deduction_mini_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    return [line["resps"][0][0] for line in sorted(lines, key=lambda line: line["doc_id"])]


def steered(server: Server) -> float:
    lines = server.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith('steer_engine_requests_total{outcome="ste'))


def test_a_task_through_a_preset(server: Server, tmp_path: Path) -> None:
    before = steered(server)
    plain = evaluate(server, MODEL, tmp_path / "plain")
    assert steered(server) == before
    loud = evaluate(server, f"{MODEL}:loud", tmp_path / "loud")
    assert steered(server) == before + NUM_ITEMS
    assert len(plain) == len(loud) == NUM_ITEMS
    assert sum(a != b for a, b in zip(plain, loud, strict=True)) > NUM_ITEMS // 2
