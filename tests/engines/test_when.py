"""When an edit applies: windows of the answer, triggers, schedules and conditions, each against the oracle.

The oracle is forced through the sampled tokens, so that every position of the answer is compared. Triggers are tokens
that the prompt has, or that the steered answer has: windows open and close in both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.driving import edit, generate, params, steering
from helpers.engines import random_vector
from helpers.exactness import MARKED, PLACES, SCHEDULES, WINDOWS, assert_exact
from helpers.oracle import Oracle

from steer_engine import LLM, ControlVector
from steer_engine.vectors import VectorMetadata


@pytest.mark.parametrize("name", WINDOWS)
def test_windows(tiny: LLM, oracle: Oracle, name: str) -> None:
    _, moved_T = assert_exact(tiny, oracle, steering(edit("r8", 2.0, scope=WINDOWS[name])))
    assert moved_T.max() >= 1e-2


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule["kind"])
@pytest.mark.parametrize("scope", ["all", "generation", {"after": 90}, {"after": 77, "each": True}], ids=str)
def test_schedules(tiny: LLM, oracle: Oracle, scope: Any, schedule: dict[str, Any]) -> None:
    _, moved_T = assert_exact(tiny, oracle, steering(edit("r8", 2.0, scope=scope, schedule=schedule)))
    assert moved_T.max() >= 1e-2


@pytest.mark.parametrize("measure", ["cosine", "dot"])
@pytest.mark.parametrize("at", PLACES)
def test_conditions(tiny: LLM, oracle: Oracle, at: str, measure: str) -> None:
    """Just below and just above the value: the edit applies, or does not."""
    condition = {"vector": "r9", "blocks": [0, 1], "measure": measure, "at": at}
    probe = steering(edit("r8", 2.0), when=condition | {"above": 0.0})
    value = oracle.decisions(MARKED, probe, len(MARKED)).value(condition | {"above": 0.0})
    for above, holds in ((value - 1e-4, True), (value + 1e-4, False)):
        _, moved_T = assert_exact(tiny, oracle, steering(edit("r8", 2.0), when=condition | {"above": above}))
        assert (moved_T.max() >= 1e-2) == holds
        if not holds:
            assert not moved_T.any()


def test_a_chat_offline_says_what_was_applied(tiny: LLM) -> None:
    condition = {"vector": "r9", "blocks": [0], "above": -1.0}
    spec = steering(edit("r8", 2.0, when=condition), edit("r7", 1.0, scope={"after": 511}))
    outputs = tiny.chat(
        [[{"role": "user", "content": "abc"}], [{"role": "user", "content": "de"}]],
        [params(spec, max_tokens=3), params(None, max_tokens=3)],
        use_tqdm=False,
        chat_template="{{ messages[0].content }}",
    )
    report = outputs[0].steering
    assert [entry["applied_tokens"] for entry in report["edits"]] == [3, 0]
    assert report["conditions"][0]["held"] is True
    assert not hasattr(outputs[1], "steering")
    assert outputs[0].kv_transfer_params is None


def test_an_answer_that_ends_at_a_stop_string_says_what_was_decided(tiny: LLM) -> None:
    condition = {"vector": "r9", "blocks": [0], "above": -1.0}
    spec = steering(edit("r8", 2.0, when=condition))
    free = generate(tiny, [MARKED], [spec], max_tokens=6)[0].outputs[0]
    stop = tiny.get_tokenizer().decode(free.token_ids[2])
    output = generate(tiny, [MARKED], [spec], max_tokens=6, stop=[stop], detokenize=True)[0]
    assert output.outputs[0].finish_reason == "stop"
    assert output.steering["conditions"][0]["held"] is True
    assert output.steering["edits"][0]["applied_tokens"] == len(output.outputs[0].token_ids)


def test_an_edit_that_covers_nothing_reports_no_decision_of_another(tiny: LLM) -> None:
    """Its slot has been another's, whose condition was measured."""
    condition = {"vector": "r9", "blocks": [0], "above": -1.0}
    generate(tiny, [MARKED], [steering(edit("r8", 2.0, when=condition))], max_tokens=1)
    nothing = steering(edit("r8", 2.0, scope={"end": 1}, when={**condition, "vector": "r10"}))
    output = generate(tiny, [MARKED], [nothing], max_tokens=2)[0]
    assert output.steering["edits"][0]["applied_tokens"] == 0
    assert "held" not in output.steering["conditions"][0]


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_a_cosine_does_not_depend_on_the_length_of_the_vector(tiny: LLM, size: float) -> None:
    """The squares of its numbers are not float32's."""
    vector = random_vector(9)
    tiny.vectors.add("long", vector)
    rows = {block: row * np.float32(size) for block, row in vector.directions.items()}
    tiny.vectors.add("scaled", ControlVector(directions=rows, metadata=VectorMetadata()))
    values = []
    for name in ("long", "scaled"):
        spec = steering(edit("r8", 1.0), when={"vector": name, "blocks": [0], "above": -1.0})
        output = generate(tiny, [MARKED], [spec], max_tokens=1)[0]
        values.append(output.steering["conditions"][0]["value"])
    assert abs(values[0]) > 1e-3
    assert abs(values[0] - values[1]) <= 1e-6
