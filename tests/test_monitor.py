"""Monitors: how they are written, and what the engine measures of a request that may ask for something itself."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.random_specs import VECTORS, resolved, specs
from hypothesis import given
from hypothesis import strategies as st

from steer_engine.errors import UnsupportedEngineError
from steer_engine.monitor import Monitor, MonitorSpec, Watched, monitor_room, parse_monitors
from steer_engine.probe import ProbePlan, StopRule
from steer_engine.program import Entry, Program
from steer_engine.settings import EngineLimits, SteeringConfig

P = 6
DIGEST = "sha256:" + "0a" * 32
WATCHED = Watched(
    numbers=(
        (VECTORS["a"].digest, 1, "cosine"),
        (VECTORS["a"].digest, 3, "cosine"),
        (VECTORS["c"].digest, 1, "dot"),
    )
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mood", ("mood", "mood", None, None, None)),
        ("mood:15", ("mood", "mood", (15,), None, None)),
        ("mood:above=0.9", ("mood", "mood", None, None, 0.9)),
        ("joy=mood.v2", ("joy", "mood.v2", None, None, None)),
        ("joy=mood:8-10:dot", ("joy", "mood", (8, 9, 10), "dot", None)),
        ("joy=mood:14:cosine:above=-0.2", ("joy", "mood", (14,), "cosine", -0.2)),
        ("joy=mood:probability:above=1e-3", ("joy", "mood", None, "probability", 0.001)),
        (f"joy={DIGEST}:3", ("joy", DIGEST, (3,), None, None)),
    ],
)
def test_every_part_behind_the_name_may_be_left_out(text: str, expected: tuple[Any, ...]) -> None:
    assert MonitorSpec.parse(text)[1:] == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "=mood", "joy=", "joy mood", "joy=mood:", "joy=mood:14:sine", "joy=mood:14:above", "joy=mood:cosine:14"),
        *("joy=mood:9-8", "joy=mood:2000", "joy=mood:14:above=high", "joy=mood:14:above=nan", "joy=mood:above=inf"),
        *("jöy=mood", "joy=sha256:12:13", "x" * 65, "joy=mood:14:cosine:above=0.2:above=0.3"),
    ],
)
def test_another_form_is_refused_in_one_line_that_repeats_it(text: str) -> None:
    with pytest.raises(UnsupportedEngineError) as error:
        MonitorSpec.parse(text)
    assert error.value.message.startswith("--steering-monitor '")
    assert "\n" not in error.value.message
    assert text[:20] in error.value.message


def test_names_differ_and_numbers_are_limited() -> None:
    limits = EngineLimits(max_monitors=4)
    assert len(parse_monitors(["a=v:1-2", "b=v:1-2"], limits)) == 2
    with pytest.raises(UnsupportedEngineError, match="'a' is used twice"):
        parse_monitors(["a", "b", "a=v:2"], limits)
    with pytest.raises(UnsupportedEngineError, match=r"5 numbers per token.*at most 4.*max_monitors=N"):
        parse_monitors(["a=v:1-4", "b"], limits)


def test_room_is_added_to_that_of_requests_and_costs_nothing_without_monitors(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from steer_engine.engine.runtime import allocate_tables

    def shapes() -> dict[str, tuple[int, ...]]:
        tables = allocate_tables(
            SteeringConfig(), num_sites=4, hidden_size=16, dtype=torch.float32, device="meta", max_requests=2,
            max_tokens=8, num_drafts=0, capture_sites=(),
        )  # fmt: skip
        assert tables.probed_TK is not None
        parts = {"bank": tables.bank_RD, "entries": tables.entries_SLEW, "numbers": tables.probed_TK}
        return {name: tuple(part.shape) for name, part in parts.items()}

    monkeypatch.delenv("STEER_ENGINE_MONITORS", raising=False)
    plain = shapes()
    assert monitor_room() == 0
    monkeypatch.setenv("STEER_ENGINE_MONITORS", "a=v:1-2 b")
    watched = shapes()
    assert watched["bank"][0] - plain["bank"][0] == 3
    assert watched["entries"][2] - plain["entries"][2] == 3
    assert watched["numbers"][1] - plain["numbers"][1] == 3


def by_block(program: Program) -> dict[int, tuple[Entry, ...]]:
    assert len({block for site in program.sites for block in site.blocks}) == sum(
        len(site.blocks) for site in program.sites
    )
    return {block: site.entries for site in program.sites for block in site.blocks}


OWN = [
    {"name": "own", "vector": "b", "blocks": [1, 2], "scope": "all"},
    {"name": "late", "vector": "c", "blocks": [0, 1], "after": True, "measure": "dot"},
]
ASKED = [
    {"name": "m1", "vector": "a", "blocks": [1]},
    {"name": "m2", "vector": "a", "blocks": [3]},
    {"name": "m3", "vector": "c", "blocks": [1], "measure": "dot"},
]


CONDITIONAL = {
    "edits": [{"vector": "a", "blocks": [2, 3]}],
    "when": {"vector": "c", "blocks": [1], "at": "max_prompt", "above": 0.0},
}


@given(specs(max_edits=3) | st.just(CONDITIONAL), st.sampled_from([[], OWN[:1], OWN[1:], OWN]))
def test_a_request_is_measured_as_if_it_had_asked_itself(spec: dict[str, Any], own: list[dict[str, Any]]) -> None:
    """The same entries, by which the device computes, and the same columns; the identity stays that of the request."""
    probes = {"probes": own} if own else {}
    program = resolved(spec | probes).template.at(P)
    expected = resolved(spec | {"probes": own + ASKED}).template.at(P)
    watched = WATCHED.added_to(program, P)
    assert by_block(watched) == by_block(expected)
    assert watched.probes is not None
    assert expected.probes is not None
    assert watched.probes._replace(num_watched=0) == expected.probes
    assert watched.probes.num_own_columns == (0 if program.probes is None else program.probes.num_columns)
    assert (watched.identity, watched.vectors, watched.keep_norm, watched.conditions, watched.triggers) == (
        *(program.identity, program.vectors, program.keep_norm, program.conditions, program.triggers),
    )
    assert watched.is_only_watched == (not program.identity and not own)


def test_an_unsteered_request_has_nothing_else() -> None:
    watched = WATCHED.added_to(None, P)
    assert watched.is_only_watched
    assert watched.identity == ()
    assert not watched.measures_prompt
    assert watched.probes == ProbePlan(((1,), (3,), (1,)), P - 1, (), 3)
    assert {entry.start for entries in by_block(watched).values() for entry in entries} == {P - 1}
    assert watched.bank_rows == set(WATCHED.rows)


def test_stop_rules_keep_their_columns() -> None:
    own = ProbePlan(((1, 2), (0,)), 2, (StopRule("own", 2, 0.5, 9.0, 1),))
    plan = WATCHED.plan(own, P)
    assert plan == ProbePlan(((1, 2), (0,), (1,), (3,), (1,)), 2, own.stops, 3)
    assert plan.num_own_columns == 3


def test_what_is_watched_travels_as_plain_data() -> None:
    monitors = [
        Monitor("a", DIGEST, 3, "probability", None, 0.5),
        Monitor("b", DIGEST, 4, "cosine"),
        Monitor("c", DIGEST, 5, "dot"),
    ]
    watched = Watched.of(monitors)
    assert watched.to_wire() == [[DIGEST, 3, "dot"], [DIGEST, 4, "cosine"], [DIGEST, 5, "dot"]]
    assert Watched.from_wire(watched.to_wire()) == watched
    assert watched.vectors == {DIGEST}
