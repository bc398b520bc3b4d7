"""Invariant 3: what the engine computes is what a Hugging Face model with forward hooks computes, at every block."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.driving import edit, generate, params, sampled, steering, tokens
from helpers.engines import TINY_BLOCKS
from helpers.exactness import AT_SITES, OPERATIONS, PROMPT, assert_same, teacher_forced
from helpers.oracle import Oracle, stacked

from steer_engine import LLM
from steer_engine.errors import SteeringRequestError
from steer_engine.site import SITES_IN_BLOCKS, all_points


@pytest.mark.parametrize("block", range(TINY_BLOCKS))
def test_add_at_each_block(tiny: LLM, oracle: Oracle, block: int) -> None:
    assert_same(tiny, oracle, steering(edit("r0", 1.5, blocks=block)))


ROWS = ["features set", "feature set", "low_rank", "rotate", "rotate to"]
"""Those that read one row and write another."""


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(tiny: LLM, oracle: Oracle, name: str) -> None:
    assert_same(tiny, oracle, steering(*OPERATIONS[name]))


@pytest.mark.v1_only
@pytest.mark.parametrize("name", ["add", "adds of different blocks", "clamp", "mixed order", "gate above", *ROWS])
def test_compiled(tiny_compiled: LLM, oracle: Oracle, name: str) -> None:
    assert_same(tiny_compiled, oracle, steering(*OPERATIONS[name]))


@pytest.mark.parametrize("name", ["add", "mixed order", "gate above", "low_rank", "features set"])
def test_preserved_norms(tiny: LLM, oracle: Oracle, name: str) -> None:
    assert_same(tiny, oracle, steering(*OPERATIONS[name], preserve_norm=True))


SCOPES = ["all", "prompt", "generation", {"start": 3, "end": 17}, {"start": -5, "end": -1}, {"start": 30}, {"end": 2}]


@pytest.mark.parametrize("scope", SCOPES, ids=str)
def test_scopes_over_prompt_and_answer(tiny: LLM, oracle: Oracle, scope: Any) -> None:
    """Sampled tokens, then the oracle forced through the same tokens: every position as the scope says."""
    spec = steering(edit("r8", 1.5, scope=scope))
    plain, steered = generate(tiny, [PROMPT, PROMPT], [None, spec], max_tokens=12)
    ids, logprobs = sampled(steered)
    whole, start = [*PROMPT, *ids], len(PROMPT) - 1
    expected = teacher_forced(oracle, whole, spec, len(PROMPT))[start:]
    assert np.abs(np.subtract(logprobs, expected)).max() <= 5e-5
    without = teacher_forced(oracle, whole, None)[start:]
    assert np.abs(np.subtract(logprobs, without)).max() >= 1e-2
    if scope == "generation":
        # The first generated token is steered already.
        assert abs(sampled(plain)[1][0] - logprobs[0]) >= 1e-3 or sampled(plain)[0][0] != ids[0]


def test_captured_streams_are_those_of_the_oracle(tiny: LLM, oracle: Oracle) -> None:
    """A capture is taken before the edit of the same block, and after those of earlier blocks."""
    spec = steering(edit("r0", 1.5, blocks=1))
    plain, streams = stacked(oracle.streams(PROMPT, None)), stacked(oracle.streams(PROMPT, spec))
    ours_plain = tiny.capture([PROMPT], "all")[0]
    ours = tiny.capture([PROMPT], "all", steering=spec)[0]
    assert ours.shape == plain.shape
    for block in range(TINY_BLOCKS):
        bound = 1e-5 * float(np.abs(plain[block]).max())
        assert np.abs(ours_plain[block] - plain[block]).max() <= bound
        assert np.abs(ours[block] - streams[block]).max() <= 2 * bound
    assert np.abs(ours[1] - ours_plain[1]).max() == 0.0
    assert np.abs(ours[2] - ours_plain[2]).max() >= 0.1


@pytest.mark.slow
@pytest.mark.parametrize("site", ["attn", "mlp"])
def test_captured_outputs_are_those_of_hooks(tiny_sites: LLM, oracle: Oracle, site: str) -> None:
    """Of prompts and of answers, before the edits of the site and after them."""
    spec = steering(edit("r0", 1.5, site=site, blocks=1), edit("r1", 0.8, blocks=0))
    plain = stacked(oracle.streams(PROMPT, None, site=site))
    bound_L = 1e-5 * np.abs(plain).max(axis=(1, 2))
    for steered in (None, spec):
        streams = oracle.streams(PROMPT, steered, site=site)
        for after in (False, True):
            expected = stacked(streams, after=after)
            ours = tiny_sites.capture([PROMPT], "all", steering=steered, after=after, site=site)[0]
            assert ours.shape == expected.shape
            assert (np.abs(ours - expected).max(axis=(1, 2)) <= 2 * bound_L).all()
            assert (np.abs(expected - plain).max(axis=(1, 2)) >= 1e-2).any() == (steered is not None)
    other = stacked(oracle.streams(PROMPT, None))
    assert (np.abs(other - plain).max(axis=(1, 2)) >= 1e4 * bound_L).all(), "the stream is another number"
    (output,) = tiny_sites.capture_answers([PROMPT], params(spec, max_tokens=4), scope="all", site=site)
    whole = [*PROMPT, *output.outputs[0].token_ids]
    expected = stacked(oracle.streams(whole, spec, len(PROMPT), site=site))[:, :-1]
    assert output.captured.shape == expected.shape
    assert (np.abs(output.captured - expected).max(axis=(1, 2)) <= 2e-5 * np.abs(expected).max(axis=(1, 2))).all()


@pytest.mark.slow
def test_captures_at_several_sites_share_a_batch(tiny_sites: LLM) -> None:
    """And a capture of the stream has the bits that it has alone."""
    alone = tiny_sites.capture([PROMPT], "all")[0]
    points = all_points(range(TINY_BLOCKS), SITES_IN_BLOCKS)
    together = tiny_sites.capture_points([PROMPT], "all", points)[0]
    assert np.array_equal(together[:TINY_BLOCKS], alone)
    for number, site in enumerate(SITES_IN_BLOCKS, start=1):
        own = tiny_sites.capture([PROMPT], "all", site=site)[0]
        assert np.array_equal(together[number * TINY_BLOCKS :][:TINY_BLOCKS], own)


def test_a_site_that_is_not_armed_is_not_captured(tiny: LLM) -> None:
    with pytest.raises(SteeringRequestError, match=r"Site 'mlp' is not armed on this engine; armed: block\."):
        tiny.capture([PROMPT], site="mlp")
    with pytest.raises(SteeringRequestError, match="Site 'ffn' .* Valid sites: block, attn, mlp"):
        tiny.capture_answers([PROMPT], site="ffn")


@pytest.mark.slow
@pytest.mark.parametrize("name", AT_SITES)
def test_edits_of_attention_and_mlp(tiny_sites: LLM, oracle: Oracle, name: str) -> None:
    assert tiny_sites.steering_status()["workers"][0]["site_modules"] == {"attn": ["self_attn"], "mlp": ["mlp"]}
    assert_same(tiny_sites, oracle, steering(*AT_SITES[name]))


@pytest.mark.slow
@pytest.mark.v1_only
@pytest.mark.parametrize("name", ["all sites of a block", "operations"])
def test_edits_of_attention_and_mlp_compiled(tiny_sites_compiled: LLM, oracle: Oracle, name: str) -> None:
    assert_same(tiny_sites_compiled, oracle, steering(*AT_SITES[name]))


@pytest.mark.slow
def test_preserved_norms_of_outputs(tiny_sites: LLM, oracle: Oracle) -> None:
    assert_same(tiny_sites, oracle, steering(*AT_SITES["all sites of a block"], preserve_norm=True))


@pytest.mark.slow
def test_a_condition_on_an_edit_of_an_mlp(tiny_sites: LLM, oracle: Oracle) -> None:
    """The condition is measured in the stream after block 0."""
    for above in (-2.0, 2.0):
        when = {"vector": "r9", "blocks": 0, "above": above}
        spec = steering(edit("r0", 1.5, site="mlp", blocks=[1, 2]), when=when)
        (steered,) = generate(tiny_sites, [PROMPT], [spec], max_tokens=4)
        ids, logprobs = sampled(steered)
        whole, start = [*PROMPT, *ids], len(PROMPT) - 1
        applied = steering(edit("r0", 1.5, site="mlp", blocks=[1, 2], scope="generation"))
        expected = teacher_forced(oracle, whole, applied if above < 0 else None, len(PROMPT))[start:]
        assert np.abs(np.subtract(logprobs, expected)).max() <= 5e-5


@pytest.mark.slow
@pytest.mark.parametrize("at", ["last_prompt_token", "mean_prompt", "max_prompt"])
@pytest.mark.parametrize("site", ["attn", "mlp"])
def test_a_condition_on_an_output(tiny_sites: LLM, oracle: Oracle, site: str, at: str) -> None:
    """Its number is that of hooks on the modules, and it decides as the oracle does, whichever way."""
    when = {"vector": "r9", "blocks": [0, 1], "site": site, "at": at, "measure": "dot"}

    def spec_of(condition: dict[str, Any]) -> dict[str, Any]:
        conditional = edit("r0", 1.5, site="mlp", blocks=[1, 2]) | {"when": condition}
        return steering(conditional, edit("r1", 0.8, blocks=0))

    anything = when | {"above": -1e6}
    number = oracle.decisions(PROMPT, spec_of(anything), len(PROMPT)).value(anything)
    for above in (number - 0.05, number + 0.05):
        spec = spec_of(when | {"above": above})
        (steered,) = generate(tiny_sites, [PROMPT], [spec], max_tokens=4)
        (told,) = steered.steering["conditions"]
        assert told["site"] == site
        assert told["value"] == pytest.approx(number, abs=2e-4)
        assert told["held"] == (above < number)
        ids, logprobs = sampled(steered)
        whole, start = [*PROMPT, *ids], len(PROMPT) - 1
        expected = teacher_forced(oracle, whole, spec, len(PROMPT))[start:]
        assert np.abs(np.subtract(logprobs, expected)).max() <= 5e-5


@pytest.mark.slow
def test_armed_sites_leave_others_unchanged(tiny: LLM, tiny_sites: LLM) -> None:
    """Bit for bit: plain requests, and edits of the stream, alone and beside an edit of an MLP."""
    specs = [None, steering(edit("r0", 0.7), edit("r3", op="ablate"))]
    expected = [sampled(output) for output in generate(tiny, [PROMPT] * 2, specs)]
    assert [sampled(output) for output in generate(tiny_sites, [PROMPT] * 2, specs)] == expected
    beside = [*specs, steering(edit("r1", 3.0, site="mlp"))]
    mixed = [sampled(output) for output in generate(tiny_sites, [PROMPT] * 3, beside)]
    plain = [sampled(output) for output in generate(tiny, [PROMPT] * 3, [*specs, None])]
    assert mixed[:2] == plain[:2]
    assert mixed[2] != plain[2]
    assert mixed[2] != expected[0]


@pytest.mark.slow
def test_the_prefix_cache_keeps_sites_apart(tiny_sites: LLM) -> None:
    """The same edit at another site finds no block of the cache, the same one finds those before the last token."""
    specs = [steering(edit("r4", 2.0, site=site)) for site in ("block", "attn", "mlp")]
    prompt = tokens(77, 96)
    cold = [generate(tiny_sites, [prompt], [spec], max_tokens=2)[0] for spec in specs]
    assert [output.num_cached_tokens for output in cold] == [0, 0, 0]
    warm = [generate(tiny_sites, [prompt], [spec], max_tokens=2)[0] for spec in specs]
    assert all(output.num_cached_tokens >= 64 for output in warm)
    assert len({tuple(sampled(output)[1]) for output in cold}) == 3
    for before, after in zip(cold, warm, strict=True):
        assert np.abs(np.subtract(sampled(before)[1], sampled(after)[1])).max() <= 5e-5
