from __future__ import annotations

from dataclasses import replace

import numpy as np
from steer_bench.load import Load, Steering, rows, vector

LOAD = Load(num_requests=12, concurrency=4, max_tokens=8, steering=Steering.ADD, num_vectors=3)


def test_prompts_depend_on_the_round_and_not_on_the_arm() -> None:
    assert LOAD.prompts(1000) == replace(LOAD, steering=Steering.NONE).prompts(1000)
    assert LOAD.prompts(1000) != replace(LOAD, seed=1).prompts(1000)
    lengths = [len(prompt) for prompt in LOAD.prompts(1000)]
    assert min(lengths) >= LOAD.min_prompt
    assert max(lengths) <= LOAD.max_prompt
    assert len(set(lengths)) > 1


def test_a_shared_prefix_depends_only_on_the_seed() -> None:
    shared = replace(LOAD, shared_prefix=50)
    prefix = shared.prompts(1000)[0][:50]
    for other in (shared, replace(shared, num_requests=1)):
        assert {tuple(prompt[:50]) for prompt in other.prompts(1000)} == {tuple(prefix)}
    assert shared.prompts(1000)[0][50:] != replace(shared, num_requests=1).prompts(1000)[0][50:]
    assert replace(shared, seed=5).prompts(1000)[0][:50] != prefix


def test_vectors_are_assigned_in_turn() -> None:
    assert [LOAD.vector_of(request) for request in range(5)] == [0, 1, 2, 0, 1]
    half = replace(LOAD, every=2)
    assert [half.vector_of(request) for request in range(5)] == [0, None, 1, None, 2]
    assert half.num_steered == 6
    assert replace(LOAD, steering=Steering.NONE).num_steered == 0


def test_a_load_survives_json() -> None:
    assert Load.from_json(LOAD.to_json()) == LOAD


def test_vectors_have_length_1_and_are_distinct() -> None:
    rows_LD = vector(3, 4, 64)
    assert np.allclose(np.linalg.norm(rows_LD, axis=1), 1.0, atol=64 * 2.0**-24)
    assert not np.array_equal(rows_LD, vector(4, 4, 64))


def test_rows_of_an_edit_are_distinct_and_those_written_orthonormal() -> None:
    read_RD, write_RD = rows(3, 4, 64)
    assert np.allclose(np.linalg.norm(read_RD, axis=1), 1.0, atol=64 * 2.0**-24)
    assert np.allclose(write_RD @ write_RD.T, np.eye(4), atol=64 * 2.0**-22)
    assert not np.array_equal(read_RD, rows(4, 4, 64)[0])


def test_loads_that_only_read_have_no_operation() -> None:
    assert replace(LOAD, steering=Steering.PROBES).ops == ()
    assert replace(LOAD, steering=Steering.PROBED_ADDS).ops == ("add",)
