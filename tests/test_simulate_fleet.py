"""The fleet simulation against known results: arithmetic and Che's approximation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import simulate_fleet as fleet
import typer
from typer.testing import CliRunner

VECTORS = 500
PLACES = {"loaded": 100, "store": 300, "bank": 40}
RATE = 2.0
HOURS = 5.0


def alone(zipf: float) -> dict[str, float]:
    """Hit rates of one replica. Answers take no time and pins never matter, so each cache is a plain LRU cache."""
    vector_bytes = fleet.Fleet().vector_bytes
    one = fleet.Fleet(
        replicas=1, sampled=1, vectors=VECTORS, rate=RATE, zipf=zipf, hours=HOURS, answer_s=1e-6, slots=PLACES["bank"],
        rows=1, loaded_bytes=PLACES["loaded"] * vector_bytes, store_bytes=PLACES["store"] * vector_bytes,
    )  # fmt: skip
    assert PLACES["store"] > RATE * 60, "the vectors pinned for a minute fit"
    found = fleet.summary(one, *fleet.simulate(one))
    assert found["refused"] == found["waited"] == 0
    return {name: found[f"{name}_hits"] for name in PLACES} | {"popularity": one.popularity_V}


def bound(hits: float) -> float:
    """Six standard errors of a hit rate over the requests of the second half."""
    return 6 * math.sqrt(hits * (1 - hits) / (RATE * HOURS * 3600 / 2))


def test_the_hit_rate_of_equally_popular_vectors_is_the_cached_share() -> None:
    found = alone(zipf=0.0)
    # A vector that leaves the store also leaves the bank. It was used later than the bank's own victims.
    for name, places in PLACES.items():
        share = places / VECTORS
        assert found[name] == pytest.approx(share, abs=bound(share)), name


def test_the_hit_rate_of_a_zipf_law_is_ches() -> None:
    found = alone(zipf=1.0)
    for name, places in PLACES.items():
        expected = fleet.che_hits(found["popularity"], places)
        assert expected > places / VECTORS + 0.1, "a small cache serves many requests"
        # The approximation is accurate to about one percent.
        assert found[name] == pytest.approx(expected, abs=bound(expected) + 0.01), name


def test_che_is_exact_if_all_are_equally_popular_or_all_fit() -> None:
    popularity_V = fleet.Fleet(vectors=50, zipf=0.0).popularity_V
    assert fleet.che_hits(popularity_V, 10) == pytest.approx(0.2, abs=1e-9)
    assert fleet.che_hits(popularity_V, 50) == 1.0


def test_a_store_that_requests_fill_refuses() -> None:
    """Vectors requested within the last minute are pinned: here more than fit."""
    small = fleet.Fleet(replicas=1, sampled=1, vectors=100, zipf=0.0, rate=1.0, hours=0.5)
    small = fleet.replace(small, store_bytes=10 * small.vector_bytes)
    assert fleet.summary(small, *fleet.simulate(small))["refused"] > 0.5


def test_more_answers_than_slots_wait() -> None:
    busy = fleet.Fleet(replicas=1, sampled=1, vectors=10, rate=10.0, answer_s=10.0, slots=50, hours=0.2)
    found = fleet.summary(busy, *fleet.simulate(busy))
    assert found["waited"] > 0.9
    assert found["running"] == pytest.approx(49, abs=1)
    idle = fleet.replace(busy, slots=256)
    assert fleet.summary(idle, *fleet.simulate(idle))["running"] == pytest.approx(100, rel=0.1)  # rate x seconds


def test_shares_of_replicas() -> None:
    some = fleet.Fleet(replicas=7, vectors=200)
    for spread in (0, 10, 200):
        assert fleet.shares_R(some, spread).sum() == pytest.approx(1)
    assert fleet.shares_R(some, 200) == pytest.approx([1 / 7] * 7)
    assert fleet.shares_R(some).max() >= some.popularity_V[0]


def test_the_same_seed_gives_the_same_numbers() -> None:
    some = fleet.Fleet(replicas=10, vectors=100, rate=20.0, hours=0.1)
    assert fleet.simulate(some) == fleet.simulate(some)
    assert fleet.simulate(some) != fleet.simulate(fleet.replace(some, seed=1))


def test_it_prints_tables_and_writes_numbers(tmp_path: Path) -> None:
    app, out = typer.Typer(), tmp_path / "fleet.json"
    app.command()(fleet.main)
    few = ["--replicas", "3", "--vectors", "40", "--rate", "6", "--hours", "0.2", "--sampled", "9", "--out", str(out)]
    done = CliRunner().invoke(app, few)
    assert done.exit_code == 0, done.output
    assert "| 70B | 1 | its vector's replica |" in done.output
    numbers = json.loads(out.read_text())
    assert all(0 <= row["bank_hits"] <= 1 and row["read_mib_s"] >= 0 for row in numbers["caches"])
    assert {row["fleet"]["sampled"] for row in numbers["caches"]} == {3}
