"""Ray actors: any class hosted in several processes (`Workers`), and engines that capture texts (`CapturePool`).

Calls are sent in order, a few ahead of what the caller has taken. Answers arrive in any order and are yielded in the
order of the calls. So results are merged in the same order for any number of actors.
"""

from __future__ import annotations

import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steer_engine.derive.capture_config import CAPTURE_ENV, CaptureConfig, Position, name_of, require_captured
from steer_engine.derive.capture_engine import CapturedText, CaptureEngine, EngineFacts
from steer_engine.derive.condition import Readout
from steer_engine.derive.moments import Array, Chunk
from steer_engine.derive.progress import Progress
from steer_engine.derive.texts import Pair, Text
from steer_engine.errors import DerivationError, SteerError

if TYPE_CHECKING:
    from steer_engine.llm import LLM

CALLS_IN_FLIGHT = 2
"""Calls per actor: one runs and one waits, so that no actor is idle."""

MAX_ACTOR_RESTARTS = 2
"""Restarts of an actor that dies. Its calls are repeated, which is safe because they change nothing."""

LOCAL_STARTS = 3
"""Attempts to start a Ray on this machine."""

CONNECT_SECONDS = 10.0
"""Timeout of a connection to a cluster's address."""

PAIRS_PER_CHUNK = 32
"""Pairs that an engine captures in one call. 64 short texts fill a batch, and a progress bar still moves."""

TEXTS_PER_CHECK = 1024
"""Texts that are tokenised in one call to check their lengths."""

START_SECONDS = 1800
"""Timeout for the start of an engine. The download of a model counts."""

_OBJECT_STORE_BYTES = 256 << 20  # sums are small, rows of a chunk a few MB; Ray's default is a third of the memory


class Workers:
    """`count` actors that host objects of one class, spread over the nodes.

    resources: Ray resources of one actor, `num_cpus` and `num_gpus`. env: environment variables of the actors.
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
            max_task_retries=-1,  # after a node dies, each try takes seconds until the actor is up elsewhere
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": dict(env)},
        )
        self._actors = [remote.remote(*arguments) for _ in range(count)]

    def __len__(self) -> int:
        return len(self._actors)

    def everywhere(self, method: str, *, timeout: float) -> list[Any]:
        """Answers of all actors to one call. timeout: seconds for all of them together."""
        return list(self._get([getattr(actor, method).remote() for actor in self._actors], timeout=timeout))

    def ordered(self, method: str, calls: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """Answers to all calls, in the order of the calls."""
        window = CALLS_IN_FLIGHT * len(self._actors)
        waiting = list(reversed(range(len(calls))))
        running: dict[Any, tuple[int, int]] = {}  # object reference -> (index of the actor, index of the call)
        load = [0] * len(self._actors)
        done: dict[int, Any] = {}
        next_index = 0
        while next_index < len(calls):
            # Back-pressure: no call is sent that is further than two windows ahead of what was yielded.
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
        """`ray.get`. Our own errors are raised as they were in the actor, Ray's errors as a DerivationError."""
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
                f"An actor died, and again after {MAX_ACTOR_RESTARTS} restarts: {_last_line(error)}"
            ) from error


