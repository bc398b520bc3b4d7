"""Prompts and answers become token ids; invalid items are named."""

from __future__ import annotations

from typing import Any

import pytest

from steer_engine.errors import EvaluationError
from steer_engine.evaluate.encode import Encoder
from steer_engine.evaluate.tasks import Item


class Words:
    """A tokenizer of letters. "ab" is one token, which can span the end of a prompt and the start of its answer."""

    chat_template = "yes"

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        begin = [1] if add_special_tokens else []
        return begin + [ord(letter) for letter in text.replace("ab", "\x02")]

    def apply_chat_template(self, turns: list[dict[str, str]], **_: Any) -> str:
        return f"<{turns[0]['content']}>"


def item(prompt: str, *answers: str, correct: int = 0) -> Item:
    return Item(id="i", prompt=prompt, answers=answers, correct=correct, where="f:1")


def letters(ids: tuple[int, ...]) -> str:
    return "".join(map(chr, ids))


def test_the_first_different_tokens_decide() -> None:
    question = Encoder(Words(), max_tokens=99).question(item("Q:", " mary", " mark", correct=1))
    assert (letters(question.prompt_ids), letters(question.answer_ids)) == ("\x01Q: mar", "yk")
    assert question.correct == 1


def test_a_token_may_span_prompt_and_answer() -> None:
    question = Encoder(Words(), max_tokens=99).question(item("Qa", "b", "c"))
    assert (letters(question.prompt_ids), letters(question.answer_ids)) == ("\x01Q", "\x02a")


def test_chat_renders_the_prompt_and_begins_the_answer() -> None:
    question = Encoder(Words(), max_tokens=99, chat=True).question(item("Q", " x", " y"))
    assert (letters(question.prompt_ids), letters(question.answer_ids)) == ("<Q>", "xy")


@pytest.mark.parametrize("answers", [(" no", " nor", " yes"), (" b", " bcd", " x"), (" no", " not"), (" xa", " xay")])
def test_answers_that_no_single_token_distinguishes(answers: tuple[str, ...]) -> None:
    with pytest.raises(EvaluationError, match=r"f:1: .*no single token decides"):
        Encoder(Words(), max_tokens=99).question(item("Q", *answers))


def test_a_prompt_that_does_not_fit_is_named() -> None:
    encoder = Encoder(Words(), max_tokens=8)
    assert len(encoder.question(item("123456", "x", "y")).prompt_ids) == 7
    with pytest.raises(EvaluationError, match=r"f:1: the prompt has 8 tokens"):
        encoder.question(item("1234567", "x", "y"))
    with pytest.raises(EvaluationError, match="5 must fit after it"):
        encoder.question(item("123", "x"), generate=5)


def test_a_single_answer_is_an_exact_match() -> None:
    question = Encoder(Words(), max_tokens=99).question(item("Q:", " 42"))
    assert (question.is_exact, question.target, question.answer_ids) == (True, " 42", ())


def test_neutral_texts_are_truncated() -> None:
    (question,) = Encoder(Words(), max_tokens=5).neutral(["123456789"])
    assert letters(question.prompt_ids) == "\x01123"
    assert not question.is_exact


def test_a_model_without_template_cannot_chat() -> None:
    tokenizer = Words()
    tokenizer.chat_template = None  # type: ignore[assignment]
    with pytest.raises(EvaluationError, match="no chat template"):
        Encoder(tokenizer, max_tokens=9, chat=True)
