"""Random stop rules, and the token at which the oracle says that each of them ends its answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from helpers.driving import edit, generate, steering, tokens
from helpers.oracle import Oracle
from helpers.oracle_probes import expected_numbers
from helpers.traffic import core_of
from steer_engine import LLM

SPECS = (None, steering(edit("r8", 1.5)), steering(edit("r9", op="ablate", scope="generation")))


@dataclass(frozen=True)
class Case:
    prompt: list[int]
    spec: dict[str, Any] | None
    probe: dict[str, Any]


def random_cases(rng: np.random.Generator, num: int, repeats: int = 1) -> list[Case]:
    """Plain and steered requests with a probe each. repeats: how often a prompt says the same."""
    cases = []
    for number in range(num):
        prompt = tokens(6_000 + number, int(rng.integers(3, 20))) * repeats
        probe = {"name": "p", "vector": f"r{20 + number % 8}", "blocks": [int(rng.integers(3))], "measure": "dot"}
        cases.append(Case(prompt, SPECS[number % 3], probe | {"after": bool(number % 2)}))
    return cases


def assert_stop_rules(llm: LLM, oracle: Oracle, num: int, length: int, *, repeats: int = 1) -> list[Any]:
    """`num` answers of at most `length` tokens, in one batch, end at the oracle's token, and nothing comes after it.

    Returns vLLM's outputs.
    """
    rng = np.random.default_rng(60)
    cases = random_cases(rng, num, repeats)
    prompts = [case.prompt for case in cases]
    free = generate(llm, prompts, [case.spec for case in cases], max_tokens=length)
    wanted, lengths = [], []
    for case, output in zip(cases, free, strict=True):
        whole = [*case.prompt, *output.outputs[0].token_ids]
        found = expected_numbers(oracle, whole, case.spec, [case.probe], len(case.prompt))
        ((number_T, bound),) = found["p"].values()
        rule, stops_at = _rule(rng, number_T[len(case.prompt) - 1 : -1], bound)
        wanted.append((case.spec or {}) | {"probes": [case.probe], "stop": [rule]})
        lengths.append(stops_at or length)
    with tokens_of_engine(llm) as returned:
        outputs = generate(llm, prompts, wanted, max_tokens=length)
    for output, stops_at, whole_answer, case in zip(outputs, lengths, free, cases, strict=True):
        choice = output.outputs[0]
        assert list(choice.token_ids) == list(whole_answer.outputs[0].token_ids)[:stops_at], case
        assert len(choice.steering["probes"]["p"][str(case.probe["blocks"][0])]) == stops_at
        fired = stops_at < length or choice.finish_reason == "stop"
        assert (choice.finish_reason, choice.stop_reason) == (("stop", "probe:p") if fired else ("length", None))
    assert sorted(returned.values()) == sorted(list(output.outputs[0].token_ids) for output in outputs)
    assert 0.3 < np.mean([stops_at < length for stops_at in lengths]) < 0.95
    assert core_of(llm).scheduler.requests == {}
    return outputs


@contextmanager
def tokens_of_engine(llm: LLM) -> Iterator[dict[str, list[int]]]:
    """By request, the tokens that the engine core returns while the block runs: those that `usage` counts."""
    client = llm.llm_engine.engine_core
    original, returned = client.get_output, {}

    def get_output() -> Any:
        found = original()
        for output in found.outputs:
            returned.setdefault(output.request_id, []).extend(output.new_token_ids)
        return found

    client.get_output = get_output
    try:
        yield returned
    finally:
        del client.get_output


def _rule(rng: np.random.Generator, numbers: np.ndarray, bound: float) -> tuple[dict[str, Any], int | None]:
    """A rule whose threshold no number comes near, and after how many tokens it ends the answer; None = never."""
    ordered = np.sort(numbers)
    gaps = np.diff(ordered)
    cut = int(rng.choice(np.flatnonzero(gaps > 4 * bound)))
    threshold = float((ordered[cut] + ordered[cut + 1]) / 2)
    side, tokens_in_a_row = str(rng.choice(["above", "below"])), int(rng.integers(1, 4))
    holds = numbers > threshold if side == "above" else numbers < threshold
    in_a_row = 0
    for count, held in enumerate(holds, start=1):
        in_a_row = in_a_row + 1 if held else 0
        if in_a_row == tokens_in_a_row:
            return {"probe": "p", side: threshold, "for": tokens_in_a_row}, count
    return {"probe": "p", side: threshold, "for": tokens_in_a_row}, None
