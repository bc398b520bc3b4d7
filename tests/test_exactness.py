"""The page on exactness names tests that exist and run on the claimed runners."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "exactness.md"
TEST = re.compile(r"^`(tests/[\w/]+\.py)::(\w+)`$")


def rows(columns: int) -> list[list[str]]:
    """Cells of the page's tables with this number of columns, without header rows."""
    lines = [line.strip("|").split("|") for line in PAGE.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in lines if len(line) == columns]
    return [row for row in cells if row[-1] != "test" and set(row[-1]) != {"-"}]


MODES, REFUSED = rows(4), rows(3)


def marks(reference: str) -> set[str]:
    """The pytest marks of a test, its own and its module's. Fails if there is no such test."""
    found = TEST.match(reference)
    assert found is not None, f"{reference!r} is not a test"
    tree = ast.parse((ROOT / found[1]).read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    test = next((node for node in functions if node.name == found[2]), None)
    assert test is not None, f"{found[1]} has no {found[2]}"
    of_module = [
        node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    ]
    return {mark for node in (*test.decorator_list, *of_module) for mark in mark_names(node)}


def mark_names(node: ast.AST) -> Iterator[str]:
    for each in ast.walk(node):
        if isinstance(each, ast.Attribute) and ast.unparse(each.value) == "pytest.mark":
            yield each.attr


def test_the_page_has_both_tables() -> None:
    assert len(MODES) >= 30
    assert len(REFUSED) >= 12


@pytest.mark.parametrize("row", MODES, ids=lambda row: row[0])
def test_modes_are_tested_on_the_claimed_runners(row: list[str]) -> None:
    _, on_v1, on_v2, reference = row
    found = marks(reference)
    assert on_v1 in ("", "yes")
    assert on_v2 in ("", "yes")
    assert (on_v1 == "yes") == ("v2_only" not in found)
    # Only the tests of this folder run on both runners.
    assert (on_v2 == "yes") == (reference.startswith("`tests/engines/") and "v1_only" not in found)


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row[0])
def test_refusals_are_tested(row: list[str]) -> None:
    _, when, reference = row
    assert when in ("400", "error", "start")
    marks(reference)


def test_every_mode_that_is_tested_is_on_the_page() -> None:
    tests = set(
        re.findall(r"^def (test_\w+)", (ROOT / "tests" / "engines" / "test_modes.py").read_text(), re.MULTILINE)
    )
    named = {row[-1].strip("`").partition("::")[2] for row in MODES if "test_modes.py" in row[-1]}
    assert tests - named == {"test_nothing_in_the_matrix_is_plain"}