class Capturer(ABC):
    """What captures texts chunk by chunk: a pool of actors, or an engine in this process."""

    @abstractmethod
    def facts(self) -> EngineFacts:
        """What the engines are, once all are up. Raises SteerError if one is not."""

    @abstractmethod
    def ordered(self, method: str, calls: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """Answers of `CaptureEngine` to all calls, in the order of the calls."""

    def capture_pairs(self, pairs: Sequence[Pair], *, keep_rows_of: int = 0) -> Iterator[Chunk]:
        """All pairs, chunk by chunk, in order. Chunks that begin before pair `keep_rows_of` contain rows."""
        starts = range(0, len(pairs), PAIRS_PER_CHUNK)
        calls = [(list(pairs[start : start + PAIRS_PER_CHUNK]), start < keep_rows_of) for start in starts]
        return self.ordered("capture_pairs", calls)

    def capture_texts(
        self, chunks: Sequence[Sequence[Text]], position: Position, source: str = ""
    ) -> Iterator[list[CapturedText]]:
        """Rows of all texts, chunk by chunk, in order. source: their file, if it is not that of the configuration."""
        return self.ordered("capture_texts", [(list(chunk), position, source) for chunk in chunks])

    def condition_values(self, texts: Sequence[Text], readout: Readout, source: str) -> Iterator[Array]:
        """Values of all prompts, chunk by chunk `[N, L]`, in order. source: their file, for messages."""
        starts = range(0, len(texts), 2 * PAIRS_PER_CHUNK)
        calls = [(list(texts[start : start + 2 * PAIRS_PER_CHUNK]), readout, source) for start in starts]
        return self.ordered("condition_values", calls)

    def text_errors(self, texts: Sequence[Text], position: Position) -> list[str]:
        """One sentence, with the line, for each text that cannot be captured. Nothing is captured."""
        starts = range(0, len(texts), TEXTS_PER_CHECK)
        calls = [(list(texts[start : start + TEXTS_PER_CHECK]), position) for start in starts]
        return [error for found in self.ordered("text_errors", calls) for error in found]


class CapturePool(Workers, Capturer):
    """Actors with one engine each. `capture_pool` starts and stops them."""

    def facts(self) -> EngineFacts:
        """Wait until every engine is up.

        Raises:
            DerivationError: two engines differ, or none was ready in time.
            SteerError: what stopped an engine.
        """
        facts: list[EngineFacts] = self.everywhere("facts", timeout=START_SECONDS)
        if any(other != facts[0] for other in facts):
            raise DerivationError(f"The actors run different engines: {facts}. Install the same on every node.")
        return facts[0]


class LivingEngine(Capturer):
    """A `steer_engine.LLM` of the caller's. It is used in this process, without Ray, and stays up."""

    def __init__(self, engine: CaptureEngine) -> None:
        self._engine = engine

    def facts(self) -> EngineFacts:
        return self._engine.facts()

    def ordered(self, method: str, calls: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        return (getattr(self._engine, method)(*call) for call in calls)


@dataclass(frozen=True, kw_only=True)
class Capturing:
    """Engines that are up, what they are, and where their progress is shown."""

    config: CaptureConfig
    engines: Capturer
    facts: EngineFacts
    shown: Progress


@contextmanager
def start_capturing(
    model: str | LLM,
    *,
    source: str,
    position: str,
    blocks: str | int | Iterable[int],
    site: str = "block",
    chat: bool = False,
    dtype: str = "auto",
    actors: int = 1,
    ray_address: str | None = None,
    gpus_per_actor: float | None = None,
    engine_args: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Iterator[Capturing]:
    """Start the engines of `derive` and `dump`, and stop them; or use a living one, which stays up.

    source: of the texts. From `chat` on, the arguments and their defaults are those of `EngineOptions`.

    Raises:
        DerivationError: a setting is invalid, or the engines did not start.
        SteerError: what stopped an engine.
    """
    if not isinstance(model, str):
        if (dtype, actors, ray_address, gpus_per_actor, engine_args) != ("auto", 1, None, None, None):
            raise DerivationError(
                "dtype, actors, ray_address, gpus_per_actor and engine_args are for engines that are started here; "
                "leave them out with a living LLM."
            )
        with Progress(enabled=progress) as shown:
            config = CaptureConfig.of(
                name_of(model), position=position, blocks=blocks, chat=chat, source=source, dtype=dtype,
                engine_args=None, local=False, site=site,
            )  # fmt: skip
            require_captured(model, config.blocks, config.site)
            living = LivingEngine(CaptureEngine(config, model))
            yield Capturing(config=config, engines=living, facts=living.facts(), shown=shown)
        return
    config = CaptureConfig.of(
        model,
        position=position,
        blocks=blocks,
        chat=chat,
        source=source,
        dtype=dtype,
        engine_args=engine_args,
        local=ray_address is None,
        site=site,
    )
    with (
        Progress(enabled=progress) as shown,
        capture_pool(config, actors=actors, ray_address=ray_address, gpus_per_actor=gpus_per_actor) as engines,
    ):
        with shown.waiting(f"starting {actors} engine{'s' if actors > 1 else ''} for {model}"):
            facts = engines.facts()
        yield Capturing(config=config, engines=engines, facts=facts, shown=shown)


@contextmanager
def capture_pool(
    config: CaptureConfig, *, actors: int = 1, ray_address: str | None = None, gpus_per_actor: float | None = None
) -> Iterator[CapturePool]:
    """Start Ray (see `ray_session`) and the actors; stop what was started."""
    if actors < 1:
        raise DerivationError(f"{actors} actors cannot capture anything; at least 1 is needed.")
    local = ray_address is None
    with ray_session(ray_address, num_cpus=actors) as ray:
        resources = {"num_cpus": 0.0 if local else 1.0, "num_gpus": _gpus(ray, config, actors, gpus_per_actor, local)}
        env = _actor_env(actors, local=local)
        engines = CapturePool(ray, CaptureEngine, (config,), count=actors, resources=resources, env=env)
        try:
            yield engines
        finally:
            engines.stop()


def _gpus(ray: Any, config: CaptureConfig, actors: int, per_actor: float | None, local: bool) -> float:
    """GPUs of one actor: the number requested, else the engine's tensor parallel size if Ray has enough, else 0.

    Raises:
        DerivationError: this machine has fewer than requested. (A cluster may grow: there the actors wait.)
    """
    available = float(ray.cluster_resources().get("GPU", 0))
    if per_actor is None:
        needed = float(dict(config.engine_args).get("tensor_parallel_size", 1))
        return needed if available >= actors * needed else 0.0
    if local and actors * per_actor > available:
        raise DerivationError(
            f"{actors} actor(s) with {per_actor:g} GPU(s) each do not fit: this machine has {available:g}."
        )
    return per_actor


def _actor_env(actors: int, *, local: bool) -> dict[str, str]:
    """Environment variables of the actors. The user's own values take precedence."""
    chosen = {
        **CAPTURE_ENV,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; texts are short and nothing is generated
    }
    if local:
        # Ray gives an actor one thread. On a machine without GPUs, the engine computes with the actor's share of cores.
        chosen["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // actors))
    return {name: os.environ.get(name, value) for name, value in chosen.items()}


@contextmanager
def ray_session(ray_address: str | None, *, num_cpus: int) -> Iterator[Any]:
    """The module `ray`, connected to `ray_address`, or to a local Ray that ends with this context.

    A Ray that already runs in this process is used and left running.
    """
    # Ray reads these when it is imported: no usage statistics, and no warning about a setting of its next release.
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
    """Start a Ray on this machine, in several attempts: Ray gives its daemons 30 s, which a busy machine exceeds."""
    for attempt in range(1, LOCAL_STARTS + 1):
        try:
            ray.init(address="local", **settings)
            return
        except Exception as error:  # Ray raises a bare Exception here
            ray.shutdown()  # stops the daemons that did start
            if attempt == LOCAL_STARTS:
                raise DerivationError(
                    f"Ray did not start on this machine in {attempt} attempts: {_last_line(error)} "
                    "Is it out of memory or very busy?"
                ) from error


def _require_listening(ray_address: str) -> None:
    """Raise DerivationError if nothing listens at `host:port`. Ray itself would try for minutes."""
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
