"""Strengths from text, invalid plans, and the grid of a plan."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from steer_engine.errors import EvaluationError
from steer_engine.evaluate.plan import Plan, Recipe, parse_alphas
from steer_engine.vectors import ControlVector

VECTOR = ControlVector(directions={block: np.ones(4, dtype=np.float32) for block in (2, 3)})
DIFFMEAN = (Recipe(method="diffmean"),)


@pytest.mark.parametrize(
    ("text", "alphas"),
    [
        ("-1:1:0.5", (-1.0, -0.5, 0.0, 0.5, 1.0)),
        ("-3:3:0.1", tuple(round(-3 + i / 10, 9) for i in range(61))),
        ("1,-2,0.5,1", (-2.0, 0.5, 1.0)),
        ("2", (2.0,)),
        ("-0", (0.0,)),
    ],
)
def test_strengths(text: str, alphas: tuple[float, ...]) -> None:
    assert parse_alphas(text) == alphas


@pytest.mark.parametrize("text", ["", "a", "1:2", "1:2:0", "2:1:0.5", "0:1:1e-9", "1e999", "nan", "1,,2", "0:1e999:1"])
def test_invalid_strengths_are_refused(text: str) -> None:
    with pytest.raises(EvaluationError, match="[Ss]trengths"):
        parse_alphas(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing to evaluate"),
        ({"recipes": DIFFMEAN, "vectors": {"diffmean-wrong": VECTOR}}, "same name"),
        ({"recipes": DIFFMEAN, "alphas": (0.0,)}, "All strengths are 0"),
        ({"recipes": DIFFMEAN, "blocks": ("9-2",)}, "runs backwards"),
    ],
)
def test_invalid_plans_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        Plan(**settings)


def test_blocks_of_a_model() -> None:
    assert Plan(recipes=DIFFMEAN).blocks_for(30) == ("10", "15", "20")
    assert Plan(recipes=DIFFMEAN).blocks_for(1) == ("0",)
    with pytest.raises(EvaluationError, match="blocks are 0 to 29"):
        Plan(recipes=DIFFMEAN, blocks=("3", "20-30")).blocks_for(30)


def test_a_grid_is_blocks_by_strengths_without_zero() -> None:
    plan = Plan(
        vectors={"v": VECTOR}, blocks=("2", "2-3"), alphas=(-1.0, 0.0, 1.0), unit="residual", scope="generation"
    )
    grid = plan.grid("v", VECTOR, 4)
    assert [(each.blocks, each.alpha) for each in grid] == [("2", -1.0), ("2", 1.0), ("2-3", -1.0), ("2-3", 1.0)]
    assert len({each.key for each in grid}) == 4
    edit = {"vector": VECTOR.digest, "scale": -1.0, "unit": "residual", "blocks": "2", "scope": "generation"}
    assert grid[0].steering == {"edits": [edit], "preserve_norm": False}
    assert plan.condition("v", VECTOR, "2", 0.0).steering is None
    assert plan.condition("v", VECTOR, "2", 0.0).key == "baseline"


def test_a_block_without_direction_is_named() -> None:
    with pytest.raises(EvaluationError, match=r"no direction for block.s. 1; it has 2-3"):
        Plan(vectors={"v": VECTOR}, blocks=("1-2",)).grid("v", VECTOR, 4)


def test_without_blocks_a_vector_is_tried_where_it_has_directions() -> None:
    """The places are a third, half and two thirds of the depth, or the nearest that it has."""
    plan = Plan(vectors={"v": VECTOR}, alphas=(1.0,))
    assert [each.blocks for each in plan.grid("v", VECTOR, 6)] == ["2", "3"]
    narrow = ControlVector(directions={block: np.ones(4, dtype=np.float32) for block in range(8, 20)})
    assert [each.blocks for each in Plan(vectors={"v": narrow}, alphas=(1.0,)).grid("v", narrow, 30)] == [
        "10",
        "15",
        "19",
    ]
