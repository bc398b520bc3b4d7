"""Simulate the load of a large fleet on its registry and caches.

Requests name vectors by a Zipf law and go to replicas as through a load balancer. The product's own classes decide what
a replica caches: `VectorCache` (contents read by an API process), `ShippedVectors` and `ResidentVectors` (the engine's
host memory), `Bank` (rows on the device). A vector is only a number here, and the clock is simulated. The costs of the
registry's volume are measured on a real registry with as many names.

python scripts/simulate_fleet.py [--replicas 100] [--vectors 10000] [--rate 1000] [--out FILE.json]
"""

from __future__ import annotations

import heapq
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from registry_costs import registry_costs

from steer_engine.api.background import GAUGE_SECONDS
from steer_engine.api.frontend import ShippedVectors
from steer_engine.engine.admission import ResidentVectors
from steer_engine.engine.bank import Bank
from steer_engine.program import Row, RowKey
from steer_engine.settings import ApiLimits, EngineLimits
from steer_engine.vectors.cache import VectorCache

MODELS = {"8B": 32 * 4096, "70B": 80 * 8192}
"""Number of elements of a vector with all blocks."""

COLD_S = 300.0
"""Seconds after a start with empty caches that are counted separately."""


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """rate: steered requests per second of all replicas. answer_s: mean duration of a request (exponential).

    by_vector: all requests with one vector go to one replica. Otherwise any request goes to any replica.
    """

    replicas: int = 100
    vectors: int = 10_000
    rate: float = 1000.0
    zipf: float = 1.0
    model: str = "8B"
    by_vector: bool = False
    answer_s: float = 10.0
    slots: int = 256
    rows: int = 4
    store_bytes: int = EngineLimits().store_bytes
    loaded_bytes: int = ApiLimits().loaded_bytes
    hours: float = 2.0
    sampled: int = 2
    seed: int = 0

    @property
    def vector_bytes(self) -> int:
        return MODELS[self.model] * 4

    @property
    def popularity_V(self) -> np.ndarray:
        """Share of each vector in the requests, most popular first. Shape [vectors]."""
        weights_V = np.arange(1, self.vectors + 1, dtype=np.float64) ** -self.zipf
        return np.asarray(weights_V / weights_V.sum())


@dataclass
class Counts:
    """What happened at one replica in `seconds` seconds."""

    seconds: float = 0.0
    requests: int = 0
    read: int = 0
    """Vectors read from the registry's volume."""
    engine_calls: int = 0
    """Calls to the engine before a request, to check or ship its vector."""
    shipped: int = 0
    """Vectors sent to the engine."""
    copied: int = 0
    """Vectors written into the bank."""
    refused: int = 0
    """Requests that got 503, because the vectors in use fill the store."""
    waited: int = 0
    """Requests that found all slots in use."""
    running: float = 0.0
    """Running requests, summed over arrivals."""

    def hits(self, misses: int) -> float:
        return 1 - misses / self.requests


@dataclass
class Replica:
    """One server with one engine. `serve` takes a request through every cache of vectors."""

    fleet: Fleet
    now: float = 0.0
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        self.loaded: VectorCache[bool] = VectorCache(budget=self.fleet.loaded_bytes)
        self.shipped = ShippedVectors(clock=lambda: self.now)
        self.resident = ResidentVectors(budget=self.fleet.store_bytes)
        # All blocks of a vector are cached and dropped together: one row represents them.
        self.bank = Bank(torch.zeros(self.fleet.slots * self.fleet.rows, 1), self._row)
        self._running: list[tuple[float, str]] = []
        self._in_use: Counter[str] = Counter()

    def serve(self, now: float, digest: str, answer_s: float) -> None:
        self.now = now
        self.counts.requests += 1
        while self._running and self._running[0][0] <= now:
            self._end_one()
        begins = now
        if len(self._running) == self.fleet.slots:
            self.counts.waited += 1
            begins = self._end_one()
        self.counts.running += len(self._running)
        if self.loaded.get(digest) is None:
            self.counts.read += 1
            self.loaded.put(digest, True, self.fleet.vector_bytes)
        if not self._ship(digest):
            self.counts.refused += 1
            return
        self.resident.touch([digest], now)
        self.bank.pin([_row_of(digest)])
        self._in_use[digest] += 1
        heapq.heappush(self._running, (begins + answer_s, digest))

    def _ship(self, digest: str) -> bool:
        """As `vllm.engine_client` and `vllm.engine_core` do."""
        if self.shipped.is_fresh(digest):
            return True
        self.counts.engine_calls += 1
        if not self.resident.pin_if_resident(digest, self.now):
            victims = self.resident.make_room(self.fleet.vector_bytes, self._in_use, self.now)
            if victims is None:
                return False
            for victim in victims:
                self.resident.drop(victim)
                self.bank.forget(victim)
            self.shipped.forget(victims)
            self.resident.put(digest, self.fleet.vector_bytes, self.now)
            self.counts.shipped += 1
        self.shipped.confirm(digest, self.now)
        return True

    def _end_one(self) -> float:
        ended, digest = heapq.heappop(self._running)
        self.bank.unpin([_row_of(digest)])
        self._in_use[digest] -= 1
        if not self._in_use[digest]:
            del self._in_use[digest]
        return ended

    def _row(self, key: RowKey, block: int) -> np.ndarray:
        self.counts.copied += 1
        return np.zeros(1, np.float32)


