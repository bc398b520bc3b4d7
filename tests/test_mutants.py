"""Every mutant still applies to the code, and its test exists. `make mutants` runs them, which takes minutes."""

from __future__ import annotations

from pathlib import Path

import mutants

ROOT = Path(__file__).resolve().parents[1]


def test_every_mutant_applies_once() -> None:
    for mutant in mutants.MUTANTS:
        package = mutants.source_of(mutant)
        text = (ROOT / package if (ROOT / package).exists() else ROOT / "triton_kernels" / package).read_text()
        assert text.count(mutant.right) == 1, mutant.name
        compile(text.replace(mutant.right, mutant.wrong), mutant.file, "exec")


def test_every_named_test_exists() -> None:
    for mutant in mutants.MUTANTS:
        file, _, name = mutant.test.partition("::")
        text = (ROOT / "tests" / file).read_text()
        assert not name or f"def {name.partition('[')[0]}(" in text, mutant.name
