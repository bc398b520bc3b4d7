"""`steer-engine batch` continues a run only if model, flags, and the content of vectors and presets are the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_engine.api.batch import answer_line, read_lines, writing
from steer_engine.cli.batch import batch, context_of
from steer_engine.errors import BatchFileError
from steer_engine.vectors import ControlVector, save

STEERING = {
    "plain": None,
    "by name": {"edits": [{"vector": "calm"}]},
    "by gate": {"edits": [{"vector": "kind", "gate": {"vector": "calm", "min_cos": 0.1}}]},
    "by preset": {"preset": "calmer"},
    "in the arguments": json.dumps({"edits": [{"vector": "calm"}]}),
    "by model": "tiny:calmer",
}


def write_vector(folder: Path, name: str, seed: int) -> None:
    direction = np.random.default_rng(seed).standard_normal(64).astype(np.float32)
    save(ControlVector(directions={1: direction}), folder / f"{name}.safetensors")


def body_of(kind: str) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": "x"}
    match kind:
        case "plain":
            return body
        case "in the arguments":
            return body | {"vllm_xargs": {"steering": STEERING[kind]}}
        case "by model":
            return body | {"model": STEERING[kind]}
        case _:
            return body | {"steering": STEERING[kind]}


@pytest.fixture
def command(tiny_llama: str, tmp_path: Path) -> list[str]:
    """A command whose only line, of the kind that the test chooses, has been answered in an earlier run."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    vectors = tmp_path / "vectors"
    vectors.mkdir()
    for seed, name in enumerate(("calm", "kind", "unused")):
        write_vector(vectors, name, seed)
    (vectors / "calmer.preset.json").write_text(json.dumps({"edits": [{"vector": "calm"}]}))
    (tmp_path / "template.jinja").write_text("one")
    return [
        str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--model", str(tmp_path / "model"),
        "--steering-vectors", str(vectors), "--max-num-seqs", "8", "--dtype", "float32",
        "--chat-template", str(tmp_path / "template.jinja"),
    ]  # fmt: skip


def answer(command: list[str], kind: str) -> None:
    """Write the input, and the output as a first run with this command leaves it."""
    source, target = map(Path, command[:2])
    source.write_text(json.dumps({"custom_id": "a", "url": "/v1/completions", "body": body_of(kind)}) + "\n")
    context = context_of(command[3], command[4:])
    target.write_bytes(b"".join(answer_line(line, 200, {}) for line in read_lines(source, context)))


@pytest.mark.parametrize("kind", STEERING)
def test_an_unchanged_run_is_continued_without_an_engine(command: list[str], kind: str, tmp_path: Path) -> None:
    answer(command, kind)
    assert batch(command) == 0
    write_vector(tmp_path / "vectors", "unused", 9)
    write_vector(tmp_path / "vectors", "new", 9)
    command[command.index("--max-num-seqs") + 1] = "4"
    assert batch([*command, "--gpu-memory-utilization=0.5"]) == 0


def test_a_text_too_long_to_be_a_path_is_no_file(tmp_path: Path) -> None:
    assert context_of(str(tmp_path), ["--chat-template", "{% for m in messages %}" * 400])({}) != b""


@pytest.mark.parametrize("kind", [kind for kind in STEERING if kind != "plain"])
def test_a_changed_vector_is_found_by_every_way_to_name_it(command: list[str], kind: str, tmp_path: Path) -> None:
    answer(command, kind)
    write_vector(tmp_path / "vectors", "calm", 9)
    with pytest.raises(BatchFileError, match="line 1 .* another request"):
        batch(command)


def test_the_vectors_of_a_default_preset_count(command: list[str], tmp_path: Path) -> None:
    command += ["--steering_default", "calmer"]
    answer(command, "plain")
    assert batch(command) == 0
    write_vector(tmp_path / "vectors", "calm", 9)
    with pytest.raises(BatchFileError, match="another request"):
        batch(command)


def change_model(command: list[str], folder: Path) -> None:
    shutil.copytree(folder / "model", folder / "other")
    (folder / "other" / "config.json").write_text("{}")
    command[3] = str(folder / "other")


def change_flag(command: list[str], folder: Path) -> None:
    command[command.index("float32")] = "bfloat16"


def change_file(command: list[str], folder: Path) -> None:
    (folder / "template.jinja").write_text("two")


def change_line(command: list[str], folder: Path) -> None:
    source = Path(command[0])
    source.write_text(source.read_text().replace("calm", "kind"))


def change_preset(command: list[str], folder: Path) -> None:
    (folder / "vectors" / "calmer.preset.json").write_text(json.dumps({"edits": [{"vector": "kind"}]}))


@pytest.mark.parametrize("change", [change_model, change_flag, change_file, change_line, change_preset])
def test_another_run_does_not_keep_the_answers(
    command: list[str], tmp_path: Path, change: Callable[[list[str], Path], None]
) -> None:
    answer(command, "by preset")
    before = (tmp_path / "out.jsonl").read_bytes()
    change(command, tmp_path)
    with pytest.raises(BatchFileError, match="another request"):
        batch(command)
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_two_runs_at_once_are_refused(command: list[str], tmp_path: Path) -> None:
    answer(command, "plain")
    with writing(tmp_path / "out.jsonl"), pytest.raises(BatchFileError, match="another run is writing"):
        batch(command)
