from __future__ import annotations

import json
from pathlib import Path

import pytest
from steer_bench import environments
from steer_bench.environments import Environment, python_of
from steer_bench.process import ArmFailed


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "FOLDER", tmp_path)


def test_an_environment_is_reused_only_for_the_same_requirements() -> None:
    one = Environment(name="one", requirements=("a==1",))
    assert not one.is_made
    one.folder.mkdir()
    (one.folder / environments.MADE).write_text(json.dumps(one._mark))
    assert one.is_made
    assert python_of(one) == str(one.folder / "bin" / "python")
    assert not Environment(name="one", requirements=("a==2",)).is_made


def test_a_failed_installation_is_a_failed_arm_with_the_output_of_pip(tmp_path: Path) -> None:
    missing = Environment(name="missing", requirements=(str(tmp_path / "no.whl"),))
    with pytest.raises(ArmFailed, match=r"missing cannot be installed: .*no\.whl"):
        python_of(missing)
    assert not missing.is_made
