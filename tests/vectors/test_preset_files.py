from __future__ import annotations

import json
from pathlib import Path

import pytest

from steer_engine.errors import SteeringRequestError
from steer_engine.vectors.folder import MAX_PRESET_FILE_BYTES, PresetFiles, check_preset

CALM = {"edits": [{"vector": "calm", "scale": 1.5, "blocks": "8-22"}]}


def test_presets_are_adopted_under_their_stem_and_followed(tmp_path: Path) -> None:
    presets = PresetFiles(tmp_path)
    assert presets.all() == {}
    path = tmp_path / "calm.preset.json"
    path.write_text(json.dumps(CALM))
    assert presets.all() == {"calm": CALM}
    other = {"edits": [{"vector": "loud"}]}
    path.unlink()
    assert presets.get("calm") is None
    path.write_text(json.dumps(other))
    assert presets.get("calm") == other


def test_broken_files_are_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = {
        "text": "calm",
        "nested": json.dumps({"preset": "calm"}),
        "empty": json.dumps({"edits": []}),
        "typo": json.dumps({"edits": [{"vektor": "calm"}]}),
        "deep": "[" * 100_000,
        "null": "null",
        "large": " " * (MAX_PRESET_FILE_BYTES + 1),
        "inline": json.dumps({"edits": [{"vector": {"data": "AAAA"}}]}),
    }
    for name, text in bad.items():
        (tmp_path / f"{name}.preset.json").write_text(text)
    (tmp_path / "good.preset.json").write_text(json.dumps(CALM))
    (tmp_path / ".hidden.preset.json").write_text("not looked at")
    presets = PresetFiles(tmp_path)
    assert presets.all() == {"good": CALM}
    assert presets.all() == {"good": CALM}
    assert sorted(presets.faults) == sorted(bad)
    assert all(f"{name}.preset.json" in caplog.text for name in bad)
    assert len(caplog.records) == len(bad)
    (tmp_path / "text.preset.json").write_text(json.dumps(CALM))
    assert presets.get("text") == CALM
    assert "text" not in presets.faults


def test_a_folder_that_vanishes_has_no_presets(tmp_path: Path) -> None:
    assert PresetFiles(tmp_path / "gone").all() == {}


def test_check_says_where(tmp_path: Path) -> None:
    assert check_preset(CALM) == CALM
    with pytest.raises(SteeringRequestError) as wrong:
        check_preset({"edits": [{"vector": "calm", "scale": "1"}]})
    assert wrong.value.param == "steering.edits[0].scale"


def test_a_preset_that_reads_is_none() -> None:
    with pytest.raises(SteeringRequestError, match="captures belong in requests"):
        check_preset({"edits": [{"vector": "v"}], "capture": {}})
