"""Ray actors with an engine each, that read chunks of texts.

Chunks are fixed by the data alone and come back in order (see `workers`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from steer_engine.derive.pairs import Pair
from steer_engine.derive.position import Position
from steer_engine.derive.reader import EngineFacts, Reader, ReaderConfig, Reading, TextRows
from steer_engine.derive.settings import READING_ENV
from steer_engine.derive.texts import Text
from steer_engine.derive.workers import Workers, ray_session
from steer_engine.errors import DerivationError

PAIRS_PER_CHUNK = 32
"""64 short texts fill a batch of the engine; small enough that a progress bar moves."""

TEXTS_PER_CHECK = 1024
"""Texts that are tokenised at once to see whether they can be read."""

START_SECONDS = 1800
"""Longest start of an engine, downloading a model included."""


class Pool(Workers):
    """Actors with one engine each. Use `pool(...)`, which also starts and stops Ray."""

    def facts(self) -> EngineFacts:
        """Wait until every engine is up. Raises what stopped one, or DerivationError where two differ."""
        facts: list[EngineFacts] = self.everywhere("facts", timeout=START_SECONDS)
        if any(other != facts[0] for other in facts):
            raise DerivationError(f"The actors run different engines: {facts}. Install the same on every node.")
        return facts[0]

    def read(self, pairs: Sequence[Pair], *, keep_rows_of: int = 0) -> Iterator[Reading]:
        """Readings of all chunks, in chunk order; the chunks of the first `keep_rows_of` pairs bring their rows."""
        starts = range(0, len(pairs), PAIRS_PER_CHUNK)
        calls = [(i, list(pairs[at : at + PAIRS_PER_CHUNK]), at < keep_rows_of) for i, at in enumerate(starts)]
        return self.ordered("read", calls)

    def rows(self, chunks: Sequence[Sequence[Text]], position: Position) -> Iterator[list[TextRows]]:
        """The rows of all texts at a position, chunk by chunk, in order."""
        return self.ordered("rows", [(list(chunk), position) for chunk in chunks])

    def problems(self, texts: Sequence[Text], position: Position) -> list[str]:
        """What is wrong with each text that the engines cannot read, with its line; nothing is read."""
        starts = range(0, len(texts), TEXTS_PER_CHECK)
        calls = [(list(texts[at : at + TEXTS_PER_CHECK]), position) for at in starts]
        return [problem for found in self.ordered("problems", calls) for problem in found]


@contextmanager
def pool(
    config: ReaderConfig, *, actors: int = 1, ray_address: str | None = None, gpus_per_actor: float | None = None
) -> Iterator[Pool]:
    """Start Ray (or connect to `ray_address`), start the actors, stop what was started.

    A Ray that is already running in this process is used and left running.
    """
    if actors < 1:
        raise DerivationError(f"{actors} actors cannot read anything; at least 1 is needed.")
    local = ray_address is None
    with ray_session(ray_address, num_cpus=actors) as ray:
        resources = {"num_cpus": 0.0 if local else 1.0, "num_gpus": _gpus(ray, config, actors, gpus_per_actor, local)}
        engines = Pool(ray, Reader, (config,), count=actors, resources=resources, env=_actor_env(actors, local=local))
        try:
            yield engines
        finally:
            engines.stop()


def _gpus(ray: Any, config: ReaderConfig, actors: int, per_actor: float | None, local: bool) -> float:
    """GPUs of one actor: as asked, else those that its engine is split over where Ray has enough, else none.

    Raises:
        DerivationError: this machine has fewer than asked. (A cluster may grow: there one waits.)
    """
    there = float(ray.cluster_resources().get("GPU", 0))
    if per_actor is None:
        needed = float(dict(config.engine_args).get("tensor_parallel_size", 1))
        return needed if there >= actors * needed else 0.0
    if local and actors * per_actor > there:
        raise DerivationError(f"{actors} actor(s) with {per_actor:g} GPU(s) each do not fit: there are {there:g} here.")
    return per_actor


def _actor_env(actors: int, *, local: bool) -> dict[str, str]:
    """Settings of the actors' processes, each only where the user has not chosen it."""
    chosen = {
        **READING_ENV,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; texts are short and nothing is generated
    }
    if local:
        # Ray gives an actor one thread; on a machine without GPUs the engine computes with the actor's share of cores.
        chosen["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // actors))
    return {name: os.environ.get(name, value) for name, value in chosen.items()}
