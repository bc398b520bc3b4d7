"""Conditions on real engines: values against Hugging Face with hooks, and the whole command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from helpers.derivation import SMALL, huggingface_rows, varied
from typer.testing import CliRunner

from steer_engine.cli.main import app
from steer_engine.derive import fit_condition
from steer_engine.derive.actors import CapturePool
from steer_engine.derive.condition import Readout
from steer_engine.derive.texts import Text
from steer_engine.errors import DerivationError, ModelMismatchError, SteerError
from steer_engine.vectors import ControlVector, VectorMetadata, load, save

BLOCKS = [0, 2]
"""Those of the pool."""

BOUND = 3 * 192 * 2.0**-23
"""Of |x| |v|: three blocks in float32, each with sums of up to 192 products, in two implementations."""

VALUES = {
    "last_prompt_token": lambda numbers_LT: numbers_LT[:, -1],
    "mean_prompt": lambda numbers_LT: numbers_LT.mean(axis=1),
    "max_prompt": lambda numbers_LT: numbers_LT.max(axis=1),
}


@pytest.fixture(scope="module")
def texts() -> list[Text]:
    return [Text(id=str(pair.line), text=pair.positive, line=pair.line) for pair in varied(9)]


@pytest.fixture(scope="module")
def reference(tiny_llama: str, texts: list[Text]) -> list[np.ndarray]:
    """Rows of each text, `[L, T, D]`."""
    return [rows_LTD[BLOCKS] for rows_LTD in huggingface_rows(tiny_llama, [text.text for text in texts])]


@pytest.mark.parametrize("at", VALUES)
@pytest.mark.parametrize("measure", ["dot", "cosine"])
@pytest.mark.parametrize("max_rows", [10_000, 100, 7])
def test_values_are_those_of_hugging_face(
    at: str, measure: str, max_rows: int, tiny_pool: CapturePool, texts: list[Text], reference: list[np.ndarray]
) -> None:
    """With few rows at a time, prompts are captured one by one, and long ones window by window."""
    directions_LD = np.random.default_rng(1).normal(size=(2, 64)).astype(np.float32)
    readout = Readout(directions_LD=directions_LD, measure=measure, at=at)  # type: ignore[arg-type]
    (found_NL,) = tiny_pool.ordered("condition_values", [(texts, readout, "p.txt", max_rows * 2 * 64 * 4)])
    norm_L = np.linalg.norm(directions_LD, axis=1)
    bound = BOUND
    if measure == "dot":
        bound *= max(np.linalg.norm(rows_LTD, axis=-1).max() for rows_LTD in reference) * norm_L.max()
    expected = []
    for rows_LTD in reference:
        numbers_LT = np.einsum("ltd,ld->lt", rows_LTD, directions_LD)
        if measure == "cosine":
            numbers_LT /= np.linalg.norm(rows_LTD, axis=-1) * norm_L[:, None]
        expected.append(VALUES[at](numbers_LT))
    assert max(rows_LTD.shape[1] for rows_LTD in reference) > 7
    assert np.isfinite(found_NL).all()
    assert np.abs(found_NL - np.stack(expected)).max() <= bound
    assert np.ptp(found_NL, axis=0).min() > 20 * bound  # prompts differ by far more


def test_a_prompt_that_is_too_long_is_named_by_its_own_file(tiny_pool: CapturePool) -> None:
    readout = Readout(directions_LD=np.ones((2, 64), np.float32), measure="dot", at="mean_prompt")
    with pytest.raises(DerivationError, match=r"negative\.txt:17: the text has 600 tokens; .* at most 511"):
        list(tiny_pool.condition_values([Text(id="17", text="a" * 600, line=17)], readout, "negative.txt"))


TOPICS = (
    "the museum", "a blue bicycle", "the river", "my neighbour", "the oldest tree", "this recipe", "the last train",
    "her violin", "the harbour", "a good sentence", "the new bridge", "winter", "our garden", "the orchestra", "a map",
    "a lighthouse", "the market", "the second chapter", "a quiet room", "the volcano", "that painting", "the school",
    "a paper boat", "the desert", "the kitchen", "an owl", "the clock tower", "her answer", "the island", "a wall",
)  # fmt: skip
QUESTIONS = ("What do people like about {}?", "Where can I read more about {}?", "Who knows the story of {}?")
STATEMENTS = ("People like to talk about {}.", "I read a long text about {}.", "My uncle told me the story of {}.")


def write_classes(folder: Path, topics: tuple[str, ...]) -> tuple[Path, Path]:
    """Files of questions and of statements about some topics."""
    for name, forms in (("questions", QUESTIONS), ("statements", STATEMENTS)):
        (folder / f"{name}.txt").write_text("".join(form.format(topic) + "\n" for topic in topics for form in forms))
    return folder / "questions.txt", folder / "statements.txt"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_derived_vector_detects_new_prompts_and_random_ones_do_not(smollm2: str, tmp_path: Path) -> None:
    pairs = [
        {"positive": question.format(topic), "negative": statement.format(topic)}
        for topic in TOPICS[:10]
        for question, statement in zip(QUESTIONS, STATEMENTS, strict=True)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    vector = tmp_path / "asks.safetensors"
    engine = ("--dtype", "float32", "--max-model-len", "512", "--chat")
    done = run("derive", smollm2, "--pairs", tmp_path / "pairs.jsonl", "--blocks", "8-19", "--out", vector, *engine)
    assert done.exit_code == 0, done.output
    questions, statements = write_classes(tmp_path, TOPICS[10:])
    options = ("--model", smollm2, "--positive", questions, "--negative", statements, "--plot", tmp_path / "p.png")
    done = run("condition", "fit", vector, *options, *engine)
    assert done.exit_code == 0, done.output
    condition = load(vector).metadata.condition
    assert condition is not None
    assert condition.chat
    assert condition.held_out == {"positive": 18, "negative": 18}
    assert condition.auroc is not None
    assert condition.auroc > 0.95
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    # A random direction may separate classes that differ much, and the best of twelve often does. Most do not.
    rng = np.random.default_rng(3)
    random = ControlVector(directions={block: rng.normal(size=576) for block in range(8, 20)})
    settings: dict[str, Any] = {"chat": True, "dtype": "float32", "engine_args": dict(SMALL), "progress": False}
    by_chance, by_design = (
        [
            each.held_out.auroc
            for each in fit_condition(smollm2, each, questions, statements, **settings).by_block.values()
        ]
        for each in (random, load(vector))
    )
    assert min(by_design) > 0.95
    assert np.median(by_chance) < 0.85


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_stores_the_condition_and_nothing_else(tiny_llama: str, tmp_path: Path) -> None:
    questions, statements = write_classes(tmp_path, TOPICS[:4])
    rng = np.random.default_rng(5)
    made = ControlVector(
        directions={block: rng.normal(size=64).astype(np.float32) for block in (1, 2)},
        metadata=VectorMetadata(model="another/model", notes="kept", residual_norms={1: 3.0}),
    )
    save(made, tmp_path / "v.gguf")
    engine = ("--dtype", "float32", "--max-model-len", "512")
    fit = ("condition", "fit", tmp_path / "v.gguf", "--model", tiny_llama, *engine)
    arguments = (*fit, "--positive", questions, "--negative", statements, "--measure", "dot", "--at", "mean_prompt")
    done = run(*arguments, "--num-blocks", "2")
    assert done.exit_code == 0, done.output
    stored = load(tmp_path / "v.gguf")
    assert stored.digest == made.digest
    assert stored.with_metadata(condition=None).metadata == made.metadata
    condition = stored.metadata.condition
    assert condition is not None
    assert set(condition.blocks) <= {1, 2}
    # Standard output is the JSON of a request alone.
    assert json.loads(done.stdout) == {"when": condition.when("v")}
    assert str(condition) in done.stderr.replace("\n", "")
    for part in ("chosen", "only 8 prompts were held out", "derived on 'another/model'"):
        assert part in done.stderr
    assert re.search(r"training +training.*\n.*AUROC +F1", done.stderr), "the head of the table, in two lines"
    assert (tmp_path / "v.condition.svg").read_text().startswith("<svg")
    # The same values again, from the rows by Hugging Face.
    held = {}
    for name, path in (("positive", questions), ("negative", statements)):
        rows = huggingface_rows(tiny_llama, path.read_text().splitlines())
        values = np.array([
            np.mean([row[block] @ stored.directions[block] for block in condition.blocks]) for row in rows
        ])  # fmt: skip
        held[name] = values > condition.above if condition.above is not None else values < condition.below
    found = fit_condition(
        tiny_llama, stored, questions, statements, measure="dot", at="mean_prompt", num_blocks=2, dtype="float32",
        engine_args=dict(SMALL), progress=False,
    )  # fmt: skip
    assert found.condition == condition  # the split is the same
    assert found.chosen.cut.holds(found.chosen.positive_N).tolist() == held["positive"].tolist()
    assert found.chosen.cut.holds(found.chosen.negative_N).tolist() == held["negative"].tolist()
    # A second run replaces it only with --force; a vector of another width is refused.
    with pytest.raises(DerivationError, match="it has a condition already"):
        run(*arguments)
    wide = ControlVector(directions={1: np.ones(32)}, metadata=VectorMetadata(model="small/model"))
    with pytest.raises(ModelMismatchError, match="hidden size 32 but the model has 64; it was made for 'small/model'"):
        fit_condition(tiny_llama, wide, questions, statements, engine_args=dict(SMALL), progress=False)
    # Positives and negatives that the direction does not see: nothing is stored.
    blind = ControlVector(directions={1: np.zeros(64), 2: np.zeros(64)})
    save(blind, tmp_path / "blind.safetensors")
    before = (tmp_path / "blind.safetensors").read_bytes()
    with pytest.raises(DerivationError, match=r"the same value at block\(s\) 1, 2"):
        run("condition", "fit", tmp_path / "blind.safetensors", "--model", tiny_llama, *engine, *arguments[-8:])
    assert (tmp_path / "blind.safetensors").read_bytes() == before
    assert not (tmp_path / "blind.condition.svg").exists()
    deep = ControlVector(directions={7: np.ones(64)})
    with pytest.raises(SteerError, match="7"):
        fit_condition(tiny_llama, deep, questions, statements, engine_args=dict(SMALL), progress=False)
