"""Gauges sum up what the workers of all engines say."""

from __future__ import annotations

from typing import Any

from prometheus_client import REGISTRY

from steer_engine.serving import metrics


def worker(engine: int, **numbers: int) -> dict[str, Any]:
    return {"engine": engine, "bank_rows": 100, "bank_rows_pinned": 0, "steered_slots": 0, "store_bytes": 0, **numbers}


def gauge(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, labels)


def test_engines_add_up_and_ranks_do_not() -> None:
    workers = [worker(0, steered_slots=3), worker(0, steered_slots=3), worker(1, steered_slots=4)]
    metrics.engine_polled(workers)
    assert gauge("steer_engine_steered_requests") == 7
    assert gauge("steer_engine_armed") == 1
    metrics.engine_polled([])
    assert gauge("steer_engine_armed") == 0


def test_the_fullest_worker_counts() -> None:
    metrics.engine_polled(
        [worker(0, bank_rows_pinned=10, store_bytes=5), worker(1, bank_rows_pinned=60, store_bytes=7)]
    )
    assert gauge("steer_engine_bank_rows", state="pinned") == 60
    assert gauge("steer_engine_bank_rows", state="free") == 40
    assert gauge("steer_engine_store_bytes") == 7
