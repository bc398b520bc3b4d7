"""Monitors are checked against model and file at the start, and their numbers end in exactly the right buckets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.random_specs import MODEL, NUM_BLOCKS, VECTORS
from prometheus_client import REGISTRY

from steer_engine.api import metrics
from steer_engine.api.frontend import Frontend
from steer_engine.api.monitors import MonitorCounts
from steer_engine.errors import UnsupportedEngineError
from steer_engine.model_shape import ModelShape
from steer_engine.monitor import Monitor
from steer_engine.probe import Platt
from steer_engine.settings import SteeringConfig
from steer_engine.spec import Op
from steer_engine.vectors import ControlVector, save
from steer_engine.vectors.metadata import FittedProbe, ProbeBlock

FITTED = FittedProbe(
    blocks={
        1: ProbeBlock(auroc=0.8, threshold=2.0, platt=Platt(1.5, -1.0)),
        2: ProbeBlock(auroc=0.9, threshold=-3.0, platt=Platt(0.5, 0.25)),
        3: ProbeBlock(threshold=4.0),
    },
    at="every_prompt_token",
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The vectors a to d, and `mood`, a trained probe on the directions of a."""
    trained = VECTORS["a"].metadata.model_copy(update={"probe": FITTED})
    mood = ControlVector(directions=VECTORS["a"].directions, metadata=trained)
    for name, vector in (VECTORS | {"mood": mood}).items():
        save(vector, tmp_path / f"{name}.safetensors")
    monkeypatch.setenv("STEER_ENGINE_VECTORS", str(tmp_path))
    return tmp_path


def monitors(monkeypatch: pytest.MonkeyPatch, texts: str, model: ModelShape = MODEL) -> tuple[Monitor, ...]:
    monkeypatch.setenv("STEER_ENGINE_MONITORS", texts)
    return Frontend(SteeringConfig(), model).monitors[0]


