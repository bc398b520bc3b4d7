"""Texts of triggers on a real tokenizer: that of the packaged model, a byte-level BPE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import AutoTokenizer

from steer_engine.errors import SteeringRequestError
from steer_engine.trigger import Trigger
from steer_engine.vocabulary import Tags, Vocabulary, encode_with

PARAM = "steering.edits[0].scope.after"


@pytest.fixture(scope="module")
def tokenizer(smollm2: str) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


def no_tags(name: str) -> str:
    return "there is no parser."


@pytest.fixture
def vocabulary(tokenizer: Any) -> Vocabulary:
    return Vocabulary(encode_with(tokenizer), len(tokenizer), no_tags)


def refused(call: Callable[[], Any]) -> SteeringRequestError:
    with pytest.raises(SteeringRequestError) as caught:
        call()
    assert caught.value.param == PARAM
    return caught.value


@pytest.mark.parametrize("text", ["<|im_start|>", "<|im_end|>", "\n", " the", "</", " think", " However", "!"])
def test_texts_of_one_token(vocabulary: Vocabulary, tokenizer: Any, text: str) -> None:
    (token,) = vocabulary.sequence(text, PARAM)
    assert tokenizer.decode([token]) == text


@pytest.mark.parametrize("text", [" the end", "\nAnswer:", " wait a minute", "</think>", "<|im_start|>assistant\n"])
def test_texts_of_several_tokens(vocabulary: Vocabulary, tokenizer: Any, text: str) -> None:
    ids = vocabulary.sequence(text, PARAM)
    assert len(ids) > 1
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("text", "context"),
    [("think", " think b"), ("Answer:", " Answer:b"), (".", "..b"), ("<think>", ".<think>b"), ("user", " user b")],
)
def test_a_text_that_is_tokenised_differently_in_context(
    vocabulary: Vocabulary, tokenizer: Any, text: str, context: str
) -> None:
    """The message has the ids alone, and a context with its ids. A client can give these instead."""
    assert refused(lambda: vocabulary.sequence(text, PARAM)).message == (
        f"{text!r} is tokenised differently in context: alone it is {tokenizer.encode(text)}, but {context!r} is "
        f"{tokenizer.encode(context)}. Give the token ids to look for."
    )


def test_blank_lines_of_this_tokenizer_are_refused(vocabulary: Vocabulary, tokenizer: Any) -> None:
    (alone,) = tokenizer.encode("\n\n")
    newline = tokenizer.encode("\n")
    in_context = tokenizer.encode("a\n\nb")
    assert in_context[1:3] == newline * 2
    error = refused(lambda: vocabulary.sequence("\n\n", PARAM))
    assert f"alone it is [{alone}], but 'a\\n\\nb' is {in_context}" in error.message
    assert vocabulary.sequence(in_context[1:3], PARAM) == tuple(newline * 2)


def test_numbers_are_taken_as_they_are(vocabulary: Vocabulary, tokenizer: Any) -> None:
    last = len(tokenizer) - 1
    assert vocabulary.sequence(last, PARAM) == (last,)
    assert vocabulary.sequence([0, last], PARAM) == (0, last)
    assert f"Token {last + 1} does not exist" in refused(lambda: vocabulary.sequence([0, last + 1], PARAM)).message


def test_every_accepted_text_is_found_where_it_stands(vocabulary: Vocabulary, tokenizer: Any) -> None:
    """In sentences, which have other neighbours than the contexts of the check."""
    for text in (" However", "!", " the", "<|im_end|>", " wait a minute"):
        ids = list(vocabulary.sequence(text, PARAM))
        for sentence in (f"I see{text} and so on", f"Yes{text}\nNo", f"<|im_start|>user\nHm{text} "):
            tokens = tokenizer.encode(sentence)
            assert any(tokens[at : at + len(ids)] == ids for at in range(len(tokens))), (text, sentence)


def test_words(tokenizer: Any) -> None:
    asked = []

    def find_tags(name: str) -> Tags | str:
        asked.append(name)
        return Tags("<|im_start|>", "<|im_end|>") if name == "thinking" else "none."

    vocabulary = Vocabulary(encode_with(tokenizer), len(tokenizer), find_tags)
    (start,), (end,) = tokenizer.encode("<|im_start|>"), tokenizer.encode("<|im_end|>")
    assert vocabulary.trigger("thinking", PARAM) == Trigger((start,), (end,), each=True)
    assert vocabulary.trigger("answer", PARAM) == Trigger((end,), (start,), each=True)
    assert "'tool_calls' has no tags here: none." in refused(lambda: vocabulary.trigger("tool_calls", PARAM)).message
    assert [vocabulary.has_tags(word) for word in ("thinking", "answer", "tool_calls")] == [True, True, False]
    assert sorted(asked) == ["thinking", "tool_calls"], "a parser is made once"


def test_an_engine_without_a_tokenizer() -> None:
    vocabulary = Vocabulary(encode_with(None), 10, no_tags)
    assert "no tokenizer; give token ids" in refused(lambda: vocabulary.sequence("a", PARAM)).message
    assert vocabulary.sequence(9, PARAM) == (9,)


def test_a_text_without_tokens() -> None:
    vocabulary = Vocabulary(lambda text: [], 10, no_tags)
    assert refused(lambda: vocabulary.sequence("\u200b", PARAM)).message == "'\\u200b' has no tokens."
