"""The worker: arms the model after it is loaded, and answers the engine core's actions.

Wraps `vllm.v1.worker.gpu_worker.Worker.load_model`, which every runner and device passes, and adds one method,
`steer(action, *args)`, to `WorkerBase`; `collective_rpc` reaches it. It never raises: with several workers an exception
leaves replies unread, and the next call would read them. Known for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from vllm.config import set_current_vllm_config

from steer_engine import __version__
from steer_engine.monitor import Watched, monitors_of_environment
from steer_engine.settings import Limits
from steer_engine.vectors import safetensors_format
from steer_engine.vllm.arming import arm
from steer_engine.vllm.patching import Patch, Symbol, apply
from steer_engine.vllm.runner import ADAPTER, RunnerAdapter, adapter_of
from steer_engine.vllm.runner_v1 import V1Adapter
from steer_engine.vllm.runner_v2 import V2Adapter

logger = logging.getLogger(__name__)

Reply = dict[str, Any]
"""`{"ok": True, ...}` or `{"ok": False, "reason": ...}`; plain data only."""

WORKER_BASE = Symbol("vllm.v1.worker.worker_base:WorkerBase.__init__", ("vllm_config",))
USED = (WORKER_BASE, Symbol("vllm.config:set_current_vllm_config", ("vllm_config",)))


def put(adapter: RunnerAdapter, digest: str, payload: bytes) -> Reply:
    """Store a vector. payload: its safetensors file. digest: what its content must hash to."""
    vector = safetensors_format.from_bytes(payload)
    if vector.digest != digest:
        return {"ok": False, "reason": f"content hashes to {vector.digest}, not to {digest}"}
    adapter.runtime.store.put(vector)
    return {"ok": True}


def drop(adapter: RunnerAdapter, digest: str) -> Reply:
    """Drop a vector that no request of the engine names any more."""
    adapter.runtime.bank.forget(digest)
    adapter.runtime.store.drop(digest)
    return {"ok": True}


def status(adapter: RunnerAdapter) -> Reply:
    """How this worker is armed, and what it holds."""
    runtime = adapter.runtime
    return {
        "ok": True,
        "version": __version__,
        "runner": adapter.runner_name,
        "stage_blocks": list(runtime.stage_blocks),
        "asked_blocks": list(runtime.requested_blocks),
        "armed_blocks": list(runtime.armed_blocks),
        "forms": {str(block): form.value for block, form in runtime.forms.items()},
        "sites": [site.value for site in runtime.config.sites],
        "site_modules": runtime.site_modules,
        "capture_blocks": list(runtime.capture_blocks),
        "ops": [op.value for op in runtime.config.ops],
        "hidden_size": runtime.hidden_size,
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "device": str(runtime.tables.bank_RD.device),
        "kernel": "triton" if runtime.use_triton else "torch",
        "fused_blocks": list(runtime.fused_blocks),
        "fused_calls": runtime.fused_calls,
        "rows": runtime.config.rows,
        "probe_limits": Limits.from_environment().of_probes,
        "monitors": [spec.text for spec in monitors_of_environment()],
        "bank_rows": runtime.bank.num_rows,
        "bank_rows_used": runtime.bank.num_used,
        "bank_rows_pinned": runtime.bank.num_pinned,
        "steered_slots": runtime.programs.num_steered,
        "table_bytes": runtime.num_bytes,
        "store_bytes": runtime.store.num_bytes,
        "captured_bytes": adapter.captures.num_bytes,
        "num_vectors": len(runtime.store),
        "vectors": runtime.store.digests(),
    }


def fetch_capture(adapter: RunnerAdapter, key: str, wanted: bool = True, end: int | None = None) -> Reply:
    """The rows captured under a key at this worker's points: positions, float32 [points, positions, D] as bytes.

    wanted: return them; otherwise they are only dropped. A request that still runs (it was aborted, and the next step
    will say so) captures nothing more. end: rows from this position on are dropped.
    """
    points, positions, rows_LPD = adapter.captures.take(key, end)
    if not wanted:
        return {"ok": True}
    return {
        "ok": True,
        "points": list(points),
        "positions": positions,
        "shape": list(rows_LPD.shape),
        "rows": rows_LPD.tobytes(),
    }


def watch(adapter: RunnerAdapter, numbers: list[Any]) -> Reply:
    """Measure monitors (`Watched` in wire form) at every request from now on. Their vectors are in the store."""
    adapter.watch(Watched.from_wire(numbers))
    return {"ok": True}


def scores(adapter: RunnerAdapter, keys: list[str]) -> Reply:
    """The numbers of scored requests in the order of their keys; None for a request that was not scored."""
    return {"ok": True, "numbers": adapter.scores.take(keys)}


def measured(adapter: RunnerAdapter, request_ids: list[str]) -> Reply:
    """What was measured for the conditions of requests, in their order; an empty list where nothing was."""
    return {"ok": True, "numbers": [adapter.decisions.measured(request_id) for request_id in request_ids]}


_ACTIONS: dict[str, Callable[..., Reply]] = {
    action.__name__: action for action in (put, drop, status, watch, fetch_capture, scores, measured)
}


def steer(self: Any, action: str, *args: Any) -> Reply:
    """Run one of the actions above. Set on `WorkerBase`."""
    try:
        adapter = adapter_of(self.model_runner)
        if adapter is None:
            return {"ok": True} if action == "drop" else {"ok": False, "reason": "this worker is not armed"}
        return _ACTIONS[action](adapter, *args)
    except Exception as error:
        logger.exception("Worker action %s failed.", action)
        return {"ok": False, "reason": f"{type(error).__name__}: {error}"[:500]}


def _load_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        with set_current_vllm_config(self.vllm_config):
            runtime = arm(self.model_runner)
        if runtime is not None:
            adapter = V2Adapter if self.vllm_config.use_v2_model_runner else V1Adapter
            setattr(self.model_runner, ADAPTER, adapter(self.model_runner, runtime))

    return load_model


PATCHES = (Patch(Symbol("vllm.v1.worker.gpu_worker:Worker.load_model"), _load_model),)


def install() -> None:
    apply(PATCHES)
    owner, _ = WORKER_BASE.owner()
    owner.steer = steer
