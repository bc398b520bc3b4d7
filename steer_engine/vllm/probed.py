"""Numbers of probes on their way from the workers into an answer, and the stop rules that act on them.

In the engine core: `receive` takes a step's numbers from the workers' report, `attach` adds them to the outputs that
carry their tokens, as `kv_transfer_params` (see `measured`). Wraps `Scheduler._update_request_with_output`, which vLLM
calls once for the tokens of a request in a step, beside its own stop rules.

In the API process: wraps `OutputProcessor.process_outputs`. vLLM merges outputs that wait, and keeps the last one's
`kv_transfer_params`; so numbers are taken from each output there, and wait in a `ProbeQueue` beside vLLM's own queue.
Those of the operator's monitors never get that far: they are counted at once.

Known for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np

from steer_engine.engine.probe_numbers import ProbeNumbers
from steer_engine.engine.step_report import StepReport
from steer_engine.monitor import Watched
from steer_engine.probe import Probe, ProbePlan
from steer_engine.probe_report import Numbers, ProbeAnswer
from steer_engine.program import PROGRAM_KEY
from steer_engine.vllm.patching import Patch, Symbol, apply

KEY = "_steer_probed"
WATCHED_KEY = "_steer_watched"
"""The same for the numbers of monitors."""

STOP_REASON = "probe:"
"""Followed by the name of the probe."""

USED = (Symbol("vllm.v1.engine:FinishReason"), Symbol("vllm.v1.request:RequestStatus"))

_WATCHED = "_steer_watched"
"""Attribute of a scheduler: what it measures of every request."""
COUNT = "_steer_count_watched"
"""Attribute of an output processor of a server with monitors: counts float32 numbers `[tokens, monitors]`."""
_ARRIVING = "_steer_arriving"
"""Attribute of an output processor that traces: the outputs with numbers that it processes now, by request id."""
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
        numbers = None if request is None else _numbers_for(request, watched_by(scheduler))
        if numbers is not None:
            rows = slice(start, start + count)
            numbers.write(probed.positions_N[rows], probed.numbers_NK[rows])
            found[request_id] = numbers
        start += count
    return found


def watch(scheduler: Any, watched: Watched) -> None:
    """The workers measure monitors at every request from now on."""
    setattr(scheduler, _WATCHED, watched)


def watched_by(scheduler: Any) -> Watched | None:
    """What is measured of every request; None without monitors."""
    found: Watched | None = getattr(scheduler, _WATCHED, None)
    return found


def _numbers_for(request: Any, watched: Watched | None) -> ProbeNumbers | None:
    """The numbers of a request, made with its first rows; None for another request that has got the same id."""
    numbers = numbers_of(request)
    if numbers is not None:
        return numbers
    program = ((request.sampling_params and request.sampling_params.extra_args) or {}).get(PROGRAM_KEY, {})
    plan = ProbePlan.from_wire(program["probes"]) if "probes" in program else None
    # With streaming input the prompt grows between answers, so positions say nothing about tokens.
    if watched is not None and not request.resumable:
        plan = watched.plan(plan, request.num_prompt_tokens)
    if plan is not None:
        numbers = ProbeNumbers(plan, request.num_prompt_tokens)
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
            own = numbers.num_own
            wire: dict[str, Any] = {}
            if own:
                wire[KEY] = [len(prompt_MK), own, prompt_MK[:, :own].tobytes(), tokens_NK[:, :own].tobytes()]
            if own < tokens_NK.shape[1]:
                wire[WATCHED_KEY] = tokens_NK[:, own:].tobytes()
            output.kv_transfer_params = (output.kv_transfer_params or {}) | wire
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
        kv_transfer_params=_without_numbers(output.kv_transfer_params),
        trace_headers=output.trace_headers,
        spec_decode_metrics=output.spec_decode_metrics,
    )
    output.finish_reason = output.stop_reason = None
    return end


def _without_numbers(params: dict[str, Any]) -> dict[str, Any] | None:
    return {key: value for key, value in params.items() if key not in (KEY, WATCHED_KEY)} or None


def _update_request_with_output(original: Callable[..., Any]) -> Callable[..., Any]:
    def _update_request_with_output(
        self: Any, request: Any, new_token_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[list[int], bool]:
        numbers = numbers_of(request)
        stopped_by = None
        if numbers is not None and numbers.has_stops:
            minimum = request.sampling_params.min_tokens
            stopped_by = numbers.stopped_by(request.num_output_tokens, len(new_token_ids), minimum)
        if stopped_by is None:
            result: tuple[list[int], bool] = original(self, request, new_token_ids, *args, **kwargs)
            return result
        from vllm.v1.request import RequestStatus

        # vLLM itself drops the tokens behind the last allowed one: vLLM 0.33 then counts fewer computed tokens as well.
        kept, allowed = stopped_by[0], request.max_tokens
        request.max_tokens = min(allowed, request.num_output_tokens + kept)
        try:
            tokens, stopped = original(self, request, new_token_ids, *args, **kwargs)
        finally:
            request.max_tokens = allowed
        # A token that ends an answer by itself does so; the rule takes precedence over the last allowed token.
        if len(tokens) == kept and request.status == RequestStatus.FINISHED_LENGTH_CAPPED:
            request.status = RequestStatus.FINISHED_STOPPED
            request.stop_reason = STOP_REASON + stopped_by[1]
        return tokens, stopped

    return _update_request_with_output


class ProbeQueue:
    """Numbers that wait for the consumer of a request's outputs, by the number of the sequence."""

    def __init__(self) -> None:
        self._parts: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        self.traced: dict[int, list[np.ndarray]] = {}
        """The numbers of all tokens, for traces; empty where nothing traces."""

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
        arrived = [_taken(self, output) for output in engine_core_outputs if _has(output, KEY)]
        watched = [_take_watched(self, output) for output in engine_core_outputs if _has(output, WATCHED_KEY)]
        traces = self.tracing_enabled
        if traces:
            setattr(self, _ARRIVING, {output.request_id: (output, tokens) for output, _, _, tokens in arrived})
        result = original(self, engine_core_outputs, *args, **kwargs)
        for output, state, prompt_MK, tokens_NK in arrived:
            if state is not None:
                # vLLM has dropped the tokens behind a stop string.
                queue = queue_of(state.queue) if state.queue is not None else _offline(self, state)
                tokens_NK = tokens_NK[: len(output.new_token_ids)]
                queue.put(state.request_index, tokens_NK, prompt_MK)
                if traces:
                    queue.traced.setdefault(state.request_index, []).append(tokens_NK)
        if watched and (count := getattr(self, COUNT, None)) is not None:
            count([numbers_NM[: len(output.new_token_ids)] for output, numbers_NM in watched])
        offline: dict[str, ProbeQueue] = getattr(self, _QUEUE, {})
        if offline:
            for answer in result.request_outputs:
                if answer.finished and answer.request_id in offline:
                    setattr(answer, _QUEUE, offline.pop(answer.request_id))
            if not self.request_states:  # those of aborted requests are left
                offline.clear()
        return result

    return process_outputs


