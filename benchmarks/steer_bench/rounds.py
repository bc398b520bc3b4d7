"""Runs cases in rounds, A B C C B A, and keeps what each took."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import TypeVar

from rich.progress import Progress

from steer_bench.timing import Timing

Measured = TypeVar("Measured")
Case = Callable[[int], Measured]
"""Runs once; takes the number of the round, from which loads take their seed."""


def interleave(
    cases: Mapping[str, Case[Measured]], rounds: int, progress: Progress, title: str
) -> dict[str, list[Measured]]:
    """Each case once a round, every other round backwards: what drifts on the machine meets all cases alike."""
    times: dict[str, list[Measured]] = {name: [] for name in cases}
    task = progress.add_task(title, total=rounds * len(cases))
    for number in range(rounds):
        names = list(cases) if number % 2 == 0 else list(cases)[::-1]
        for name in names:
            times[name].append(cases[name](number))
            progress.advance(task)
    return times


def throughputs(times: list[Timing]) -> list[float]:
    """Tokens per second, round by round."""
    return [timing.tokens_per_second for timing in times]


def middle(values: list[float]) -> float:
    return float(median(values))
