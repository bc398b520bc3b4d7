"""Probes: each number against a float64 projection of the oracle's stream; stop rules at exactly the oracle's token.

`test_modes` has probes in its traffic: chunks, cache, preemption, drafts, asynchronous scheduling, n, compiled.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.driving import FEW, edit, generate, params, steering, tokens
from helpers.engines import RUNNER
from helpers.oracle import Oracle
from helpers.oracle_probes import assert_numbers
from helpers.stop_rules import assert_stop_rules
from helpers.traffic import Start, core_of, drafts_of

from steer_engine import LLM
from steer_engine.errors import SteeringRequestError

PROMPT = [*tokens(50, 12), 77, 78, *tokens(51, 6), 90, *tokens(52, 5)]
EDITS = [edit("r8", 2.0), edit("r9", 0.7, op="ablate", scope="generation")]
SCOPES = [
    *("generation", "all", "prompt", "last_prompt_token"),
    *({"start": -3}, {"from": "generation", "start": 1, "end": 3}),
    *({"after": 77, "until": 90}, {"except": {"after": [77, 78]}}),
]


@pytest.mark.parametrize("measure", ["cosine", "dot"])
@pytest.mark.parametrize("scope", SCOPES, ids=str)
def test_numbers(tiny: LLM, oracle: Oracle, scope: Any, measure: str) -> None:
    """Before and after the edits, with and without any, at one block and at all."""
    probe = {"vector": "r20", "measure": measure, "scope": scope}
    probes = [
        probe | {"name": "before"},
        probe | {"name": "after", "after": True, "blocks": [0, 2]},
        probe | {"name": "own", "vector": "r8", "blocks": 1, "after": True},
    ]
    specs = [None, steering(*EDITS), steering(*EDITS, preserve_norm=True)]
    wanted = [(spec or {}) | {"probes": probes} for spec in specs]
    outputs = generate(tiny, [PROMPT] * len(specs), wanted)
    for spec, output in zip(specs, outputs, strict=True):
        choice = output.outputs[0]
        assert_numbers(oracle, PROMPT, choice.token_ids, spec, probes, choice.steering)
    # The edits show in the numbers.
    plain, steered = (outputs[i].outputs[0].steering["probes"]["own"]["1"] for i in (0, 1))
    if plain[0] is not None:
        assert abs(plain[0] - steered[0]) > 1e-2


@pytest.mark.slow
def test_numbers_at_attention_and_mlp(tiny_sites: LLM, oracle: Oracle) -> None:
    probe = {"vector": "r20", "measure": "dot", "scope": "all"}
    probes = [
        *(probe | {"name": site, "site": site} for site in ("block", "attn", "mlp")),
        probe | {"name": "after", "site": "mlp", "after": True, "blocks": [0, 2]},
        {"name": "own", "vector": "r8", "blocks": 1, "site": "attn", "after": True},
    ]
    edits = [edit("r8", 2.0, site="attn"), edit("r9", 0.7, op="ablate", site="mlp"), edit("r10", 1.0)]
    specs = [None, steering(*edits), steering(*edits, preserve_norm=True)]
    outputs = generate(tiny_sites, [PROMPT] * 3, [(spec or {}) | {"probes": probes} for spec in specs])
    for spec, output in zip(specs, outputs, strict=True):
        choice = output.outputs[0]
        assert_numbers(oracle, PROMPT, choice.token_ids, spec, probes, choice.steering)
    plain, steered = (outputs[i].outputs[0].steering["probes"]["own"]["1"] for i in (0, 1))
    assert abs(plain[0] - steered[0]) > 1e-2
    stop = [{"probe": "attn", "block": 1, "above": -1e6}]
    (stopped,) = generate(tiny_sites, [PROMPT], [{"probes": probes, "stop": stop}])
    assert len(stopped.outputs[0].token_ids) == 1


def test_probes_change_no_bit_of_the_answer(tiny: LLM) -> None:
    probes = [{"name": "a", "vector": "r20", "scope": "all"}, {"name": "b", "vector": "r8", "after": True}]
    for spec in (None, steering(*EDITS), steering(*EDITS, preserve_norm=True)):
        both = []
        for wanted in (spec, (spec or {}) | {"probes": probes}):
            tiny.llm_engine.reset_prefix_cache()
            choice = generate(tiny, [PROMPT], [wanted], logprobs=5)[0].outputs[0]
            both.append((list(choice.token_ids), choice.logprobs))
        assert both[0] == both[1]


def test_prompt_probes_read_nothing_from_the_cache_and_others_do(tiny: LLM, oracle: Oracle) -> None:
    prompt = tokens(53, 70)
    for scope, cached in (("generation", 64), ("all", 0)):
        probes = [{"name": "p", "vector": "r20", "blocks": 1, "scope": scope}]
        tiny.llm_engine.reset_prefix_cache()
        generate(tiny, [prompt], [None], max_tokens=1)
        output = generate(tiny, [prompt], [{"probes": probes}], max_tokens=3)[0]
        assert output.num_cached_tokens == cached
        choice = output.outputs[0]
        assert_numbers(oracle, prompt, choice.token_ids, None, probes, choice.steering)


def test_a_summary_is_of_the_numbers(tiny: LLM) -> None:
    probe = {"vector": "r20", "blocks": [0, 1], "scope": "all"}
    probes = [
        probe | {"name": "all"},
        probe | {"name": "short", "return": "summary"},
        probe | {"name": "no", "return": "none"},
    ]
    told = generate(tiny, [PROMPT], [{"probes": probes}])[0].outputs[0].steering
    assert told["probes"].keys() == {"all", "short"}
    for block in ("0", "1"):
        numbers = told["prompt_probes"]["all"][block] + told["probes"]["all"][block]
        summary = told["probes"]["short"][block]
        assert summary["tokens"] == len(numbers) == len(PROMPT) - 1 + FEW
        assert summary["max"] == max(numbers)
        assert abs(summary["mean"] - np.mean(numbers)) < 1e-7


def test_a_stop_string_cuts_the_numbers_too(tiny: LLM) -> None:
    wanted = {"probes": [{"name": "p", "vector": "r20", "blocks": 0}]}
    free = generate(tiny, [PROMPT], [wanted])[0].outputs[0]
    stop = tiny.get_tokenizer().decode(free.token_ids[1])
    cut = generate(tiny, [PROMPT], [wanted], stop=[stop], detokenize=True)[0].outputs[0]
    assert len(cut.token_ids) < len(free.token_ids)
    assert len(cut.steering["probes"]["p"]["0"]) == len(cut.token_ids)


def test_stop_rules_fire_at_exactly_the_oracles_token(tiny: LLM, oracle: Oracle) -> None:
    """200 random rules, on plain and steered requests in one batch."""
    assert_stop_rules(tiny, oracle, 200, 16 if RUNNER == "v1" else 4)


SAMPLE = (60, 16) if RUNNER == "v1" else (12, 5)
"""Rules, and tokens of an answer, where the engine computes ahead of the rules."""


@pytest.mark.slow
@pytest.mark.usefixtures("asynchronous")
def test_stop_rules_under_asynchronous_scheduling(start: Start, oracle: Oracle) -> None:
    """A step is in flight when a rule fires: its tokens are thrown away."""
    llm = start(max_num_batched_tokens=64, max_num_seqs=16)
    assert type(core_of(llm).scheduler).__name__ == "AsyncScheduler"
    assert_stop_rules(llm, oracle, *SAMPLE)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["Scheduler", "AsyncScheduler"])
def test_stop_rules_with_drafts(
    start: Start, oracle: Oracle, tiny_llama: str, scheduler: str, request: pytest.FixtureRequest
) -> None:
    """A rule fires among accepted drafts: those after its token are thrown away."""
    if scheduler == "AsyncScheduler":
        request.getfixturevalue("asynchronous")
    llm = start(speculative_config={"model": tiny_llama, "num_speculative_tokens": 3}, max_num_seqs=16)
    assert type(core_of(llm).scheduler).__name__ == scheduler
    _, accepted = drafts_of(llm, [], lambda llm, _: assert_stop_rules(llm, oracle, *SAMPLE))
    assert accepted > 0


def test_the_text_of_the_token_that_fired_is_returned(tiny: LLM) -> None:
    stop = {"probe": "p", "above": -2.0, "for": 2}
    wanted = {"probes": [{"name": "p", "vector": "r20", "blocks": 0}], "stop": [stop]}
    free = generate(tiny, [PROMPT], [None], max_tokens=2, detokenize=True)[0].outputs[0]
    choice = generate(tiny, [PROMPT], [wanted], detokenize=True)[0].outputs[0]
    assert (list(choice.token_ids), choice.text) == (list(free.token_ids), free.text)
    last = generate(tiny, [PROMPT], [wanted], max_tokens=2)[0].outputs[0]
    assert (last.finish_reason, last.stop_reason) == ("stop", "probe:p")
    # An answer has at least `min_tokens`, whatever a rule says.
    longer = generate(tiny, [PROMPT], [wanted], min_tokens=3)[0].outputs[0]
    assert len(longer.token_ids) == 3


def test_a_scope_that_misses_this_prompt_gives_no_number_and_stops_nothing(tiny: LLM) -> None:
    """Beside steered requests, after others have left their numbers in the buffer."""
    probe = {"name": "p", "vector": "r20", "blocks": [0], "scope": "all"}
    generate(tiny, [PROMPT], [{"probes": [probe]}])
    missing = {"probes": [probe | {"scope": {"start": 400, "end": -1}}], "stop": None}
    late = {"probes": [probe | {"scope": {"start": -90, "end": 2}}], "stop": [{"probe": "p", "above": -2.0, "for": 1}]}
    prompt = tokens(54, 120)
    outputs = generate(tiny, [prompt] * 3, [missing, late, steering(*EDITS)])
    for output in outputs[:2]:
        choice = output.outputs[0]
        assert len(choice.token_ids) == FEW
        assert choice.steering["probes"]["p"]["0"] == [None] * FEW
    assert core_of(tiny).scheduler.requests == {}


def test_an_aborted_request_leaves_nothing(tiny: LLM) -> None:
    engine = tiny.llm_engine
    wanted = {"probes": [{"name": "p", "vector": "r20"}]}
    inputs: Any = {"prompt_token_ids": PROMPT}
    engine.add_request("gone", inputs, params(wanted, max_tokens=FEW))
    engine.step()
    engine.abort_request(["gone"])
    while engine.has_unfinished_requests():
        engine.step()
    generate(tiny, [PROMPT], [wanted])
    assert not engine.output_processor._steer_probe_queue
    assert core_of(tiny).scheduler.requests == {}


WRONG = {
    "an unknown vector": ({"vector": "nobody"}, "steering.probes[0].vector"),
    "an unknown block": ({"vector": "r20", "blocks": [7]}, "steering.probes[0].blocks"),
    "no calibration": ({"vector": "r20", "measure": "probability"}, "steering.probes[0].measure"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_probes_are_refused(tiny: LLM, case: str) -> None:
    fields, param = WRONG[case]
    with pytest.raises(SteeringRequestError) as refused:
        generate(tiny, [PROMPT], [{"probes": [{"name": "p", **fields}]}])
    assert refused.value.param == param
