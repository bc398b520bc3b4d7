"""Prometheus metrics `steer_engine_*`, on vLLM's own `/metrics` in both of its modes (one API process or several).

Plain module-level objects: vLLM's page for several processes reads the files that these write, and custom collectors
would be missing there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from prometheus_client import Counter, Gauge, Histogram

from steer_engine.resolve import ResolvedSpec

MAX_VECTOR_LABELS = 100
"""Names with a time series of their own; later names count as `other`."""

MAX_DIGEST_LABELS = 20
"""The same for digests, which clients create with inline vectors; they do not displace names."""

OTHER = "other"

_COSINES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
_DOTS = tuple(step * 10.0**power for power in range(-1, 4) for step in (1, 2, 5))


def both_signs(bounds: tuple[float, ...]) -> tuple[float, ...]:
    """The upper bounds of buckets from -bounds[-1] to bounds[-1]."""
    return (*(-bound for bound in reversed(bounds)), 0.0, *bounds)


class BulkHistogram(Histogram):
    """A histogram that can count an array at once: `observe` costs 2 microseconds per number."""

    def observe_all(self, numbers_N: np.ndarray) -> None:
        """The same as `observe` for each of the numbers, which are finite."""
        places, counts = np.unique(np.searchsorted(self._upper_bounds, numbers_N), return_counts=True)
        for place, count in zip(places.tolist(), counts.tolist(), strict=True):
            self._buckets[place].inc(count)
        self._sum.inc(float(numbers_N.sum()))


requests = Counter("steer_engine_requests", "Generating requests by steering outcome.", labelnames=("outcome",))
vector_requests = Counter(
    "steer_engine_vector_requests",
    "Steered requests by a vector's name (or short digest).",
    labelnames=("vector",),
)
upload_rejections = Counter(
    "steer_engine_upload_rejections", "Rejected uploads by HTTP status.", labelnames=("status",)
)
shipped_bytes = Counter("steer_engine_shipped_bytes", "Bytes of vectors sent to the engines.")
admission_seconds = Histogram(
    "steer_engine_admission_seconds",
    "Time from a steered request's check until its vectors are in the engine.",
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
armed = Gauge("steer_engine_armed", "1 if this server's engines are armed.", multiprocess_mode="mostrecent")
registered_vectors = Gauge("steer_engine_registered_vectors", "Names in the registry.", multiprocess_mode="mostrecent")
registry_readable = Gauge(
    "steer_engine_registry_readable", "0 while the registry's folder cannot be read.", multiprocess_mode="mostrecent"
)
mirror_failing = Gauge(
    "steer_engine_mirror_failing",
    "1 while the folder is not in sync with the URL of --steering-mirror, for any reason; 0 without one.",
    multiprocess_mode="mostrecent",
)
mirror_failures = Counter("steer_engine_mirror_failures", "Rounds of --steering-mirror that failed.")
mirror_left_out = Gauge(
    "steer_engine_mirror_left_out",
    "Files at the URL of --steering-mirror that are not usable; the log names them.",
    multiprocess_mode="mostrecent",
)
registry_generation = Gauge(
    "steer_engine_registry_generation", "Changes of the registry over the API.", multiprocess_mode="mostrecent"
)
bank_rows = Gauge(
    "steer_engine_bank_rows",
    "Bank rows of the fullest worker; idle rows hold a vector that no request uses.",
    ("state",),
    multiprocess_mode="mostrecent",
)
bank_waiting = Gauge(
    "steer_engine_waiting_requests", "Steered requests that wait in the engine.", multiprocess_mode="mostrecent"
)
steered_requests = Gauge(
    "steer_engine_steered_requests", "Steered requests that run in the engine now.", multiprocess_mode="mostrecent"
)
ended_non_finite = Gauge(
    "steer_engine_ended_non_finite",
    "Steered requests that ended with an error because their numbers were not finite. Anything but 0 is a bug.",
    multiprocess_mode="mostrecent",
)
store_bytes = Gauge(
    "steer_engine_store_bytes", "Host memory that vectors take in a worker.", multiprocess_mode="mostrecent"
)

_MONITOR = ("monitor", "block")
"""The labels of a monitor: the operator's name, and the block. At most `max_monitors` pairs."""
monitor_tokens = Counter(
    "steer_engine_monitor_tokens", "Generated tokens that a monitor (--steering-monitor) measured.", _MONITOR
)
monitor_tokens_above = Counter(
    "steer_engine_monitor_tokens_above", "Those whose number is above the monitor's threshold.", _MONITOR
)
monitor_threshold = Gauge(
    "steer_engine_monitor_threshold", "The threshold of a monitor.", _MONITOR, multiprocess_mode="mostrecent"
)
monitor_cosine = BulkHistogram(
    "steer_engine_monitor_cosine", "Numbers of monitors with measure cosine.", _MONITOR, buckets=both_signs(_COSINES)
)
monitor_dot = BulkHistogram(
    "steer_engine_monitor_dot", "Numbers of monitors with measure dot.", _MONITOR, buckets=both_signs(_DOTS)
)
monitor_probability = BulkHistogram(
    "steer_engine_monitor_probability", "Numbers of monitors with measure probability.", _MONITOR,
    buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0),
)  # fmt: skip

