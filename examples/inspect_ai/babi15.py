"""A task for Inspect AI: questions like those of bAbI task 15, answered plain, through a preset, or with a vector.

Inspect's provider `openai-api` speaks to any OpenAI-compatible server, and passes `extra_body` on, so steering needs no
provider of its own. README.md in this folder has the commands.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import Sample, json_dataset
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import accuracy, includes, stderr
from inspect_ai.solver import generate

ITEMS = Path(__file__).parents[1] / "lm_eval" / "babi15.jsonl"
"""Written by examples/lm_eval/items.py."""


def sample(record: dict[str, Any]) -> Sample:
    """A question; the right answer is one word."""
    return Sample(input=record["prompt"], target=record["answers"][record["correct"]].strip())


@task
def babi15(vector: str = "", scale: float = 1.0, items: str = str(ITEMS)) -> Task:
    """vector, scale: one edit in every request. Without them, the model's name decides: `MODEL` or `MODEL:PRESET`."""
    steering = {"steering": {"edits": [{"vector": vector, "scale": scale}]}} if vector else None
    return Task(
        dataset=json_dataset(items, sample),
        solver=generate(),
        scorer=includes(),
        metrics=[accuracy(), stderr()],
        config=GenerateConfig(temperature=0, max_tokens=16, extra_body=steering),
    )
