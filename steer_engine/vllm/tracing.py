"""OpenTelemetry spans of steered requests name what was applied.

With `--otlp-traces-endpoint`, vLLM makes a span per request when it finishes. Wraps `OutputProcessor.do_tracing` and
the `instrument_manual` that it calls; `intake` attaches the report to the request's output queue. A steered request's
span gets `steer_engine.digest`, `.preset`, `.names`, `.vectors` and `.edits` (digests). Known for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from steer_engine.vllm.intake import REPORT
from steer_engine.vllm.patching import Patch, Symbol, apply

USED: tuple[Symbol, ...] = ()

_attributes: ContextVar[dict[str, Any] | None] = ContextVar("steer_engine_span", default=None)
"""Our attributes of the span that is being made."""


def attributes_of(report: dict[str, Any]) -> dict[str, Any]:
    """A span's attributes: strings, and lists of strings."""
    edits = report["edits"]
    found = {
        "digest": report["digest"],
        "preset": report.get("preset"),
        "names": [edit["name"] for edit in edits if "name" in edit],
        "vectors": [edit["vector"] for edit in edits],
        "edits": [edit["digest"] for edit in edits],
    }
    return {f"steer_engine.{key}": value for key, value in found.items() if value is not None}


def _do_tracing(original: Any) -> Any:
    def do_tracing(self: Any, engine_core_output: Any, req_state: Any, *args: Any, **kwargs: Any) -> None:
        report = getattr(req_state.queue, REPORT, None)
        token = _attributes.set(None if report is None else attributes_of(report))
        try:
            original(self, engine_core_output, req_state, *args, **kwargs)
        finally:
            _attributes.reset(token)

    return do_tracing


def _instrument_manual(original: Any) -> Any:
    def instrument_manual(*args: Any, **kwargs: Any) -> Any:
        if (ours := _attributes.get()) is not None:
            kwargs["attributes"] = {**(kwargs.get("attributes") or {}), **ours}
        return original(*args, **kwargs)

    return instrument_manual


_OUTPUT = "vllm.v1.engine.output_processor"
PATCHES = (
    Patch(Symbol(f"{_OUTPUT}:OutputProcessor.do_tracing", ("engine_core_output", "req_state")), _do_tracing),
    Patch(Symbol(f"{_OUTPUT}:instrument_manual", ("span_name", "attributes")), _instrument_manual),
)


def install() -> None:
    apply(PATCHES)
