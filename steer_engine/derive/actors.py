"""Actors on Ray, a few calls ahead of what has been taken from them.

Calls are handed out in order; answers come in any order and are yielded in the order of the calls. So what is merged,
and how, is the same for any number of actors.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from steer_engine.derive.activations import EngineFacts, Position, Reader, ReaderConfig, Reading, TextRows
from steer_engine.derive.engine_options import READING_ENV
from steer_engine.derive.pairs import Pair
from steer_engine.derive.texts import Text
from steer_engine.errors import DerivationError, SteerError

CALLS_IN_FLIGHT = 2
"""Per actor: one that runs and one that waits, so that no actor idles and none hoards."""

MAX_ACTOR_RESTARTS = 2
"""An actor that dies is started again and its calls are made again (they change nothing), this many times."""

LOCAL_STARTS = 3
"""Times that a Ray on this machine is tried to be started."""

CONNECT_SECONDS = 10.0
"""Longest wait for a cluster's address to answer."""

_OBJECT_STORE_BYTES = 256 << 20  # sums are small, rows of a chunk a few MB; Ray would take a third of the memory


class Workers:
    """`count` actors that host objects of one class, spread over the nodes.

    resources: what one actor takes of Ray's, `num_cpus` and `num_gpus`. env: variables of the actors' processes.
    """

    def __init__(
        self,
        ray: Any,
        hosted: type,
        arguments: tuple[Any, ...],
        *,
        count: int,
        resources: Mapping[str, float],
        env: Mapping[str, str],
    ) -> None:
        self._ray = ray
        remote = ray.remote(hosted).options(
            **resources,
            max_restarts=MAX_ACTOR_RESTARTS,
            max_task_retries=-1,  # a node's death takes a try every few seconds until the actor is up elsewhere
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": dict(env)},
        )
        self._actors = [remote.remote(*arguments) for _ in range(count)]

    def __len__(self) -> int:
        return len(self._actors)

    def everywhere(self, method: str, *, timeout: float) -> list[Any]:
        """The answers of all actors to one call, waited for together."""
        return list(self._get([getattr(actor, method).remote() for actor in self._actors], timeout=timeout))

    def ordered(self, method: str, calls: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """The answers to all calls, in the order of the calls."""
        window = CALLS_IN_FLIGHT * len(self._actors)
        waiting = list(reversed(range(len(calls))))
        running: dict[Any, tuple[int, int]] = {}  # object reference -> (which actor, which call)
        load = [0] * len(self._actors)
        done: dict[int, Any] = {}
        next_index = 0
        while next_index < len(calls):
            # Back-pressure: nothing is sent that is further than the window ahead of what was yielded.
            while waiting and waiting[-1] < next_index + 2 * window and min(load) < CALLS_IN_FLIGHT:
                which = load.index(min(load))
                index = waiting.pop()
                running[getattr(self._actors[which], method).remote(*calls[index])] = (which, index)
                load[which] += 1
            ready, _ = self._ray.wait(list(running), num_returns=1)
            for reference in ready:
                which, index = running.pop(reference)
                load[which] -= 1
                done[index] = self._get(reference)
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
                f"No actor was ready within {timeout:.0f} s. Does the cluster have room for {len(self)}?"
            ) from None
        except errors.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, SteerError):
                raise cause from None
            raise DerivationError(f"An actor failed: {_last_line(error)}") from error
        except errors.RayActorError as error:
            raise DerivationError(
                f"An actor died, and again when it was started anew ({MAX_ACTOR_RESTARTS} times): {_last_line(error)}"
            ) from error


@contextmanager
def ray_session(ray_address: str | None, *, num_cpus: int) -> Iterator[Any]:
    """The module `ray`, connected to `ray_address`, or to a local Ray that lives as long as this context.

    A Ray that is already running in this process is used and left running.
    """
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
        _start_ray(ray, num_cpus, ray_address)
    try:
        yield ray
    finally:
        if started:
            ray.shutdown()


def _start_ray(ray: Any, num_cpus: int, ray_address: str | None) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if ray_address is None:
        _start_local_ray(
            ray, num_cpus=num_cpus, include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **quiet
        )
        return
    _require_listening(ray_address)
    try:
        ray.init(address=ray_address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise DerivationError(f"There is no Ray cluster at {ray_address!r}: {error}") from None


def _start_local_ray(ray: Any, **settings: Any) -> None:
    """Start a Ray on this machine; again if need be, since Ray gives its daemons 30 s, which a busy machine exceeds."""
    for tried in range(1, LOCAL_STARTS + 1):
        try:
            ray.init(address="local", **settings)
            return
        except Exception as error:  # Ray raises a bare Exception here
            ray.shutdown()  # what was half started
            if tried == LOCAL_STARTS:
                raise DerivationError(
                    f"Ray did not start on this machine, {tried} times: {_last_line(error)} "
                    "Is it out of memory or very busy?"
                ) from error


def _require_listening(ray_address: str) -> None:
    """Raise DerivationError where nobody answers at `host:port`: Ray itself would try for minutes."""
    host, _, port = ray_address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return  # such as `auto`
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise DerivationError(f"There is no Ray cluster at {ray_address!r}: {error}.") from None


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


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
