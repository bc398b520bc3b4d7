"""Invariants 7 and 8 offline: a request that cannot be steered gets a clear error, and the next one is served."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest
from helpers.driving import FEW, edit, generate, params, sampled, score, steering, tokens
from helpers.engines import RUNNER, random_vector
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams

from steer_engine import LLM
from steer_engine.errors import SteeringRequestError, UnknownVectorError
from steer_engine.program import PROGRAM_KEY

PROMPT = tokens(4, 20)

REFUSED: dict[str, tuple[Any, str, str]] = {
    "unknown vector": (steering(edit("nobody")), "steering.edits[0].vector", "nobody"),
    "block out of range": (steering(edit("r0", blocks="1-3")), "steering.edits[0].blocks", "block"),
    "other hidden size": (steering(edit("wide")), "steering.edits[0].vector", "hidden size"),
    "not finite": (steering(edit("r0", float("nan"))), "steering.edits[0].scale", "finite"),
    "absurd": (steering(edit("r0", 1e6)), "steering.edits[0].scale", "1000"),
    "unknown key": (steering(edit("r0", strength=2)), "steering.edits[0].strength", "unknown"),
    "wrong type": (steering(edit("r0", "2")), "steering.edits[0].scale", "number"),  # type: ignore[arg-type]
    "no edits": ({"edits": []}, "steering.edits", "at least 1"),
    "too many rows": (
        steering(*[edit(f"r{i}", scope={"start": i}, gate={"vector": f"r{9 + i}", "min_cos": 0.0}) for i in range(5)]),
        "steering.edits",
        "--steering-rows",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_specs(tiny: LLM, name: str) -> None:
    spec, param, words = REFUSED[name]
    tiny.vectors.add("wide", random_vector(0, hidden_size=128))
    before = sampled(generate(tiny, [PROMPT], [None], max_tokens=1)[0])
    with pytest.raises(SteeringRequestError) as caught:
        generate(tiny, [PROMPT], [spec])
    assert caught.value.param == param
    assert words in caught.value.message
    assert not tiny.llm_engine.has_unfinished_requests()
    assert sampled(generate(tiny, [PROMPT], [None], max_tokens=1)[0]) == before


@pytest.mark.v1_only
@pytest.mark.parametrize("steered", [False, True])
def test_a_seed_gives_the_same_tokens_however_its_prompt_is_chunked(tiny: LLM, steered: bool) -> None:
    """Plain vLLM's V1 runner on a CPU ends its engine here: it cannot rewind a CPU generator after a discarded draw."""
    budget = tiny.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    length = min(400, budget - 1)
    prompts: list[Any] = [{"prompt_token_ids": tokens(8 + i, length)} for i in range(12)]
    assert len(prompts) * length > budget, "the step's budget is partly used: some prompts are chunked"
    spec = steering(edit("r0")) if steered else None
    wanted = [params(spec, seed=i, temperature=1.0, max_tokens=4) for i in range(len(prompts))]

    def sampled_tokens(outputs: Any) -> list[list[int]]:
        return [list(output.outputs[0].token_ids) for output in outputs]

    together = sampled_tokens(tiny.generate(prompts, wanted, use_tqdm=False))
    alone = [
        sampled_tokens(tiny.generate([prompt], one, use_tqdm=False))[0]
        for prompt, one in zip(prompts, wanted, strict=True)
    ]
    assert together == alone
    assert len({tuple(sampled) for sampled in alone}) > 1


def test_unknown_vectors_have_a_status_of_their_own(tiny: LLM) -> None:
    with pytest.raises(UnknownVectorError):
        generate(tiny, [PROMPT], [steering(edit("nobody"))])


def test_the_reserved_key_is_ours(tiny: LLM) -> None:
    wire = {"sites": [], "vectors": [], "identity": [], "keep_norm": False}
    with pytest.raises(VLLMValidationError, match="reserved"):
        tiny.generate(
            {"prompt_token_ids": PROMPT}, SamplingParams(max_tokens=1, extra_args={PROGRAM_KEY: wire}), use_tqdm=False
        )


def test_beam_search_is_refused(tiny: LLM) -> None:
    """vLLM's parameters of a beam search have no place for it; put there all the same, it is not dropped."""
    with pytest.raises(TypeError, match="extra_args"):
        BeamSearchParams(beam_width=2, max_tokens=2, extra_args={"steering": steering(edit("r0"))})
    wanted = BeamSearchParams(beam_width=2, max_tokens=2)
    wanted.extra_args = {"steering": steering(edit("r0"))}
    with pytest.raises(SteeringRequestError, match="Beam search") as caught:
        tiny.beam_search([{"prompt_token_ids": PROMPT}], wanted)
    assert caught.value.param == "steering"


@pytest.mark.parametrize("value", [0, "", [], {}, "0"])
def test_a_falsy_value_is_not_no_steering(tiny: LLM, value: Any) -> None:
    wanted = SamplingParams(max_tokens=1, extra_args={"steering": value})
    with pytest.raises(SteeringRequestError):
        tiny.generate({"prompt_token_ids": PROMPT}, wanted, use_tqdm=False)
    assert not tiny.llm_engine.has_unfinished_requests()
    beams = BeamSearchParams(beam_width=2, max_tokens=2)
    beams.extra_args = {"steering": value}
    with pytest.raises(SteeringRequestError, match="Beam search"):
        tiny.beam_search([{"prompt_token_ids": PROMPT}], beams)


