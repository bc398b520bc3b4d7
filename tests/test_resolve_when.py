"""When an edit applies, resolved: triggers, schedules and conditions against model, tokenizer and limits."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers.random_specs import HIDDEN_SIZE, MODEL, VECTORS, source

from steer_engine.edit import GENERATION, LAST_PROMPT_TOKEN, Bound, Schedule, Scope
from steer_engine.errors import SteeringRequestError, UnknownVectorError
from steer_engine.model_shape import ModelShape
from steer_engine.parse import parse_spec
from steer_engine.resolve import ResolvedSpec, resolve
from steer_engine.settings import Limits
from steer_engine.spec import Op
from steer_engine.trigger import NO_END, Trigger
from steer_engine.vectors import ControlVector, VectorMetadata
from steer_engine.vectors.cache import InlineVectors
from steer_engine.vectors.metadata import FittedCondition
from steer_engine.vectors.safetensors_format import to_bytes
from steer_engine.vocabulary import Tags, Vocabulary

SIZE = 300
TAGS = {"thinking": Tags("<", ">"), "tool_calls": Tags("[", None)}
LINEAR = {"kind": "linear", "over": 8, "to": 0.0}
HOLDS = {"vector": "c", "blocks": [0, 1], "above": 0.1}


def find_tags(name: str) -> Tags | str:
    return TAGS[name]


CHARACTERS = Vocabulary(lambda text: [ord(character) for character in text], SIZE, find_tags)
"""A token per character."""


def resolved(
    *edits: dict[str, Any],
    model: ModelShape = MODEL,
    limits: Limits | None = None,
    vocabulary: Vocabulary = CHARACTERS,
    vectors: Callable[[str], ControlVector] = source,
    **rest: Any,
) -> ResolvedSpec:
    spec = parse_spec({"edits": [{"vector": "a", **edit} for edit in edits], **rest})
    assert spec is not None
    return resolve(spec, vectors, model, limits or Limits(), vocabulary=vocabulary)


def scope_of(scope: Any, **rest: Any) -> Scope:
    return resolved({"scope": scope}, **rest).edits[0].edit.scope


def refused(*edits: dict[str, Any], **rest: Any) -> SteeringRequestError:
    with pytest.raises(SteeringRequestError) as caught:
        resolved(*edits, **rest)
    return caught.value


# Scopes


@pytest.mark.parametrize(
    ("scope", "meant"),
    [
        ("last_prompt_token", LAST_PROMPT_TOKEN),
        ({"from": "generation"}, GENERATION),
        ({"from": "generation", "end": 4}, Scope(Bound(True, -1), Bound(True, 3))),
        ({"from": "generation", "start": 2, "end": 4}, Scope(Bound(True, 1), Bound(True, 3))),
        ("thinking", Scope.span(0, None)._replace(trigger=Trigger((60,), (62,), True))),
        ("answer", Scope.span(0, None)._replace(trigger=Trigger((62,), (60,), True))),
        ("tool_calls", Scope.span(0, None)._replace(trigger=Trigger((91,), (), True))),
        ({"after": "<", "until": ">"}, Scope.span(0, None)._replace(trigger=Trigger((60,), (62,)))),
        (
            {"after": [5, 6], "each": True, "tokens": 3},
            Scope.span(0, None)._replace(trigger=Trigger((5, 6), (), True, 3)),
        ),
        ({"until": 7, "start": 3}, Scope.span(3, None)._replace(trigger=Trigger((), (7,)))),
        ({"except": "thinking"}, Scope.span(0, None)._replace(exclude=Trigger((60,), (62,), True))),
        (
            {"after": 5, "from": "generation", "start": 1, "except": {"until": 7}},
            Scope(Bound(True, 0), Bound(False, NO_END), Trigger((5,)), Trigger((), (7,))),
        ),
    ],
    ids=str,
)
def test_scopes(scope: Any, meant: Scope) -> None:
    assert scope_of(scope) == meant


@pytest.mark.parametrize("prompt_len", [1, 2, 7])
def test_windows_of_the_answer(prompt_len: int) -> None:
    """Position P-1 selects the first generated token."""
    assert scope_of("last_prompt_token").at(prompt_len) == (prompt_len - 1, prompt_len)
    assert scope_of({"from": "generation", "end": 1}).at(prompt_len) == (prompt_len - 1, prompt_len)
    assert scope_of({"from": "generation", "start": 2, "end": 5}).at(prompt_len) == (prompt_len + 1, prompt_len + 4)
    assert scope_of({"from": "generation", "start": 3}).at(prompt_len) == (prompt_len + 2, NO_END)


@pytest.mark.parametrize("word", ["thinking", "answer", "tool_calls"])
def test_words_without_tags(word: str) -> None:
    vocabulary = Vocabulary(None, SIZE, lambda name: f"no parser of {name}.")
    error = refused({"scope": word}, vocabulary=vocabulary)
    assert error.param == "steering.edits[0].scope"
    asked = "thinking" if word == "answer" else word
    assert error.message == f"'{word}' has no tags here: no parser of {asked}."
    excluded = refused({"scope": {"except": word}}, vocabulary=vocabulary)
    assert (excluded.param, excluded.message) == ("steering.edits[0].scope.except", error.message)
    assert not vocabulary.has_tags(word)
    assert CHARACTERS.has_tags(word)


@pytest.mark.parametrize(
    ("scope", "param"),
    [
        ({"after": SIZE}, ".after"),
        ({"after": [5, SIZE]}, ".after"),
        ({"until": SIZE + 7}, ".until"),
        ({"except": {"after": SIZE}}, ".except.after"),
        ({"except": {"until": [SIZE]}}, ".except.until"),
    ],
    ids=str,
)
def test_tokens_beyond_the_vocabulary(scope: dict[str, Any], param: str) -> None:
    error = refused({"scope": scope})
    assert error.param == f"steering.edits[0].scope{param}"
    assert f"the vocabulary has 0 to {SIZE - 1}" in error.message
    scope_of({"after": SIZE - 1})


def test_text_without_a_tokenizer() -> None:
    without = Vocabulary(None, SIZE, find_tags)
    assert refused({"scope": {"after": "a"}}, vocabulary=without).message == (
        "This engine has no tokenizer; give token ids instead of text."
    )
    assert scope_of({"after": 5}, vocabulary=without).trigger == Trigger((5,))


@pytest.mark.parametrize(
    ("scope", "param"),
    [
        ({"after": 5, "until": 6, "except": {"after": [5], "until": [6]}}, ".except"),
        ({"after": "<", "until": ">", "each": True, "except": "thinking"}, ".except"),
        ({"until": 5, "except": {"until": 5}}, ".except"),
        ({"after": "<", "until": 60}, ".until"),
        ({"after": [5], "until": 5}, ".until"),
        ({"except": {"after": 60, "until": "<"}}, ".except.until"),
    ],
    ids=str,
)
def test_scopes_that_contradict_themselves(scope: dict[str, Any], param: str) -> None:
    """Also where the same tokens are written in two ways, which the schema cannot see."""
    assert refused({"scope": scope}).param == f"steering.edits[0].scope{param}"


@pytest.mark.parametrize(
    ("scope", "param"),
    [
        ({"after": list(range(9))}, ".after"),
        ({"until": "abcdefghi"}, ".until"),
        ({"except": {"after": list(range(9))}}, ".except.after"),
    ],
    ids=str,
)
def test_the_limit_on_the_tokens_of_a_trigger(scope: dict[str, Any], param: str) -> None:
    error = refused({"scope": scope})
    assert error.param == f"steering.edits[0].scope{param}"
    assert "9 tokens; at most 8 are allowed (max_trigger_tokens)" in error.message
    scope_of({"after": list(range(8)), "until": "abcdefgh"})
    assert refused({"scope": {"after": [1, 2]}}, limits=Limits(max_trigger_tokens=1)).param is not None


def test_the_limit_holds_for_the_tags_of_a_parser() -> None:
    """A device has room for so many tokens, whoever names them."""
    vocabulary = Vocabulary(lambda text: [ord(each) for each in text], SIZE, lambda name: Tags("<", "</thinking>"))
    for scope, param in (("thinking", ""), ("answer", ""), ({"except": "thinking"}, ".except")):
        error = refused({"scope": scope}, vocabulary=vocabulary)
        assert error.param == f"steering.edits[0].scope{param}"
        assert "has 11 tokens; at most 8" in error.message


def test_the_limit_on_triggers_counts_different_ones() -> None:
    two = [{"scope": {"after": 5}}, {"scope": {"after": 5, "except": {"after": 6}}}]
    assert len(resolved(*two, limits=Limits(max_triggers=2)).template.triggers) == 2
    error = refused(*two, {"scope": "thinking"}, limits=Limits(max_triggers=2))
    assert error.param == "steering.edits"
    assert "3 different triggers; one request may have at most 2 (max_triggers)" in error.message
    assert refused(two[0], limits=Limits(max_triggers=0)).param == "steering.edits"
    eight = [{"scope": {"after": token}} for token in range(8)]
    many = Limits(max_edits=9)
    resolved(*eight, limits=many)
    assert "9 different triggers" in refused(*eight, {"scope": {"until": 0}}, limits=many).message


# Schedules


def test_schedules() -> None:
    (linear, exponential) = (
        resolved({"schedule": schedule}).edits[0].edit.schedule
        for schedule in (LINEAR, {"kind": "exponential", "over": 4, "to": 0.25})
    )
    assert linear == Schedule(False, 8, 0.0)
    assert linear.slope == -1 / 8
    assert exponential == Schedule(True, 4, 0.25)
    assert exponential.slope == -0.5
    assert resolved({"schedule": LINEAR | {"to": 1}}).edits[0].edit.schedule is None


def test_the_bounds_count_the_end_of_a_rising_schedule() -> None:
    """Dose, range and growth: each as if the edit had its largest share everywhere."""
    steep = {"schedule": LINEAR | {"to": 8.0}}
    for fields, limits in (
        ({"scale": 2.0, "op": "add_relative"}, Limits(max_dose=10.0)),
        ({"scale": 2.0, "unit": "residual"}, Limits(max_dose=10.0)),
    ):
        resolved({**fields, "schedule": LINEAR}, limits=limits)
        error = refused({**fields, **steep}, limits=limits)
        assert (error.param, "16 residual norms" in error.message) == ("steering.edits[0].scale", True)
    half = replace(MODEL, dtype="float16")
    vector = ControlVector(directions={0: np.full(HIDDEN_SIZE, 25.0, np.float32)}, metadata=VectorMetadata())
    loud = {"vector": "v", "blocks": 0, "scale": 50.0}
    one_edit = Limits(max_edits=1)
    resolved(loud | {"schedule": LINEAR}, model=half, vectors=lambda name: vector, limits=one_edit)
    growth = refused(loud | steep, model=half, vectors=lambda name: vector, limits=one_edit)
    assert "norm of 7.3e+04; float16 holds 6.6e+04" in growth.message
    edits = [{"op": "add_relative", "scale": 4.0, "blocks": block} for block in range(4)] * 2
    free = Limits(max_dose=1e6)
    resolved(*edits, limits=free)
    assert (
        "grow the residual stream"
        in refused(*(edit | {"schedule": LINEAR | {"to": 1000.0}} for edit in edits), limits=free).message
    )


# Conditions


def test_a_condition_is_resolved() -> None:
    resolved_when = resolved({"when": HOLDS}).edits[0].edit.when
    assert resolved_when is not None
    (condition,) = resolved_when.conditions
    assert (condition.vector, condition.blocks) == (VECTORS["c"].digest, (0, 1))
    assert (condition.measure, condition.at, condition.above, condition.below) == (
        "cosine",
        "last_prompt_token",
        0.1,
        None,
    )
    assert resolved_when.decided_at == 1
    spread = resolved({"when": {"any": [HOLDS, HOLDS | {"blocks": 2, "at": "max_prompt", "measure": "dot"}]}})
    found = spread.edits[0].edit.when
    assert found is not None
    assert (found.any, found.decided_at, len(found.conditions)) == (True, 2, 2)


def test_the_request_has_a_condition_for_all_edits() -> None:
    both = resolved({"blocks": "2-3"}, {"vector": "b"}, when=HOLDS)
    each = resolved({"blocks": "2-3", "when": HOLDS}, {"vector": "b", "when": HOLDS})
    assert both.digest == each.digest
    assert both.template.conditions == each.template.conditions
    assert len(both.template.conditions) == 1


@pytest.mark.parametrize(
    ("when", "param"),
    [
        (HOLDS | {"vector": "nobody"}, ".vector"),
        (HOLDS | {"blocks": [0, 7]}, ".blocks"),
        (HOLDS | {"vector": "b"}, ".blocks"),
        ({"vector": "d", "above": 0.1, "blocks": 1}, ".blocks"),
        ({"vector": "c", "blocks": 0}, ".above"),
        (HOLDS | {"blocks": "0-3"}, ".blocks"),
        ({"vector": "c", "above": 0.1}, ".blocks"),
        ({"any": [HOLDS, HOLDS | {"blocks": 3}]}, ".any[1].blocks"),
        ({"any": [HOLDS, HOLDS | {"vector": "nobody"}]}, ".any[1].vector"),
        ({"all": [{"vector": "c", "blocks": 0}]}, ".all[0].above"),
    ],
    ids=str,
)
def test_wrong_conditions(when: dict[str, Any], param: str) -> None:
    error = refused({"when": when})
    assert error.param == f"steering.edits[0].when{param}"
    assert isinstance(error, UnknownVectorError) == ("nobody" in str(when))
    assert refused({}, when=when).param == f"steering.when{param}"


def test_a_vector_with_a_condition_of_its_own() -> None:
    fitted = FittedCondition(blocks=(0, 1), measure="dot", at="mean_prompt", above=2.0)
    vector = replace(VECTORS["c"], metadata=VectorMetadata(condition=fitted))
    vectors = {**VECTORS, "fitted": vector}.__getitem__
    written = {"vector": "fitted", "blocks": "0-1", "measure": "dot", "at": "mean_prompt", "above": 2.0}
    suggested = resolved({"when": {"vector": "fitted"}}, vectors=vectors)
    assert suggested.digest == resolved({"when": written}, vectors=vectors).digest
    for given in ({"blocks": 0}, {"measure": "cosine"}, {"at": "max_prompt"}):
        error = refused({"when": {"vector": "fitted", **given}}, vectors=vectors)
        assert error.param == "steering.edits[0].when.above"
        assert f"it has its own {next(iter(given))}" in error.message
    late = refused({"when": {"vector": "fitted"}, "blocks": "0-1"}, vectors=vectors)
    assert late.param == "steering.edits[0].when.blocks"


def test_a_condition_must_leave_a_block() -> None:
    resolved({"blocks": 2, "when": HOLDS})
    for blocks in (0, 1, "0-1"):
        error = refused({"blocks": blocks, "when": HOLDS})
        assert error.param == "steering.edits[0].when.blocks"
        assert "decided at block 1, and the edit's last block is" in error.message
    assert refused({"blocks": 2}, {"blocks": 1}, when=HOLDS).param == "steering.when.blocks"


def test_a_condition_of_another_model() -> None:
    wide = ControlVector(directions={0: np.ones(HIDDEN_SIZE * 2, np.float32)}, metadata=VectorMetadata())
    flat = ControlVector(directions={0: np.zeros(HIDDEN_SIZE, np.float32)}, metadata=VectorMetadata())
    vectors = {**VECTORS, "wide": wide, "flat": flat}
    for name, field, says in (("wide", "vector", "made for another model"), ("flat", "blocks", "no direction there")):
        error = refused({"when": {"vector": name, "blocks": 0, "above": 0}}, vectors=vectors.__getitem__)
        assert error.param == f"steering.edits[0].when.{field}"
        assert says in error.message


def test_engines_without_conditions() -> None:
    adds = refused({"when": HOLDS}, model=replace(MODEL, ops=(Op.ADD,)))
    assert (adds.param, "--steering-ops" in adds.message) == ("steering.edits[0].when", True)
    stages = refused({}, when={"any": [HOLDS]}, model=replace(MODEL, is_pipeline=True))
    assert (stages.param, "pipeline parallelism" in stages.message) == ("steering.when.any[0]", True)
    resolved({"scope": {"after": 5}, "schedule": LINEAR}, model=replace(MODEL, ops=(Op.ADD,), is_pipeline=True))


def test_the_limit_on_conditions_counts_different_ones() -> None:
    edits = [{"when": {"all": [HOLDS, HOLDS | {"above": above}]}} for above in (0.1, 0.2, 0.3)]
    resolved(*edits, limits=Limits(max_conditions=3))
    error = refused(*edits, limits=Limits(max_conditions=2))
    assert error.param == "steering.edits"
    assert "3 different conditions; one request may have at most 2 (max_conditions)" in error.message


def test_rows_of_conditions_are_counted() -> None:
    """A condition needs an entry at each of its blocks."""
    conditions = {"all": [HOLDS | {"above": bound} for bound in (0.1, 0.2, 0.3, 0.4)]}
    assert resolved({"blocks": "2-3", "when": conditions}).template.rows == 4
    assert refused({"when": conditions}, model=replace(MODEL, rows=4)).param == "steering.edits"
    resolved({"when": conditions}, model=replace(MODEL, rows=5))


def test_inline_vectors_in_conditions() -> None:
    inline = InlineVectors(100_000)
    data = to_base64(VECTORS["c"])
    spec = parse_spec({"edits": [{"vector": "a", "when": {"any": [HOLDS | {"vector": {"data": data}}]}}]})
    assert spec is not None
    taken, own = inline.take(spec)
    assert own == {VECTORS["c"].digest: VECTORS["c"]}
    assert inline.find(VECTORS["c"].digest) == VECTORS["c"]
    found = resolve(taken, source, MODEL, Limits())
    assert found.digest == resolved({"when": {"any": [HOLDS]}}).digest
    assert set(found.vectors) == {VECTORS["a"].digest, VECTORS["c"].digest}
    bad = parse_spec({"edits": [{"vector": "a"}], "when": {"all": [{"vector": {"data": "????"}, "above": 0}]}})
    assert bad is not None
    with pytest.raises(SteeringRequestError) as caught:
        inline.take(bad)
    assert caught.value.param == "steering.when.all[0].vector.data"


def to_base64(vector: ControlVector) -> str:
    return base64.b64encode(to_bytes(vector)).decode()


# Digests


def test_equal_meaning_has_one_digest() -> None:
    alike = [
        ({"scope": "thinking"}, {"scope": {"after": "<", "until": ">", "each": True}}),
        ({"scope": {"after": 60}}, {"scope": {"after": [60], "each": False, "start": 0}}),
        ({"scope": {"from": "generation"}}, {"scope": "generation"}),
        ({"scope": {"from": "generation", "start": 0, "end": 1}}, {"scope": "last_prompt_token"}),
        ({"schedule": LINEAR | {"to": 1}}, {}),
        ({"when": HOLDS}, {"when": HOLDS | {"vector": VECTORS["c"].digest, "measure": "cosine", "blocks": "0-1"}}),
        ({"when": HOLDS}, {"when": {"all": [HOLDS]}}),
        ({"when": {"any": [HOLDS]}}, {"when": {"all": [HOLDS]}}),
        ({"when": {"all": [HOLDS, HOLDS]}}, {"when": HOLDS}),
        ({"when": {"any": [HOLDS, HOLDS | {"above": 0}]}}, {"when": {"any": [HOLDS | {"above": 0}, HOLDS]}}),
    ]
    for one, other in alike:
        assert resolved(one).digest == resolved(other).digest, (one, other)
        assert resolved(one).template == resolved(other).template, (one, other)


def test_different_meaning_has_another_digest() -> None:
    other = HOLDS | {"above": 0.2}
    variants = [
        {},
        {"scope": "last_prompt_token"},
        {"scope": {"from": "generation", "end": 2}},
        {"scope": "thinking"},
        {"scope": "answer"},
        {"scope": {"after": 60, "until": 62}},
        {"scope": {"after": 60}},
        {"scope": {"until": 60}},
        {"scope": {"after": 60, "each": True}},
        {"scope": {"after": 60, "tokens": 4}},
        {"scope": {"after": [60, 60]}},
        {"scope": {"except": {"after": 60}}},
        {"scope": {"after": 60, "start": 1}},
        {"schedule": LINEAR},
        {"schedule": LINEAR | {"over": 9}},
        {"schedule": LINEAR | {"to": 0.5}},
        {"schedule": LINEAR | {"kind": "exponential", "to": 0.5}},
        {"schedule": LINEAR, "scope": "generation"},
        {"when": HOLDS},
        {"when": other},
        {"when": HOLDS | {"below": 0.2}},
        {"when": HOLDS | {"measure": "dot"}},
        {"when": HOLDS | {"at": "mean_prompt"}},
        {"when": HOLDS | {"blocks": 1}},
        {"when": HOLDS | {"vector": "a"}},
        {"when": {"any": [HOLDS, other]}},
        {"when": {"all": [HOLDS, other]}},
    ]
    assert len({resolved(variant).digest for variant in variants}) == len(variants)


def test_adds_are_summed_only_where_they_apply_alike() -> None:
    def entries(*edits: dict[str, Any]) -> int:
        return len(resolved(*edits).template.edits)

    assert entries({"scope": "thinking"}, {"scope": "thinking", "scale": 2}) == 1
    assert entries({"scope": "thinking"}, {"scope": "answer"}) == 2
    assert entries({"schedule": LINEAR}, {"schedule": LINEAR}) == 2
    assert entries({"when": HOLDS}, {"when": HOLDS}) == 2
    assert entries({"scope": "thinking"}, {"scope": "thinking", "scale": -1}) == 0


# Reports


def test_the_report() -> None:
    scope = {"after": "<", "until": ">", "except": {"after": 5}}
    edits = [
        {"scope": scope, "schedule": LINEAR},
        {"scale": 0, "when": HOLDS | {"above": 0.9}},
        {"vector": "b", "scope": "thinking", "when": {"any": [HOLDS | {"above": 0.2}, HOLDS]}},
        {"vector": "b", "scope": "last_prompt_token", "when": HOLDS},
    ]
    report = resolved(*edits).report()
    assert [edit["scope"] for edit in report["edits"]] == [
        {"start": None, "end": None} | scope,
        "thinking",
        "last_prompt_token",
    ]
    assert report["edits"][0]["schedule"] == LINEAR
    assert [(condition["above"], condition["at"]) for condition in report["conditions"]] == [
        (0.1, "last_prompt_token"),
        (0.2, "last_prompt_token"),
    ]
    assert [edit.get("when") for edit in report["edits"]] == [None, {"any": [0, 1]}, {"all": [0]}]
    assert not re.search('"[c]"', json.dumps(report["conditions"])), "conditions are named by digest"
    json.dumps(report, allow_nan=False)
