"""`sweep`, `evaluate` and `calibrate` from Python: the numbers of the commands, as tables and pictures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_engine import LLM, ControlVector
from steer_engine.errors import DerivationError, EvaluationError
from steer_engine.evaluate import Outcome, Sizes, Sweep, Task, calibrate, evaluate, load_task, sweep
from steer_engine.evaluate.evaluation import Evaluation
from steer_engine.evaluate.outcome import Point
from steer_engine.evaluate.plan import Plan
from steer_engine.vectors import load, save

ALPHAS = (-1.0, 1.0)
SETTINGS: dict[str, Any] = {"blocks": ["1"], "alphas": ALPHAS, "progress": False}


BOUND = 3 * 192 * 2.0**-23 * 8
"""Of a metric between two runs whose batches and cached prefixes differ: three blocks in float32, each with sums of up
to 192 products, and log-probabilities of about 8 in size (the vocabulary has 512 tokens)."""


def assert_same(found: list[Point], expected: list[Point]) -> None:
    names = [(point.split, point.vector, point.blocks, point.alpha) for point in found]
    assert names == [(point.split, point.vector, point.blocks, point.alpha) for point in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.metrics.keys() == theirs.metrics.keys()
        for name, value in ours.metrics.items():
            assert abs(value.mean - theirs.metrics[name].mean) <= BOUND, (name, ours, theirs)


@pytest.fixture(scope="module")
def vector() -> ControlVector:
    random = np.random.default_rng(5)
    return ControlVector(directions={block: 30 * random.normal(size=64).astype(np.float32) for block in range(3)})


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task("ioi", Sizes(derive=8, validation=8, test=12))


@pytest.fixture(scope="module")
def outcome(tiny_engine: LLM, task: Task, vector: ControlVector, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What the command's own class measures."""
    plan = Plan(vectors={"vector": vector}, blocks=("1",), alphas=ALPHAS)
    folder = tmp_path_factory.mktemp("evaluation")
    return Evaluation(tiny_engine, task, plan, folder, model="tiny", progress=False).run()


@pytest.fixture(scope="module")
def swept(tiny_engine: LLM, task: Task, vector: ControlVector) -> Sweep:
    return sweep(tiny_engine, vector, task, **SETTINGS)


def test_a_sweep_measures_what_the_evaluation_measures(swept: Sweep, outcome: Outcome) -> None:
    ours = [point for point in swept.points if point.split == "validation"]
    assert_same(ours, [point for point in outcome.points if point.split == "validation"])
    margins = sorted(point.metrics["margin"].mean for point in ours)
    assert min(np.diff(margins)) > 10 * BOUND, "the bound could not tell the strengths apart"
    assert {point.split for point in swept.points} == {"validation", "neutral"}


@pytest.mark.slow
def test_vectors_of_sites_are_applied_there(tiny_llama: str, task: Task, vector: ControlVector, swept: Sweep) -> None:
    """The engine of the sweep arms them. What is added to an MLP is added to the stream; to an attention, it is not."""
    named = {site: vector.with_metadata(site=site) for site in ("attn", "mlp")}
    started = {"dtype": "float32", "max_model_len": 768, "gpu_memory_utilization": 0.2, "seed": 0, "max_num_seqs": 32}
    found = sweep(tiny_llama, named, task, engine_args=started, **SETTINGS)

    def margins(points: list[Point], name: str) -> np.ndarray:
        of_name = [point for point in points if point.split == "validation" and point.vector == name]
        return np.array([point.metrics["margin"].mean for point in sorted(of_name, key=lambda point: point.alpha)])

    stream = margins(swept.points, "vector")
    assert len(stream) == len(ALPHAS)
    assert np.abs(margins(found.points, "mlp") - stream).max() <= BOUND
    assert np.abs(margins(found.points, "attn") - stream).max() > 5 * BOUND


