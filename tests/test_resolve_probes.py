"""Probes and stop rules, resolved: names, blocks, limits, bounds, and what the engine is told."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import pytest
from helpers.random_specs import MODEL, source

from steer_engine.errors import SteeringRequestError, UnknownVectorError
from steer_engine.model_shape import ModelShape
from steer_engine.parse import parse_spec
from steer_engine.probe import Platt, ProbePlan, StopRule, bounds_on_dot
from steer_engine.program import Program
from steer_engine.resolve import ResolvedSpec, resolve, with_probes
from steer_engine.settings import Limits
from steer_engine.spec import Op

PROBE = {"name": "p", "vector": "a", "blocks": [0]}


def resolved(spec: dict[str, Any], model: ModelShape = MODEL, limits: Limits | None = None) -> ResolvedSpec:
    parsed = parse_spec(spec)
    assert parsed is not None
    return resolve(parsed, source, model, limits or Limits())


def refused(spec: dict[str, Any], **rest: Any) -> tuple[str | None, str]:
    with pytest.raises(SteeringRequestError) as error:
        resolved(spec, **rest)
    return error.value.param, error.value.message


@pytest.mark.parametrize(
    ("spec", "param", "words"),
    [
        ({"probes": [PROBE, PROBE]}, "steering.probes[1].name", "twice"),
        ({"probes": [PROBE | {"name": str(i)} for i in range(9)]}, "steering.probes", "max_probes"),
        ({"probes": [PROBE | {"blocks": [99]}]}, "steering.probes[0].blocks", "does not exist"),
        ({"probes": [PROBE | {"measure": "probability"}]}, "steering.probes[0].measure", "probe fit"),
        ({"probes": [PROBE], "stop": [{"probe": "q", "above": 1}]}, "steering.stop[0].probe", "probes: p"),
        ({"probes": [PROBE], "stop": [{"probe": "p"}]}, "steering.stop[0]", "above or below"),
        ({"probes": [PROBE], "stop": [{"probe": "p", "above": 2, "below": 1}]}, "steering.stop[0].above", "not less"),
        ({"probes": [PROBE], "stop": [{"probe": "p", "above": 1, "for": 0}]}, "steering.stop[0].for", "greater"),
        ({"probes": [PROBE], "stop": [{"probe": "p", "above": 1, "block": 1}]}, "steering.stop[0].block", "at block 1"),
        (
            {"probes": [PROBE | {"blocks": [0, 1]}], "stop": [{"probe": "p", "above": 1}]},
            "steering.stop[0].block",
            "which one",
        ),
        (
            {"probes": [PROBE | {"scope": {"end": -1}}], "stop": [{"probe": "p", "above": 1}]},
            "steering.stop[0].probe",
            "no generated tokens",
        ),
        ({"probes": [PROBE | {"scope": {"start": 5, "end": 5}}]}, "steering.probes[0].scope", "no positions"),
        ({"stop": [{"probe": "p", "above": 1}]}, "steering", "edits or the name of a preset"),
        ({"edits": [{"vector": "a"}], "stop": [{"probe": "p", "above": 1}]}, "steering.stop", "need probes"),
        ({"probes": [PROBE | {"name": "a b"}]}, "steering.probes[0].name", "pattern"),
        ({"probes": [PROBE | {"unit": "x"}]}, "steering.probes[0].unit", "unknown field"),
        ({"probes": []}, "steering.probes", "at least 1"),
    ],
    ids=str,
)
def test_wrong(spec: dict[str, Any], param: str, words: str) -> None:
    found = refused(spec)
    assert found[0] == param
    assert words in found[1]


def test_an_unknown_vector_is_not_found() -> None:
    with pytest.raises(UnknownVectorError) as error:
        resolved({"probes": [PROBE | {"vector": "nobody"}]})
    assert error.value.param == "steering.probes[0].vector"


def test_engines_that_measure_nothing_refuse() -> None:
    param, message = refused({"probes": [PROBE]}, model=replace(MODEL, ops=(Op.ADD,)))
    assert param == "steering.probes[0]"
    assert "--steering-ops" in message


def test_a_pipeline_measures_at_the_blocks_of_its_stages() -> None:
    resolved({"probes": [PROBE]}, model=replace(MODEL, is_pipeline=True))


def test_a_stage_of_a_pipeline_has_no_rows_of_other_blocks() -> None:
    """Its bank may be for one block alone."""
    probes = [{"name": str(i), "vector": "abc"[i], "blocks": [1]} for i in range(3)]
    few = replace(MODEL, rows=2)
    resolved({"probes": probes}, model=few)
    stage = replace(few, is_pipeline=True)
    resolved({"probes": probes[:2]}, model=stage)
    param, message = refused({"probes": probes}, model=stage)
    assert param == "steering.edits"
    assert "probes need 3 rows at one block" in message


def test_limits_are_named() -> None:
    assert (
        "max_probe_numbers" in refused({"probes": [PROBE | {"blocks": [0, 1]}]}, limits=Limits(max_probe_numbers=1))[1]
    )
    assert "max_probes" in refused({"probes": [PROBE]}, limits=Limits(max_probes=0))[1]
    rows = MODEL.rows * len(MODEL.armed_blocks)
    probes = [{"name": str(i), "vector": "abc"[i % 3], "measure": ["dot", "cosine"][i // 3]} for i in range(6)]
    needed = 6 * len(MODEL.armed_blocks)
    assert needed > 1
    message = refused({"probes": probes}, model=replace(MODEL, rows=1))[1]
    assert "--steering-rows" in message
    assert rows >= len(MODEL.armed_blocks)


def test_the_engine_gets_a_column_per_probe_and_block() -> None:
    spec = resolved(
        {
            "edits": [{"vector": "b", "blocks": [1, 2]}],
            "probes": [
                PROBE | {"blocks": [0, 2]},
                PROBE | {"name": "q", "vector": "b", "blocks": [1, 2], "after": True},
            ],
            "stop": [{"probe": "q", "block": 2, "above": 1.5, "for": 3}],
        }
    )
    program = Program.from_wire(spec.template.at(10).to_wire())
    plan = program.probes
    assert plan == ProbePlan(((0, 2), (1, 2)), 9, (StopRule("q", 3, 1.5, inf, 3),))
    assert [plan.columns(0), plan.columns(1)] == [{0: 0, 2: 1}, {1: 2, 2: 3}]
    order = {
        site.blocks: [(e.details.probe, e.details.late) if e.details else None for e in site.entries]
        for site in program.sites
    }
    assert order == {(0,): [(0, False)], (1,): [None, (1, True)], (2,): [(0, False), None, (1, True)]}
    assert not program.measures_prompt
    assert resolved({"probes": [PROBE | {"scope": "all"}]}).template.at(10).measures_prompt


def test_only_stop_rules_change_the_digest() -> None:
    """Probes alone change nothing of an answer."""
    plain = resolved({"edits": [{"vector": "a"}]})
    watched = resolved({"edits": [{"vector": "a"}], "probes": [PROBE]})
    stopped = resolved({"edits": [{"vector": "a"}], "probes": [PROBE], "stop": [{"probe": "p", "above": 1}]})
    assert plain.digest == watched.digest != stopped.digest
    assert plain.template.at(5).identity == watched.template.at(5).identity


def test_probes_of_a_request_follow_those_of_its_preset() -> None:
    base = resolved({"edits": [{"vector": "a"}], "probes": [PROBE]})
    more = parse_spec(
        {
            "preset": "x",
            "probes": [PROBE | {"name": "q", "vector": "b", "blocks": [1]}],
            "stop": [{"probe": "p", "above": 1}],
        }
    )
    assert more is not None
    both = with_probes(base, more, source, MODEL, Limits())
    assert [probe.name for probe in both.template.probes] == ["p", "q"]
    assert [stop.column for stop in both.template.stops] == [0]
    again = parse_spec({"preset": "x", "probes": [PROBE]})
    assert again is not None
    with pytest.raises(SteeringRequestError, match="twice"):
        with_probes(base, again, source, MODEL, Limits())


@pytest.mark.parametrize("a", [2.0, -0.5])
@pytest.mark.parametrize(("above", "below"), [(0.3, None), (None, 0.8), (0.3, 0.8)])
def test_bounds_on_a_probability_are_bounds_on_the_dot_product(
    a: float, above: float | None, below: float | None
) -> None:
    platt = Platt(a, 0.7)
    low, high = bounds_on_dot(platt, above, below)
    for step in range(-100, 100):
        dot = step / 10
        p = platt.probability(dot)
        assert (low < dot < high) == ((above is None or p > above) and (below is None or p < below))
    assert platt.probability(1e6) in (0.0, 1.0)
    assert platt.probability(-1e6) in (0.0, 1.0)


def test_without_numbers_stop_rules_remain_and_other_probes_are_not_measured() -> None:
    """For an answer that has no place for them. What is done, and so the digest, is the same."""
    edits = {"edits": [{"vector": "b", "blocks": [2]}]}
    watched = resolved(edits | {"probes": [PROBE]}).without_numbers()
    assert watched.template.probes == ()
    assert watched.digest == resolved(edits).digest
    assert set(watched.vectors) == set(resolved(edits).vectors)
    assert watched.template.at(5) == resolved(edits).template.at(5)
    stopping = resolved(edits | {"probes": [PROBE], "stop": [{"probe": "p", "above": 1}]})
    silent = stopping.without_numbers()
    assert [probe.returns for probe in silent.template.probes] == ["none"]
    assert silent.digest == stopping.digest
    assert silent.template.at(5) == stopping.template.at(5)
