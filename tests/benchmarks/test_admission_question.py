"""What the admission benchmark reports per request."""

from __future__ import annotations

from steer_bench.questions.admission import submitting_rows


def test_what_a_vector_adds_to_a_request_is_reported() -> None:
    rows = submitting_rows({"unsteered": 333.44, "named": 1680.81, "inline": 1811.26})
    assert {row["case"]: row["us"] for row in rows} == {
        "submitting a request, unsteered": 333.4,
        "submitting a request, named": 1680.8,
        "submitting a request, inline": 1811.3,
        "added by a named vector": 1347.4,
        "added by an inline vector": 1477.8,
    }
