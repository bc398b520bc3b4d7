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
