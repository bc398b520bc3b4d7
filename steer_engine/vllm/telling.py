"""What steering did, on its way into an answer.

`telling` goes around `AsyncLLM.generate` (`shutdown` wraps it). When a sequence of a steered request finishes, the
number of tokens that each edit covered, and what was measured for its conditions, enter the report of the answer. The
numbers of probes follow their tokens. Known for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from vllm.sampling_params import RequestOutputKind

from steer_engine.api.answers import current_note
from steer_engine.applied import Applied
from steer_engine.probe_report import ProbeAnswer
from steer_engine.vllm import measured, probed
from steer_engine.vllm.intake import checked_steering
from steer_engine.vllm.patching import Symbol

USED = (Symbol("vllm.sampling_params:RequestOutputKind"),)


def telling(original: Callable[..., AsyncGenerator[Any, None]]) -> Callable[..., AsyncGenerator[Any, None]]:
    def generate(self: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        stream = original(self, *args, **kwargs)
        params = args[1] if len(args) > 1 else kwargs.get("sampling_params")
        resolved, note = checked_steering(getattr(params, "extra_args", None)), current_note.get()
        if params is None or resolved is None or note is None or note.report is None:
            return stream
        if probes := resolved.template.probes:
            answers = [ProbeAnswer(probes) for _ in range(params.n)]
            first = note.num_prompts * params.n
            note.probe_answers.update({first + number: answer for number, answer in enumerate(answers)})
            stream = _with_numbers(stream, answers, is_delta=params.output_kind == RequestOutputKind.DELTA)
        if resolved.edits:
            applied = Applied(resolved, note.report, note.num_prompts, note.decisions)
            stream = _telling(stream, applied, is_delta=params.output_kind == RequestOutputKind.DELTA)
        note.num_prompts += 1
        return stream

    return generate


async def _telling(stream: Any, applied: Applied, *, is_delta: bool) -> AsyncGenerator[Any, None]:
    tokens: dict[int, list[int]] = {}
    numbers: list[float] = []
    finished: list[tuple[Any, Any, int]] = []
    """Sequences whose numbers have not come. vLLM merges outputs that wait, and then keeps the last one's numbers."""
    async with aclosing(stream):
        async for output in stream:
            numbers = measured.take(output) or numbers
            for choice in output.outputs:
                if is_delta:
                    tokens.setdefault(choice.index, []).extend(choice.token_ids)
                # A prompt of embeddings has no length here.
                if choice.finish_reason is not None and output.prompt_token_ids is not None:
                    answer = tokens.get(choice.index, []) if is_delta else choice.token_ids
                    finished.append((output.prompt_token_ids, answer, choice.index))
            if numbers or output.finished or not applied.has_conditions:
                for prompt, answer, index in finished:
                    applied.add(prompt, answer, numbers, index)
                finished.clear()
            yield output


async def _with_numbers(stream: Any, answers: list[ProbeAnswer], *, is_delta: bool) -> AsyncGenerator[Any, None]:
    """answers: of the sequences of one prompt. Each gets the numbers of an output's tokens before the output."""
    queues: list[Any] = []
    num_tokens = [0] * len(answers)
    async with aclosing(stream):
        # The first step of the stream adds the request to the engine. Not reset by token: a client that hangs up may
        # end this generator in another context.
        probed.current_queue.set(queues)
        output = await anext(stream, None)
        probed.current_queue.set(None)
        while output is not None:
            waiting = probed.queue_of(queues[0])
            for choice in output.outputs:
                answer = answers[choice.index]
                waiting.move(choice.index, answer)
                num_tokens[choice.index] = len(choice.token_ids) + is_delta * num_tokens[choice.index]
                if choice.finish_reason is not None:
                    answer.pad(num_tokens[choice.index])
                    answer.finished = True
            yield output
            output = await anext(stream, None)
