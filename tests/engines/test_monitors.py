"""Monitors on engines: no answer changes by a bit, the cache is shared, and each number is that of the same probe.

`test_probes` and `test_modes` show that probes are right; here, monitors must have exactly the numbers of probes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers.driving import edit, generate, params, sampled, steering, tokens
from helpers.engines import RUNNER, VECTORS
from helpers.oracle import Oracle
from helpers.traffic import Ask, Start, asks, assert_right, core_of, drafts_of, run

from steer_engine import LLM
from steer_engine.monitor import Watched
from steer_engine.settings import SteeringConfig
from steer_engine.vectors import safetensors_format, save
from steer_engine.vllm import probed
from steer_engine.vllm.engine_client import call

MONITORS = "m1=w20:1 m2=w21:0-2:dot m3=w22:2:above=0.1"
SAME = [
    {"name": "m1", "vector": "r20", "blocks": 1},
    {"name": "m2", "vector": "r21", "blocks": [0, 1, 2], "measure": "dot"},
    {"name": "m3", "vector": "r22", "blocks": [2]},
]
"""The same numbers as probes of a request, in the same order."""
NUM = 20 if RUNNER == "v1" else 6

StartWatching = Callable[..., LLM]


@pytest.fixture(scope="module")
def start_watching(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartWatching]:
    """Starts an engine with room for the monitors. They are measured from `watch` on."""
    folder = tmp_path_factory.mktemp("vectors")
    for seed in (20, 21, 22):  # the engine has them in memory as r20 and so on
        save(VECTORS[f"r{seed}"], folder / f"w{seed}.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEER_ENGINE_VECTORS", str(folder))
        patch.setenv("STEER_ENGINE_MONITORS", MONITORS)
        yield start


@pytest.fixture(scope="module")
def idle(start_watching: StartWatching) -> LLM:
    """With room for monitors that nobody has switched on: `watch` may be called once."""
    return start_watching(max_num_batched_tokens=128, max_num_seqs=16)


def watch(llm: LLM) -> None:
    monitors, vectors = llm._frontend.monitors
    payloads = {digest: safetensors_format.to_bytes(vector) for digest, vector in vectors.items()}
    reply = call(llm.llm_engine, "watch", Watched.of(monitors).to_wire(), payloads)
    assert reply == {"ok": True}


@contextmanager
def counted(llm: LLM) -> Iterator[list[np.ndarray]]:
    """What would be counted while the block runs: float32 [tokens, monitors] each."""
    parts: list[np.ndarray] = []
    processor = llm.llm_engine.output_processor
    setattr(processor, probed.COUNT, parts.extend)
    yield parts
    delattr(processor, probed.COUNT)


def everything(output: Any) -> Any:
    return [sampled_of(choice) for choice in output.outputs], output.num_cached_tokens, output.kv_transfer_params


def sampled_of(choice: Any) -> Any:
    ids = list(choice.token_ids)
    logprobs = [{token: each.logprob for token, each in step.items()} for step in choice.logprobs]
    return ids, logprobs, choice.finish_reason, choice.stop_reason, getattr(choice, "steering", None)


def test_nobodys_answer_changes_by_a_bit(idle: LLM) -> None:
    """Plain, edited and probed requests in one batch, cold and with a warm cache, before and after `watch`."""
    requested = asks(NUM, shared=70)
    both = []
    for switched_on in (False, True):
        if switched_on:
            watch(idle)
            assert call(idle.llm_engine, "watch", Watched.of(idle._frontend.monitors[0]).to_wire(), {})["ok"]
            assert not call(idle.llm_engine, "watch", [], {})["ok"]
        idle.llm_engine.reset_prefix_cache()
        with counted(idle) as parts:
            answers = [[everything(output) for output in run(idle, requested, logprobs=5)] for _ in ("cold", "warm")]
        both.append(answers)
        num_tokens = sum(len(choice[0]) for run_ in answers for output in run_ for choice in output[0])
        assert sum(len(part) for part in parts) == (num_tokens if switched_on else 0)
    assert both[0] == both[1]
    assert sum(cached for _, cached, _ in both[1][1]) > 0


def of_clients(outputs: list[Any]) -> np.ndarray:
    """float32 [tokens, monitors]: what the same probes returned."""
    rows = []
    for output in outputs:
        for choice in output.outputs:
            told = choice.steering["probes"]
            columns = [told[each["name"]][str(block)] for each in SAME for block in np.atleast_1d(each["blocks"])]
            rows.append(np.array(columns, dtype=np.float32).T)
    return np.concatenate(rows)


def assert_same(parts: list[np.ndarray], outputs: list[Any]) -> None:
    """The same rows, in any order, bit for bit."""
    watched_NM, asked_NM = np.concatenate(parts), of_clients(outputs)
    assert watched_NM.shape == asked_NM.shape
    assert np.isfinite(asked_NM).all()
    orders = [np.lexsort(numbers_NM.T) for numbers_NM in (watched_NM, asked_NM)]
    assert np.array_equal(watched_NM[orders[0]], asked_NM[orders[1]])
    assert watched_NM.std(axis=0).min() > 1e-3


def probing(requested: list[Ask]) -> list[Ask]:
    return [replace(ask, probes=SAME) for ask in requested]


def test_numbers_are_those_of_the_same_probes(idle: LLM, oracle: Oracle) -> None:
    if probed.watched_by(core_of(idle).scheduler) is None:
        watch(idle)
    requested = probing(asks(NUM, seed=5))
    with counted(idle) as parts:
        outputs = run(idle, requested)
    assert_right(oracle, requested, outputs)
    assert_same(parts, outputs)
    several = probing(asks(3, seed=6))
    with counted(idle) as parts:
        outputs = run(idle, several, n=2, temperature=1.0, seed=None)
    assert_same(parts, outputs)


def test_a_client_has_all_of_its_own_probes(idle: LLM) -> None:
    """Eight at every block, and a stop rule among them, beside the monitors."""
    if probed.watched_by(core_of(idle).scheduler) is None:
        watch(idle)
    probes = [{"name": str(i), "vector": f"r{i}", "blocks": [0, 1, 2]} for i in range(4)]
    probes += [{"name": str(i), "vector": f"r{i - 4}", "blocks": [0, 1, 2], "measure": "dot"} for i in range(4, 8)]
    stop = [{"probe": "5", "block": 1, "above": -1e6, "for": 2}]
    prompt = tokens(60, 12)
    with counted(idle) as parts:
        plain, many = generate(idle, [prompt] * 2, [None, {"probes": probes, "stop": stop}])
    choice = many.outputs[0]
    assert choice.stop_reason == "probe:5"
    assert list(choice.token_ids) == list(plain.outputs[0].token_ids)[:2]
    assert [len(blocks) for blocks in choice.steering["probes"].values()] == [3] * 8
    assert sum(len(part) for part in parts) == len(plain.outputs[0].token_ids) + 2


def test_an_engine_with_monitors_is_idle_when_nobody_asks(idle: LLM) -> None:
    """Monitored requests are not steered: they neither count as such nor wait for rows, and leave nothing behind."""
    if probed.watched_by(core_of(idle).scheduler) is None:
        watch(idle)
    engine, core = idle.llm_engine, core_of(idle)
    engine.add_request("watched", {"prompt_token_ids": tokens(62, 9)}, params())
    engine.step()
    status = idle.steering_status()["workers"][0]
    assert (status["steered_slots"], status["bank_rows_pinned"]) == (0, 5)
    assert (core.steer("waiting", []), core.steer("in_flight", [VECTORS["r20"].digest])) == (0, 0)
    while engine.has_unfinished_requests():
        engine.step()
    assert core.steer("drop", [VECTORS["r20"].digest]) == {"ok": False, "reason": "in use"}
    assert idle.steering_status()["workers"][0]["bank_rows_pinned"] == 5


@pytest.mark.usefixtures("asynchronous")
def test_drafts_and_asynchronous_scheduling(start_watching: StartWatching, oracle: Oracle, tiny_llama: str) -> None:
    """Of rejected drafts nothing is counted, and nothing of accepted ones behind a stop string."""
    llm = start_watching(speculative_config={"model": tiny_llama, "num_speculative_tokens": 3}, max_num_seqs=16)
    watch(llm)
    requested = probing(asks(NUM if RUNNER == "v1" else 4))
    with counted(llm) as parts:
        outputs, accepted = drafts_of(llm, requested)
    assert accepted > 0
    assert_right(oracle, requested, outputs)
    assert_same(parts, outputs)
    prompt = tokens(61, 12)
    free = generate(llm, [prompt], [None])[0].outputs[0]
    stop = llm.get_tokenizer().decode(free.token_ids[1])
    with counted(llm) as parts:
        cut = generate(llm, [prompt], [None], stop=[stop], detokenize=True)[0].outputs[0]
    assert sum(len(part) for part in parts) == len(cut.token_ids) < len(free.token_ids)


@pytest.mark.slow_on_v2
def test_preemption_counts_nothing_twice(start_watching: StartWatching) -> None:
    llm = start_watching(num_gpu_blocks_override=14, max_num_seqs=8, max_model_len=256, enable_prefix_caching=False)
    watch(llm)
    preempted = []
    scheduler = core_of(llm).scheduler
    original = scheduler._preempt_request
    scheduler._preempt_request = lambda *args, **kwargs: (preempted.append(1), original(*args, **kwargs))[1]
    num, length = (12, 40) if RUNNER == "v1" else (6, 8)
    steered = steering(edit("r8", 1.0))
    requested = [Ask(tokens(900 + i, 60), steered if i % 2 else None, length, SAME) for i in range(num)]
    with counted(llm) as parts:
        outputs = run(llm, requested)
    assert preempted
    assert_same(parts, outputs)


def test_monitors_have_rows_of_their_own_in_a_small_bank(start_watching: StartWatching) -> None:
    """A bank of six rows is full with two vectors at all blocks; plain requests never wait for it."""
    llm = start_watching(steering=SteeringConfig(bank_rows=6), max_num_seqs=8)
    prompts = [tokens(70 + i, 8) for i in range(6)]
    specs = [steering(edit(f"r{i}", 2.0)) if i < 4 else None for i in range(6)]
    before = [sampled(output)[0] for output in generate(llm, prompts, specs)]
    watch(llm)
    llm.llm_engine.reset_prefix_cache()
    with counted(llm) as parts:
        outputs = generate(llm, prompts, specs)
    assert [sampled(output)[0] for output in outputs] == before
    assert sum(len(part) for part in parts) == sum(len(ids) for ids in before)
    assert llm.steering_status()["workers"][0]["bank_rows"] == 6 + 5
