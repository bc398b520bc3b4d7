"""Wraps `OutputProcessor.{add_request, do_tracing}` and the `instrument_manual` that it calls. Known for 0.32, 0.33.

Why: with `--otlp-traces-endpoint`, vLLM makes an OpenTelemetry span of each request when it is finished. Steered ones
also say by what: `steer_engine.digest`, `.preset`, `.names`, `.vectors` and `.edits` (digests).
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from steer_engine.api import answers
from steer_engine.vllm import symbols
from steer_engine.vllm.patching import wrap

REPORT = "_steer_engine_report"
"""Attribute of vLLM's state of a request: what its answer says about steering."""

_finished: ContextVar[dict[str, Any] | None] = ContextVar("steer_engine_finished", default=None)
"""The attributes of the request whose span is being made."""


def hook() -> None:
    wrap(symbols.OUTPUT_ADD_REQUEST, _add_request)
    wrap(symbols.DO_TRACING, _do_tracing)
    wrap(symbols.INSTRUMENT_MANUAL, _instrument_manual)


def attributes_of(report: dict[str, Any]) -> dict[str, Any]:
    """A span's attributes: strings, and lists of them."""
    edits = report["edits"]
    found = {
        "digest": report["digest"],
        "preset": report.get("preset"),
        "names": [edit["name"] for edit in edits if "name" in edit],
        "vectors": [edit["vector"] for edit in edits],
        "edits": [edit["digest"] for edit in edits],
    }
    return {f"steer_engine.{key}": value for key, value in found.items() if value is not None}


def _add_request(original: Any) -> Any:
    def add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        original(self, request, *args, **kwargs)
        note = answers.current.get() if self.tracing_enabled else None
        if note is not None and note.report is not None:
            setattr(self.request_states[request.request_id], REPORT, note.report)

    return add_request


def _do_tracing(original: Any) -> Any:
    def do_tracing(self: Any, engine_core_output: Any, req_state: Any, *args: Any, **kwargs: Any) -> None:
        report = getattr(req_state, REPORT, None)
        token = _finished.set(None if report is None else attributes_of(report))
        try:
            original(self, engine_core_output, req_state, *args, **kwargs)
        finally:
            _finished.reset(token)

    return do_tracing


def _instrument_manual(original: Any) -> Any:
    def instrument_manual(*args: Any, **kwargs: Any) -> Any:
        if (ours := _finished.get()) is not None:
            kwargs["attributes"] = {**(kwargs.get("attributes") or {}), **ours}
        return original(*args, **kwargs)

    return instrument_manual
