"""The demo derives its vector once per set of inputs, and its tables fit in a terminal of 80 columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from steer_engine.demo import __main__ as module
from steer_engine.demo.scoring import SHOWN, Side
from steer_engine.demo.server import Reply
from steer_engine.vectors import ControlVector, load


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("STEER_ENGINE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / module.MANIFEST).write_text("{}")
    return str(folder)


@pytest.fixture
def derivations(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for the derivation; the list grows with each one."""
    done: list[dict[str, Any]] = []

    def derive(model: str, pairs: Path, **settings: Any) -> ControlVector:
        done.append(settings)
        return ControlVector(directions={8: np.full(4, len(done), dtype=np.float32)})

    monkeypatch.setattr("steer_engine.derive.derive", derive)
    return done


def test_the_second_run_reuses_the_file(model: str, derivations: list[dict[str, Any]]) -> None:
    folder = module.derive_once("m", model, "float32")
    assert module.derive_once("m", model, "float32") == folder
    assert derivations == [{"method": "diffmean", "blocks": "8-19", "position": "last", "dtype": "float32"}]
    assert load(folder / "cheerful.safetensors").directions[8][0] == 1


def test_other_inputs_are_other_vectors(
    model: str, derivations: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {module.derive_once("m", model, "float32"), module.derive_once("m", model, "auto")}
    Path(model, module.MANIFEST).write_text('{"other": "weights"}')
    folders.add(module.derive_once("m", model, "float32"))
    (tmp_path / "pairs.jsonl").write_text("{}")
    monkeypatch.setattr(module, "pairs_path", lambda: tmp_path / "pairs.jsonl")
    folders.add(module.derive_once("m", model, "float32"))
    assert len(folders) == len(derivations) == 4


def test_every_column_is_visible_at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(width=80, record=True)
    monkeypatch.setattr(module, "console", console)
    replies = [
        Reply(prompt=SHOWN[1], scale=scale, text="a good day " * 9, digest=digest, tokens=27)
        for scale, digest in ((None, None), (0.15, f"sha256:{'0123456789abcdef' * 4}"))
    ]
    module._show_batch(replies, 2)
    module._show_scores([Side(scale=scale, answers=("a good day",)) for scale in (-0.3, 0.0, 0.3)], [], 1)
    text = console.export_text()
    for cell in (
        "What is it like",
        "plain",
        "+0.15",
        "0123456789abcd",
        "a good day a good",
        "-0.3",
        "words per answer",
    ):
        assert cell in text
    assert max(map(len, text.splitlines())) <= 80
