"""A request that a stop rule ends among several new tokens is left as after vLLM's own stop.

Without an engine: vLLM's request and scheduler method alone, as after a step with accepted drafts.
"""

from __future__ import annotations

from math import inf
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import Request, RequestStatus

from steer_engine.engine.probe_numbers import ProbeNumbers
from steer_engine.probe import ProbePlan, StopRule
from steer_engine.vllm import probed

pytestmark = pytest.mark.v1_only  # no engine

PROMPT, FIRST, NEW = [1, 2, 3, 4], 10, [11, 12, 13, 14]
STOP_AT = 12
RULE = StopRule("q", column=0, low=STOP_AT - FIRST - 0.5, high=inf, tokens=1)
"""Holds from STOP_AT on: the number of a token is how many came before it."""


def after_step(*, by_rule: bool, max_tokens: int) -> dict[str, Any]:
    """The state of a request whose tokens NEW have come, and which ends with STOP_AT."""
    stop_token_ids = [] if by_rule else [STOP_AT]
    params = SamplingParams(max_tokens=max_tokens, stop_token_ids=stop_token_ids)
    request = Request("r", prompt_token_ids=list(PROMPT), sampling_params=params, pooling_params=None)
    request.status = RequestStatus.RUNNING
    request.append_output_token_ids(FIRST)
    request.num_computed_tokens = len(PROMPT) + len(NEW)
    request.num_output_placeholders = len(NEW)
    numbers = ProbeNumbers(ProbePlan(((0,),), len(PROMPT) - 1, (RULE,)), len(PROMPT))
    positions = np.arange(len(PROMPT), len(PROMPT) + len(NEW))
    numbers.write(positions, (positions - len(PROMPT) + 1.0)[:, None].astype(np.float32))
    if by_rule:
        setattr(request, probed._NUMBERS, numbers)

    scheduler, cached = object.__new__(AsyncScheduler), []
    scheduler.max_model_len = 100
    scheduler.kv_cache_manager = SimpleNamespace(cache_blocks=lambda _, count: cached.append(count))
    probed.install()
    tokens, stopped = scheduler._update_request_with_output(request, list(NEW))
    assert stopped
    reason = f"{probed.STOP_REASON}q" if by_rule else STOP_AT
    return {
        "by the stop": request.stop_reason == reason,
        "tokens": tokens,
        "all tokens": list(request.all_token_ids),
        "status": request.status,
        "computed": request.num_computed_tokens,
        "placeholders": request.num_output_placeholders,
        "most tokens": request.max_tokens,
        "cached": cached,
    }


@pytest.mark.parametrize("max_tokens", [16, 3], ids=["within", "at the last allowed token"])
def test_the_state_is_that_after_vllms_own_stop(max_tokens: int) -> None:
    """A token too many that counts as computed would be cached as a block that the request does not have."""
    by_rule = after_step(by_rule=True, max_tokens=max_tokens)
    assert by_rule["by the stop"]
    assert by_rule["tokens"] == [11, 12]
    assert by_rule["status"] == RequestStatus.FINISHED_STOPPED
    assert by_rule == after_step(by_rule=False, max_tokens=max_tokens)


def test_an_answer_that_ends_before_its_stop_is_not_ended_by_it() -> None:
    by_rule = after_step(by_rule=True, max_tokens=2)
    assert not by_rule["by the stop"]
    assert by_rule["tokens"] == [11]
    assert by_rule["status"] == RequestStatus.FINISHED_LENGTH_CAPPED
    assert by_rule == after_step(by_rule=False, max_tokens=2)
