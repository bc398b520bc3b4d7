from __future__ import annotations

import numpy as np
from steer_bench.questions.evaluate import ALPHAS, ioi_questions


def test_questions_have_two_answers_and_longer_prompts_with_examples(tiny_llama: str) -> None:
    plain, shown = ioi_questions(tiny_llama, 12), ioi_questions(tiny_llama, 12, shots=4)
    assert len(plain) == len(shown) == 12
    assert all(len(set(question["answer_ids"])) == 2 for question in plain)
    lengths = [[len(question["prompt_ids"]) for question in questions] for questions in (plain, shown)]
    assert np.min(lengths[1]) > 4 * np.min(lengths[0])
    assert len({tuple(question["answer_ids"]) for question in plain}) > 1


def test_there_are_nine_strengths_with_zero_first() -> None:
    assert ALPHAS[0] == 0.0
    assert len(set(ALPHAS)) == 9
