"""A vector from a model's own answers: the rows of one pass are those of a second pass over the same tokens."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.derivation import SMALL

from steer_engine.derive.capture_config import CaptureConfig, Position
from steer_engine.derive.capture_engine import MAX_CAPTURE_BYTES, CaptureEngine, EngineFacts
from steer_engine.derive.make_pairs import Question
from steer_engine.derive.moments import summarise
from steer_engine.derive.own_answers import questions_per_call

QUESTIONS = [Question(prompt=f"{number} + 3 =", answer="7", line=number) for number in (1, 2, 3)]


def test_as_many_questions_at_a_time_as_rows_fit() -> None:
    facts = EngineFacts(
        architecture="A", hidden_size=1024, num_blocks=8, blocks=tuple(range(8)), dtype="float32", versions={}
    )
    row_bytes = 8 * 1024 * 4
    assert questions_per_call(facts, samples=4, max_tokens=64) == MAX_CAPTURE_BYTES // (4 * 64 * row_bytes)
    assert questions_per_call(facts, samples=256, max_tokens=10**6) == 1


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["last", "mean"])
def test_one_pass_gives_the_rows_of_two(tiny_llama: str, rule: str) -> None:
    engine = CaptureEngine(CaptureConfig(model=tiny_llama, position=Position(rule), engine_args=SMALL))
    answers = engine.answer(QUESTIONS, samples=2, max_tokens=6, temperature=1.0, seed=0)
    assert [len(given) for given in answers] == [2] * len(QUESTIONS)
    assert answers[0][0].token_ids != answers[0][1].token_ids
    for question, given in zip(QUESTIONS, answers, strict=True):
        prompt = engine._llm.get_tokenizer().encode(question.prompt)
        for answer in given:
            rows_LTD = engine._llm.capture([[*prompt, *answer.token_ids]], "all")[0][:, len(prompt) - 1 : -1]
            again = summarise(rows_LTD[:, -1:] if rule == "last" else rows_LTD, skip_first=False)
            bound = 2e-5 * np.abs(rows_LTD).max()
            assert np.abs(answer.sample.row_LD - again.row_LD).max() <= bound
            assert answer.sample.norm_count == again.norm_count
            np.testing.assert_allclose(answer.sample.norm_L, again.norm_L, rtol=1e-4)
