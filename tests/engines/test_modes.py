"""Engine modes x exactness: the same mixed traffic in every mode, each answer against the oracle.

Every engine here is tiny, eager and in this process; what a mode must show of itself (that a prompt was split, a
request preempted, a draft accepted) is asserted too, so that no row of the matrix is green for want of doing anything.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.counting import counting
from helpers.driving import edit, params, steering, tokens
from helpers.engines import RUNNER
from helpers.oracle import Oracle
from helpers.traffic import (
    AT_SITES,
    CLOSE,
    OPEN,
    PROBES,
    PROBES_AT_SITES,
    SPECS,
    Ask,
    Start,
    asks,
    assert_right,
    core_of,
    drafts_of,
    marked,
    run,
)

from steer_engine import LLM
from steer_engine.llm import probed_numbers
from steer_engine.settings import SteeringConfig
from steer_engine.site import SITES_IN_BLOCKS

NUM = 24 if RUNNER == "v1" else 8


@pytest.mark.parametrize("chunk", [16, *(pytest.param(chunk, marks=pytest.mark.slow) for chunk in (50, 512))])
def test_chunk_sizes(start: Start, oracle: Oracle, chunk: int) -> None:
    """Prompts of up to a hundred tokens in pieces of 16 or 50, or whole."""
    llm = start(max_num_batched_tokens=chunk, max_num_seqs=min(16, chunk))
    requested = asks(NUM, shared=20, seed=chunk)  # less than a block: nothing comes from the cache
    with counting(core_of(llm).scheduler, "schedule") as steps:
        assert_right(oracle, requested, run(llm, requested))
    assert len(steps) >= sum(len(ask.prompt) + ask.max_tokens - 1 for ask in requested) / chunk


@pytest.mark.parametrize(
    "caching", [pytest.param(True, marks=pytest.mark.slow_on_v2), pytest.param(False, marks=pytest.mark.slow)]
)
def test_prefix_cache_cold_warm_and_off(start: Start, oracle: Oracle, caching: bool) -> None:
    llm = start(enable_prefix_caching=caching)
    requested = asks(NUM, shared=70)
    assert_right(oracle, requested, run(llm, requested))
    warm = run(llm, requested)
    assert_right(oracle, requested, warm)
    cached = [output.num_cached_tokens or 0 for output in warm]
    assert (sum(cached) > 32 * NUM / 3) if caching else sum(cached) == 0


@pytest.mark.slow_on_v2
def test_preemption_and_recomputation(start: Start, oracle: Oracle) -> None:
    """A KV cache of a few blocks: requests are thrown out in the middle of their answers and computed again."""
    llm = start(num_gpu_blocks_override=14, max_num_seqs=8, max_model_len=256, enable_prefix_caching=False)
    num, length = (12, 40) if RUNNER == "v1" else (6, 8)
    requested = [
        Ask(marked(tokens(900 + i, 60)), SPECS[i % len(SPECS)], length, PROBES[i % len(PROBES)]) for i in range(num)
    ]
    with counting(core_of(llm).scheduler, "_preempt_request") as preempted:
        outputs = run(llm, requested)
    assert_right(oracle, requested, outputs)
    assert preempted, "nothing was preempted"


@pytest.mark.usefixtures("asynchronous")
def test_asynchronous_scheduling(start: Start, oracle: Oracle) -> None:
    llm = start(max_num_batched_tokens=64, max_num_seqs=16)
    assert type(core_of(llm).scheduler).__name__ == "AsyncScheduler"
    requested = asks(NUM)
    assert_right(oracle, requested, run(llm, requested))


@pytest.mark.slow
@pytest.mark.usefixtures("asynchronous")
def test_a_draft_model_under_asynchronous_scheduling(start: Start, oracle: Oracle, tiny_llama: str) -> None:
    llm = start(speculative_config={"model": tiny_llama, "num_speculative_tokens": 3}, max_num_seqs=16)
    assert type(core_of(llm).scheduler).__name__ == "AsyncScheduler"
    requested = asks(NUM if RUNNER == "v1" else 4)
    outputs, accepted = drafts_of(llm, requested)
    assert_right(oracle, requested, outputs)
    assert accepted > 0


@pytest.mark.v1_only
def test_compiled(tiny_compiled: LLM, oracle: Oracle) -> None:
    """One graph for all of the traffic: steered and plain rows, whole prompts and single tokens, cold and warm."""
    requested = asks(NUM, shared=70)
    for _ in ("cold", "warm"):
        outputs = run(tiny_compiled, requested)
        assert_right(oracle, requested, outputs)
    assert sum(output.num_cached_tokens or 0 for output in outputs) > 0


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_ngram_drafts() -> None:
    """In a process of its own: vLLM can't start another engine in one where ngram drafting has loaded numba."""
    alone = Path(__file__).with_name("ngram_alone.py")
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-W", "ignore", str(alone)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "2 passed" in done.stdout


