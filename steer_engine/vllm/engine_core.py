"""The engine core: tracks which vectors all workers hold, and admits only what they can steer.

Wraps `vllm.v1.engine.core.EngineCore.preprocess_add_request` (an exception there fails that request alone) and adds one
utility method, `steer(action, args)`, which clients reach by name. Known for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from steer_engine.api.request_field import FIELD, is_absent, parsed_null
from steer_engine.engine.admission import ResidentVectors
from steer_engine.errors import CapacityError, SteeringRequestError
from steer_engine.monitor import Watched
from steer_engine.program import PROGRAM_KEY, Program
from steer_engine.settings import SteeringConfig
from steer_engine.vllm import measured, non_finite, probed, scheduler
from steer_engine.vllm.patching import Patch, Symbol, apply

Reply = dict[str, Any]
"""`{"ok": True, ...}` or `{"ok": False, "reason": ...}`; plain data only."""

USED = (Symbol("vllm.v1.engine.core:EngineCore.collective_rpc", ("method", "timeout", "args")),)

_RESIDENT = "_steer_resident"
_CONFIG = "_steer_config"


def put(core: Any, digest: str, payload: bytes) -> Reply:
    """Put a vector into all workers, or into none. `dropped` names the vectors that made room."""
    resident = _resident(core)
    if hold(core, digest):
        return {"ok": True, "dropped": []}
    victims = resident.make_room(len(payload), _in_use(core), time.monotonic())
    if victims is None:
        return {"ok": False, "reason": f"the vectors in use fill the store ({resident.budget} bytes)"}
    for victim in victims:
        resident.drop(victim)
        _workers(core, "drop", victim)
    failed = [reply for reply in _workers(core, "put", digest, payload) if not reply["ok"]]
    if failed:
        _workers(core, "drop", digest)
        return {"ok": False, "reason": failed[0]["reason"]}
    resident.put(digest, len(payload), time.monotonic())
    return {"ok": True, "dropped": victims}


def hold(core: Any, digest: str) -> bool:
    """Whether all workers hold a vector. If so, it is kept for the request that is on its way."""
    return _resident(core).pin_if_resident(digest, time.monotonic())


def drop(core: Any, digest: str) -> Reply:
    """Drop a vector, unless a request of this engine names it."""
    if digest in _in_use(core):
        return {"ok": False, "reason": "in use"}
    _resident(core).drop(digest)
    _workers(core, "drop", digest)
    return {"ok": True}


def watch(core: Any, numbers: list[Any], payloads: dict[str, bytes]) -> Reply:
    """Measure monitors (`Watched` in wire form) at every request from now on, and keep their vectors. payloads: by
    digest.

    Every API process asks for it when it starts; all must ask for the same.
    """
    watched = probed.watched_by(core.scheduler)
    if watched is not None:
        same = watched.to_wire() == numbers
        return {"ok": True} if same else {"ok": False, "reason": "another API process watches other monitors"}
    for digest, payload in payloads.items():
        if not (reply := put(core, digest, payload))["ok"]:
            return reply
    if failed := [reply for reply in _workers(core, "watch", numbers) if not reply["ok"]]:
        return failed[0]
    probed.watch(core.scheduler, Watched.from_wire(numbers))
    return {"ok": True}


def in_flight(core: Any, digest: str) -> int:
    """How many requests of this engine name a vector."""
    return sum(digest in _vectors_of(request.sampling_params) for request in core.scheduler.requests.values())


def waiting(core: Any) -> int:
    """How many steered requests of this engine wait to run."""
    return scheduler.num_waiting(core.scheduler)


def status(core: Any) -> Reply:
    """How every worker is armed, and which vectors all of them hold. `vectors` lists MAX_LISTED of them at most."""
    if _config(core) is None:
        return {"ok": False, "reason": "this engine is not armed for steering", "armed": False}
    workers = _workers(core, "status")
    failed = [worker["reason"] for worker in workers if not worker["ok"]]
    if failed:
        return {"ok": False, "reason": failed[0], "armed": True}
    return {
        "ok": True,
        "armed": True,
        "workers": workers,
        "num_vectors": len(_resident(core)),
        "vectors": _resident(core).digests(),
        "waiting": waiting(core),
        "ended_non_finite": non_finite.num_ended(core.scheduler),
    }


def fetch_capture(core: Any, key: str, wanted: bool = True, end: int | None = None) -> Reply:
    """The rows captured under a key, from the first rank of each stage: all its ranks see the same stream.

    wanted, end: see `worker.fetch_capture`.
    """
    replies = _workers(core, "fetch_capture", key, wanted, end)
    if failed := [reply for reply in replies if not reply["ok"]]:
        return failed[0]
    if not wanted:
        return {"ok": True}
    parts = [reply for reply in replies if reply["points"]]
    if not parts or any(part["positions"] != parts[0]["positions"] for part in parts):
        return {"ok": False, "reason": "the stages of the pipeline captured different positions"}
    num_bytes = 4 * math.prod(parts[0]["shape"][1:])  # float32, of one point
    rows_of = {
        point: part["rows"][place * num_bytes : (place + 1) * num_bytes]
        for part in reversed(parts)
        for place, point in enumerate(part["points"])
    }
    return {
        "ok": True,
        "positions": parts[0]["positions"],
        "shape": [len(rows_of), *parts[0]["shape"][1:]],
        "rows": b"".join(rows_of[point] for point in sorted(rows_of)),
    }


def scores(core: Any, keys: list[str]) -> Reply:
    """The numbers of scored requests, from the ranks that have logits."""
    replies = _workers(core, "scores", keys)
    if failed := [reply for reply in replies if not reply["ok"]]:
        return failed[0]
    by_key = zip(*(reply["numbers"] for reply in replies), strict=True)
    return {"ok": True, "numbers": [next((one for one in found if one is not None), None) for found in by_key]}


_ACTIONS: dict[str, Callable[..., Any]] = {
    action.__name__: action for action in (put, hold, drop, watch, in_flight, waiting, status, fetch_capture, scores)
}


def steer(self: Any, action: str, args: list[Any]) -> Any:
    """Run one of the actions above. Set on `EngineCore`; vLLM's RPC takes no variable arguments."""
    return _ACTIONS[action](self, *args)


