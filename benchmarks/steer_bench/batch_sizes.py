"""Find the best batch size of a peer, so that the comparison is fair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rich.progress import Progress

from steer_bench.rounds import interleave, middle

ROUNDS = 2


def sweep(
    rate: Callable[[int], float], sizes: Sequence[int], name: str, progress: Progress, title: str
) -> tuple[int, list[dict[str, Any]]]:
    """Returns the batch size with the fastest single run, and a table row per size.

    rate: runs one batch size and returns items per second. Runs are interleaved, so that a machine that becomes slower
    does not affect the choice.
    """
    cases = {str(size): partial(_once, rate, size) for size in sizes}
    rates = interleave(cases, ROUNDS, progress, f"{title}: batch sizes")
    best = max(sizes, key=lambda size: max(rates[str(size)]))
    return best, [row("sweep", f"{name}, batches of {size}", rates[size]) for size in rates]


def row(part: str, case: str, rates: Sequence[float]) -> dict[str, Any]:
    """A table row with median, smallest and largest rate per second."""
    figures = {"per s": middle(list(rates)), "min": min(rates), "max": max(rates)}
    return {"part": part, "case": case, **{name: round(value, 2) for name, value in figures.items()}}


def _once(rate: Callable[[int], float], size: int, number: int) -> float:
    """Ignores the round number."""
    return rate(size)
