"""Brings vectors into an engine before a request needs them, and asks how its workers are armed.

Vectors travel by vLLM's own RPC, as the bytes of our own safetensors file; an engine has them on all ranks or on none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import numpy as np

from steer_engine import __version__
from steer_engine.api.frontend import Frontend
from steer_engine.errors import CapacityError, UnsupportedEngineError
from steer_engine.vectors import safetensors_format
from steer_engine.vllm.patching import Symbol

SYMBOLS = (
    Symbol("vllm.v1.engine.core_client:AsyncMPClient.call_utility_all_async", ("method", "args")),
    Symbol("vllm.v1.engine.core_client:SyncMPClient.call_utility", ("method", "args")),
    Symbol("vllm.v1.engine.core_client:InprocClient.__init__"),
)

HANDSHAKE_SECONDS = 30.0
"""How long a readiness check waits for the engine. The call itself is never cut: its reply would be left unread."""


async def ship(async_llm: Any, digests: Iterable[str]) -> int:
    """Put vectors into every engine of `async_llm`; returns the bytes sent to each.

    Raises:
        CapacityError: an engine cannot take one.
    """
    frontend: Frontend = async_llm.input_processor.steering

    async def ask(method: str, *args: Any) -> list[Any]:
        replies: list[Any] = await asyncio.shield(async_llm.engine_core.call_utility_all_async(method, *args))
        return replies

    sent = 0
    for digest in digests:
        asked = frontend.held.now()
        if digest not in frontend.held or not all(await ask("steer_hold", digest)):
            asked = frontend.held.now()
            payload = _payload(frontend, digest)
            _settle(frontend, digest, await ask("steer_put", digest, payload))
            sent += len(payload)
        frontend.held.confirm(digest, asked)
    return sent


def ship_sync(llm_engine: Any, digests: Iterable[str]) -> None:
    """The same for an offline engine."""
    frontend: Frontend = llm_engine.input_processor.steering
    for digest in digests:
        asked = frontend.held.now()
        if digest not in frontend.held or not call(llm_engine, "steer_hold", digest):
            asked = frontend.held.now()
            _settle(frontend, digest, [call(llm_engine, "steer_put", digest, _payload(frontend, digest))])
        frontend.held.confirm(digest, asked)


def call(llm_engine: Any, method: str, *args: Any) -> Any:
    """A utility method of an offline engine's core, in this process or another."""
    client = llm_engine.engine_core
    if hasattr(client, "call_utility"):
        return client.call_utility(method, *args)
    return getattr(client.engine_core, method)(*args)


async def in_flight(async_llm: Any, digest: str) -> int:
    """How many requests name a vector, over all engines."""
    counts = await asyncio.shield(async_llm.engine_core.call_utility_all_async("steer_in_flight", digest))
    return sum(counts)


async def num_waiting(async_llm: Any) -> int:
    """How many steered requests wait to be run, over all engines."""
    counts = await asyncio.shield(async_llm.engine_core.call_utility_all_async("steer_waiting"))
    return sum(counts)


async def handshake(async_llm: Any) -> dict[str, Any]:
    """How the engines are armed: the status of the first, after comparing all of them.

    Raises:
        UnsupportedEngineError: an engine or worker is not armed, not alike, or of another version.
        CapacityError: no answer in time.
    """
    client = async_llm.engine_core
    task = asyncio.ensure_future(client.call_utility_all_async("steer_status"))
    done, _ = await asyncio.wait({task}, timeout=HANDSHAKE_SECONDS)
    if not done:
        raise CapacityError(f"The engine did not answer within {HANDSHAKE_SECONDS:g} s.", retry_after=5)
    return check_status(task.result())


async def take(async_llm: Any, key: str, *, wanted: bool = True) -> np.ndarray | None:
    """What was read under a capture key, as `rows_of`; nothing more is read under it, and nothing is held any more.

    wanted: send it; else it is only given up, and the answer is None.
    """
    replies = await asyncio.shield(async_llm.engine_core.call_utility_all_async("steer_take", key, wanted))
    if not wanted:
        return None
    # One of several engines ran the request; the others know nothing of the key.
    return rows_of(max(replies, key=lambda reply: len(reply.get("positions", ()))))


def rows_of(reply: dict[str, Any]) -> np.ndarray:
    """float32 `[blocks, positions, D]` of an answer to `steer_take`."""
    if not reply["ok"]:
        raise RuntimeError(f"Reading failed in the worker: {reply['reason']}")
    return np.frombuffer(reply["rows"], dtype=np.float32).reshape(reply["shape"])


def check_status(statuses: list[dict[str, Any]]) -> dict[str, Any]:
    """The first status, if all engines and workers are armed alike, with the workers of all: `engine` numbers them."""
    for status in statuses:
        if not status["ok"]:
            raise UnsupportedEngineError(status["reason"])
    workers = [worker for status in statuses for worker in status["workers"]]
    for worker in workers:
        if worker["version"] != __version__:
            raise UnsupportedEngineError(f"A worker runs steer-engine {worker['version']}, the server {__version__}.")
        for key in ("asked_blocks", "ops", "rows", "hidden_size", "dtype"):
            if worker[key] != workers[0][key]:
                raise UnsupportedEngineError(f"Workers differ in {key}: {workers[0][key]} and {worker[key]}.")
    for status in statuses:
        _check_stages(status["workers"])
    numbered = [{**worker, "engine": number} for number, status in enumerate(statuses) for worker in status["workers"]]
    return {**statuses[0], "workers": numbered}


def _check_stages(workers: list[dict[str, Any]]) -> None:
    """The workers of one engine arm all blocks between them, and those that have the same blocks arm them alike."""
    asked = workers[0]["asked_blocks"]
    armed: set[int] = set()
    for worker in workers:
        here = [block for block in asked if block in worker["stage_blocks"]]
        if worker["armed_blocks"] != here:
            raise UnsupportedEngineError(f"A worker arms blocks {worker['armed_blocks']} and should arm {here}.")
        alike = next(other for other in workers if other["stage_blocks"] == worker["stage_blocks"])
        if worker["forms"] != alike["forms"]:
            raise UnsupportedEngineError(f"Workers differ in forms: {alike['forms']} and {worker['forms']}.")
        armed.update(here)
    if absent := sorted(set(asked) - armed):
        raise UnsupportedEngineError(f"No worker has blocks {absent}, which are to be armed.")


def _payload(frontend: Frontend, digest: str) -> bytes:
    return safetensors_format.to_bytes(frontend.vector(digest))


def _settle(frontend: Frontend, digest: str, replies: list[dict[str, Any]]) -> None:
    failed = [reply["reason"] for reply in replies if not reply["ok"]]
    if failed:
        frontend.held.forget([digest])
        raise CapacityError(f"The engine could not take vector {digest}: {failed[0]}.")
    frontend.held.forget(dropped for reply in replies for dropped in reply["dropped"])