def _workers(core: Any, action: str, *args: Any) -> list[Reply]:
    replies: list[Reply] = core.collective_rpc("steer", args=(action, *args))
    return replies


def _config(core: Any) -> SteeringConfig | None:
    """How the engine is armed, validated once; None if it is not."""
    if not hasattr(core, _CONFIG):
        setattr(core, _CONFIG, SteeringConfig.from_additional_config(core.vllm_config.additional_config))
    config: SteeringConfig | None = getattr(core, _CONFIG)
    return config


def _resident(core: Any) -> ResidentVectors:
    if not hasattr(core, _RESIDENT):
        setattr(core, _RESIDENT, ResidentVectors())
    resident: ResidentVectors = getattr(core, _RESIDENT)
    return resident


def _in_use(core: Any) -> set[str]:
    """Digests that a monitor or a request of the engine names, waiting requests included."""
    requests, watched = list(core.scheduler.requests.values()), probed.watched_by(core.scheduler)
    named = {digest for request in requests for digest in _vectors_of(request.sampling_params)}
    return named if watched is None else named | watched.vectors


def _vectors_of(params: Any) -> list[str]:
    extra_args = getattr(params, "extra_args", None)
    program = extra_args.get(PROGRAM_KEY) if extra_args else None
    return list(program["vectors"]) if program else []


def _preprocess_add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    def preprocess_add_request(self: Any, request: Any) -> Any:
        _check_steering(self, request)
        return original(self, request)

    return preprocess_add_request


def _check_steering(core: Any, request: Any) -> None:
    extra_args = getattr(request.sampling_params, "extra_args", None)
    if not extra_args:
        return
    if not is_absent(parsed_null(extra_args.get(FIELD))):
        raise SteeringRequestError(
            "This request reached the engine with uncompiled steering; its entry point is not supported."
        )
    if PROGRAM_KEY not in extra_args:
        return
    config = _config(core)
    if config is None:
        raise SteeringRequestError("This engine is not armed for steering.")
    if config.bank_rows is not None and len(Program.from_wire(extra_args[PROGRAM_KEY]).bank_rows) > config.bank_rows:
        raise SteeringRequestError("This request needs more rows than the bank has; it would wait forever.")
    resident, named = _resident(core), _vectors_of(request.sampling_params)
    absent = [digest for digest in named if digest not in resident]
    if absent:
        # The API process confirmed them within FRESH_SECONDS, and they are kept for PIN_SECONDS: the request was under
        # way for half a minute. vLLM logs this error and answers 500, for it passes on no reason from here.
        raise CapacityError(f"The engine does not hold vector {absent[0]}; send the request again.")
    resident.touch(named, time.monotonic())
    measured.watch(core, request)


PREPROCESS = Symbol("vllm.v1.engine.core:EngineCore.preprocess_add_request", ("request",))
PATCHES = (Patch(PREPROCESS, _preprocess_add_request),)


def install() -> None:
    apply(PATCHES)
    owner, _ = PREPROCESS.owner()
    owner.steer = steer
