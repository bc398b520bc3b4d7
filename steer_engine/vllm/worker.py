"""Methods that every worker answers: put a vector, drop one, say how it is armed, hand out what was read.

Set on `vllm.v1.worker.worker_base.WorkerBase`, reached by `collective_rpc`. They never raise: with several workers an
exception leaves replies unread, and the next call would read them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from steer_engine import __version__
from steer_engine.vectors import safetensors_format
from steer_engine.vllm import runner_v1, runner_v2
from steer_engine.vllm.patching import Symbol

logger = logging.getLogger(__name__)

WORKER_BASE = Symbol("vllm.v1.worker.worker_base:WorkerBase.__init__", ("vllm_config",))
SYMBOLS = (WORKER_BASE,)

Reply = dict[str, Any]
"""`{"ok": True, ...}` or `{"ok": False, "reason": ...}`; plain data only."""


def hook() -> None:
    owner, _ = WORKER_BASE.owner()
    for method in (steer_put, steer_drop, steer_status, steer_take, steer_scores):
        setattr(owner, method.__name__, method)


def _total(method: Callable[..., Reply]) -> Callable[..., Reply]:
    @functools.wraps(method)
    def answered(self: Any, *args: Any) -> Reply:
        try:
            return method(self, *args)
        except Exception as error:
            logger.exception("Worker method %s failed.", method.__name__)
            return {"ok": False, "reason": f"{type(error).__name__}: {error}"[:500]}

    return answered


@_total
def steer_put(self: Any, digest: str, payload: bytes) -> Reply:
    """Hold a vector: `payload` is its safetensors file, `digest` what its content must hash to."""
    adapter = _adapter(self)
    if adapter is None:
        return {"ok": False, "reason": "this worker is not armed"}
    vector = safetensors_format.from_bytes(payload)
    if vector.digest != digest:
        return {"ok": False, "reason": f"content hashes to {vector.digest}, not to {digest}"}
    adapter.runtime.store.put(vector)
    return {"ok": True}


@_total
def steer_drop(self: Any, digest: str) -> Reply:
    """Give up a vector that no request of the engine names any more."""
    adapter = _adapter(self)
    if adapter is not None:
        adapter.runtime.bank.forget(digest)
        adapter.runtime.store.drop(digest)
    return {"ok": True}


@_total
def steer_status(self: Any) -> Reply:
    """How this worker is armed, and what it holds."""
    adapter = _adapter(self)
    if adapter is None:
        return {"ok": False, "reason": "this worker is not armed"}
    runtime = adapter.runtime
    return {
        "ok": True,
        "version": __version__,
        "runner": f"{type(self.model_runner).__module__}.{type(self.model_runner).__qualname__}",
        "stage_blocks": list(runtime.stage_blocks),
        "asked_blocks": list(runtime.asked_blocks),
        "armed_blocks": list(runtime.armed_blocks),
        "forms": {str(block): form.value for block, form in runtime.forms.items()},
        "capture_blocks": list(runtime.capture_blocks),
        "ops": [op.value for op in runtime.config.ops],
        "hidden_size": runtime.hidden_size,
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "device": str(runtime.tables.bank_RD.device),
        "kernel": "triton" if runtime.use_triton else "torch",
        "fused_blocks": list(runtime.fused_blocks),
        "fused_calls": runtime.fused_calls,
        "rows": runtime.config.rows,
        "bank_rows": runtime.bank.num_rows,
        "bank_rows_used": runtime.bank.num_used,
        "bank_rows_pinned": runtime.bank.num_pinned,
        "steered_slots": len(runtime.programs.steered_slots),
        "table_bytes": runtime.num_bytes,
        "store_bytes": runtime.store.num_bytes,
        "captured_bytes": adapter.reader.num_bytes,
        "vectors": runtime.store.digests(),
    }


@_total
def steer_take(self: Any, key: str, wanted: bool = True) -> Reply:
    """What was read under a capture key at this worker's blocks: positions, float32 [blocks, positions, D] as bytes.

    wanted: give it; else it is only forgotten. A request that still runs (it was aborted, and the next step will say
    so) reads nothing more.
    """
    adapter = _adapter(self)
    if adapter is None:
        return {"ok": False, "reason": "this worker is not armed"}
    adapter.stop_reading(key)
    positions, rows_LPD = adapter.reader.take(key)
    if not wanted:
        return {"ok": True}
    return {
        "ok": True,
        "blocks": list(adapter.runtime.capture_blocks),
        "positions": positions,
        "shape": list(rows_LPD.shape),
        "rows": rows_LPD.tobytes(),
    }


@_total
def steer_scores(self: Any, keys: list[str]) -> Reply:
    """The numbers of scored requests, in the order of their keys; None for what was not scored."""
    adapter = _adapter(self)
    if adapter is None:
        return {"ok": False, "reason": "this worker is not armed"}
    return {"ok": True, "numbers": adapter.scores.take(keys)}


def _adapter(worker: Any) -> runner_v1.V1Adapter | runner_v2.V2Adapter | None:
    runner = worker.model_runner
    if runner_v1.LOAD_MODEL.owner()[0] in type(runner).__mro__:
        return runner_v1.adapter_of(runner)
    return runner_v2.adapter_of(runner)
