"""The notebook of `examples/`: it was executed, its page shows it, and it runs from top to bottom in a kernel."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import notebook_page
import pytest

PICTURES = {"quality-plot", "sweep-plot"}
"""Ids of the cells that draw one."""


def stored() -> Any:
    return json.loads(notebook_page.NOTEBOOK.read_text())


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source(cell: Any) -> str:
    return "".join(cell["source"])


def assert_steers_and_measures(notebook: Any) -> None:
    shown = {cell["id"]: "\n".join(map(notebook_page.printed_text, cell["outputs"])) for cell in code_cells(notebook)}
    everything = json.dumps(notebook)
    for word in ("Traceback", "Warning", "\\u001b", "\\r"):
        assert word not in everything, "a reader sees the results only"
    answers = [line.partition("My day was")[2] for line in shown["steer"].splitlines()]
    assert len(set(answers)) == len(answers) == 3, "three strengths, three answers"
    assert shown["quality"].startswith("Start with blocks ")
    assert {"validation", "neutral"} <= set(shown["sweep"].split())
    assert re.search(r"p = .* after Holm", shown["calibrate"]), "tested on other items"
    assert {"flipped", "random", "shuffled"} <= set(shown["calibrate"].split()), "with controls"
    drawn = [cell["id"] for cell in code_cells(notebook) for output in cell["outputs"] if "image/png" in str(output)]
    assert sorted(drawn) == sorted(PICTURES), "each picture once"


def test_the_stored_notebook_was_executed() -> None:
    cells = code_cells(stored())
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert_steers_and_measures(stored())
    assert str(Path.home()) not in notebook_page.NOTEBOOK.read_text()
    lines = "\n".join(source(cell) for cell in cells[:2]).splitlines()
    assert sum(line != "" for line in lines) <= 10, "a vector in ten lines"


def test_the_page_is_the_notebook() -> None:
    page, pictures = notebook_page.page_of(stored())
    assert notebook_page.PAGE.read_text() == page, "run scripts/notebook_page.py"
    assert len(pictures) == len(PICTURES)
    for name, picture in pictures.items():
        assert (notebook_page.DOCS / "images" / name).read_bytes() == picture


@pytest.fixture
def kernels() -> None:
    """Skips the test where there are none."""
    for module in ("nbclient", "ipykernel"):
        pytest.importorskip(module, reason=f"needs {module}, of the extra dev: make setup")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("kernels")
def test_the_notebook_runs() -> None:
    assert_steers_and_measures(notebook_page.execute(stored()))
