"""What an answer says was applied, counted once more position by position from the definitions."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers.oracle_when import covered
from helpers.random_specs import MODEL, source
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from steer_engine.applied import Applied, Decisions
from steer_engine.parse import parse_spec
from steer_engine.resolve import ResolvedSpec, resolve
from steer_engine.settings import Limits

TOKENS = [0, 1, 2, 3]
SEQUENCES = [[0], [1], [0, 1], [1, 1]]
HOLDS = {"vector": "c", "blocks": [0, 1], "above": 0.25}


def resolved(*edits: dict[str, Any], **rest: Any) -> ResolvedSpec:
    spec = parse_spec({"edits": [{"vector": "a", **edit} for edit in edits], **rest})
    assert spec is not None
    return resolve(spec, source, MODEL, Limits())


def report_of(spec: ResolvedSpec, *sequences: tuple[list[int], list[int], list[float]]) -> dict[str, Any]:
    report = spec.report()
    applied = Applied(spec, report)
    for choice, (prompt, tokens, measured) in enumerate(sequences):
        applied.add(prompt, tokens, measured, choice)
    return report


def counts(report: dict[str, Any]) -> list[int]:
    return [edit["applied_tokens"] for edit in report["edits"]]


@pytest.mark.parametrize(
    ("scope", "count"),
    [
        ("all", 12),
        ("prompt", 10),
        ("generation", 3),
        ("last_prompt_token", 1),
        ({"from": "generation", "end": 2}, 2),
        ({"from": "generation", "start": 1}, 2),
        ({"from": "generation", "start": 9}, 0),
        ({"start": -1, "end": 50}, 3),
        ({"after": 3}, 8),
        ({"after": 3, "until": 7}, 3),
        ({"except": {"after": 3, "until": 7}}, 9),
        ({"after": 99}, 0),
        ({"after": 102}, 0),
        ({"after": 100}, 1),
    ],
    ids=str,
)
def test_scopes(scope: Any, count: int) -> None:
    """A prompt of 10 tokens and 3 of the answer, of which the last is sampled and never computed."""
    assert counts(report_of(resolved({"scope": scope}), (list(range(10)), [100, 101, 102], []))) == [count]


triggers = st.fixed_dictionaries(
    {"after": st.sampled_from(SEQUENCES)},
    optional={"until": st.sampled_from(SEQUENCES), "each": st.booleans(), "tokens": st.integers(1, 5)},
)
spans = st.fixed_dictionaries({}, optional={"start": st.integers(-6, 6), "end": st.integers(-3, 12)})
from_generation = st.integers(0, 3).flatmap(
    lambda start: st.integers(1, 9).map(lambda size: {"from": "generation", "start": start, "end": start + size})
)
scopes = st.sampled_from(["all", "prompt", "generation", "last_prompt_token"]) | st.builds(
    lambda span, trigger, without: span | trigger | without,
    spans | from_generation,
    triggers | st.just({}) | st.fixed_dictionaries({"until": st.sampled_from(SEQUENCES)}),
    triggers.map(lambda trigger: {"except": trigger}) | st.just({}),
)
answers = st.lists(st.sampled_from(TOKENS), max_size=10)
prompts = st.lists(st.sampled_from(TOKENS), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(st.lists(scopes, min_size=1, max_size=3), st.lists(st.tuples(prompts, answers), min_size=1, max_size=3))
def test_counts_are_those_of_the_definitions(
    requested: list[Any], sequences: list[tuple[list[int], list[int]]]
) -> None:
    for scope in requested:
        if isinstance(scope, dict):
            assume(scope.get("after") != scope.get("until", 0))
            exception = scope.get("except", {})
            assume(exception.get("after", 0) != exception.get("until"))
            trigger = {name: scope[name] for name in ("after", "until", "each", "tokens") if name in scope}
            assume(not exception or {"each": False} | trigger != {"each": False} | exception)
    edits = [{"scope": scope, "op": "ablate"} for scope in requested]
    report = report_of(resolved(*edits), *((prompt, tokens, []) for prompt, tokens in sequences))
    shown = [edit for edit, entry in zip(requested, resolved(*edits).edits, strict=True) if not entry.edit.does_nothing]
    expected = [
        sum(int(covered(scope, [*prompt, *tokens][: len(prompt) + max(0, len(tokens) - 1)], len(prompt))[0].sum())
            for prompt, tokens in sequences)
        for scope in shown
    ]  # fmt: skip
    assert counts(report) == expected


def test_edits_of_the_same_sum_are_counted_each() -> None:
    report = report_of(resolved({}, {"scale": 2.0}, {"scale": 0}, {"scope": "prompt"}), ([1, 2, 3], [4], []))
    assert counts(report) == [3, 3, 3]


PROMPT = list(range(5))


@pytest.mark.parametrize(
    ("fields", "number", "value"),
    [
        ({}, 0.75, 0.375),
        ({"at": "mean_prompt"}, 3.75, 0.375),
        ({"at": "max_prompt"}, 0.375, 0.375),
        ({"measure": "dot"}, 0.25, 0.125),
        ({"at": "max_prompt"}, 0.25, 0.25),
    ],
    ids=str,
)
def test_values_of_conditions(fields: dict[str, Any], number: float, value: float) -> None:
    """The engine returns sums over blocks and positions, or the largest number. Bounds are strict."""
    spec = resolved({"when": HOLDS | fields})
    report = report_of(spec, (PROMPT, [8, 9, 10], [number]))
    (condition,) = report["conditions"]
    assert (condition["value"], condition["held"]) == (value, value > 0.25)
    assert counts(report) == [3 if value > 0.25 else 0], "from the last prompt token on"


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_holds_no_condition(number: float) -> None:
    report = report_of(resolved({"when": HOLDS}), (PROMPT, [8, 9], [number]))
    (condition,) = report["conditions"]
    assert (condition["value"], condition["held"]) == (None, False)
    assert counts(report) == [0]
    json.dumps(report, allow_nan=False)


def test_any_and_all() -> None:
    low = HOLDS | {"above": 0.0}
    spec = resolved({"when": {"any": [HOLDS, low]}}, {"when": {"all": [HOLDS, low]}, "vector": "b"})
    report = report_of(spec, (PROMPT, [8, 9], [0.2, 0.2]))
    held = {condition["above"]: condition["held"] for condition in report["conditions"]}
    assert held == {0.0: True, 0.25: False}
    assert counts(report) == [2, 0]


def test_several_sequences() -> None:
    """Of one prompt, as with `n`: values in the order of the choices, counts added up."""
    spec = resolved({"when": HOLDS})
    report = spec.report()
    applied = Applied(spec, report)
    for choice, number in ((2, 1.0), (0, 0.75), (1, 0.25)):
        applied.add(PROMPT, [8, 9], [number], choice)
    (condition,) = report["conditions"]
    assert condition["value"] == [0.375, 0.125, 0.5]
    assert condition["held"] == [True, False, True]
    assert counts(report) == [4]


def test_several_prompts_that_finish_in_any_order() -> None:
    spec = resolved({"when": HOLDS})
    report = spec.report()
    decisions: Decisions = {}
    first, second = (Applied(spec, report, number, decisions) for number in range(2))
    second.add([1, 2], [8], [2.0])
    assert report["conditions"][0]["value"] == 1.0
    first.add(PROMPT, [8, 9], [0.25])
    (condition,) = report["conditions"]
    assert (condition["value"], condition["held"]) == ([0.125, 1.0], [False, True])
    assert counts(report) == [1]


def test_an_engine_that_returned_no_numbers() -> None:
    report = report_of(resolved({"when": HOLDS}, {"scope": "prompt"}), (PROMPT, [8, 9], []))
    unknown, known = report["edits"]
    assert "applied_tokens" not in unknown
    assert known["applied_tokens"] == 5
    assert not {"value", "held"} & set(report["conditions"][0])