def _row_of(digest: str) -> Row:
    return RowKey(terms=((digest, 1.0),)), 0


def shares_R(fleet: Fleet, spread: int = 0) -> np.ndarray:
    """Share of the requests that each replica gets if each vector has its own replica. Shape [replicas].

    spread: number of the most popular vectors whose requests go to any replica.
    """
    popularity_V = fleet.popularity_V
    home_V = np.random.default_rng(fleet.seed).integers(fleet.replicas, size=fleet.vectors)
    own_R = np.bincount(home_V[spread:], popularity_V[spread:], minlength=fleet.replicas)
    return np.asarray(own_R + popularity_V[:spread].sum() / fleet.replicas)


def simulate(fleet: Fleet) -> tuple[Counts, Counts]:
    """Counts of the first COLD_S seconds after a start with empty caches, and of the second half of the time.

    Sums over the `sampled` replicas, which represent all.
    """
    rng = np.random.default_rng(fleet.seed)
    cold, warm = Counts(), Counts()
    home_V = np.random.default_rng(fleet.seed).integers(fleet.replicas, size=fleet.vectors)
    for number in range(fleet.sampled):
        popularity_V = fleet.popularity_V * (home_V == number if fleet.by_vector else 1)
        share = popularity_V.sum() if fleet.by_vector else 1 / fleet.replicas
        _run(Replica(fleet), popularity_V / popularity_V.sum(), fleet.rate * share, rng, cold, warm)
    return cold, warm


def _run(
    replica: Replica, popularity_V: np.ndarray, rate: float, rng: np.random.Generator, cold: Counts, warm: Counts
) -> None:
    end = replica.fleet.hours * 3600
    num = rng.poisson(rate * end)
    arrivals_N = np.sort(rng.uniform(0, end, num))
    vectors_N = rng.choice(len(popularity_V), num, p=popularity_V)
    answers_N = rng.exponential(replica.fleet.answer_s, num)
    for begin, stop, total in ((0.0, min(COLD_S, end / 2), cold), (COLD_S, end / 2, None), (end / 2, end, warm)):
        replica.counts = Counts(seconds=stop - begin)
        for i in range(*np.searchsorted(arrivals_N, [begin, stop])):
            replica.serve(float(arrivals_N[i]), str(vectors_N[i]), float(answers_N[i]))
        if total is not None:
            for name, value in asdict(replica.counts).items():
                setattr(total, name, getattr(total, name) + value)


def che_hits(popularity_V: np.ndarray, places: int) -> float:
    """Hit rate of an LRU cache with room for `places` contents of equal size (Che's approximation).

    The time t until a content is dropped solves sum(1 - exp(-p t)) = places. A request hits with 1 - exp(-p t).
    """
    if places >= len(popularity_V):
        return 1.0
    low, high = 0.0, 1.0
    while (1 - np.exp(-popularity_V * high)).sum() < places:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - np.exp(-popularity_V * middle)).sum() < places else (low, middle)
    return float((popularity_V * (1 - np.exp(-popularity_V * high))).sum())


def summary(fleet: Fleet, cold: Counts, warm: Counts) -> dict[str, Any]:
    """Rates of the whole fleet, scaled from the sampled replicas."""
    scale = fleet.replicas / warm.seconds if warm.seconds else 0.0
    mib = fleet.vector_bytes / 2**20
    return {
        "fleet": asdict(fleet),
        "loaded_hits": warm.hits(warm.read),
        "loaded_hits_cold": cold.hits(cold.read),
        "store_hits": warm.hits(warm.shipped),
        "bank_hits": warm.hits(warm.copied),
        "read_mib_s": warm.read * scale * mib,
        "read_mib_s_cold": cold.read * fleet.replicas / cold.seconds * mib,
        "shipped_mib_s": warm.shipped * scale * mib,
        "engine_calls_s": warm.engine_calls * scale,
        "copied_s": warm.copied * scale,
        "refused": warm.refused / warm.requests,
        "waited": warm.waited / warm.requests,
        "running": warm.running / warm.requests,
    }


COLUMNS = {
    "loaded_hits_cold": ("in the API process, first 5 min", "{:.0%}"),
    "loaded_hits": ("in the API process", "{:.0%}"),
    "read_mib_s_cold": ("MiB/s read from the volume, first 5 min", "{:,.0f}"),
    "read_mib_s": ("MiB/s read from the volume", "{:,.0f}"),
    "store_hits": ("in the store", "{:.1%}"),
    "shipped_mib_s": ("MiB/s shipped", "{:,.0f}"),
    "engine_calls_s": ("engine calls/s", "{:,.0f}"),
    "bank_hits": ("in the bank", "{:.0%}"),
    "waited": ("waited", "{:.0%}"),
}


