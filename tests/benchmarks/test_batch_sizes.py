from __future__ import annotations

from rich.progress import Progress
from steer_bench.batch_sizes import row, sweep


def test_the_batch_size_with_the_best_single_run_is_chosen() -> None:
    runs = {4: [1.0, 5.0], 8: [4.0, 4.0], 16: [3.0, 2.0]}
    measured_sizes: list[int] = []

    def rate(size: int) -> float:
        measured_sizes.append(size)
        return runs[size][measured_sizes.count(size) - 1]

    best, rows = sweep(rate, list(runs), "peer", Progress(disable=True), "which")
    assert best == 4
    assert measured_sizes == [4, 8, 16, 16, 8, 4]
    assert [line["case"] for line in rows] == [f"peer, batches of {size}" for size in runs]
    assert rows[0] == row("sweep", "peer, batches of 4", [1.0, 5.0])


def test_a_row_shows_median_and_range() -> None:
    assert row("rounds", "a", [3.0, 1.0, 2.0]) == {"part": "rounds", "case": "a", "per s": 2.0, "min": 1.0, "max": 3.0}
