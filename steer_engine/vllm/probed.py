"""Numbers of probes on their way from the workers into an answer, and the stop rules that act on them.

In the engine core: `receive` takes a step's numbers from the workers' report, `attach` adds them to the outputs that
carry their tokens, as `kv_transfer_params` (see `measured`). Wraps `Scheduler._update_request_with_output`, which vLLM
calls once for the tokens of a request in a step, beside its own stop rules.

In the API process: wraps `OutputProcessor.process_outputs`. vLLM merges outputs that wait, and keeps the last one's
`kv_transfer_params`; so numbers are taken from each output there, and wait in a `ProbeQueue` beside vLLM's own queue.

Known for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import numpy as np

from steer_engine.engine.probe_numbers import ProbeNumbers
from steer_engine.engine.step_report import StepReport
from steer_engine.probe import ProbePlan
from steer_engine.probe_report import ProbeAnswer
from steer_engine.program import PROGRAM_KEY
from steer_engine.vllm.patching import Patch, Symbol, apply

KEY = "_steer_probed"

STOP_REASON = "probe:"
"""Followed by the name of the probe."""

USED = (Symbol("vllm.v1.engine:FinishReason"), Symbol("vllm.v1.request:RequestStatus"))

_NUMBERS = "_steer_probe_numbers"
"""Attribute of a request in the engine core."""
_QUEUE = "_steer_probe_queue"
"""Attribute of a request's output queue, or of the output processor of an offline engine (by request id)."""


def numbers_of(request: Any) -> ProbeNumbers | None:
    """The numbers of a request in the engine core; None if it has no probes."""
    found: ProbeNumbers | None = getattr(request, _NUMBERS, None)
    return found


def receive(scheduler: Any, report: StepReport | None) -> dict[str, ProbeNumbers]:
    """Before a step's outputs are made: keep its numbers. Returns those of the requests that have some, by id."""
    if report is None or report.probed is None:
        return {}
    probed, start, found = report.probed, 0, {}
    for request_id, count in zip(probed.request_ids, probed.counts, strict=True):
        request = scheduler.requests.get(request_id)
        numbers = None if request is None else _numbers_for(request)
        if numbers is not None:
            rows = slice(start, start + count)
            numbers.write(probed.positions_N[rows], probed.numbers_NK[rows])
            found[request_id] = numbers
        start += count
    return found


def _numbers_for(request: Any) -> ProbeNumbers | None:
    """The numbers of a request, made with its first rows; None for another request that has got the same id."""
    numbers = numbers_of(request)
    program = ((request.sampling_params and request.sampling_params.extra_args) or {}).get(PROGRAM_KEY, {})
    if numbers is None and "probes" in program:
        numbers = ProbeNumbers(ProbePlan.from_wire(program["probes"]), request.num_prompt_tokens)
        setattr(request, _NUMBERS, numbers)
    return numbers


def attach(outputs: dict[int, Any], numbers_of_step: dict[str, ProbeNumbers]) -> None:
    """After a step: add the numbers to the outputs with their tokens. outputs: by client."""
    if not numbers_of_step:
        return
    for of_client in outputs.values():
        for output in list(of_client.outputs):
            numbers = numbers_of_step.get(output.request_id)
            if numbers is None or not output.new_token_ids:
                continue
            prompt_MK, tokens_NK = numbers.take(len(output.new_token_ids))
            wire = [len(prompt_MK), tokens_NK.shape[1], prompt_MK.tobytes(), tokens_NK.tobytes()]
            output.kv_transfer_params = (output.kv_transfer_params or {}) | {KEY: wire}
            if isinstance(output.stop_reason, str) and output.stop_reason.startswith(STOP_REASON):
                of_client.outputs.append(_end_of(output))


def _end_of(output: Any) -> Any:
    """Move the end of an answer into an output of its own: vLLM leaves the text of a token out that ends an answer."""
    from vllm.v1.engine import EngineCoreOutput

    end = EngineCoreOutput(
        request_id=output.request_id,
        new_token_ids=[],
        finish_reason=output.finish_reason,
        stop_reason=output.stop_reason,
        kv_transfer_params={key: value for key, value in output.kv_transfer_params.items() if key != KEY} or None,
        trace_headers=output.trace_headers,
        spec_decode_metrics=output.spec_decode_metrics,
    )
    output.finish_reason = output.stop_reason = None
    return end


