"""Settings: what arms an engine, invalid values, armed blocks, and limits."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from pydantic import ValidationError

from steer_engine.errors import UnsupportedEngineError
from steer_engine.settings import (
    ALL_OPS,
    CONFIG_KEY,
    MIRROR_SECONDS_ENV,
    Limits,
    NamedLimits,
    SteeringConfig,
    mirror_seconds,
)
from steer_engine.spec import MAX_SPEC_CHARS, Op


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEER_ENGINE", raising=False)


def test_by_default_all_is_armed_except_capture() -> None:
    config = SteeringConfig()
    assert config.armed_blocks(5) == (0, 1, 2, 3, 4)
    assert config.ops == ALL_OPS == tuple(Op)
    assert config.capture_blocks(5) == ()
    assert not config.adds_only


# Arming


@pytest.mark.parametrize("additional", [None, {}, {"other": 1}, "steer_engine", 5, {CONFIG_KEY: None}])
def test_not_armed(additional: Any) -> None:
    assert SteeringConfig.from_additional_config(additional) is None


@pytest.mark.parametrize("value", ["", "0", "true", "yes", "11"])
def test_other_values_of_the_variable_do_not_arm(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEER_ENGINE", value)
    assert SteeringConfig.from_additional_config({}) is None


@pytest.mark.parametrize("additional", [None, {}, {CONFIG_KEY: None}])
def test_the_environment_arms_with_defaults(additional: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEER_ENGINE", "1")
    assert SteeringConfig.from_additional_config(additional) == SteeringConfig()


def test_additional_config_overrides_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEER_ENGINE", "1")
    config = SteeringConfig.from_additional_config({CONFIG_KEY: {"rows": 2}})
    assert config == SteeringConfig(rows=2)


@pytest.mark.parametrize(
    "config",
    [
        SteeringConfig(),
        SteeringConfig(blocks="8-22", ops=(Op.ADD,), rows=2, capture=(9, 10)),
        SteeringConfig(blocks=(3, 4), capture="all"),
    ],
)
def test_settings_survive_json_and_pickle(config: SteeringConfig) -> None:
    additional = json.loads(json.dumps(config.to_additional_config()))
    assert SteeringConfig.from_additional_config(additional) == config
    assert pickle.loads(pickle.dumps(config)) == config
    hash(config)


@pytest.mark.parametrize(
    ("raw", "where"),
    [
        ({"rows": 0}, "rows"),
        ({"rows": 17}, "rows"),
        ({"rows": "many"}, "rows"),
        ({"ops": []}, "ops"),
        ({"ops": ["frob"]}, "ops.0"),
        ({"ops": "add"}, "ops"),
        ({"blocks": 5}, "blocks"),
        ({"blocks": None}, "blocks"),
        ({"bolcks": "all"}, "bolcks"),
        (True, "steer_engine"),
        ("all", "steer_engine"),
    ],
)
def test_invalid_settings_are_errors(raw: Any, where: str) -> None:
    with pytest.raises(UnsupportedEngineError, match="Valid keys") as caught:
        SteeringConfig.from_additional_config({CONFIG_KEY: raw})
    assert where in caught.value.message
    assert ".:" not in caught.value.message


def test_settings_are_frozen_and_unknown_keys_are_errors() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        SteeringConfig().rows = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        SteeringConfig(unknown=1)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        Limits(unknown=1)  # type: ignore[call-arg]


# Operations


def test_operations_are_sorted_without_repeats() -> None:
    """They are part of the compile-cache key."""
    assert SteeringConfig(ops=(Op.SET, Op.ADD, Op.SET)).ops == (Op.ADD, Op.SET)
    assert SteeringConfig(ops=(Op.ADD, Op.ADD)).adds_only
    assert not SteeringConfig(ops=(Op.ABLATE,)).adds_only


# Blocks


@pytest.mark.parametrize(
    ("blocks", "armed"),
    [("all", tuple(range(10))), ("2-4", (2, 3, 4)), ("7", (7,)), ((9, 0, 9), (0, 9)), ("0-9", tuple(range(10)))],
)
def test_armed_blocks(blocks: Any, armed: tuple[int, ...]) -> None:
    assert SteeringConfig(blocks=blocks).armed_blocks(10) == armed


@pytest.mark.parametrize("blocks", ["8-10", "10", (3, 10), "", "x", "4-2", (), (-1,), "all,3"])
def test_blocks_that_the_model_does_not_have(blocks: Any) -> None:
    with pytest.raises(UnsupportedEngineError, match="--steering-blocks"):
        SteeringConfig(blocks=blocks).armed_blocks(10)


def test_capture_needs_armed_blocks() -> None:
    assert SteeringConfig(blocks="2-4", capture="3-4").capture_blocks(10) == (3, 4)
    assert SteeringConfig(blocks="2-4", capture=(4,)).capture_blocks(10) == (4,)
    with pytest.raises(UnsupportedEngineError, match=r"\[5\]"):
        SteeringConfig(blocks="2-4", capture="4-5").capture_blocks(10)
    with pytest.raises(UnsupportedEngineError, match="not armed"):
        SteeringConfig(blocks="2-4", capture="all").capture_blocks(10)
    with pytest.raises(UnsupportedEngineError, match="capture blocks"):
        SteeringConfig(capture="4-10").capture_blocks(10)


def test_default_limits() -> None:
    limits = Limits()
    assert (limits.max_edits, limits.max_abs_scale, limits.max_dose) == (8, 1000.0, 10.0)
    assert limits.max_spec_bytes == MAX_SPEC_CHARS


BAD_NUMBERS = ["nan", "inf", "-inf", "-1", "", "many", "1e400", "9" * 5000]


@pytest.mark.parametrize("value", BAD_NUMBERS)
def test_a_limit_that_is_no_number_of_its_kind_stops_the_start(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    for group in NamedLimits.__subclasses__():
        for name in group.model_fields:
            with monkeypatch.context() as patched:
                patched.setenv(group.variable(name), value)
                with pytest.raises(UnsupportedEngineError) as refused:
                    group.from_environment()
            message = str(refused.value)
            assert group.variable(name) in message
            assert f"limit {name}" in message
            assert "default is" in message
            assert len(message) < 300


@pytest.mark.parametrize("value", [*BAD_NUMBERS[:4], "many", "0", "0.5"])
def test_a_mirror_interval_that_is_no_positive_number_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv(MIRROR_SECONDS_ENV, value)
    with pytest.raises(UnsupportedEngineError, match="at least 1"):
        mirror_seconds()


def test_a_mirror_interval_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MIRROR_SECONDS_ENV, raising=False)
    assert mirror_seconds() == 60
    monkeypatch.setenv(MIRROR_SECONDS_ENV, "2.5")
    assert mirror_seconds() == 2.5


def test_every_published_limit_is_finite() -> None:
    for group in NamedLimits.__subclasses__():
        json.dumps(group().model_dump(), allow_nan=False)
