"""Costs of one change, one poll and one request on a registry of many names, on this machine's disk."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from steer_engine.settings import RegistryLimits
from steer_engine.vectors import ControlVector, Registry, save
from steer_engine.vectors.manifest import FOLDER, Manifest, VectorEntry, read_manifest, write_manifest
from steer_engine.vectors.uploaded import UploadedVectors


@contextmanager
def counted_stats() -> Iterator[Counter[str]]:
    """Count the calls of `stat` in this block, by path."""
    calls: Counter[str] = Counter()
    real = os.stat

    def stat(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        calls[str(path)] += 1
        return real(path, *args, **kwargs)

    with mock.patch("os.stat", stat):
        yield calls


def registry_costs(vectors: int) -> dict[str, float]:
    """Seconds, bytes and `stat` calls of a change, a poll and a request, on a real registry of `vectors` names."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FOLDER / "manifest.json"
        path.parent.mkdir()
        known = ControlVector(directions={0: np.ones(8, np.float32)})
        entries = {f"vector-{i:05}": VectorEntry(digest=f"sha256:{i:064x}", num_bytes=2**20) for i in range(vectors)}
        write_manifest(path, Manifest(vectors=entries))
        reads = [_seconds(lambda: read_manifest(path)) for _ in range(5)]
        limits = RegistryLimits(max_vectors=2 * vectors, max_registry_bytes=2**62)
        uploaded = UploadedVectors(Path(folder), limits)
        changes = [_seconds(lambda name=name: uploaded.put(name, known)) for name in "abcde"]
        num_bytes = path.stat().st_size
    with tempfile.TemporaryDirectory() as folder:
        registry = Registry(folder)
        registry.put("known", known)
        registry.get("known")
        with counted_stats() as of_request:
            registry.get("known")
        with counted_stats() as of_poll:
            _ = registry.names(), registry.generation, registry.fault
    with tempfile.TemporaryDirectory() as folder:
        files = 20
        for i in range(files):
            save(ControlVector(directions={0: np.full(8, i + 1, np.float32)}), Path(folder) / f"file-{i}.safetensors")
        registry = Registry(folder)
        with counted_stats() as of_files:
            registry.names()
    return {
        "manifest_bytes": num_bytes,
        "manifest_read_s": statistics.median(reads),
        "change_s": statistics.median(changes),
        "stats_per_edit": of_request.total(),
        "stats_per_poll": of_poll.total(),
        "stats_per_poll_and_file": sum(n for name, n in of_files.items() if "file-" in name) / files,
    }


def _seconds(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