def test_streaming_input_is_refused(tiny: LLM) -> None:
    process = tiny.llm_engine.input_processor.process_inputs
    prompt: Any = {"type": "token", "prompt_token_ids": PROMPT}
    for resumable in (False, True):
        wanted = params(steering(edit("r0")))
        if resumable:
            with pytest.raises(VLLMValidationError, match="Streaming input"):
                process("stream", prompt, wanted, supported_tasks=("generate",), resumable=True)
        else:
            assert (
                PROGRAM_KEY
                in process("whole", prompt, wanted, supported_tasks=("generate",)).sampling_params.extra_args
            )


def test_the_callers_params_stay_untouched(tiny: LLM) -> None:
    wanted = params(steering(edit("r0", 2.0)))
    tiny.generate([{"prompt_token_ids": PROMPT}, {"prompt_token_ids": PROMPT[:7]}], wanted, use_tqdm=False)
    assert wanted.extra_args == {"steering": steering(edit("r0", 2.0))}


def test_a_steered_request_leaves_a_line_in_the_log(tiny: LLM, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", logger="steer_engine.requests"):
        generate(tiny, [PROMPT, PROMPT], [steering(edit("r0", 2.0, scope="prompt")), None], max_tokens=1)
    (record,) = [record for record in caplog.records if record.name == "steer_engine.requests"]
    line = json.loads(record.getMessage().removeprefix("steered "))
    assert line["vectors"] == [tiny.vectors.get("r0").digest]
    assert [span for _, *span in line["edits"]] == [[0, len(PROMPT)]]
    assert line["request_id"]


def test_children_of_n_are_steered(tiny: LLM) -> None:
    """Every sample of n=3, re-scored: its tokens are as likely as the steered model says, not the plain one."""
    spec = steering(edit("r5", 1.5))
    output = generate(tiny, [PROMPT], [spec], n=3, temperature=1.0, max_tokens=FEW)[0]
    assert len(output.outputs) == 3
    for completion in output.outputs:
        ids = list(completion.token_ids)
        reported = np.array([step[token].logprob for token, step in zip(ids, completion.logprobs, strict=True)])
        whole = [*PROMPT, *ids]
        steered = score(tiny, [whole], [spec])[0][len(PROMPT) - 1 :]
        plain = score(tiny, [whole], [None])[0][len(PROMPT) - 1 :]
        assert np.abs(reported - steered).max() <= 1e-4
        assert np.abs(reported - plain).max() >= 1e-2


def test_more_requests_than_slots(tiny: LLM) -> None:
    """Three waves of distinct programs over 32 slots: slots and rows are handed on cleanly, in any order."""
    num = 40 if RUNNER == "v1" else 34
    prompts = [tokens(200 + i, 6 + i % 5) for i in range(num)]
    specs = [steering(edit(f"r{i % 32}", 1.0 + i / num)) if i % 3 else None for i in range(num)]
    lengths = [1 + (7 * i) % (11 if RUNNER == "v1" else 3) for i in range(num)]
    inputs: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
    batch = tiny.generate(
        inputs, [params(spec, max_tokens=n) for spec, n in zip(specs, lengths, strict=True)], use_tqdm=False
    )
    tiny.llm_engine.reset_prefix_cache()
    for i in range(0, num, 3 if RUNNER == "v1" else 8):
        for j in (i, (i + 1) % num):
            alone = generate(tiny, [prompts[j]], [specs[j]], max_tokens=lengths[j])[0]
            ids, logprobs = sampled(alone)
            assert list(batch[j].outputs[0].token_ids) == ids
            assert np.abs(np.subtract(sampled(batch[j])[1], logprobs)).max() <= 1e-4
    worker = tiny.steering_status()["workers"][0]
    # The last ones to finish are cleared by the next step; an unsteered request brings one.
    generate(tiny, [PROMPT], [None], max_tokens=1)
    worker = tiny.steering_status()["workers"][0]
    assert worker["steered_slots"] == 0
    assert worker["bank_rows_pinned"] == 0


def test_an_aborted_request_leaves_nothing(tiny: LLM) -> None:
    engine = tiny.llm_engine
    engine.add_request("goes", {"prompt_token_ids": PROMPT}, params(steering(edit("r6", 3.0)), max_tokens=50))
    for _ in range(4):
        engine.step()
    engine.abort_request(["goes"])
    while engine.has_unfinished_requests():
        engine.step()
    tiny.llm_engine.reset_prefix_cache()
    plain = sampled(generate(tiny, [PROMPT], [None])[0])
    tiny.llm_engine.reset_prefix_cache()
    again = sampled(generate(tiny, [PROMPT], [None])[0])
    assert plain == again
    assert tiny.steering_status()["workers"][0]["steered_slots"] == 0


def test_the_store_stays_within_its_budget(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """More vectors than fit: idle ones make room, are shipped again when they are needed, and steer right."""
    from steer_engine.engine import admission

    monkeypatch.setattr(admission, "PIN_SECONDS", 0.0)
    core = tiny.llm_engine.engine_core.engine_core
    resident = core._steer_resident
    resident.touch(resident.digests(), time.monotonic())  # earlier tests have pinned them for longer
    monkeypatch.setattr(resident, "budget", resident.num_bytes + 2500)
    for seed in range(60, 66):
        tiny.vectors.add(f"r{seed}", random_vector(seed))
    first = {seed: score(tiny, [PROMPT], [steering(edit(f"r{seed}"))])[0] for seed in range(60, 66)}
    assert resident.num_bytes <= resident.budget
    assert tiny.steering_status()["workers"][0]["vectors"] == resident.digests()
    tiny.llm_engine.reset_prefix_cache()
    for seed, expected in first.items():
        np.testing.assert_array_equal(score(tiny, [PROMPT], [steering(edit(f"r{seed}"))])[0], expected)
    assert len({logprobs.tobytes() for logprobs in first.values()}) == len(first)
