"""Ray actors that read chunks of pairs, at most a few chunks ahead of what has been merged.

Chunks are fixed by the data alone and handed out in order; results come back in any order and are yielded in chunk
order. So what is merged, and how, is the same for any number of actors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from steer_engine.derive.pairs import Pair
from steer_engine.derive.reader import EngineFacts, Reader, ReaderConfig, Reading
from steer_engine.errors import DerivationError, SteerError

PAIRS_PER_CHUNK = 32
"""64 short texts fill a batch of the engine; small enough that a progress bar moves."""

CHUNKS_IN_FLIGHT = 2
"""Per actor: one that is read and one that waits, so that no engine idles and none hoards."""

MAX_ACTOR_RESTARTS = 2
"""An actor that dies is started again and its chunks are read again (reading changes nothing), this many times."""

START_SECONDS = 1800
"""Longest start of an engine, downloading a model included."""

_OBJECT_STORE_BYTES = 256 << 20  # sums are small, rows of a chunk a few MB; Ray would take a third of the memory


class Pool:
    """Actors with one engine each. Use `pool(...)`, which also starts and stops Ray.

    resources: what one actor takes of Ray's, `num_cpus` and `num_gpus`. env: variables of the actors' processes.
    """

    def __init__(
        self, ray: Any, config: ReaderConfig, *, actors: int, resources: dict[str, float], env: dict[str, str]
    ) -> None:
        self._ray = ray
        remote = ray.remote(Reader).options(
            **resources,
            max_restarts=MAX_ACTOR_RESTARTS,
            max_task_retries=MAX_ACTOR_RESTARTS,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": env},
        )
        self._actors = [remote.remote(config) for _ in range(actors)]

    def facts(self) -> EngineFacts:
        """Wait until every engine is up. Raises what stopped one, or DerivationError where two differ."""
        facts: list[EngineFacts] = self._get([actor.facts.remote() for actor in self._actors], timeout=START_SECONDS)
        if any(other != facts[0] for other in facts):
            raise DerivationError(f"The actors run different engines: {facts}. Install the same on every node.")
        return facts[0]

    def read(self, pairs: Sequence[Pair], *, keep_rows_of: int = 0) -> Iterator[Reading]:
        """Readings of all chunks, in chunk order; the chunks of the first `keep_rows_of` pairs bring their rows."""
        chunks = [list(pairs[i : i + PAIRS_PER_CHUNK]) for i in range(0, len(pairs), PAIRS_PER_CHUNK)]
        window = CHUNKS_IN_FLIGHT * len(self._actors)
        waiting = list(reversed(range(len(chunks))))
        running: dict[Any, int] = {}  # object reference -> which actor
        load = [0] * len(self._actors)
        done: dict[int, Reading] = {}
        next_index = 0
        while next_index < len(chunks):
            # Back-pressure: nothing is sent that is further than the window ahead of what was yielded.
            while waiting and waiting[-1] < next_index + 2 * window and min(load) < CHUNKS_IN_FLIGHT:
                which = load.index(min(load))
                index = waiting.pop()
                running[
                    self._actors[which].read.remote(index, chunks[index], index * PAIRS_PER_CHUNK < keep_rows_of)
                ] = which
                load[which] += 1
            ready, _ = self._ray.wait(list(running), num_returns=1)
            for reference in ready:
                load[running.pop(reference)] -= 1
                reading: Reading = self._get(reference)
                done[reading.index] = reading
            while next_index in done:
                yield done.pop(next_index)
                next_index += 1

    def stop(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor, no_restart=True)

    def _get(self, references: Any, timeout: float | None = None) -> Any:
        """`ray.get`, with our own errors as they were raised in the actor and Ray's as a sentence."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(references, timeout=timeout)
        except errors.GetTimeoutError:
            raise DerivationError(
                f"No engine came up within {START_SECONDS} s. Does the cluster have room for this many actors?"
            ) from None
        except errors.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, SteerError):
                raise cause from None
            raise DerivationError(f"An engine failed: {_last_line(error)}") from error
        except errors.RayActorError as error:
            raise DerivationError(
                f"An engine died, and again when it was started anew ({MAX_ACTOR_RESTARTS} times): {_last_line(error)}"
            ) from error


@contextmanager
def pool(
    config: ReaderConfig, *, actors: int = 1, ray_address: str | None = None, gpus_per_actor: float | None = None
) -> Iterator[Pool]:
    """Start Ray (or connect to `ray_address`), start the actors, stop what was started.

    A Ray that is already running in this process is used and left running.
    """
    if actors < 1:
        raise DerivationError(f"{actors} actors cannot read anything; at least 1 is needed.")
    # Ray phones home, and warns about a setting of the next release, unless told not to before it is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise DerivationError(
            "Derivation runs on Ray, which is not installed: pip install 'steer-engine[derive]'."
        ) from None
    started = not ray.is_initialized()
    if started:
        _start_ray(ray, actors, ray_address)
    local = ray_address is None
    workers: Pool | None = None
    try:
        resources = {"num_cpus": 0.0 if local else 1.0, "num_gpus": _gpus(ray, config, actors, gpus_per_actor, local)}
        workers = Pool(ray, config, actors=actors, resources=resources, env=_actor_env(actors, local=local))
        yield workers
    finally:
        if workers is not None:
            workers.stop()
        if started:
            ray.shutdown()


def _start_ray(ray: Any, actors: int, ray_address: str | None) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if ray_address is None:
        ray.init(
            address="local",
            num_cpus=actors,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            **quiet,
        )
        return
    try:
        ray.init(address=ray_address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise DerivationError(f"There is no Ray cluster at {ray_address!r}: {error}") from None


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
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; texts are short and nothing is generated
    }
    if local:
        # Ray gives an actor one thread; on a machine without GPUs the engine computes with the actor's share of cores.
        chosen["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // actors))
    return {name: os.environ.get(name, value) for name, value in chosen.items()}


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
