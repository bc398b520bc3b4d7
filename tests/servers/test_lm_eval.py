"""lm-evaluation-harness steers by a preset's name, as it is: the tasks of examples/lm_eval on generated questions."""

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

LM_EVAL = os.environ.get("LM_EVAL") or shutil.which("lm_eval")
"""Its console script; it needs an environment of its own (`pip install "lm_eval[api]" transformers`)."""

EXAMPLES = Path("examples", "lm_eval")
ROOT = Path(__file__).resolve().parents[2]
NUM_ITEMS = 12
NUM_ANSWERS = 4

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(LM_EVAL is None, reason="needs lm_eval (LM_EVAL names its script)"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder from where the example's commands work, with items of our generator."""
    made = tmp_path_factory.mktemp("lm_eval")
    shutil.copytree(ROOT / EXAMPLES, made / EXAMPLES)
    items = subprocess.run(
        [sys.executable, "-P", str(EXAMPLES / "items.py"), str(NUM_ITEMS)],
        cwd=made, capture_output=True, check=True, timeout=240,
    )  # fmt: skip
    (made / EXAMPLES / "babi15.jsonl").write_bytes(items.stdout)
    return made


def evaluate(server: Server, folder: Path, task: str, model: str, tokenizer: str) -> list[Any]:
    """What the harness got for each item, in their order: texts, or lists of log-probabilities."""
    assert LM_EVAL is not None
    out = folder / f"{task} {model.replace(':', ' ')}"
    arguments = f"model={model},base_url={server.url}/v1/completions,tokenizer={tokenizer},num_concurrent=4"
    command = [
        LM_EVAL, "--model", "local-completions", "--include_path", str(EXAMPLES), "--tasks", task,
        "--model_args", arguments, "--log_samples", "--output_path", str(out),
    ]  # fmt: skip
    environment = os.environ | {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    environment.pop("PYTHONPATH", None)  # its environment is its own
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = out.rglob(f"samples_{task}_*.jsonl")
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    return [[answer[0] for answer in line["resps"]] for line in lines]


@pytest.mark.parametrize(("task", "per_item"), [("babi15_generate", 1), ("babi15_choice", NUM_ANSWERS)])
def test_a_task_through_a_preset(server: Server, smollm2: str, folder: Path, task: str, per_item: int) -> None:
    before = server.metric(STEERED)
    plain = evaluate(server, folder, task, MODEL, str(smollm2))
    assert server.metric(STEERED) == before
    loud = evaluate(server, folder, task, f"{MODEL}:loud", str(smollm2))
    assert server.metric(STEERED) == before + NUM_ITEMS * per_item
    assert [len(each) for each in plain] == [len(each) for each in loud] == [per_item] * NUM_ITEMS
    assert sum(a != b for a, b in zip(plain, loud, strict=True)) > NUM_ITEMS // 2