def _update_request_with_output(original: Callable[..., Any]) -> Callable[..., Any]:
    def _update_request_with_output(
        self: Any, request: Any, new_token_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[list[int], bool]:
        numbers = numbers_of(request)
        stopped_by = None
        if numbers is not None and numbers.has_stops:
            minimum = request.sampling_params.min_tokens
            stopped_by = numbers.stopped_by(request.num_output_tokens, len(new_token_ids), minimum)
            if stopped_by is not None:
                del new_token_ids[stopped_by[0] :]
        tokens, stopped = original(self, request, new_token_ids, *args, **kwargs)
        if stopped_by is not None:
            from vllm.v1.request import RequestStatus

            # A token that ends an answer by itself does so; the rule takes precedence over the last allowed token.
            if stopped and request.status != RequestStatus.FINISHED_LENGTH_CAPPED:
                return tokens, stopped
            request.status = RequestStatus.FINISHED_STOPPED
            request.stop_reason = STOP_REASON + stopped_by[1]
            stopped = True
        return tokens, stopped

    return _update_request_with_output


class ProbeQueue:
    """Numbers that wait for the consumer of a request's outputs, by the number of the sequence."""

    def __init__(self) -> None:
        self._parts: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}

    def put(self, sequence: int, tokens_NK: np.ndarray, prompt_MK: np.ndarray) -> None:
        self._parts.setdefault(sequence, []).append((tokens_NK, prompt_MK))

    def move(self, sequence: int, answer: ProbeAnswer) -> None:
        """Hand over the numbers of the tokens since the last call."""
        for tokens_NK, prompt_MK in self._parts.pop(sequence, ()):
            answer.put(tokens_NK, prompt_MK)


current_queue: ContextVar[list[Any] | None] = ContextVar("steer_engine_probe_queue", default=None)
"""Where `AsyncLLM.add_request` leaves the output queue of the request that is being added."""


def queue_of(output_queue: Any) -> ProbeQueue:
    """The numbers beside vLLM's output queue of a request."""
    found: ProbeQueue | None = getattr(output_queue, _QUEUE, None)
    if found is None:
        found = ProbeQueue()
        setattr(output_queue, _QUEUE, found)
    return found


def numbers_offline(output: Any) -> ProbeQueue | None:
    """The numbers of a finished output of an offline engine; None if it has no probes."""
    found: ProbeQueue | None = getattr(output, _QUEUE, None)
    return found


def _process_outputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_outputs(self: Any, engine_core_outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        arrived = [_taken(self, output) for output in engine_core_outputs if _has_numbers(output)]
        result = original(self, engine_core_outputs, *args, **kwargs)
        for output, state, prompt_MK, tokens_NK in arrived:
            if state is not None:
                # vLLM has dropped the tokens behind a stop string.
                queue = queue_of(state.queue) if state.queue is not None else _offline(self, state)
                queue.put(state.request_index, tokens_NK[: len(output.new_token_ids)], prompt_MK)
        offline: dict[str, ProbeQueue] = getattr(self, _QUEUE, {})
        if offline:
            for answer in result.request_outputs:
                if answer.finished and answer.request_id in offline:
                    setattr(answer, _QUEUE, offline.pop(answer.request_id))
            if not self.request_states:  # those of aborted requests are left
                offline.clear()
        return result

    return process_outputs


def _has_numbers(output: Any) -> bool:
    return output.kv_transfer_params is not None and KEY in output.kv_transfer_params


def _taken(processor: Any, output: Any) -> tuple[Any, Any, np.ndarray, np.ndarray]:
    """The output, vLLM's state of its request (None if it was aborted), and its numbers, which are removed from it."""
    num_prompt, num_columns, prompt, tokens = output.kv_transfer_params.pop(KEY)
    output.kv_transfer_params = output.kv_transfer_params or None
    prompt_MK = np.frombuffer(prompt, dtype=np.float32).reshape(num_prompt, num_columns)
    tokens_NK = np.frombuffer(tokens, dtype=np.float32).reshape(-1, num_columns)
    return output, processor.request_states.get(output.request_id), prompt_MK, tokens_NK


def _offline(processor: Any, state: Any) -> ProbeQueue:
    """The numbers of an offline request, until its output is finished. Sequences of one prompt share them."""
    if not hasattr(processor, _QUEUE):
        setattr(processor, _QUEUE, {})
    queues: dict[str, ProbeQueue] = getattr(processor, _QUEUE)
    return queues.setdefault((state.parent_req or state).external_req_id, ProbeQueue())


PATCHES = (
    Patch(
        Symbol("vllm.v1.core.sched.scheduler:Scheduler._update_request_with_output", ("request", "new_token_ids")),
        _update_request_with_output,
    ),
    Patch(
        Symbol("vllm.v1.engine.output_processor:OutputProcessor.process_outputs", ("engine_core_outputs",)),
        _process_outputs,
    ),
)


def install() -> None:
    apply(PATCHES)
