"""One tiny engine in a Ray actor, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers.derivation import config
from threadpoolctl import threadpool_limits

from steer_engine.derive.actors import CapturePool, capture_pool


@pytest.fixture(scope="session")
def tiny_pool(tiny_llama: str) -> Iterator[CapturePool]:
    with capture_pool(config(tiny_llama, blocks=(0, 2), source="varied.jsonl")) as engines:
        assert engines.facts().blocks == (0, 2)
        yield engines


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrix products round as in the actors of `fit_dump`. On busy cores, one thread is also faster."""
    with threadpool_limits(1):
        yield
