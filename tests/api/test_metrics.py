"""Gauges summarise the status of the workers of all engines."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import REGISTRY

from steer_engine.api import metrics


def worker(engine: int, **numbers: int) -> dict[str, Any]:
    return {
        "engine": engine,
        "bank_rows": 100,
        "bank_rows_used": 0,
        "bank_rows_pinned": 0,
        "steered_slots": 0,
        "store_bytes": 0,
        **numbers,
    }


def gauge(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, labels)


def test_engines_add_up_and_ranks_do_not() -> None:
    workers = [worker(0, steered_slots=3), worker(0, steered_slots=3), worker(1, steered_slots=4)]
    metrics.engine_refreshed(workers)
    assert gauge("steer_engine_steered_requests") == 7
    assert gauge("steer_engine_armed") == 1
    # Of the stages of a pipeline one may have nothing to do for a request.
    metrics.engine_refreshed([worker(0, steered_slots=3), worker(0, steered_slots=1)])
    assert gauge("steer_engine_steered_requests") == 3
    metrics.engine_refreshed([])
    assert gauge("steer_engine_armed") == 0


def test_the_fullest_worker_counts() -> None:
    metrics.engine_refreshed(
        [
            worker(0, bank_rows_used=90, bank_rows_pinned=10, store_bytes=5),
            worker(1, bank_rows_used=70, bank_rows_pinned=60, store_bytes=7),
        ]
    )
    assert gauge("steer_engine_bank_rows", state="pinned") == 60
    assert gauge("steer_engine_bank_rows", state="idle") == 10
    assert gauge("steer_engine_bank_rows", state="free") == 30
    assert gauge("steer_engine_store_bytes") == 7


def test_uploaded_vectors_do_not_displace_registered_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many a client sends, their number of series is bounded, and a registered name keeps its own."""
    monkeypatch.setattr(metrics, "_labels", {most: set() for most in metrics._labels})
    labels = {metrics._label_of(f"sha256:{number:064x}", f"sha256:{number:x}".ljust(71, "0")) for number in range(500)}
    assert len(labels) == metrics.MAX_DIGEST_LABELS + 1
    assert metrics.OTHER in labels
    names = {metrics._label_of(f"name{number}", "sha256:" + "0" * 64) for number in range(500)}
    assert names == {f"name{number}" for number in range(metrics.MAX_VECTOR_LABELS)} | {metrics.OTHER}