def caches_table(rows: list[dict[str, Any]]) -> str:
    heads = ["model", "Zipf", "a request goes to", "STEER_ENGINE_LOADED_BYTES", *(head for head, _ in COLUMNS.values())]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        fleet = row["fleet"]
        to = "its vector's replica" if fleet["by_vector"] else "any replica"
        own = [fleet["model"], f"{fleet['zipf']:g}", to, f"{fleet['loaded_bytes'] / 2**30:g} GiB"]
        cells = [pattern.format(row[key]) for key, (_, pattern) in COLUMNS.items()]
        lines.append("| " + " | ".join([*own, *cells]) + " |")
    return "\n".join(lines)


def pinning(fleet: Fleet) -> list[dict[str, float]]:
    """Hit rates of a cache of C vectors: least recently used out, against the C most popular pinned."""
    popularity_V = fleet.popularity_V
    places = sorted({fleet.slots * fleet.rows, *(2**30 * n // fleet.vector_bytes for n in (1, 4))})
    return [
        {"places": n, "lru": che_hits(popularity_V, n), "most_popular": float(popularity_V[:n].sum())} for n in places
    ]


def main(
    replicas: Annotated[int, typer.Option(min=1)] = 100,
    vectors: Annotated[int, typer.Option(min=1)] = 10_000,
    rate: Annotated[float, typer.Option(min=0.1, help="Steered requests per second, all replicas.")] = 1000.0,
    hours: Annotated[float, typer.Option(min=0.01, help="Simulated hours since all caches were empty.")] = 2.0,
    sampled: Annotated[int, typer.Option(min=1, help="Simulated replicas; they represent all.")] = 2,
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file for all numbers.")] = None,
) -> None:
    """Print the load on a fleet's registry and caches."""
    base = Fleet(replicas=replicas, vectors=vectors, rate=rate, hours=hours, sampled=min(sampled, replicas), seed=seed)
    variants = [replace(base, model=model, zipf=zipf) for model in MODELS for zipf in (0.0, 0.8, 1.0, 1.2)]
    variants += [replace(base, model=model, by_vector=True) for model in MODELS]
    variants += [replace(base, model=model, loaded_bytes=vectors * base.vector_bytes * 5) for model in ("70B",)]
    began = time.perf_counter()
    rows = [summary(fleet, *simulate(fleet)) for fleet in variants]
    costs = registry_costs(vectors)
    load = {spread: float(shares_R(base, spread).max() * replicas) for spread in (0, 10, 100, 1000)}
    pins = {model: pinning(replace(base, model=model)) for model in MODELS}
    typer.echo(f"{replicas} replicas, {vectors:,} vectors, {rate:g} steered requests/s, {hours:g} h, seed {seed}\n")
    typer.echo(caches_table(rows) + "\n")
    typer.echo(registry_table(base, costs) + "\n")
    typer.echo("| places | LRU | most popular pinned |\n|---|---|---|")
    for model, found in pins.items():
        for row in found:
            lru, best = row["lru"], row["most_popular"]
            typer.echo(f"| {row['places']:,} ({model}) | {lru:.1%} | {best:.1%} |")
    typer.echo("\n| vectors served by any replica | load of the busiest replica / mean load |\n|---|---|")
    for spread, factor in load.items():
        typer.echo(f"| {spread} | {factor:.1f} |")
    typer.echo(f"\n{time.perf_counter() - began:.0f} s")
    if out is not None:
        out.write_text(json.dumps({"caches": rows, "registry": costs, "load": load, "pinning": pins}, indent=1) + "\n")


def registry_table(fleet: Fleet, costs: dict[str, float]) -> str:
    replicas, mib = fleet.replicas, costs["manifest_bytes"] / 2**20
    polls = replicas / GAUGE_SECONDS
    start_gib = {model: fleet.vectors * numbers * 4 / 2**30 for model, numbers in MODELS.items()}
    rows = [
        ("`stat` calls by requests", f"{fleet.rate * costs['stats_per_edit']:,.0f} /s"),
        ("`stat` calls by the servers' polls", f"{polls * costs['stats_per_poll']:,.0f} /s"),
        ("`stat` calls by polls, if the vectors were files in the folder",
         f"{polls * costs['stats_per_poll_and_file'] * fleet.vectors:,.0f} /s"),
        ("size of the manifest", f"{mib:.2f} MiB"),
        ("read after a change, all replicas", f"{mib * replicas:,.0f} MiB"),
        ("time per replica for that", f"{costs['manifest_read_s'] * 1000:.0f} ms"),
        ("time of one change, under the lock", f"{costs['change_s'] * 1000:.0f} ms"),
        *((f"read at the startup of a replica, {model}", f"{gib:.1f} GiB") for model, gib in start_gib.items()),
    ]  # fmt: skip
    return "\n".join(["| the registry's volume | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)])


if __name__ == "__main__":
    typer.run(main)
