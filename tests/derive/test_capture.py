"""Position rules and checkpoint fingerprints."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from steer_engine.derive.capture_config import Position
from steer_engine.derive.capture_engine import fingerprint
from steer_engine.errors import DerivationError


@pytest.mark.parametrize(
    ("rule", "capture_position", "includes_first"),
    [
        ("last", "last", False),
        ("mean", "all", True),
        ("all", "all", True),
        ("-2", [-2], False),
        ("0,3,-1", [0, 3, -1], False),
    ],
)
def test_rules(rule: str, capture_position: str | list[int], includes_first: bool) -> None:
    position = Position(rule)
    assert position.capture_position == capture_position
    assert position.includes_first is includes_first
    assert str(position) == rule


@pytest.mark.parametrize("rule", ["", "first", "1,", "1;2", "--1", "1.0", "last\n", "٣", "1" * 7])
def test_other_rules_are_refused(rule: str) -> None:
    with pytest.raises(DerivationError, match="is none of 'last', 'mean'"):
        Position(rule)


def test_a_text_must_be_long_enough() -> None:
    assert Position("last").fits(1)
    assert not Position("last").fits(0)
    assert Position("2,-3").fits(3)
    assert not Position("3").fits(3)
    assert not Position("-4").fits(3)


def test_other_weights_or_config_are_another_fingerprint(tiny_llama: str, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_llama, tmp_path / "copy")
    assert fingerprint(str(copy)) == fingerprint(tiny_llama)
    (copy / "tokenizer_config.json").write_text("{}")
    assert fingerprint(str(copy)) == fingerprint(tiny_llama)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert fingerprint(str(copy)) != fingerprint(tiny_llama)
    again = shutil.copytree(tiny_llama, tmp_path / "again")
    (again / "config.json").write_text((again / "config.json").read_text().replace("{", "{ ", 1))
    assert fingerprint(str(again)) != fingerprint(tiny_llama)


@pytest.mark.parametrize(("config", "expected"), [(SimpleNamespace(_commit_hash="abc"), "abc"), (None, "")])
def test_a_hub_model_goes_by_its_commit(config: object, expected: str) -> None:
    assert fingerprint("org/model", config) == expected