def summaries_of(processor: Any, state: Any, probes: Sequence[Probe]) -> Numbers:
    """The mean and the largest number of each probe over the answer of a request that ends now, for its trace."""
    answer = ProbeAnswer([probe._replace(returns="summary") for probe in probes])
    for tokens_NK in queue_of(state.queue).traced.pop(state.request_index, ()):
        answer.put(tokens_NK)
    if arriving := getattr(processor, _ARRIVING).get(state.request_id):
        output, tokens_NK = arriving
        answer.put(tokens_NK[: len(output.new_token_ids)])
    answer.finished = True
    found: Numbers = answer.take().get("probes", {})
    return found


def _has(output: Any, key: str) -> bool:
    return output.kv_transfer_params is not None and key in output.kv_transfer_params


def _take_watched(processor: Any, output: Any) -> tuple[Any, np.ndarray]:
    """The output, and the numbers of monitors, which are removed from it: float32 [N, monitors].

    None of a request that was aborted: nobody gets its tokens.
    """
    numbers = output.kv_transfer_params.pop(WATCHED_KEY)
    output.kv_transfer_params = output.kv_transfer_params or None
    num_tokens = len(output.new_token_ids)
    numbers_NM = np.frombuffer(numbers, dtype=np.float32).reshape(num_tokens, -1)
    return output, numbers_NM if output.request_id in processor.request_states else numbers_NM[:0]


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
