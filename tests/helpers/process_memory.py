"""Memory of a server's processes over time, and whether it is flat."""

from __future__ import annotations

import statistics
import threading
from dataclasses import dataclass, field
from pathlib import Path

import psutil  # type: ignore[import-untyped]

POLL_SECONDS = 1.0
FIELDS = ("RssAnon:", "RssShmem:", "VmSwap:")
"""What a process owns. Pages of files (libraries) are the kernel's: it drops them and reads them again at any time."""
PARTS = 5
COURSE = 20
"""Samples that a report shows."""
MIN_SAMPLES = 2 * PARTS
FRACTION, FLOOR_MIB = 0.05, 8.0
"""Allowed growth: a part of a process's memory, or, for small processes, some arenas of its allocator."""


def owned_mib(pid: int) -> float | None:
    """Memory of one process in MiB; None if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return sum(int(line.split()[1]) for line in lines if line.startswith(FIELDS)) / 1024


@dataclass
class History:
    """Memory of one process: MiB at each sample, from `first` (the number of its first sample)."""

    title: str
    first: int
    samples: list[float] = field(default_factory=list)


class MemoryWatch(threading.Thread):
    """Samples all processes of a tree until `close`."""

    def __init__(self, root: int, poll_seconds: float = POLL_SECONDS) -> None:
        super().__init__(daemon=True)
        self._root, self._poll_seconds = psutil.Process(root), poll_seconds
        self._closed = threading.Event()
        self.histories: dict[int, History] = {}
        self.num_samples = 0

    def run(self) -> None:
        while not self._closed.wait(self._poll_seconds):
            self.sample()

    def sample(self) -> None:
        for process in [self._root, *self._root.children(recursive=True)]:
            mib = owned_mib(process.pid)
            if mib is None:
                continue
            if process.pid not in self.histories:
                self.histories[process.pid] = History(title_of(process), self.num_samples)
            self.histories[process.pid].samples.append(mib)
        self.num_samples += 1

    def close(self) -> None:
        self._closed.set()
        self.join()


def title_of(process: psutil.Process) -> str:
    """The title that it gave itself, or the end of its command line: long ones begin with paths."""
    try:
        return " ".join(" ".join(process.cmdline()).split())[-60:] or process.name()
    except psutil.Error:
        return "ended"


@dataclass(frozen=True)
class Growth:
    """One process: MiB after the warm-up and at the end; None: it did not live the whole time.

    course: samples at equal distances, for a person to see whether it still grows.
    """

    title: str
    before: float
    after: float | None
    course: tuple[float, ...]

    @property
    def is_flat(self) -> bool:
        allowed = max(FRACTION * self.before, FLOOR_MIB)
        return self.after is not None and self.after - self.before <= allowed

    def __str__(self) -> str:
        if self.after is None:
            return f"{self.title}: did not live from start to end"
        change = self.after - self.before
        course = " ".join(f"{mib:.0f}" for mib in self.course)
        return (
            f"{self.title}: {self.before:.1f} -> {self.after:.1f} MiB ({change / max(self.before, 1):+.1%}): {course}"
        )


def growths(histories: dict[int, History], num_samples: int) -> list[Growth]:
    """Per process, the median of the second fifth of the time against the median of the last fifth.

    The first fifth is the warm-up. Medians, so that a body of some MiB at the moment of a sample does not count.
    """
    assert num_samples >= MIN_SAMPLES, f"{num_samples} samples are too few; let the load run longer"
    part = num_samples // PARTS
    found = []
    for history in histories.values():
        whole = history.first == 0 and len(history.samples) == num_samples
        before = statistics.median(history.samples[part : 2 * part] if whole else history.samples)
        after = statistics.median(history.samples[-part:]) if whole else None
        course = tuple(history.samples[:: max(1, len(history.samples) // COURSE)])
        found.append(Growth(history.title, before, after, course))
    return found
