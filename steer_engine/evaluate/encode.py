"""Turns items into questions in token ids: the prompt, and the tokens that distinguish the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steer_engine.errors import EvaluationError
from steer_engine.evaluate.items import Item


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question in token ids. What is measured after `prompt_ids` depends on the kind of question:

    * a choice: which of `answer_ids` is the most probable next token. They are the tokens at which the answers
      first differ;
    * an exact match: whether the generated text begins with `target`;
    * neither: only how steering changes the distribution of the next token.
    """

    id: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...] = ()
    correct: int = 0
    target: str | None = None

    @property
    def is_exact(self) -> bool:
        return self.target is not None


class Encoder:
    """Tokenises prompts and answers for one model.

    max_tokens: length limit of the model.
    chat: the prompt becomes a user message in the model's chat template; the answer begins the model's turn.
    """

    def __init__(self, tokenizer: Any, *, max_tokens: int, chat: bool = False) -> None:
        if chat and getattr(tokenizer, "chat_template", None) is None:
            raise EvaluationError("This model has no chat template; evaluate without --chat.")
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._chat = chat

    def ids(self, prompt: str, answer: str = "") -> list[int]:
        """Token ids of a prompt, followed by the beginning of an answer."""
        if self._chat:
            turn = [{"role": "user", "content": prompt}]
            text = self._tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            # The template ends where the answer begins, so the answer needs no leading space.
            text += answer.lstrip()
        else:
            text = prompt + answer
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=not self._chat)]

    def question(self, item: Item, *, generate: int = 1) -> Question:
        """Tokenise an item. `generate`: number of tokens to generate after the prompt of an exact match.

        Prompt and answer are tokenised together, because a token may span both. Tokens that all answers share at
        their beginning become part of the prompt.

        Raises:
            EvaluationError: the prompt is too long for the model, or no single token distinguishes the answers.
        """
        if len(item.answers) == 1:
            return Question(
                id=item.id, prompt_ids=self._fitting(item, self.ids(item.prompt), generate), target=item.target
            )
        texts = [self.ids(item.prompt, answer) for answer in item.answers]
        shared = _shared(texts)
        answer_ids = [ids[shared] for ids in texts if len(ids) > shared]
        if len(set(answer_ids)) < len(item.answers):
            raise EvaluationError(
                f"{item.where or item.id}: no single token decides between the answers {list(item.answers)}: two of "
                "them share their next token, or one is the beginning of another. Change the answers."
            )
        prompt_ids = self._fitting(item, texts[0][:shared], 1)
        return Question(id=item.id, prompt_ids=prompt_ids, answer_ids=tuple(answer_ids), correct=item.correct)

    def neutral(self, texts: Sequence[str]) -> list[Question]:
        """Questions without answers, truncated to the length limit of the model."""
        return [
            Question(id=f"neutral-{number}", prompt_ids=tuple(self.ids(text)[: self._max_tokens - 1]))
            for number, text in enumerate(texts)
        ]

    def questions(self, items: Sequence[Item], *, generate: int = 1) -> list[Question]:
        """Tokenise all items, so that errors appear before the first one runs."""
        return [self.question(item, generate=generate) for item in items]

    def _fitting(self, item: Item, ids: Sequence[int], generate: int) -> tuple[int, ...]:
        where = item.where or item.id
        if not ids:
            raise EvaluationError(f"{where}: the prompt has no tokens.")
        if len(ids) + generate > self._max_tokens:
            raise EvaluationError(
                f"{where}: the prompt has {len(ids)} tokens and {generate} must fit after it; the model's limit is "
                f"{self._max_tokens} (--max-model-len)."
            )
        return tuple(ids)


def _shared(texts: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens that all texts share."""
    for place, tokens in enumerate(zip(*texts, strict=False)):
        if len(set(tokens)) > 1:
            return place
    return min(map(len, texts))
