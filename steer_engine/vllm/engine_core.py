"""The engine core: holds which vectors all workers have, and lets in only what they can steer.

Wraps `vllm.v1.engine.core.EngineCore.preprocess_add_request` (an exception there fails that request alone) and adds
utility methods, which clients reach by name. Known for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from steer_engine.engine.admission import Resident
from steer_engine.errors import CapacityError, SteeringRequestError
from steer_engine.program import PROGRAM_KEY, Program
from steer_engine.settings import SteeringConfig
from steer_engine.vllm import scheduler
from steer_engine.vllm.patching import Symbol, wrap

PREPROCESS = Symbol("vllm.v1.engine.core:EngineCore.preprocess_add_request", ("request",))
COLLECTIVE_RPC = Symbol("vllm.v1.engine.core:EngineCore.collective_rpc", ("method", "timeout", "args"))
SYMBOLS = (PREPROCESS, COLLECTIVE_RPC)

Reply = dict[str, Any]
_RESIDENT = "_steer_resident"


def hook() -> None:
    wrap(PREPROCESS, _preprocess_add_request)
    owner, _ = PREPROCESS.owner()
    methods = (
        steer_put, steer_hold, steer_drop, steer_in_flight, steer_waiting, steer_status, steer_take, steer_scores,
    )  # fmt: skip
    for method in methods:
        setattr(owner, method.__name__, method)


def steer_put(self: Any, digest: str, payload: bytes) -> Reply:
    """Put a vector into all workers, or into none. `dropped` names what had to leave for it."""
    resident = _resident(self)
    if steer_hold(self, digest):
        return {"ok": True, "dropped": []}
    victims = resident.make_room(len(payload), _in_use(self), time.monotonic())
    if victims is None:
        return {"ok": False, "reason": f"the vectors in use fill the store ({resident.budget} bytes)"}
    for victim in victims:
        resident.drop(victim)
        self.collective_rpc("steer_drop", args=(victim,))
    replies = self.collective_rpc("steer_put", args=(digest, payload))
    failed = [reply for reply in replies if not reply["ok"]]
    if failed:
        self.collective_rpc("steer_drop", args=(digest,))
        return {"ok": False, "reason": failed[0]["reason"]}
    resident.put(digest, len(payload), time.monotonic())
    return {"ok": True, "dropped": victims}


def steer_hold(self: Any, digest: str) -> bool:
    """Whether all workers hold a vector; if so it stays for the request that is on its way."""
    return _resident(self).hold(digest, time.monotonic())


def steer_drop(self: Any, digest: str) -> Reply:
    """Give up a vector, unless a request of this engine names it."""
    if digest in _in_use(self):
        return {"ok": False, "reason": "in use"}
    _resident(self).drop(digest)
    self.collective_rpc("steer_drop", args=(digest,))
    return {"ok": True}


def steer_in_flight(self: Any, digest: str) -> int:
    """How many requests of this engine name a vector."""
    return sum(digest in _vectors_of(request.sampling_params) for request in self.scheduler.requests.values())


def steer_waiting(self: Any) -> int:
    """How many steered requests of this engine wait to be run."""
    return scheduler.num_waiting(self.scheduler)


def steer_status(self: Any) -> Reply:
    """How every worker is armed, and which vectors all of them hold."""
    armed = SteeringConfig.from_additional_config(self.vllm_config.additional_config) is not None
    if not armed:
        return {"ok": False, "reason": "this engine is not armed for steering", "armed": False}
    workers = self.collective_rpc("steer_status")
    failed = [worker["reason"] for worker in workers if not worker["ok"]]
    if failed:
        return {"ok": False, "reason": failed[0], "armed": True}
    return {
        "ok": True,
        "armed": True,
        "workers": workers,
        "vectors": _resident(self).digests(),
        "waiting": steer_waiting(self),
    }


def steer_take(self: Any, key: str, wanted: bool = True) -> Reply:
    """What was read under a capture key: by the first rank of each stage, since all its ranks read the same stream."""
    replies: list[Reply] = self.collective_rpc("steer_take", args=(key, wanted))
    if failed := [reply for reply in replies if not reply["ok"]]:
        return failed[0]
    if not wanted:
        return {"ok": True}
    of_stages = {tuple(reply["blocks"]): reply for reply in reversed(replies) if reply["blocks"]}
    parts = [of_stages[blocks] for blocks in sorted(of_stages)]
    if not parts or any(part["positions"] != parts[0]["positions"] for part in parts):
        return {"ok": False, "reason": "the stages of the pipeline have not read the same positions"}
    return {
        "ok": True,
        "blocks": [block for part in parts for block in part["blocks"]],
        "positions": parts[0]["positions"],
        "shape": [sum(part["shape"][0] for part in parts), *parts[0]["shape"][1:]],
        "rows": b"".join(part["rows"] for part in parts),
    }


def steer_scores(self: Any, keys: list[str]) -> Reply:
    """The numbers of scored requests. The ranks that have logits answer."""
    replies: list[Reply] = self.collective_rpc("steer_scores", args=(keys,))
    if failed := [reply for reply in replies if not reply["ok"]]:
        return failed[0]
    by_key = zip(*(reply["numbers"] for reply in replies), strict=True)
    return {"ok": True, "numbers": [next((one for one in found if one is not None), None) for found in by_key]}


def _resident(engine_core: Any) -> Resident:
    if not hasattr(engine_core, _RESIDENT):
        setattr(engine_core, _RESIDENT, Resident())
    resident: Resident = getattr(engine_core, _RESIDENT)
    return resident


def _in_use(engine_core: Any) -> set[str]:
    """Digests that a request of the engine names, waiting ones included."""
    requests = list(engine_core.scheduler.requests.values())
    return {digest for request in requests for digest in _vectors_of(request.sampling_params)}


def _vectors_of(params: Any) -> list[str]:
    extra_args = getattr(params, "extra_args", None)
    program = extra_args.get(PROGRAM_KEY) if extra_args else None
    return list(program["vectors"]) if program else []


def _preprocess_add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    def preprocess_add_request(self: Any, request: Any) -> Any:
        _check_steering(self, request)
        return original(self, request)

    return preprocess_add_request


def _check_steering(engine_core: Any, request: Any) -> None:
    extra_args = getattr(request.sampling_params, "extra_args", None)
    if not extra_args:
        return
    if extra_args.get("steering"):
        raise SteeringRequestError("This request's steering was never compiled; it came by a way that we do not know.")
    if PROGRAM_KEY not in extra_args:
        return
    config = SteeringConfig.from_additional_config(engine_core.vllm_config.additional_config)
    if config is None:
        raise SteeringRequestError("This engine is not armed for steering.")
    if config.bank_rows is not None and len(Program.from_wire(extra_args[PROGRAM_KEY]).bank_rows) > config.bank_rows:
        raise SteeringRequestError("This request needs more rows than the bank has; it would wait for ever.")
    resident, named = _resident(engine_core), _vectors_of(request.sampling_params)
    absent = [digest for digest in named if digest not in resident]
    if absent:
        raise CapacityError(f"The engine does not hold vector {absent[0]}; send the request again.")
    resident.touch(named, time.monotonic())
