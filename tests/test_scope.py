"""Scopes, schedules and conditions in the `steering` field: what is accepted, and that a refusal names the field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from steer_engine.errors import SteeringRequestError
from steer_engine.fields import InlineVector
from steer_engine.parse import parse_spec
from steer_engine.scope import (
    MAX_CONDITIONS,
    MAX_SCHEDULE_TOKENS,
    MAX_TEXT_CHARS,
    MAX_TOKENS,
    AllSpec,
    AnySpec,
    ConditionSpec,
    ScheduleSpec,
    ScopeSpec,
    conditions_of,
)
from steer_engine.spec import EditSpec, SteeringSpec, vectors_in, with_vectors

HOLDS = {"vector": "c", "above": 0.1}
LINEAR = {"kind": "linear", "over": 8, "to": 0.0}


def one(**fields: Any) -> dict[str, Any]:
    return {"edits": [{"vector": "v", **fields}]}


def parsed(raw: Any) -> SteeringSpec:
    """The spec of an object, which is the same as that of its JSON text."""
    spec = parse_spec(raw)
    assert spec is not None
    assert parse_spec(json.dumps(raw)) == spec
    return spec


def edit_of(**fields: Any) -> EditSpec:
    (edit,) = parsed(one(**fields)).edits or ()
    return edit


def refused(raw: Any) -> SteeringRequestError:
    with pytest.raises(SteeringRequestError) as caught:
        parse_spec(raw)
    with pytest.raises(SteeringRequestError) as from_text:
        parse_spec(json.dumps(raw, allow_nan=True))
    assert from_text.value.param == caught.value.param or "is not a JSON number" in from_text.value.message
    assert "steer_engine" not in caught.value.message
    return caught.value


# What is accepted


@pytest.mark.parametrize("word", ["last_prompt_token", "thinking", "answer", "tool_calls"])
def test_words(word: str) -> None:
    assert edit_of(scope=word).scope == word


@pytest.mark.parametrize(
    "scope",
    [
        {"from": "generation"},
        {"from": "generation", "start": 0, "end": 16},
        {"after": "<think>", "until": "</think>"},
        {"after": 7},
        {"until": [7, 8]},
        {"after": [7], "each": True, "tokens": 5},
        {"until": "</think>", "tokens": 100},
        {"after": "\n\n", "from": "generation", "start": 2},
        {"after": 7, "start": 3, "end": -2},
        {"except": "tool_calls"},
        {"after": "a", "except": {"after": 5, "each": True, "tokens": 3}},
        {"start": -5, "except": {"until": 5}},
    ],
    ids=str,
)
def test_a_scope_is_kept_as_written(scope: dict[str, Any]) -> None:
    found = edit_of(scope=scope).scope
    assert isinstance(found, ScopeSpec)
    assert found.model_dump(by_alias=True, exclude_unset=True, exclude_none=True) == scope
    assert found.report() == {"start": None, "end": None} | scope


@pytest.mark.parametrize(
    "scope",
    [
        {"after": "a" * MAX_TEXT_CHARS},
        {"after": list(range(MAX_TOKENS))},
        {"after": 2**31 - 1, "tokens": 2**31 - 1},
        {"from": "generation", "start": 2**30 - 1, "end": 2**30},
    ],
    ids=["text", "list", "number", "positions"],
)
def test_a_scope_at_its_limits(scope: dict[str, Any]) -> None:
    assert edit_of(scope=scope).scope == ScopeSpec.model_validate(scope)


@pytest.mark.parametrize(
    "schedule",
    [LINEAR, {"kind": "linear", "over": 1, "to": 3}, {"kind": "exponential", "over": MAX_SCHEDULE_TOKENS, "to": 1e-3}],
    ids=str,
)
def test_schedules(schedule: dict[str, Any]) -> None:
    assert edit_of(schedule=schedule).schedule == ScheduleSpec(**{**schedule, "to": float(schedule["to"])})
    assert edit_of(op="set", target=1, schedule=LINEAR).schedule == ScheduleSpec.model_validate(LINEAR)


def test_conditions() -> None:
    full = {"vector": "c", "blocks": "1-3", "above": 0, "below": 0.5, "measure": "dot", "at": "max_prompt"}
    for when in (HOLDS, full, {"vector": "c"}, {"vector": {"data": "AAAA"}, "below": -1}):
        assert edit_of(when=when).when == ConditionSpec.model_validate(when)
        assert parsed(one() | {"when": when}).when == ConditionSpec.model_validate(when)
    assert edit_of(when={"any": [HOLDS, full]}).when == AnySpec.model_validate({"any": [HOLDS, full]})
    assert edit_of(when={"all": [HOLDS] * MAX_CONDITIONS}).when == AllSpec.model_validate(
        {"all": [HOLDS] * MAX_CONDITIONS}
    )


def test_a_condition_without_a_bound_is_read() -> None:
    """The vector may suggest one."""
    when = edit_of(when={"vector": "c"}).when
    assert isinstance(when, ConditionSpec)
    assert not when.is_bounded


def test_null_is_the_same_as_leaving_a_field_out() -> None:
    scope = dict.fromkeys(("after", "until", "each", "tokens", "from", "start", "end", "except"))
    assert edit_of(scope=scope).scope == ScopeSpec()
    exception = dict.fromkeys(("until", "each", "tokens")) | {"after": 5}
    assert edit_of(scope={"except": exception}).scope == ScopeSpec.model_validate({"except": {"after": 5}})
    condition = dict.fromkeys(("blocks", "site", "above", "below", "measure", "at")) | {"vector": "c"}
    assert edit_of(when=condition).when == ConditionSpec(vector="c")
    assert edit_of(when=None, schedule=None) == EditSpec(vector="v")
    assert parsed(one() | {"when": None}) == parsed(one())
    assert parsed({"preset": "p", "when": None}) == SteeringSpec(preset="p")


def test_the_schema_names_the_fields_as_clients_write_them() -> None:
    defs = SteeringSpec.model_json_schema()["$defs"]
    trigger = {"after", "until", "each", "tokens"}
    assert set(defs["ScopeSpec"]["properties"]) == trigger | {"from", "start", "end", "except"}
    assert set(defs["ExceptSpec"]["properties"]) == trigger
    assert set(defs["ScheduleSpec"]["properties"]) == {"kind", "over", "to"}
    assert set(defs["ConditionSpec"]["properties"]) == {"vector", "blocks", "site", "above", "below", "measure", "at"}
    assert {name: set(defs[name]["properties"]) for name in ("AnySpec", "AllSpec")} == {
        "AnySpec": {"any"},
        "AllSpec": {"all"},
    }


# What is refused


@pytest.mark.parametrize(
    ("scope", "param"),
    [
        ("reasoning", ""),
        ("Thinking", ""),
        (True, ""),
        (["thinking"], ""),
        ({"from": "prompt"}, ".from"),
        ({"from": 0}, ".from"),
        ({"from": True}, ".from"),
        ({"from_": "generation"}, ".from_"),
        ({"except_": "thinking"}, ".except_"),
        ({"from": "generation", "start": -1}, ".start"),
        ({"from": "generation", "end": -1}, ".end"),
        ({"from": "generation", "end": 0}, ".end"),
        ({"from": "generation", "start": 4, "end": 4}, ".end"),
        ({"from": "generation", "start": 5, "end": 4}, ".end"),
        ({"from": "generation", "start": 1.0}, ".start"),
        ({"after": ""}, ".after"),
        ({"after": "a" * (MAX_TEXT_CHARS + 1)}, ".after"),
        ({"after": -1}, ".after"),
        ({"after": 2**31}, ".after"),
        ({"after": 10**400}, ".after"),
        ({"after": 1.0}, ".after"),
        ({"after": True}, ".after"),
        ({"after": {}}, ".after"),
        ({"after": []}, ".after"),
        ({"after": [1, -1]}, ".after[1]"),
        ({"after": [1, "a"]}, ".after[1]"),
        ({"after": [True]}, ".after[0]"),
        ({"after": [[1]]}, ".after[0]"),
        ({"after": list(range(MAX_TOKENS + 1))}, ".after"),
        ({"until": ""}, ".until"),
        ({"until": [2, None]}, ".until[1]"),
        ({"after": "\ud800"}, ".after"),
        ({"after": 5, "until": 5}, ".until"),
        ({"after": "a", "until": "a"}, ".until"),
        ({"each": True}, ".each"),
        ({"until": 5, "each": True}, ".each"),
        ({"after": 5, "each": 1}, ".each"),
        ({"after": 5, "each": "true"}, ".each"),
        ({"tokens": 5}, ".tokens"),
        ({"after": 5, "tokens": 0}, ".tokens"),
        ({"after": 5, "tokens": -1}, ".tokens"),
        ({"after": 5, "tokens": 2**31}, ".tokens"),
        ({"after": 5, "tokens": "5"}, ".tokens"),
        ({"after": 5, "tokens": 5.0}, ".tokens"),
        ({"except": "generation"}, ".except"),
        ({"except": "prompt"}, ".except"),
        ({"except": 5}, ".except"),
        ({"except": []}, ".except"),
        ({"except": {}}, ".except"),
        ({"except": {"after": None}}, ".except"),
        ({"except": {"start": 0}}, ".except.start"),
        ({"except": {"except": "thinking"}}, ".except.except"),
        ({"except": {"after": ""}}, ".except.after"),
        ({"except": {"after": [1, "a"]}}, ".except.after[1]"),
        ({"except": {"until": 5, "each": True}}, ".except.each"),
        ({"except": {"tokens": 5}}, ".except.tokens"),
        ({"except": {"after": 5, "until": 5}}, ".except.until"),
        ({"while": 5}, ".while"),
    ],
    ids=str,
)
def test_wrong_scopes(scope: Any, param: str) -> None:
    assert refused(one(scope=scope)).param == f"steering.edits[0].scope{param}"


@pytest.mark.parametrize(
    ("schedule", "param"),
    [
        ("linear", ""),
        ({}, ".kind"),
        ({"kind": "cosine", "over": 8, "to": 0}, ".kind"),
        ({"kind": "linear", "to": 0}, ".over"),
        ({"kind": "linear", "over": 8}, ".to"),
        (LINEAR | {"over": 0}, ".over"),
        (LINEAR | {"over": 8.0}, ".over"),
        (LINEAR | {"over": True}, ".over"),
        (LINEAR | {"over": MAX_SCHEDULE_TOKENS + 1}, ".over"),
        (LINEAR | {"to": -0.1}, ".to"),
        (LINEAR | {"to": "0"}, ".to"),
        (LINEAR | {"to": float("nan")}, ".to"),
        (LINEAR | {"to": float("inf")}, ".to"),
        (LINEAR | {"kind": "exponential"}, ".to"),
        (LINEAR | {"from": 1}, ".from"),
    ],
    ids=str,
)
def test_wrong_schedules(schedule: Any, param: str) -> None:
    assert refused(one(schedule=schedule)).param == f"steering.edits[0].schedule{param}"


@pytest.mark.parametrize(
    ("when", "param"),
    [
        ("c", ""),
        (True, ""),
        ([], ""),
        ({}, ".vector"),
        ({"above": 0.1}, ".vector"),
        (HOLDS | {"vector": ""}, ".vector"),
        (HOLDS | {"vector": 5}, ".vector"),
        (HOLDS | {"vector": {"data": ""}}, ".vector.data"),
        (HOLDS | {"vector": {"data": "AAAA", "path": "x"}}, ".vector.path"),
        (HOLDS | {"blocks": "3-1"}, ".blocks"),
        (HOLDS | {"blocks": [1, "2"]}, ".blocks[1]"),
        (HOLDS | {"above": "0.1"}, ".above"),
        (HOLDS | {"above": True}, ".above"),
        (HOLDS | {"above": float("inf")}, ".above"),
        (HOLDS | {"below": 0.1}, ".above"),
        (HOLDS | {"below": 0.0}, ".above"),
        (HOLDS | {"measure": "cos"}, ".measure"),
        (HOLDS | {"at": "prompt"}, ".at"),
        (HOLDS | {"min_cos": 0.1}, ".min_cos"),
        ({"any": []}, ".any"),
        ({"any": None}, ".any"),
        ({"any": HOLDS}, ".any"),
        ({"any": [HOLDS] * (MAX_CONDITIONS + 1)}, ".any"),
        ({"any": ["c"]}, ".any[0]"),
        ({"any": [HOLDS, {"above": 0.1}]}, ".any[1].vector"),
        ({"any": [HOLDS | {"scale": 1}]}, ".any[0].scale"),
        ({"any": [{"all": [HOLDS]}]}, ".any[0].vector"),
        ({"any": [HOLDS], "all": [HOLDS]}, ".all"),
        ({"any": [HOLDS], "above": 0.1}, ".above"),
        ({"all": []}, ".all"),
        ({"all": [HOLDS, HOLDS | {"at": "mean"}]}, ".all[1].at"),
        ({"all": [HOLDS], "vector": "c"}, ".vector"),
    ],
    ids=str,
)
def test_wrong_conditions(when: Any, param: str) -> None:
    assert refused(one(when=when)).param == f"steering.edits[0].when{param}"
    assert refused(one() | {"when": when}).param == f"steering.when{param}"


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (one(scope="last_prompt_token", schedule=LINEAR), "steering.edits[0].schedule"),
        (one(op="set", target=1, schedule=LINEAR | {"to": 1.5}), "steering.edits[0].schedule"),
        (one(op="clamp", lo=1, schedule=LINEAR | {"to": 1.5}), "steering.edits[0].schedule"),
        (one(when=HOLDS) | {"when": HOLDS}, "steering.when"),
        ({"edits": [{"vector": "v"}, {"vector": "v", "when": HOLDS}], "when": HOLDS}, "steering.when"),
        ({"preset": "p", "when": HOLDS}, "steering.when"),
        ({"capture": {}, "when": HOLDS}, "steering.when"),
        ({"edits": [{"vector": "v"}, {"vector": "v", "scope": {"tokens": 1}}]}, "steering.edits[1].scope.tokens"),
        ({"edits": [{"vector": "v"}], "schedule": LINEAR}, "steering.schedule"),
    ],
    ids=str,
)
def test_fields_that_do_not_go_together(raw: Any, param: str) -> None:
    assert refused(raw).param == param


@pytest.mark.parametrize(
    ("raw", "valid"),
    [
        (one(scope={"x": 1}), "after, until, each, tokens, from, start, end, except"),
        (one(scope={"except": {"x": 1}}), "after, until, each, tokens"),
        (one(schedule={"x": 1} | LINEAR), "kind, over, to"),
        (one(when={"x": 1} | HOLDS), "vector, blocks, site, above, below, measure, at"),
        (one(when={"any": [{"x": 1} | HOLDS]}), "vector, blocks, site, above, below, measure, at"),
        (one(when={"all": [{"x": 1} | HOLDS]}), "vector, blocks, site, above, below, measure, at"),
        (one(when={"any": [HOLDS], "x": 1}), "any"),
        (one(when={"all": [HOLDS], "x": 1}), "all"),
        (one() | {"when": {"x": 1} | HOLDS}, "vector, blocks, site, above, below, measure, at"),
    ],
    ids=str,
)
def test_an_unknown_field_lists_the_valid_ones(raw: Any, valid: str) -> None:
    assert refused(raw).message.endswith(f"unknown field 'x'; valid fields: {valid}.")


def test_a_refusal_says_what_is_valid() -> None:
    assert "'last_prompt_token', 'thinking'" in refused(one(scope=5)).message
    assert refused(one(scope={"after": 1.5})).message == (
        "steering.edits[0].scope.after: must be text, a token id, or a list of token ids that follow each other, not "
        "1.5."
    )
    assert "'tool_calls', or {'after': tokens" in refused(one(scope={"except": 5})).message
    assert "{'any': [...]} or {'all': [...]}" in refused(one(when=5)).message
    assert (
        "from the generation, positions count from 0" in refused(one(scope={"from": "generation", "start": -1})).message
    )


# Vectors of a spec


INLINE = {"data": "AAAA"}


def test_vectors_in_a_spec() -> None:
    spec = parsed(
        {
            "edits": [
                {
                    "vector": "a",
                    "gate": {"vector": "g", "min_cos": 0},
                    "when": {"any": [HOLDS, HOLDS | {"vector": "d"}]},
                },
                {"vector": INLINE},
            ]
        }
    )
    assert list(vectors_in(spec)) == ["a", "g", "c", "d", InlineVector(data="AAAA")]
    assert list(vectors_in(parsed(one() | {"when": HOLDS}))) == ["c", "v"]
    assert list(vectors_in(SteeringSpec(preset="p"))) == []


def test_inline_vectors_get_names_wherever_they_are() -> None:
    spec = parsed(
        {"edits": [{"vector": INLINE}, {"vector": "v"}], "when": {"all": [HOLDS, {"vector": INLINE, "above": 0}]}}
    )
    asked: list[str] = []

    def name_of(vector: str | InlineVector, param: str) -> str:
        asked.append(param)
        return vector if isinstance(vector, str) else "named"

    replaced = with_vectors(spec, name_of)
    assert list(vectors_in(replaced)) == ["c", "named", "named", "v"]
    assert asked == ["steering.edits[0]", "steering.edits[1]", "steering.when.all[0]", "steering.when.all[1]"]
    assert replaced.when is not None
    assert [condition.above for _, condition in conditions_of(replaced.when)] == [0.1, 0.0]

    one_edit = parsed(one(when={"vector": INLINE, "below": 1}))
    assert list(vectors_in(with_vectors(one_edit, name_of))) == ["v", "named"]
    plain = parsed(one(when=HOLDS))
    assert with_vectors(plain, name_of) is plain


def test_a_schedule_has_a_largest_factor() -> None:
    """A larger one would not fit into the device's float32."""
    assert parsed(one(schedule={"kind": "linear", "over": 1, "to": 1000.0})).edits
    error = refused(one(scale=1e-40, schedule={"kind": "linear", "over": 1, "to": 1e39}))
    assert error.param == "steering.edits[0].schedule.to"