def test_a_trained_probe_needs_only_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read at its best block, as a probability, with its own threshold."""
    digest = VECTORS["a"].digest
    (found,) = monitors(monkeypatch, "mood")
    assert found == Monitor("mood", digest, 2, "probability", Platt(0.5, 0.25), found.above)
    assert found.above == Platt(0.5, 0.25).probability(-3.0)
    dots = monitors(monkeypatch, "x=mood:1-3:dot y=mood:3")
    assert [(each.name, each.block, each.measure, each.above) for each in dots] == [
        ("x", 1, "dot", 2.0),
        ("x", 2, "dot", -3.0),
        ("x", 3, "dot", 4.0),
        ("y", 3, "dot", 4.0),  # there is no calibration for this block
    ]
    assert [each.above for each in monitors(monkeypatch, "x=mood:1:cosine y=mood:1:above=0.5")] == [None, 0.5]


def test_any_vector_can_be_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = VECTORS["d"].digest
    assert monitors(monkeypatch, f"x=d:2 y={digest}:2:dot:above=7") == (
        Monitor("x", digest, 2, "cosine"),
        Monitor("y", digest, 2, "dot", None, 7.0),
    )
    assert monitors(monkeypatch, "") == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nobody", "no control vector 'nobody'"),
        ("x=a", "no trained probe"),
        ("x=d:1", "no direction at blocks 1"),
        (f"x=a:{NUM_BLOCKS}", "does not exist"),
        ("x=a:1:probability", "no calibration"),
        ("x=mood:3:probability", "no calibration for block 3"),
        ("mood:above=1.5", "not a probability"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    with pytest.raises(UnsupportedEngineError, match=words) as error:
        monitors(monkeypatch, f"good=a:1 {text}")
    assert error.value.message.startswith(f"--steering-monitor '{text}': ")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (replace(MODEL, ops=(Op.ADD,)), "more than op 'add'"),
        (replace(MODEL, hidden_size=64), "another model"),
        (replace(MODEL, armed_blocks=(0, 2)), "not armed"),
    ],
)
def test_an_engine_that_cannot_measure_is_refused(
    monkeypatch: pytest.MonkeyPatch, model: ModelShape, words: str
) -> None:
    with pytest.raises(UnsupportedEngineError, match=words):
        monitors(monkeypatch, "x=a:1", model)


def test_the_limits_on_probes_of_requests_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEER_ENGINE_MAX_PROBES", "0")
    assert len(monitors(monkeypatch, "x=a:0-3 y=c:0-3")) == 8


def buckets(histogram: str, name: str, block: int) -> Iterator[tuple[float, float]]:
    """Upper bound and cumulated count of each bucket."""
    for family in REGISTRY.collect():
        for sample in family.samples:
            labels = {"monitor": name, "block": str(block)}
            if sample.name == f"{histogram}_bucket" and labels.items() <= sample.labels.items():
                yield float(sample.labels["le"]), sample.value


def value(name: str, monitor: str, block: int) -> float | None:
    return REGISTRY.get_sample_value(name, {"monitor": monitor, "block": str(block)})


def test_numbers_end_in_their_buckets_and_above_their_threshold() -> None:
    rng = np.random.default_rng(0)
    dots = rng.normal(scale=3.0, size=(500, 3)).astype(np.float32)
    dots[:3, 0] = [0.5, np.float32(0.1), -1.0]  # on bounds, or next to one
    cosines = np.tanh(dots[:, 0]).astype(np.float32)
    platt = Platt(-0.7, 0.3)
    count = MonitorCounts(
        [
            Monitor("c", "", 1, "cosine", None, 0.25),
            Monitor("d", "", 2, "dot", None, -1.0),
            Monitor("p", "", 3, "probability", platt, 0.9),
        ]
    )
    assert value("steer_engine_monitor_tokens_total", "c", 1) == 0
    rows = np.stack([cosines, dots[:, 1], dots[:, 2]], axis=1)
    rows[7] = np.nan  # nothing was measured
    rows[8, 1] = np.inf
    for parts in ([rows[:100], rows[100:100]], [rows[100:101], rows[101:]]):
        count(parts)
    expected = {
        ("steer_engine_monitor_cosine", "c", 1, 0.25): rows[:, 0].astype(np.float64),
        ("steer_engine_monitor_dot", "d", 2, -1.0): rows[:, 1].astype(np.float64),
        ("steer_engine_monitor_probability", "p", 3, 0.9): 1 / (1 + np.exp(0.7 * rows[:, 2].astype(np.float64) - 0.3)),
    }
    for (histogram, name, block, above), numbers in expected.items():
        known = numbers[np.isfinite(numbers)]
        found = dict(buckets(histogram, name, block))
        assert len(found) > 10
        assert found == {bound: (known <= bound).sum() for bound in found}
        assert found[np.inf] == value("steer_engine_monitor_tokens_total", name, block) == len(known) >= 498
        assert value("steer_engine_monitor_tokens_above_total", name, block) == (known > above).sum() > 0
        assert value("steer_engine_monitor_threshold", name, block) == above


def test_without_a_threshold_no_share_is_counted() -> None:
    MonitorCounts([Monitor("free", "", 1, "cosine")])([np.array([[0.5]], dtype=np.float32)])
    assert value("steer_engine_monitor_tokens_total", "free", 1) == 1
    assert value("steer_engine_monitor_tokens_above_total", "free", 1) is None


@pytest.mark.parametrize(
    "histogram", [metrics.monitor_cosine, metrics.monitor_dot, metrics.monitor_probability], ids=lambda each: each._name
)
def test_many_at_once_are_counted_as_one_by_one(histogram: metrics.BulkHistogram) -> None:
    bounds = [bound for bound in histogram._upper_bounds if np.isfinite(bound)]
    numbers = np.array([*bounds, *np.nextafter(bounds, np.inf), *np.nextafter(bounds, -np.inf), -1e9, 1e9])
    bulk, single = histogram.labels("bulk", "0"), histogram.labels("single", "0")
    bulk.observe_all(numbers)
    for number in numbers.tolist():
        single.observe(number)
    assert list(buckets(histogram._name, "bulk", 0)) == list(buckets(histogram._name, "single", 0))
    assert bulk._sum.get() == pytest.approx(single._sum.get())
