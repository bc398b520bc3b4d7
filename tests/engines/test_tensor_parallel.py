"""The invariants on two tensor-parallel workers: each has the same vectors and edits the same stream.

They run in a process of their own, since a worker per rank is a process; the oracle is here.
"""

from __future__ import annotations

from typing import Any

import pytest
from helpers import parallel as shared
from helpers.engines import RUNNER_CLASS, TINY_BLOCKS, TINY_HIDDEN, VECTORS
from helpers.oracle import Oracle
from helpers.parallel import USED, WRONG

pytestmark = [pytest.mark.slow, pytest.mark.v1_only, pytest.mark.timeout(600)]

WORLD = 2

parallel = shared.fixture(TINY_BLOCKS, tensor_parallel_size=WORLD)


def test_every_worker_is_armed_and_holds_the_same_vectors(parallel: dict[str, Any]) -> None:
    first, *others = workers = parallel["workers"]
    assert len(workers) == WORLD
    assert first["runner"] == RUNNER_CLASS
    assert first["armed_blocks"] == list(range(TINY_BLOCKS))
    assert first["site_modules"] == {"attn": ["self_attn"], "mlp": ["mlp"]}
    assert first["vectors"] == sorted({VECTORS[f"r{seed}"].digest for seed in USED}), "r8 - r8 is nothing"
    for other in others:
        assert other == first


def test_a_vector_that_ranks_refuse_is_stored_by_none(parallel: dict[str, Any]) -> None:
    assert not parallel["refused"]["ok"]
    assert "hashes to" in parallel["refused"]["reason"]
    assert all(WRONG not in worker["vectors"] for worker in parallel["workers"])


def test_oracle(parallel: dict[str, Any], oracle: Oracle) -> None:
    shared.assert_oracle(parallel, oracle)


def test_neighbours_do_not_matter(parallel: dict[str, Any]) -> None:
    shared.assert_neighbours_do_not_matter(parallel)


def test_algebra(parallel: dict[str, Any]) -> None:
    shared.assert_algebra(parallel)


def test_the_stream_is_read_whole(parallel: dict[str, Any], oracle: Oracle) -> None:
    """Each worker has the whole stream, not its share of it."""
    shared.assert_read(parallel, oracle, TINY_BLOCKS, TINY_HIDDEN)


def test_every_number_of_a_probe_comes_back_once(parallel: dict[str, Any], oracle: Oracle) -> None:
    shared.assert_probes(parallel, oracle)
