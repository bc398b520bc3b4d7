"""What each batch size gives a peer, so that it is compared at its best."""

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
    """The batch size with the best single run, and a row for each. rate: runs one batch size, gives items per second.

    Forth and back, so that a machine that slows down does not choose.
    """
    cases = {str(size): partial(_once, rate, size) for size in sizes}
    rates = interleave(cases, ROUNDS, progress, f"{title}: batch sizes")
    best = max(sizes, key=lambda size: max(rates[str(size)]))
    return best, [row("sweep", f"{name}, batches of {size}", rates[size]) for size in rates]


def row(part: str, case: str, rates: Sequence[float]) -> dict[str, Any]:
    """One line of a table; rates per second."""
    figures = {"per s": middle(list(rates)), "min": min(rates), "max": max(rates)}
    return {"part": part, "case": case, **{name: round(value, 2) for name, value in figures.items()}}


def _once(rate: Callable[[int], float], size: int, number: int) -> float:
    """The number of the round changes nothing."""
    return rate(size)
