from __future__ import annotations

from functools import partial

from rich.progress import Progress
from steer_bench.rounds import interleave, throughputs
from steer_bench.timing import Timing


def test_cases_alternate_and_every_other_round_is_reversed() -> None:
    ran: list[tuple[str, int]] = []

    def run(name: str, number: int) -> Timing:
        ran.append((name, number))
        return Timing(seconds=2.0, output_tokens=10 * (number + 1), prompt_tokens=1, ttft_ms=1.0, itl_ms=1.0)

    with Progress(disable=True) as progress:
        times = interleave({name: partial(run, name) for name in "ABC"}, 2, progress, "")
    assert ran == [("A", 0), ("B", 0), ("C", 0), ("C", 1), ("B", 1), ("A", 1)]
    assert throughputs(times["B"]) == [5.0, 10.0]
