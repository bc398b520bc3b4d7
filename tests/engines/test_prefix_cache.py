"""Invariant 6: equal steering shares cached prefixes, unequal steering never does, and what may be shared is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers.driving import edit, generate, sampled, steering, tokens
from helpers.engines import ROW_SETS, RUNNER, random_rows, random_vector

from steer_engine import LLM
from steer_engine.vectors import RowSet

BLOCK = 32
NUM_BLOCKS = 4 if RUNNER == "v1" else 3
PROMPT = tokens(2, NUM_BLOCKS * BLOCK + 5)
FULL = NUM_BLOCKS * BLOCK


@pytest.fixture
def llm(tiny: LLM) -> LLM:
    tiny.llm_engine.reset_prefix_cache()
    return tiny


def ask(llm: LLM, spec: dict[str, Any] | None, prompt: list[int] = PROMPT) -> tuple[int, tuple[list[int], list[float]]]:
    """Cached prompt tokens, and the answer."""
    output = generate(llm, [prompt], [spec], max_tokens=2)[0]
    return output.num_cached_tokens, sampled(output)


def test_equal_steering_shares_whatever_the_vector_is_called(llm: LLM) -> None:
    llm.vectors.add("r0-again", random_vector(0))
    cached, first = ask(llm, steering(edit("r0")))
    assert cached == 0
    cached, second = ask(llm, steering(edit("r0-again")))
    assert cached == FULL
    assert np.abs(np.subtract(first[1], second[1])).max() <= 1e-5
    cached, _ = ask(llm, steering(edit("r0", 0.25), edit("r0", 0.75)))
    assert cached == FULL, "adds of one vector sum up to the same edit"


FEATURE = {"vector": "relu", "op": "feature", "feature": 3, "target": 3.0}
ROTATE = {"vector": "r1", "op": "rotate", "toward": "r2", "degrees": 70}
UNEQUAL: dict[str, list[dict[str, Any]]] = {
    "directions": [
        steering(edit("r0")),
        steering(edit("r0", 1.25)),
        steering(edit("r1")),
        steering(edit("r0", blocks=1)),
        steering(edit("r0", op="ablate")),
        steering(edit("r0"), preserve_norm=True),
        steering(edit("r0", gate={"vector": "r1", "min_cos": -0.9})),
    ],
    "features": [
        steering(FEATURE),
        steering(FEATURE | {"target": 2.0}),
        steering(FEATURE | {"feature": 40}),
        steering(FEATURE | {"feature": [3, 40]}),
        steering(FEATURE | {"vector": "jump"}),
    ],
    "ranks and files": [
        steering(edit("reft", op="low_rank")),
        steering(edit("reft", 0.5, op="low_rank")),
        steering(edit("reft-2", op="low_rank")),
        steering(edit("reft", op="low_rank", blocks=1)),
        steering(edit("reft-rank-2", op="low_rank")),
    ],
    "angles": [
        steering(ROTATE),
        steering(ROTATE | {"degrees": -70}),
        steering(ROTATE | {"degrees": 71}),
        steering({key: value for key, value in ROTATE.items() if key != "degrees"} | {"to_degrees": 70}),
        steering(ROTATE | {"toward": "r3"}),
    ],
    "gates on dot products": [
        steering(edit("r0", 1.5, gate={"vector": "r7", "min_dot": 0.02})),
        steering(edit("r0", 1.5, gate={"vector": "r7", "min_dot": 0.2})),
        steering(edit("r0", 1.5, gate={"vector": "r7", "max_dot": 0.02})),
        steering(edit("r0", 1.5, blocks=1, gate={"vector": "relu", "feature": 3, "min_dot": 0.1})),
        steering(edit("r0", 1.5, blocks=1, gate={"vector": "relu", "feature": 40, "min_dot": 0.1})),
    ],
}
"""Kinds of edits; two of a kind are never equal. On V2 every second one runs."""


def rank_2_of(rows: RowSet) -> RowSet:
    ranks = {name: {block: part[:2] for block, part in getattr(rows, name).items()} for name in PER_RANK}
    return replace(rows, **ranks)


PER_RANK = ("read", "write", "bias")


@pytest.mark.parametrize(
    "kind", ["directions", *(pytest.param(kind, marks=pytest.mark.slow_on_v2) for kind in list(UNEQUAL)[1:])]
)
def test_unequal_steering_does_not_share(llm: LLM, kind: str) -> None:
    llm.vectors.add("reft-2", random_rows(4, "low_rank"))
    llm.vectors.add("reft-rank-2", rank_2_of(ROW_SETS["reft"]))
    plain_cached, plain = ask(llm, None)
    assert plain_cached == 0
    different = UNEQUAL[kind] if RUNNER == "v1" else UNEQUAL[kind][::2]
    alone = {}
    for number, spec in enumerate(different):
        cached, answer = ask(llm, spec)
        assert cached == 0, spec
        alone[number] = answer
    # And each finds its own again, right; nobody was served another's.
    cached, again = ask(llm, None)
    assert cached == FULL
    assert np.abs(np.subtract(again[1], plain[1])).max() <= 1e-5
    for number, spec in enumerate(different):
        cached, answer = ask(llm, spec)
        assert cached == FULL
        assert np.abs(np.subtract(answer[1], alone[number][1])).max() <= 1e-5
    # One pair at most, a gate that is open anyway, gives the same.
    assert len({tuple(answer[1]) for answer in (plain, *alone.values())}) >= len(different)


def test_generation_scope_shares_the_prompt_with_plain_traffic(llm: LLM) -> None:
    plain = ask(llm, None)[1]
    cached, steered = ask(llm, steering(edit("r0", 1.5, scope="generation")))
    assert cached == FULL
    assert steered != plain
    cached, other = ask(llm, steering(edit("r1", 1.5, scope="generation")))
    assert cached == FULL
    assert other not in (plain, steered)
    # The other way round, and cold against warm.
    llm.llm_engine.reset_prefix_cache()
    cold = ask(llm, steering(edit("r0", 1.5, scope="generation")))
    assert cold[0] == 0
    assert np.abs(np.subtract(cold[1][1], steered[1])).max() <= 1e-5
    cached, again = ask(llm, None)
    assert cached == FULL
    assert np.abs(np.subtract(again[1], plain[1])).max() <= 1e-5


def test_blocks_before_a_span_are_shared(llm: LLM) -> None:
    ask(llm, None)
    assert ask(llm, steering(edit("r0", scope={"start": 2 * BLOCK})))[0] == 2 * BLOCK
    assert ask(llm, steering(edit("r0", scope={"start": 2 * BLOCK + 7, "end": 2 * BLOCK + 9})))[0] == 2 * BLOCK
    # Blocks are chained: behind an edited block nothing is shared, even where nothing is edited.
    assert ask(llm, steering(edit("r0", scope={"end": 1})))[0] == 0
    # The same offsets at the same place, requested in other words.
    assert ask(llm, steering(edit("r0", scope={"start": 2 * BLOCK + 7 - len(PROMPT), "end": 2 * BLOCK + 9})))[0] == FULL


def test_generated_blocks_are_keyed_too(llm: LLM) -> None:
    """An answer that becomes a prompt: its blocks were made under steering, and only equal steering may reuse them."""
    spec = steering(edit("r0", 1.5))
    prompt = PROMPT[: 2 * BLOCK]
    output = generate(llm, [prompt], [spec], max_tokens=2 * BLOCK + 2)[0]
    grown = [*prompt, *output.outputs[0].token_ids]
    assert ask(llm, None, grown)[0] == 0
    assert ask(llm, spec, grown)[0] == 4 * BLOCK


def test_a_replaced_vector_never_serves_stale_blocks(llm: LLM) -> None:
    llm.vectors.add("changing", random_vector(50))
    _, before = ask(llm, steering(edit("changing", 1.5)))
    llm.vectors.add("changing", random_vector(51))
    cached, after = ask(llm, steering(edit("changing", 1.5)))
    assert cached == 0
    assert before != after


def test_reading_is_never_shortened_by_the_cache(llm: LLM) -> None:
    ask(llm, None)
    assert ask(llm, None)[0] == FULL
    rows = llm.capture([PROMPT], "all")[0]
    assert rows.shape[1] == len(PROMPT)
    assert np.abs(rows).max(axis=2).min() > 0


OPEN, CLOSE = 300, 301


def marked(at: int, closed: int | None = None) -> list[int]:
    """PROMPT with a token that opens a window at one position, and one that closes it at another."""
    prompt = list(PROMPT)
    prompt[at] = OPEN
    if closed is not None:
        prompt[closed] = CLOSE
    return prompt


WINDOW = {"after": OPEN, "until": CLOSE, "each": True}


def test_a_prompt_without_a_trigger_shares_with_plain_traffic(llm: LLM) -> None:
    plain = ask(llm, None)[1]
    cached, steered = ask(llm, steering(edit("r0", 1.5, scope=WINDOW)))
    assert cached == FULL
    assert np.abs(np.subtract(steered[1], plain[1])).max() <= 1e-5


def test_blocks_before_a_trigger_are_plain_and_those_in_its_window_are_not(llm: LLM) -> None:
    prompt = marked(BLOCK + 7)
    spec = steering(edit("r0", 1.5, scope=WINDOW))
    assert ask(llm, None, prompt)[0] == 0
    cached, steered = ask(llm, spec, prompt)
    assert cached == BLOCK
    assert ask(llm, spec, prompt)[0] == FULL
    cached, plain = ask(llm, None, prompt)
    assert cached == FULL
    assert steered != plain
    # The same positions in other words.
    same = steering(edit("r0", 1.5, scope={"start": BLOCK + 8}))
    cached, answer = ask(llm, same, prompt)
    assert cached == FULL
    assert np.abs(np.subtract(answer[1], steered[1])).max() <= 1e-5
    # Another prompt with the window elsewhere in the second block.
    assert ask(llm, spec, marked(BLOCK + 9))[0] == BLOCK


def test_windows_of_the_answer_are_keyed_by_what_was_sampled(llm: LLM) -> None:
    """An answer that becomes a prompt: the window that one of its tokens opened is found in its blocks again."""
    prompt = PROMPT[: BLOCK + 3]
    plain = generate(llm, [prompt], [None], max_tokens=BLOCK + 2)[0].outputs[0].token_ids
    trigger = {"after": plain[1]}
    llm.llm_engine.reset_prefix_cache()
    spec = steering(edit("r0", 1.5, scope=trigger))
    answer = generate(llm, [prompt], [spec], max_tokens=BLOCK + 2)[0].outputs[0].token_ids
    assert answer[:2] == plain[:2]
    assert answer != plain
    grown = [*prompt, *answer]
    assert ask(llm, None, grown)[0] == BLOCK
    cached, again = ask(llm, spec, grown)
    assert cached == 2 * BLOCK
    llm.llm_engine.reset_prefix_cache()
    assert np.abs(np.subtract(ask(llm, spec, grown)[1][1], again[1])).max() <= 1e-5


def test_schedules_share_only_what_they_edit_alike(llm: LLM) -> None:
    def fading(over: int) -> dict[str, Any]:
        schedule = {"kind": "linear", "over": over, "to": 0.0}
        return steering(edit("r0", 1.5, scope={"start": BLOCK}, schedule=schedule))

    assert ask(llm, fading(40))[0] == 0
    assert ask(llm, fading(40))[0] == FULL
    assert ask(llm, fading(50))[0] == BLOCK
    assert ask(llm, steering(edit("r0", 1.5, scope={"start": BLOCK})))[0] == BLOCK


@pytest.mark.parametrize("above", [-1.0, 0.9], ids=["holds", "does not hold"])
def test_a_condition_has_its_own_key_where_it_could_have_held(llm: LLM, above: float) -> None:
    condition = {"vector": "r9", "blocks": [0], "above": above}
    spec = steering(edit("r0", 1.5, when=condition))
    prompt = PROMPT[: 2 * BLOCK + 3]
    ask(llm, None, prompt)
    answer = generate(llm, [prompt], [spec], max_tokens=BLOCK)[0]
    assert answer.num_cached_tokens == 2 * BLOCK, "before the last prompt token, nothing is edited"
    assert answer.steering["conditions"][0]["held"] == (above < 0)
    covered = len(answer.outputs[0].token_ids) if above < 0 else 0
    assert answer.steering["edits"][0]["applied_tokens"] == covered
    grown = [*prompt, *answer.outputs[0].token_ids]
    assert ask(llm, None, grown)[0] == 2 * BLOCK


def test_a_condition_on_the_whole_prompt_measures_it_whole(llm: LLM) -> None:
    condition = {"vector": "r9", "blocks": [0], "above": -1.0, "at": "mean_prompt"}
    spec = steering(edit("r0", 1.5, when=condition))
    values = []
    for _ in ("cold", "warm"):
        output = generate(llm, [PROMPT], [spec], max_tokens=1)[0]
        assert output.num_cached_tokens == 0
        values.append(output.steering["conditions"][0]["value"])
    assert abs(values[0] - values[1]) <= 1e-7
