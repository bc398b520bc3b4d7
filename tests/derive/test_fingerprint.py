from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from steer_engine.derive.capture_engine import fingerprint


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
