"""`make mutants` takes minutes; that its mistakes can still be made, and its tests exist, is seen here."""

from __future__ import annotations

from pathlib import Path

import mutants

ROOT = Path(__file__).resolve().parents[1]


def test_every_mistake_can_be_made_once() -> None:
    for mutant in mutants.MUTANTS:
        text = (ROOT / "steer_engine" / mutant.file).read_text()
        assert text.count(mutant.right) == 1, mutant.name
        compile(text.replace(mutant.right, mutant.wrong), mutant.file, "exec")


def test_every_named_test_exists() -> None:
    for mutant in mutants.MUTANTS:
        file, _, name = mutant.test.partition("::")
        text = (ROOT / "tests" / file).read_text()
        assert not name or f"def {name.partition('[')[0]}(" in text, mutant.name
