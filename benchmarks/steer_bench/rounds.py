"""Run cases in interleaved rounds (A B C, then C B A) and collect their results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import TypeVar

from rich.progress import Progress

from steer_bench.timing import Timing

Measured = TypeVar("Measured")
Case = Callable[[int], Measured]
"""Runs a case once. The argument is the round number, which determines the seed of the load."""


def interleave(
    cases: Mapping[str, Case[Measured]], rounds: int, progress: Progress, title: str
) -> dict[str, list[Measured]]:
    """Run each case once per round, every second round in reverse, so that drift of the machine affects all equally."""
    times: dict[str, list[Measured]] = {name: [] for name in cases}
    task = progress.add_task(title, total=rounds * len(cases))
    for number in range(rounds):
        names = list(cases) if number % 2 == 0 else list(cases)[::-1]
        for name in names:
            times[name].append(cases[name](number))
            progress.advance(task)
    return times


def throughputs(times: list[Timing]) -> list[float]:
    """Tokens per second of each round."""
    return [timing.tokens_per_second for timing in times]


def middle(values: list[float]) -> float:
    return float(median(values))