def test_a_draft_model(start: Start, oracle: Oracle, tiny_llama: str) -> None:
    """The model drafts for itself, unsteered: drafts of plain requests are taken, those of steered ones corrected."""
    llm = start(speculative_config={"model": tiny_llama, "num_speculative_tokens": 3}, max_num_seqs=16)
    requested = asks(NUM if RUNNER == "v1" else 4)
    outputs, accepted = drafts_of(llm, requested)
    assert_right(oracle, requested, outputs)
    assert accepted > 0


@pytest.mark.filterwarnings("ignore:max_rollback_tokens:DeprecationWarning")
def test_structured_output(start: Start, oracle: Oracle) -> None:
    """Constrained to digits: the tokens obey, and among digits they are as likely as the steered model says."""
    from helpers.driving import params
    from vllm.sampling_params import StructuredOutputsParams

    llm = start()
    requested = asks(len(SPECS))
    inputs: Any = [{"prompt_token_ids": ask.prompt} for ask in requested]
    wanted = [
        params(ask.steering, max_tokens=ask.max_tokens, structured_outputs=StructuredOutputsParams(regex="[0-9]{32}"))
        for ask in requested
    ]
    outputs = list(llm.generate(inputs, wanted, use_tqdm=False))
    ids = [token for output in outputs for token in output.outputs[0].token_ids]
    tokenizer = llm.get_tokenizer()
    assert tokenizer.decode(ids).isdigit()
    assert_right(oracle, requested, outputs, allowed=tokenizer.convert_tokens_to_ids(list("0123456789")))


def test_samples_of_one_request(start: Start, oracle: Oracle) -> None:
    """n in 1..4, re-scored: each sample's tokens are as likely as the oracle says of the steered model."""
    llm = start()
    for n in range(1, 5) if RUNNER == "v1" else (3,):
        requested = asks(4, seed=n)
        outputs = run(llm, requested, n=n, temperature=1.0, seed=None)
        assert [len(output.outputs) for output in outputs] == [n] * 4
        assert_right(oracle, requested, outputs)


@pytest.fixture(scope="module")
def start_with_sites(start: Start) -> Start:
    """Starts an engine whose attention and MLP outputs can be edited."""
    return partial(start, steering=SteeringConfig(rows=8, sites=SITES_IN_BLOCKS))


def at_sites(num: int, **fields: Any) -> list[Ask]:
    return asks(num, specs=AT_SITES, probes=PROBES_AT_SITES, **fields)


@pytest.mark.slow
def test_sites_in_chunks_and_preempted(start_with_sites: Start, oracle: Oracle) -> None:
    small = {"num_gpu_blocks_override": 14, "max_num_seqs": 8, "max_model_len": 256, "max_num_batched_tokens": 16}
    llm = start_with_sites(enable_prefix_caching=False, **small)
    num, length = (16, 40) if RUNNER == "v1" else (6, 24)
    requested = [
        replace(ask, prompt=marked(tokens(900 + i, 60)), max_tokens=length) for i, ask in enumerate(at_sites(num))
    ]
    with (
        counting(core_of(llm).scheduler, "schedule") as steps,
        counting(core_of(llm).scheduler, "_preempt_request") as out,
    ):
        assert_right(oracle, requested, run(llm, requested))
    assert len(steps) >= num * 60 / 16
    assert out, "nothing was preempted"


@pytest.mark.slow
def test_sites_with_drafts(start_with_sites: Start, oracle: Oracle, tiny_llama: str) -> None:
    llm = start_with_sites(speculative_config={"model": tiny_llama, "num_speculative_tokens": 3}, max_num_seqs=16)
    requested = at_sites(NUM if RUNNER == "v1" else 4)
    outputs, accepted = drafts_of(llm, requested)
    assert_right(oracle, requested, outputs)
    assert accepted > 0


@pytest.mark.slow
@pytest.mark.usefixtures("asynchronous")
def test_sites_under_asynchronous_scheduling(start_with_sites: Start, oracle: Oracle) -> None:
    """With a prefix cache, cold and warm."""
    llm = start_with_sites(max_num_batched_tokens=64, max_num_seqs=16)
    assert type(core_of(llm).scheduler).__name__ == "AsyncScheduler"
    requested = at_sites(NUM, shared=70)
    for _ in ("cold", "warm"):
        outputs = run(llm, requested)
        assert_right(oracle, requested, outputs)
    assert sum(output.num_cached_tokens or 0 for output in outputs) > 0


