"""How much memory a derivation takes at its peak. Run by test_memory.py in a process of its own.

    peak_memory.py MODEL NUM_PAIRS

Prints the seconds, and the peaks in MiB of this process and of the actors together: the kernel's own high-water marks.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from helpers.derivation import SMALL, varied
from steer_engine.derive import derive

POLL_SECONDS = 0.2
ACTOR = "ray::CaptureEngine"


def high_water(pid: int) -> float:
    """MiB; 0 for a process that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    marks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return int(marks[0]) / 1024 if marks else 0.0


def actors() -> list[int]:
    """Processes of Ray's that host an actor of this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title, parent = process.cmdline(), process.parent()
            # A child between fork and exec has the title and the high-water mark of its parent.
            is_copy = parent is not None and _is_actor(parent.cmdline())
        except psutil.Error:  # it has just ended
            continue
        if _is_actor(title) and not is_copy:
            found.append(process.pid)
    return found


def _is_actor(title: list[str]) -> bool:
    return " ".join(title).startswith(ACTOR)


class Watch(threading.Thread):
    """Notes the high-water mark of each actor until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.marks: dict[int, float] = {}
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(POLL_SECONDS):
            for pid in actors():
                self.marks[pid] = max(self.marks.get(pid, 0.0), high_water(pid))


def main(model: str, num_pairs: int) -> None:
    watch = Watch()
    watch.start()
    began = time.monotonic()
    derive(model, varied(num_pairs), dtype="float32", engine_args=dict(SMALL), progress=False)
    seconds = time.monotonic() - began
    watch.done.set()
    watch.join()
    peaks = {"driver": high_water(os.getpid()), "actors": sum(watch.marks.values())}
    print(json.dumps({"pairs": num_pairs, "seconds": round(seconds, 1), **peaks}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
