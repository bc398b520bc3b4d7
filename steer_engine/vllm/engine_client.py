"""Talks to the engines from the API process: ships vectors, and asks how the workers are armed.

Vectors travel by vLLM's own RPC as the bytes of our safetensors format. An engine has a vector on all ranks or on none.
Known for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import numpy as np

from steer_engine import __version__
from steer_engine.api.frontend import Frontend
from steer_engine.api.monitors import MonitorCounts
from steer_engine.errors import CapacityError, UnsupportedEngineError
from steer_engine.monitor import FLAG, Watched, monitors_of_environment
from steer_engine.resolve import ResolvedSpec
from steer_engine.settings import MONITORS_ENV, Limits
from steer_engine.vectors import safetensors_format
from steer_engine.vllm import probed
from steer_engine.vllm.patching import Symbol

USED = (
    Symbol("vllm.v1.engine.core_client:AsyncMPClient.call_utility_all_async", ("method", "args")),
    Symbol("vllm.v1.engine.core_client:SyncMPClient.call_utility", ("method", "args")),
    Symbol("vllm.v1.engine.core_client:InprocClient.__init__"),
)

logger = logging.getLogger(__name__)

HANDSHAKE_SECONDS = 30.0
"""How long a readiness check waits. The call itself is never cancelled: its reply would stay unread."""


async def ship(async_llm: Any, resolved: ResolvedSpec) -> int:
    """Put the vectors of a request into every engine of `async_llm`. Returns the bytes sent to each engine.

    Raises:
        CapacityError: an engine cannot take a vector.
    """
    frontend: Frontend = async_llm.input_processor.steering
    sent = 0
    for digest in frontend.missing(resolved):
        asked = frontend.shipped.now()
        if digest not in frontend.shipped or not all(await call_all(async_llm, "hold", digest)):
            asked = frontend.shipped.now()
            payload = safetensors_format.to_bytes(resolved.vectors[digest])
            _settle(frontend, digest, await call_all(async_llm, "put", digest, payload))
            sent += len(payload)
        frontend.shipped.confirm(digest, asked)
    return sent


def ship_sync(llm_engine: Any, resolved: ResolvedSpec) -> None:
    """The same for an offline engine."""
    frontend: Frontend = llm_engine.input_processor.steering
    for digest in frontend.missing(resolved):
        asked = frontend.shipped.now()
        if digest not in frontend.shipped or not call(llm_engine, "hold", digest):
            asked = frontend.shipped.now()
            payload = safetensors_format.to_bytes(resolved.vectors[digest])
            _settle(frontend, digest, [call(llm_engine, "put", digest, payload)])
        frontend.shipped.confirm(digest, asked)


def call(llm_engine: Any, action: str, *args: Any) -> Any:
    """Run an action of `engine_core` on an offline engine, in this process or another."""
    client = llm_engine.engine_core
    if hasattr(client, "call_utility"):
        return client.call_utility("steer", action, list(args))
    return client.engine_core.steer(action, list(args))


async def call_all(async_llm: Any, action: str, *args: Any) -> list[Any]:
    """Run an action of `engine_core` on every engine of a server. The caller may be cancelled, the call is not."""
    replies: list[Any] = await asyncio.shield(async_llm.engine_core.call_utility_all_async("steer", action, list(args)))
    return replies


async def in_flight(async_llm: Any, digest: str) -> int:
    """How many requests name a vector, over all engines."""
    return sum(await call_all(async_llm, "in_flight", digest))


async def num_waiting(async_llm: Any) -> int:
    """How many steered requests wait to run, over all engines."""
    return sum(await call_all(async_llm, "waiting"))


async def handshake(async_llm: Any) -> dict[str, Any]:
    """How the engines are armed: the status of the first, after comparing all of them.

    Raises:
        UnsupportedEngineError: an engine or worker is not armed, armed differently, or of another version.
        CapacityError: no answer in time.
    """
    task = asyncio.ensure_future(async_llm.engine_core.call_utility_all_async("steer", "status", []))
    done, _ = await asyncio.wait({task}, timeout=HANDSHAKE_SECONDS)
    if not done:
        raise CapacityError(f"The engine did not answer within {HANDSHAKE_SECONDS:g} s.", retry_after=5)
    return check_status(task.result())


async def watch(async_llm: Any) -> None:
    """Make the engines of a server measure its monitors, and its metrics count them.

    Raises:
        UnsupportedEngineError: an engine cannot.
    """
    monitors, vectors = async_llm.input_processor.steering.monitors
    if not monitors:
        return
    payloads = {digest: safetensors_format.to_bytes(vector) for digest, vector in vectors.items()}
    replies = await call_all(async_llm, "watch", Watched.of(monitors).to_wire(), payloads)
    if failed := [reply["reason"] for reply in replies if not reply["ok"]]:
        raise UnsupportedEngineError(f"{FLAG}: {failed[0]}.")
    setattr(async_llm.output_processor, probed.COUNT, MonitorCounts(monitors))
    for monitor in monitors:
        logger.info("Monitor %s", monitor)


async def fetch_capture(async_llm: Any, key: str, end: int | None) -> np.ndarray:
    """The rows captured under a key, as `rows_of`; those from position `end` on are dropped. The workers forget all."""
    replies = await call_all(async_llm, "fetch_capture", key, True, end)
    # One of several engines ran the request; the others do not know the key.
    return rows_of(max(replies, key=lambda reply: len(reply.get("positions", ()))))


async def drop_capture(async_llm: Any, key: str) -> None:
    """Make the workers forget the rows of a key, and capture nothing more under it."""
    await call_all(async_llm, "fetch_capture", key, False)


def rows_of(reply: dict[str, Any]) -> np.ndarray:
    """float32 `[points, positions, D]` of a reply to `fetch_capture`."""
    if not reply["ok"]:
        raise RuntimeError(f"Capture failed in the worker: {reply['reason']}")
    return np.frombuffer(reply["rows"], dtype=np.float32).reshape(reply["shape"])


def check_status(statuses: list[dict[str, Any]]) -> dict[str, Any]:
    """The first status, with the workers of all engines; `engine` numbers them.

    Raises:
        UnsupportedEngineError: the engines or workers are not all armed in the same way.
    """
    for status in statuses:
        if not status["ok"]:
            raise UnsupportedEngineError(status["reason"])
    workers = [worker for status in statuses for worker in status["workers"]]
    limits = Limits.from_environment().of_probes
    monitors = [spec.text for spec in monitors_of_environment()]
    for worker in workers:
        if worker["version"] != __version__:
            raise UnsupportedEngineError(f"A worker runs steer-engine {worker['version']}, the server {__version__}.")
        # A worker has allocated its room by these.
        if worker["probe_limits"] != limits:
            raise UnsupportedEngineError(
                f"A worker's limits max_probes and max_probe_numbers are {worker['probe_limits']}, the server's "
                f"{limits}: set STEER_ENGINE_MAX_PROBES and STEER_ENGINE_MAX_PROBE_NUMBERS alike on every machine."
            )
        if worker["monitors"] != monitors:
            raise UnsupportedEngineError(
                f"A worker has room for the monitors {worker['monitors']}, the server has {monitors}: set "
                f"{MONITORS_ENV} alike on every machine."
            )
        for key in ("asked_blocks", "sites", "ops", "rows", "hidden_size", "dtype"):
            if worker[key] != workers[0][key]:
                raise UnsupportedEngineError(f"Workers differ in {key}: {workers[0][key]} and {worker[key]}.")
    for status in statuses:
        _check_stages(status["workers"])
    numbered = [{**worker, "engine": number} for number, status in enumerate(statuses) for worker in status["workers"]]
    ended = sum(status["ended_non_finite"] for status in statuses)
    return {**statuses[0], "workers": numbered, "ended_non_finite": ended}


def _check_stages(workers: list[dict[str, Any]]) -> None:
    """The workers of one engine arm all blocks between them; workers with equal blocks arm them in the same form."""
    requested = workers[0]["asked_blocks"]
    armed: set[int] = set()
    for worker in workers:
        here = [block for block in requested if block in worker["stage_blocks"]]
        if worker["armed_blocks"] != here:
            raise UnsupportedEngineError(f"A worker arms blocks {worker['armed_blocks']} and should arm {here}.")
        same_stage = next(other for other in workers if other["stage_blocks"] == worker["stage_blocks"])
        if worker["forms"] != same_stage["forms"]:
            raise UnsupportedEngineError(f"Workers differ in forms: {same_stage['forms']} and {worker['forms']}.")
        armed.update(here)
    if absent := sorted(set(requested) - armed):
        raise UnsupportedEngineError(f"No worker has blocks {absent}, which must be armed.")


def _settle(frontend: Frontend, digest: str, replies: list[dict[str, Any]]) -> None:
    failed = [reply["reason"] for reply in replies if not reply["ok"]]
    if failed:
        frontend.shipped.forget([digest])
        raise CapacityError(f"The engine could not take vector {digest}: {failed[0]}.")
    frontend.shipped.forget(dropped for reply in replies for dropped in reply["dropped"])
