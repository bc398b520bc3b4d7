from __future__ import annotations

import numpy as np
import pytest
from steer_bench.arms.hooks import Hooks, left_padded
from steer_bench.load import Load, Steering

PLAIN = Load(num_requests=5, concurrency=5, max_tokens=4, max_prompt=40)


def test_prompts_are_padded_on_the_left_with_a_mask() -> None:
    ids_BT, mask_BT = left_padded([[5, 6, 7], [8]])
    assert ids_BT.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask_BT.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.fixture(scope="module")
def hooks(tiny_llama: str) -> Hooks:
    import torch
    from transformers import AutoModelForCausalLM

    return Hooks(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval(), num_vectors=5)


def test_every_request_gets_its_own_vector_in_any_batch_size(hooks: Hooks) -> None:
    load = Load(**{**PLAIN.to_json(), "steering": Steering.ADD, "num_vectors": 3, "every": 2})
    runs = {}
    for size in (1, 2, 5):
        hooks.command("batch_size", value=size)
        runs[size] = hooks.run(load, check=True)
    plain = hooks.run(PLAIN, check=True)
    for size in (2, 5):
        assert runs[size].applied["answers"] == runs[1].applied["answers"]
        # Means over at least 15 log-probabilities of size 10, a few hundred float32 roundings apart.
        np.testing.assert_allclose(runs[size].prompt_logprobs, runs[1].prompt_logprobs, rtol=0, atol=1e-4)
    moved = np.abs(np.subtract(runs[1].prompt_logprobs, plain.prompt_logprobs))
    steered = [load.vector_of(request) is not None for request in range(load.num_requests)]
    assert (moved[steered] > 1e-2).all()
    assert (moved[np.invert(steered)] < 1e-4).all()


def test_unsteered_answers_equal_those_of_the_model_without_hooks(hooks: Hooks) -> None:
    import torch

    hooks.command("batch_size", value=3)
    timing = hooks.run(PLAIN, check=True)
    for request, prompt in enumerate(PLAIN.prompts(hooks.model.config.vocab_size)):
        tokens = list(prompt)
        with torch.inference_mode():
            for _ in range(PLAIN.max_tokens):
                logits_TV = hooks.model(torch.tensor([tokens]), use_cache=False).logits[0]
                tokens.append(int(logits_TV[-1].argmax()))
            logprobs_TV = hooks.model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        assert timing.applied["answers"][request] == tokens[len(prompt) :]
        said_T = logprobs_TV[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
        assert abs(timing.prompt_logprobs[request] - float(said_T.mean())) < 1e-4


def test_exactly_max_tokens_are_generated_and_timed(hooks: Hooks) -> None:
    hooks.command("batch_size", value=2)
    timing = hooks.run(PLAIN)
    assert timing.output_tokens == PLAIN.num_requests * PLAIN.max_tokens
    assert timing.prompt_tokens == sum(map(len, PLAIN.prompts(hooks.model.config.vocab_size)))
    assert 0 < timing.ttft_ms < 1e3 * timing.seconds
    assert 0 < timing.itl_ms < timing.ttft_ms + 1e3 * timing.seconds


def test_unsupported_loads_and_commands_are_errors(hooks: Hooks) -> None:
    with pytest.raises(ValueError, match="directional in all"):
        hooks.run(Load(**{**PLAIN.to_json(), "steering": Steering.DIRECTIONAL}))
    with pytest.raises(ValueError, match="has no command 'sing'"):
        hooks.command("sing")


def test_scores_do_not_depend_on_the_batch_and_generation_steers_only_the_last_token(hooks: Hooks) -> None:
    # The answers' tokens come after the same prompts, but in another order than their lengths.
    questions = [{"prompt_ids": [9, 8, 7, 6, 5][:length], "answer_ids": [3, 4]} for length in (3, 5, 1)]
    scores = {
        (scope, size): np.array(
            hooks.command("score", questions=questions, alphas=[0.0, 8.0], scope=scope, batch_size=size)["scores"]
        )
        for scope in ("all", "generation")
        for size in (1, 4)
    }
    for scope in ("all", "generation"):
        np.testing.assert_allclose(scores[scope, 4], scores[scope, 1], rtol=0, atol=1e-4)
    both = scores["all", 1], scores["generation", 1]
    np.testing.assert_allclose(both[0][:, 0], both[1][:, 0], rtol=0, atol=1e-6)  # strength 0
    assert (both[0][:, 0, 2] == 0).all()  # KL of the baseline to itself
    np.testing.assert_allclose(both[0][2], both[1][2], rtol=0, atol=1e-5)  # one token: all of it is the last
    assert np.abs(both[0][:2, 1] - both[1][:2, 1]).max() > 1e-3
