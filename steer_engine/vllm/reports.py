"""The one place where answers and traces say what was applied.

Answers: wraps the constructors of `OpenAIBaseModel` (chat, completion and responses answers derive from it) and of the
two base classes of `/inference/v1/generate`. An answer of a steered request gets the field `steering`: every whole
answer, and every stream chunk with a `finish_reason`. The model is named as the client named it. The request's note is
found by its context variable, which vLLM's tasks inherit.

Traces: with `--otlp-traces-endpoint`, vLLM makes a span per request when it finishes. Wraps
`OutputProcessor.do_tracing` and the `instrument_manual` that it calls; `intake` attaches the report to the request's
output queue. A steered request's span gets `steer_engine.digest`, `.preset`, `.names`, `.vectors` and `.edits`
(digests), and of its probes `.probes`, `.probe_vectors`, `.stopped_by`, and the `.mean` and `.max` of their numbers.

Known for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

from contextvars import ContextVar
from functools import cache
from typing import Any

from steer_engine.api.answers import RequestNote, current_note
from steer_engine.probe_report import Numbers
from steer_engine.vllm import probed
from steer_engine.vllm.intake import PROBES, REPORT
from steer_engine.vllm.patching import Patch, Symbol, apply
from steer_engine.vllm.probed import STOP_REASON

_CHAT = "vllm.entrypoints.openai.chat_completion.protocol"
_COMPLETION = "vllm.entrypoints.openai.completion.protocol"
_TOKENS = "vllm.entrypoints.scale_out.token_in_token_out.protocol"

WHOLE = (
    Symbol(f"{_CHAT}:ChatCompletionResponse"),
    Symbol(f"{_COMPLETION}:CompletionResponse"),
    Symbol("vllm.entrypoints.openai.responses.protocol:ResponsesResponse"),
    Symbol(f"{_TOKENS}:GenerateResponseBase"),
)
CHUNKS = (
    Symbol(f"{_CHAT}:ChatCompletionStreamResponse"),
    Symbol(f"{_COMPLETION}:CompletionStreamResponse"),
    Symbol(f"{_TOKENS}:GenerateStreamResponseBase"),
)
STREAMS = (
    Symbol(
        "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat.chat_completion_stream_generator",
        ("model_name",),
    ),
    Symbol(
        "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion.completion_stream_generator",
        ("model_name",),
    ),
)
"""Where streams are written. A class that redefines one may name the model in objects of its own."""
USED = (*WHOLE, *CHUNKS, *STREAMS)

MAX_TRACED_NUMBERS = 32
"""Numbers (pairs of a probe and a block) whose mean and maximum a span has. OpenTelemetry's own limit is 128 attributes
of a span."""

_attributes: ContextVar[dict[str, Any] | None] = ContextVar("steer_engine_span", default=None)
"""Our attributes of the span that is being made."""


@cache
def _classes() -> tuple[tuple[type, ...], tuple[type, ...]]:
    return tuple(symbol.get() for symbol in WHOLE), tuple(symbol.get() for symbol in CHUNKS)


def _init(original: Any) -> Any:
    def __init__(self: Any, /, **data: Any) -> None:
        note = current_note.get()
        # Unsteered answers, the common case, pay for this test only.
        if note is not None and note.report is not None:
            _add(self, data, note, note.report)
        original(self, **data)

    return __init__


def _add(answer: Any, data: dict[str, Any], note: RequestNote, report: dict[str, Any]) -> None:
    whole, chunks = _classes()
    is_chunk = isinstance(answer, chunks)
    if not is_chunk and not isinstance(answer, whole):
        return
    if note.model is not None and "model" in data:
        data["model"] = note.model
    if note.probe_answers:
        report = _add_numbers(data, note, report)
    if is_chunk and not any(choice.finish_reason for choice in data.get("choices", ())):
        return
    capture = report.get("capture")
    if not is_chunk and capture is not None and "data" not in capture:
        raise RuntimeError("An answer was made before its captured rows were fetched.")
    data["steering"] = report


def _add_numbers(data: dict[str, Any], note: RequestNote, report: dict[str, Any]) -> dict[str, Any]:
    """Add the numbers of probes to the choices that have their tokens; returns the report of the whole answer."""
    if "choices" not in data:  # a response of /v1/responses has one sequence
        return report | {"numbers": note.probe_answers[0].take()}
    for choice in data["choices"]:
        # The first chunk of a chat names the role, before any token.
        if getattr(getattr(choice, "delta", None), "role", None) and choice.finish_reason is None:
            continue
        answer = note.probe_answers.get(choice.index)
        if answer is not None and (told := answer.take()):
            choice.steering = told
    return report


def attributes_of(report: dict[str, Any], summaries: Numbers | None = None, stop_reason: Any = None) -> dict[str, Any]:
    """A span's attributes: strings, lists of strings, and numbers.

    summaries: of the probes over the generated tokens. stop_reason: vLLM's.
    """
    edits, probes = report["edits"], report.get("probes", [])
    found = {
        "digest": report["digest"],
        "preset": report.get("preset"),
        "names": [edit["name"] for edit in edits if "name" in edit],
        "vectors": [edit["vector"] for edit in edits],
        "edits": [edit["digest"] for edit in edits],
    }
    if probes:
        found["probes"] = [probe["name"] for probe in probes]
        found["probe_vectors"] = [probe["vector"] for probe in probes]
    if isinstance(stop_reason, str) and stop_reason.startswith(STOP_REASON):
        found["stopped_by"] = stop_reason.removeprefix(STOP_REASON)
    blocks = [(name, block, each) for name, of_probe in (summaries or {}).items() for block, each in of_probe.items()]
    for name, block, each in blocks[:MAX_TRACED_NUMBERS]:
        found |= {f"probe.{name}.{block}.{key}": each[key] for key in ("mean", "max")}
    return {f"steer_engine.{key}": value for key, value in found.items() if value is not None}


def _do_tracing(original: Any) -> Any:
    def do_tracing(self: Any, engine_core_output: Any, req_state: Any, *args: Any, **kwargs: Any) -> None:
        report, probes = getattr(req_state.queue, REPORT, None), getattr(req_state.queue, PROBES, ())
        attributes = None
        if report is not None:
            summaries = probed.summaries_of(self, req_state, probes) if probes else None
            attributes = attributes_of(report, summaries, engine_core_output.stop_reason)
        token = _attributes.set(attributes)
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
    Patch(Symbol("vllm.entrypoints.serve.engine.protocol:OpenAIBaseModel.__init__"), _init),
    Patch(Symbol(f"{_TOKENS}:GenerateResponseBase.__init__"), _init),
    Patch(Symbol(f"{_TOKENS}:GenerateStreamResponseBase.__init__"), _init),
    Patch(Symbol(f"{_OUTPUT}:OutputProcessor.do_tracing", ("engine_core_output", "req_state")), _do_tracing),
    Patch(Symbol(f"{_OUTPUT}:instrument_manual", ("span_name", "attributes")), _instrument_manual),
)


def install() -> None:
    apply(PATCHES)
