"""`make mutants` takes minutes; that its mistakes can still be made, and its tests exist, is seen here."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def mutants() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "scripts" / "mutants.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = module
    spec.loader.exec_module(module)
    return module


def test_every_mistake_can_be_made_once(mutants: ModuleType) -> None:
    for mutant in mutants.MUTANTS:
        text = (ROOT / "steer_engine" / mutant.file).read_text()
        assert text.count(mutant.right) == 1, mutant.name
        compile(text.replace(mutant.right, mutant.wrong), mutant.file, "exec")


def test_every_named_test_exists(mutants: ModuleType) -> None:
    for mutant in mutants.MUTANTS:
        file, _, name = mutant.test.partition("::")
        text = (ROOT / "tests" / file).read_text()
        assert not name or f"def {name.partition('[')[0]}(" in text, mutant.name
