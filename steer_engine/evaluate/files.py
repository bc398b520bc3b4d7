"""The folder of an evaluation: results as JSON and CSV, and the page."""

from __future__ import annotations

from pathlib import Path

from steer_engine.evaluate.outcome import Outcome
from steer_engine.evaluate.report import html_report
from steer_engine.vectors.atomic_write import write_atomically


def write_results(outcome: Outcome, folder: Path) -> Path:
    """Write `results.json`, `results.csv` and `report.html`; returns the page's path."""
    write_atomically(folder / "results.json", outcome.to_json().encode())
    write_atomically(folder / "results.csv", outcome.to_csv().encode())
    page = folder / "report.html"
    write_atomically(page, html_report(outcome).encode())
    return page
