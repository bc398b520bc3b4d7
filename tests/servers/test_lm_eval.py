"""lm-evaluation-harness steers by a preset's name, as it is: the tasks of examples/lm_eval on generated questions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.asking import MODEL
from helpers.harness import EXAMPLES, Harness, assert_steered, write_items
from helpers.server_process import STEERED, Server

LM_EVAL = Harness(script="lm_eval", variable="LM_EVAL", packages="'lm_eval[api]' transformers")
TASKS = Path("examples", "lm_eval")
"""Relative, as the tasks name their items."""

NUM_ITEMS = 12
NUM_ANSWERS = 4

pytestmark = LM_EVAL.marks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder from where the example's commands work, with items of our generator."""
    made = tmp_path_factory.mktemp("lm_eval")
    shutil.copytree(EXAMPLES / "lm_eval", made / TASKS)
    write_items(made / TASKS / "babi15.jsonl", NUM_ITEMS)
    return made


def evaluate(server: Server, folder: Path, task: str, model: str, tokenizer: str) -> list[Any]:
    """What the harness got for each item, in their order: texts, or lists of log-probabilities."""
    out = folder / f"{task} {model.replace(':', ' ')}"
    arguments = f"model={model},base_url={server.url}/v1/completions,tokenizer={tokenizer},num_concurrent=4"
    done = LM_EVAL.run(
        "--model", "local-completions", "--include_path", str(TASKS), "--tasks", task,
        "--model_args", arguments, "--log_samples", "--output_path", str(out),
        folder=folder, HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1", HF_HOME=str(folder / "home"),
    )  # fmt: skip
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
    assert_steered(plain, loud)
