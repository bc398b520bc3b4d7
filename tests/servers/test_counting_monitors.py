"""Numbers of monitors between the engine core and the metrics, with vLLM's own output processor and no engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from steer_engine.engine.probe_numbers import ProbeNumbers
from steer_engine.monitor import Watched
from steer_engine.probe import ProbePlan
from steer_engine.vllm import probed
from steer_engine.vllm.plugin import register

WATCHED = Watched(numbers=(("sha256:a", 1, "cosine"), ("sha256:b", 2, "dot")))
PROMPT = [1, 2, 3]


@pytest.fixture(scope="module", autouse=True)
def _patched() -> None:
    register()


def numbers(own: ProbePlan | None, offset: float) -> ProbeNumbers:
    """Of a request in the engine core: token t has t + offset in column 0, one more in the next, and so on."""
    found = ProbeNumbers(WATCHED.plan(own, len(PROMPT)), len(PROMPT))
    at = np.arange(2, 8)
    num_columns = WATCHED.plan(own, len(PROMPT)).num_columns
    found.write(at, (at[:, None] - 2 + offset + np.arange(num_columns)).astype(np.float32))
    return found


def processor_of(*names: str) -> tuple[OutputProcessor, list[RequestOutputCollector]]:
    processor = OutputProcessor(tokenizer=None, log_stats=False)
    queues = []
    for name in names:
        params = SamplingParams(detokenize=False, output_kind=RequestOutputKind.DELTA)
        request = EngineCoreRequest(
            request_id=name, prompt_token_ids=PROMPT, mm_features=None, sampling_params=params, pooling_params=None,
            arrival_time=0.0, lora_request=None, cache_salt=None, data_parallel_rank=None, external_req_id=name,
        )  # fmt: skip
        queues.append(RequestOutputCollector(RequestOutputKind.DELTA, name))
        processor.add_request(request, None, queue=queues[-1])
    return processor, queues


def test_own_numbers_reach_the_answer_and_monitors_the_metrics() -> None:
    own = ProbePlan(((0,),), 2)
    of_step: dict[str, ProbeNumbers] = {
        "plain": numbers(None, 10.0),
        "asks": numbers(own, 20.0),
        "gone": numbers(None, 30.0),
    }
    outputs = [
        EngineCoreOutput("plain", [7, 8]),
        EngineCoreOutput("asks", [9], finish_reason=FinishReason.LENGTH),
        EngineCoreOutput("gone", [7]),  # the client has hung up: the processor does not know it any more
        EngineCoreOutput("unmeasured", [7]),
    ]
    probed.attach({0: EngineCoreOutputs(outputs=outputs)}, of_step)
    processor, (plain, asks, unmeasured) = processor_of("plain", "asks", "unmeasured")
    counted: list[Any] = []
    setattr(processor, probed.COUNT, counted.append)
    processor.process_outputs(outputs)
    (parts,) = counted
    assert [part.tolist() for part in parts] == [[[10, 11], [11, 12]], [[21, 22]], []]
    assert all(output.kv_transfer_params is None for output in outputs)
    for queue, tokens in ((plain, [7, 8]), (asks, [9]), (unmeasured, [7])):
        answer = queue.get_nowait()
        assert answer is not None
        assert answer.kv_transfer_params is None
        assert list(answer.outputs[0].token_ids) == tokens  # type: ignore[union-attr]
    assert [tokens.tolist() for tokens, _ in probed.queue_of(asks)._parts[0]] == [[[20]]]
    assert probed.queue_of(plain)._parts == {}


def test_without_monitors_a_request_that_asks_for_nothing_carries_nothing() -> None:
    outputs = [EngineCoreOutput("plain", [7])]
    probed.attach({0: EngineCoreOutputs(outputs=outputs)}, {})
    assert outputs[0].kv_transfer_params is None
