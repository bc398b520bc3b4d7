"""The invariants on a pipeline of two stages, vLLM's own: each arms its blocks, and both store all vectors.

They run in a process of their own, since a worker per stage is a process; the oracle is here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import parallel as shared
from helpers.engines import RUNNER_CLASS, TINY_HIDDEN, random_vector
from helpers.oracle import Oracle
from helpers.parallel import USED, WRONG
from helpers.tiny_models import tiny_llama_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BLOCKS = 5
STAGES = [[0, 1, 2], [3, 4]]
VECTORS = {f"r{seed}": random_vector(seed, num_blocks=BLOCKS) for seed in range(32)}

parallel = shared.fixture(BLOCKS, pipeline_parallel_size=len(STAGES))


@pytest.fixture(scope="module")
def oracle(tiny_models_dir: Path) -> Oracle:
    return Oracle(str(tiny_llama_path(tiny_models_dir, num_blocks=BLOCKS)), VECTORS)


def test_each_stage_arms_its_own_blocks_and_holds_all_vectors(parallel: dict[str, Any]) -> None:
    workers = parallel["workers"]
    assert [worker["stage_blocks"] for worker in workers] == STAGES
    assert [worker["armed_blocks"] for worker in workers] == STAGES
    assert [worker["capture_blocks"] for worker in workers] == STAGES
    for worker, blocks in zip(workers, STAGES, strict=True):
        assert worker["runner"] == RUNNER_CLASS
        assert worker["asked_blocks"] == list(range(BLOCKS))
        assert worker["site_modules"] == {"attn": ["self_attn"], "mlp": ["mlp"]}
        assert worker["forms"] == {str(block): "split" for block in blocks}
        assert worker["vectors"] == sorted({VECTORS[f"r{seed}"].digest for seed in USED})
        assert worker["bank_rows_pinned"] == worker["steered_slots"] == 0


def test_a_vector_that_stages_refuse_is_stored_by_none(parallel: dict[str, Any]) -> None:
    assert not parallel["refused"]["ok"]
    assert all(WRONG not in worker["vectors"] for worker in parallel["workers"])


def test_oracle(parallel: dict[str, Any], oracle: Oracle) -> None:
    shared.assert_oracle(parallel, oracle)


def test_neighbours_do_not_matter(parallel: dict[str, Any]) -> None:
    shared.assert_neighbours_do_not_matter(parallel)


def test_algebra(parallel: dict[str, Any]) -> None:
    shared.assert_algebra(parallel)


def test_what_the_stages_read_is_put_together(parallel: dict[str, Any], oracle: Oracle) -> None:
    shared.assert_read(parallel, oracle, BLOCKS, TINY_HIDDEN)


def test_every_number_of_a_probe_comes_back_once(parallel: dict[str, Any], oracle: Oracle) -> None:
    shared.assert_probes(parallel, oracle)