def test_steering_changes_between_turns(start: Start, oracle: Oracle) -> None:
    """A conversation of three turns; what a turn may take from the cache, and what it must compute anew."""
    llm = start()
    history = tokens(77, 70)
    turns = [SPECS[1], SPECS[1], SPECS[2], None]
    cached = []
    for spec in turns:
        ask = Ask(history, spec, 3)
        output = run(llm, [ask])[0]
        assert_right(oracle, [ask], [output])
        cached.append(output.num_cached_tokens)
        history = [*history, *output.outputs[0].token_ids, *tokens(len(history), 30)]
    assert cached == [0, 64, 0, 128]  # the third turn's prompt is plain up to its last token


@pytest.mark.slow_on_v2
def test_requests_come_and_go(start: Start, oracle: Oracle) -> None:
    """Added one by one while others run, some aborted in the middle: those that finish are right."""
    from helpers.driving import params

    llm = start(max_num_batched_tokens=48, max_num_seqs=8, num_gpu_blocks_override=40)
    engine = llm.llm_engine
    requested = asks(NUM, max_tokens=10 if RUNNER == "v1" else 4)
    waiting = list(enumerate(requested))
    finished: dict[int, Any] = {}
    step = 0
    while waiting or engine.has_unfinished_requests():
        for _ in range(step % 3):
            if waiting:
                number, ask = waiting.pop(0)
                inputs: Any = {"prompt_token_ids": ask.prompt}
                engine.add_request(str(number), inputs, params(ask.steering, max_tokens=ask.max_tokens))
        for output in engine.step():
            number = int(output.request_id)
            if output.finished:
                finished[number] = output
            elif number % 4 == 2:  # in the middle of its answer
                engine.abort_request([output.request_id])
        step += 1
    assert set(finished) == {number for number in range(NUM) if number % 4 != 2 or requested[number].max_tokens == 1}
    for number, output in finished.items():
        ask = requested[number]
        if ask.probes:
            for choice in output.outputs:
                choice.steering = probed_numbers(output, choice, llm._frontend.resolve(ask.steering))
    assert_right(oracle, [requested[i] for i in finished], list(finished.values()))


@pytest.mark.slow_on_v2
def test_prompt_logprobs(start: Start, oracle: Oracle) -> None:
    from helpers.driving import prompt_logprobs

    llm = start(max_num_batched_tokens=32, max_num_seqs=8)
    requested = [Ask(ask.prompt, ask.spec, 1) for ask in asks(len(SPECS))]
    for ask, output in zip(requested, run(llm, requested, prompt_logprobs=0), strict=True):
        expected = oracle.logprobs(ask.prompt, ask.spec)[range(len(ask.prompt) - 1), ask.prompt[1:]]
        assert abs(prompt_logprobs(output) - expected).max() <= 1e-4


def test_nothing_in_the_matrix_is_plain(oracle: Oracle) -> None:
    """Every spec of the traffic moves the next token's logprobs by far more than any bound here."""
    prompt = marked(tokens(1, 40))
    plain = oracle.logprobs(prompt, None)[-1]
    for spec in (*SPECS, *AT_SITES):
        moved = abs(oracle.logprobs(prompt, spec, prompt_len=len(prompt))[-1] - plain).max()
        assert (moved == 0) if spec is None else moved > 1e-2


@pytest.mark.v1_only
def test_a_preempted_request_may_resume_in_the_next_step(start: Start, oracle: Oracle) -> None:
    """The batch of the next step has the same requests. Their prompts are computed again, but not measured twice, and
    their windows are found again.
    """
    llm = start(enable_prefix_caching=False, max_num_seqs=8, max_num_batched_tokens=256)
    prompt, scope = marked(tokens(910, 40)), {"after": OPEN, "until": CLOSE, "each": True}
    when = {"vector": "r10", "blocks": [0], "measure": "dot", "at": "mean_prompt", "above": 0.0}
    asked = steering(edit("r11", 2.0, when=when), edit("r8", 2.0, scope=scope))
    value = oracle.decisions(prompt, asked, len(prompt)).value(when)
    # The number holds; twice the number would not.
    del when["above"]
    when["below" if value > 0 else "above"] = 1.5 * value
    asked = steering(edit("r11", 2.0, when=when), edit("r8", 2.0, scope=scope))
    requested = [Ask(prompt, asked, 12), Ask(marked(tokens(911, 30)), SPECS[3], 12)]
    engine = llm.llm_engine
    for number, ask in enumerate(requested):
        engine.add_request(
            str(number), {"prompt_token_ids": ask.prompt}, params(ask.steering, max_tokens=ask.max_tokens)
        )
    outputs: dict[str, Any] = {}
    steps = 0
    with counting(core_of(llm).scheduler, "_preempt_request") as preempted:
        while engine.has_unfinished_requests():
            outputs |= {output.request_id: output for output in engine.step()}
            steps += 1
            if steps in (3, 7):
                engine.reset_prefix_cache(reset_running_requests=True)
    assert len(preempted) == 2 * len(requested)
    assert_right(oracle, requested, [outputs[str(number)] for number in range(len(requested))])