_labels: dict[int, set[str]] = {MAX_VECTOR_LABELS: set(), MAX_DIGEST_LABELS: set()}
"""Limit -> labels in use."""


class MonitorSeries:
    """The series of one monitor at one block. They exist from the start, so that rates are right from the first token.

    above: the threshold; None = tokens above it are not counted.
    """

    def __init__(self, name: str, block: int, measure: str, above: float | None) -> None:
        labels = (name, str(block))
        histogram = {"cosine": monitor_cosine, "dot": monitor_dot, "probability": monitor_probability}[measure]
        self._numbers: BulkHistogram = histogram.labels(*labels)
        self._tokens = monitor_tokens.labels(*labels)
        self._above = above
        if above is not None:
            self._tokens_above = monitor_tokens_above.labels(*labels)
            monitor_threshold.labels(*labels).set(above)

    def count(self, numbers_N: np.ndarray) -> None:
        """Count tokens by their numbers, float64 and finite."""
        self._numbers.observe_all(numbers_N)
        self._tokens.inc(len(numbers_N))
        if self._above is not None:
            self._tokens_above.inc(int((numbers_N > self._above).sum()))


def request_steered(resolved: ResolvedSpec, seconds: float) -> None:
    """Count a request whose steering is resolved and shipped. seconds: admission time."""
    requests.labels("steered").inc()
    admission_seconds.observe(seconds)
    for label in {_label_of(edit.requested.vector, edit.edit.vector) for edit in resolved.edits}:
        vector_requests.labels(label).inc()


def request_refused(status: int) -> None:
    """Count a refused request: its own error (4xx), or no capacity (503)."""
    requests.labels("unavailable" if status >= 500 else "refused").inc()


def upload_rejected(status: int) -> None:
    upload_rejections.labels(str(int(status))).inc()


def engine_refreshed(statuses: list[dict[str, Any]], waiting: int = 0, num_ended: int = 0) -> None:
    """Update the engine gauges. statuses: one per worker; empty if the workers are not armed or do not answer.

    waiting: steered requests that the engine has not started. num_ended: requests whose numbers were not finite.
    """
    bank_waiting.set(waiting)
    ended_non_finite.set(num_ended)
    armed.set(bool(statuses))
    if not statuses:
        return
    fullest = max(statuses, key=lambda worker: worker["bank_rows_pinned"])
    # The three states add up to all rows, as dashboards and alerts expect.
    bank_rows.labels("pinned").set(fullest["bank_rows_pinned"])
    bank_rows.labels("idle").set(fullest["bank_rows_used"] - fullest["bank_rows_pinned"])
    bank_rows.labels("free").set(fullest["bank_rows"] - fullest["bank_rows_used"])
    # Engines share the requests. Each rank of an engine runs all of its requests; it counts those that steer its
    # blocks.
    slots: dict[int, int] = {}
    for worker in statuses:
        slots[worker["engine"]] = max(slots.get(worker["engine"], 0), worker["steered_slots"])
    steered_requests.set(sum(slots.values()))
    store_bytes.set(max(worker["store_bytes"] for worker in statuses))


def registry_refreshed(num_vectors: int, generation: int, *, readable: bool) -> None:
    registered_vectors.set(num_vectors)
    registry_readable.set(readable)
    registry_generation.set(generation)


def snapshot() -> dict[str, float]:
    """The counters of this process, for `GET /v1/steering/stats`."""
    found: dict[str, float] = {}
    for counter in (requests, vector_requests, upload_rejections, shipped_bytes):
        for family in counter.collect():
            for sample in family.samples:
                if sample.name.endswith("_total"):
                    labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
                    found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def _label_of(requested: Any, digest: str) -> str:
    named = isinstance(requested, str) and not requested.startswith("sha256:")
    label, most = (requested, MAX_VECTOR_LABELS) if named else (digest[: len("sha256:") + 12], MAX_DIGEST_LABELS)
    if label not in _labels[most]:
        if len(_labels[most]) >= most:
            return OTHER
        _labels[most].add(label)
    return str(label)
