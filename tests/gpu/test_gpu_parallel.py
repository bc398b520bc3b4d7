"""Two GPUs, tensor- or pipeline-parallel, compiled: the checks of tests/engines on engines of two workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import parallel as shared
from helpers.engines import RUNNER_CLASS, TINY_HIDDEN, random_vector
from helpers.gpu_settings import MOST, REHEARSAL
from helpers.oracle import Oracle
from helpers.parallel import USED, WRONG
from helpers.tiny_models import tiny_llama_path

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() < 2 and not REHEARSAL, reason="needs two GPUs"),
    pytest.mark.timeout(1500),
]

BLOCKS = 5
STAGES = [[0, 1, 2], [3, 4]]
VECTORS = {f"r{seed}": random_vector(seed, num_blocks=BLOCKS) for seed in range(32)}


@pytest.fixture(scope="module", params=["tensor_parallel_size", "pipeline_parallel_size"])
def parallel(
    request: pytest.FixtureRequest, tiny_models_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What two workers found; `by` says how they share the model."""
    model = tiny_llama_path(tiny_models_dir, num_blocks=BLOCKS)
    settings = {request.param: 2, "enforce_eager": REHEARSAL}
    found = shared.run(tmp_path_factory.mktemp("parallel"), str(model), BLOCKS, timeout=1200, **settings)
    return found | {"by": request.param}


@pytest.fixture(scope="module")
def oracle(tiny_models_dir: Path) -> Oracle:
    return Oracle(str(tiny_llama_path(tiny_models_dir, num_blocks=BLOCKS)), VECTORS)


def test_each_worker_arms_its_blocks_and_holds_all_vectors(parallel: dict[str, Any]) -> None:
    of_each = STAGES if parallel["by"] == "pipeline_parallel_size" else [list(range(BLOCKS))] * 2
    assert [worker["armed_blocks"] for worker in parallel["workers"]] == of_each
    for worker in parallel["workers"]:
        assert worker["runner"] == RUNNER_CLASS
        assert worker["vectors"] == sorted({VECTORS[f"r{seed}"].digest for seed in USED})
        assert worker["bank_rows_pinned"] == worker["steered_slots"] == 0


def test_a_vector_that_workers_refuse_is_stored_by_none(parallel: dict[str, Any]) -> None:
    assert not parallel["refused"]["ok"]
    assert all(WRONG not in worker["vectors"] for worker in parallel["workers"])


def test_oracle(parallel: dict[str, Any], oracle: Oracle) -> None:
    shared.assert_oracle(parallel, oracle, most=MOST)


def test_neighbours_do_not_matter(parallel: dict[str, Any]) -> None:
    shared.assert_neighbours_do_not_matter(parallel)


def test_algebra(parallel: dict[str, Any]) -> None:
    shared.assert_algebra(parallel)


def test_captures_are_put_together(parallel: dict[str, Any], oracle: Oracle) -> None:
    shared.assert_read(parallel, oracle, BLOCKS, TINY_HIDDEN)


def test_every_number_of_a_probe_comes_back_once(parallel: dict[str, Any], oracle: Oracle) -> None:
    shared.assert_probes(parallel, oracle)