def test_the_frame_of_a_sweep_has_a_row_per_condition(swept: Sweep) -> None:
    frame = swept.to_frame()
    assert len(frame) == len(swept.points) == 6
    assert list(frame.columns[:4]) == ["split", "vector", "blocks", "alpha"]
    assert {"accuracy", "accuracy_low", "accuracy_high", "kl", "margin"} <= set(frame.columns)
    row = frame[(frame.split == "validation") & (frame.alpha == 1.0)].iloc[0]
    (point,) = (point for point in swept.points if (point.split, point.alpha) == ("validation", 1.0))
    assert row.margin == point.metrics["margin"].mean
    assert row.margin_low <= row.margin <= row.margin_high
    assert frame[frame.split == "neutral"].accuracy.isna().all(), "neutral texts have no answers"


def test_the_picture_of_a_sweep_shows_its_means(swept: Sweep) -> None:
    (axis,) = swept.plot("margin").axes
    (line,) = axis.lines
    assert list(line.get_xdata()) == [-1.0, 0.0, 1.0]
    by_alpha = {point.alpha: point.metrics["margin"].mean for point in swept.points if point.split == "validation"}
    assert list(line.get_ydata()) == [by_alpha[alpha] for alpha in (-1.0, 0.0, 1.0)]
    with pytest.raises(EvaluationError, match="has 'margins'; there are accuracy"):
        swept.plot("margins")


def test_evaluate_gives_the_outcome_of_the_command(
    tiny_engine: LLM, task: Task, vector: ControlVector, outcome: Outcome
) -> None:
    found = evaluate(tiny_engine, task, vectors=vector, **SETTINGS)
    assert_same(found.points, outcome.points)
    assert [(each.blocks, each.digest) for each in found.verdicts] == [("1", vector.digest)]
    frame = found.trials_frame()
    assert list(frame.trial) == ["chosen", "flipped", "random", "shuffled"]
    assert frame.after[0] == found.verdicts[0].main.paired.after


def test_calibrate_stores_the_strength_and_never_overwrites(
    tiny_engine: LLM, task: Task, vector: ControlVector, tmp_path: Path
) -> None:
    out = tmp_path / "mood.safetensors"
    save(vector, tmp_path / "given.safetensors")
    found = calibrate(tiny_engine, tmp_path / "given.safetensors", task, out=out, max_kl=1e6, **SETTINGS)
    assert found.vector.digest == vector.digest
    assert load(out).metadata.extra["suggested_scale"] == f"{found.outcome.verdicts[0].alpha:g}"
    before = out.read_bytes()
    with pytest.raises(DerivationError, match="exists already"):
        calibrate("/no/such/model", vector, task, out=out)
    assert out.read_bytes() == before


def test_mistakes_are_named_before_an_engine_starts(task: Task, vector: ControlVector) -> None:
    for settings, words in (
        ({"block": ["1"]}, "Unknown setting 'block'; known are alphas"),
        ({"blocks": ["9-3"]}, "backwards"),
        ({"alphas": [0.0]}, "All strengths are 0"),
        ({"split": "derive"}, "none of validation, test"),
    ):
        with pytest.raises(EvaluationError, match=words):
            sweep("/no/such/model", vector, task, **settings)  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match="no task or file"):
        evaluate("/no/such/model", "/no/such/task.jsonl")
    with pytest.raises(DerivationError, match="guess"):
        evaluate("/no/such/model", task, methods=["guess"])


def test_a_folder_resumes(tiny_engine: LLM, task: Task, vector: ControlVector, swept: Sweep, tmp_path: Path) -> None:
    first = sweep(tiny_engine, {"vector": vector}, task, folder=tmp_path, **SETTINGS)
    size = (tmp_path / "sweep.jsonl").stat().st_size
    assert sweep(tiny_engine, vector, task, folder=tmp_path, **SETTINGS).points == first.points
    assert_same(first.points, swept.points)
    assert (tmp_path / "sweep.jsonl").stat().st_size == size, "nothing was measured twice"


def test_neither_pandas_nor_an_engine_is_imported_with_the_package() -> None:
    code = (
        "import sys; from steer_engine.evaluate import sweep, evaluate, calibrate\n"
        "assert callable(sweep), sweep\n"
        "print([name for name in ('pandas', 'matplotlib', 'torch', 'vllm', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
