"""Seconds of a path that is requested again and again."""

from __future__ import annotations

import threading
import time

import httpx


class LatencyWatch(threading.Thread):
    """Requests a path in its own thread until `close`, and keeps the seconds and the statuses."""

    def __init__(self, url: str, path: str, poll_seconds: float) -> None:
        super().__init__(daemon=True)
        self._url, self.path, self._poll_seconds = url, path, poll_seconds
        self._closed = threading.Event()
        self.seconds: list[float] = []
        self.faults: list[str] = []

    def run(self) -> None:
        # No connection is kept: a probe of an orchestrator opens its own.
        limits = httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(base_url=self._url, timeout=60, limits=limits) as client:
            while not self._closed.wait(self._poll_seconds):
                began = time.monotonic()
                try:
                    answer = client.get(self.path)
                except httpx.TransportError as error:
                    self.faults.append(f"GET {self.path}: {error!r}")
                    continue
                finally:
                    self.seconds.append(time.monotonic() - began)
                if answer.status_code != 200:
                    self.faults.append(f"GET {self.path}: {answer.status_code} {answer.text[:200]}")

    def close(self) -> None:
        self._closed.set()
        self.join()

    def __str__(self) -> str:
        p50, p99, slowest = (self.quantile(fraction) for fraction in (0.5, 0.99, 1.0))
        return f"{self.path}: {len(self.seconds)} requests, p50 {p50:.3f} s, p99 {p99:.3f} s, slowest {slowest:.3f} s"

    def quantile(self, fraction: float) -> float:
        """Seconds; the slowest request for fractions near 1 of few requests."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]
