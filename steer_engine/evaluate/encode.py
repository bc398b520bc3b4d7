"""From items to token ids: where a choice is made, and between which tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steer_engine.errors import EvaluationError
from steer_engine.evaluate.items import Item


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What the engine is asked, in tokens. The model reads `prompt_ids`, then one of three things counts:

    * a choice: which of `answer_ids` its next token would rather be, the first tokens at which the answers differ;
    * an exact match: whether what it generates begins with `target`;
    * neither: only how steering shifts the next token's distribution.
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
    """Turns texts into tokens as the model expects them.

    chat: the prompt is the user's message, rendered with the model's chat template; answers begin the model's turn.
    """

    def __init__(self, tokenizer: Any, *, max_tokens: int, chat: bool = False) -> None:
        if chat and getattr(tokenizer, "chat_template", None) is None:
            raise EvaluationError("This model has no chat template; evaluate without --chat.")
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._chat = chat

    def ids(self, prompt: str, answer: str = "") -> list[int]:
        """Tokens of a prompt with the beginning of an answer."""
        if self._chat:
            turn = [{"role": "user", "content": prompt}]
            text = self._tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            # The template ends where the answer begins: a leading space would be a second one.
            text += answer.lstrip()
        else:
            text = prompt + answer
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=not self._chat)]

    def question(self, item: Item, *, generate: int = 1) -> Question:
        """An item in tokens. `generate`: tokens that must fit behind the prompt.

        The whole texts are tokenised, since tokens may span the border of prompt and answer; what all answers share
        belongs to the prompt.

        Raises:
            EvaluationError: the prompt is longer than the model takes, or answers cannot be told apart by one token.
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
                f"{item.where or item.id}: after what they share, two of the answers {list(item.answers)} begin with "
                "the same token, or one continues the other, so that no single token decides. Change the answers."
            )
        prompt_ids = self._fitting(item, texts[0][:shared], 1)
        return Question(id=item.id, prompt_ids=prompt_ids, answer_ids=tuple(answer_ids), correct=item.correct)

    def neutral(self, texts: Sequence[str]) -> list[Question]:
        """Texts without answers, cut to what the model takes."""
        return [
            Question(id=f"neutral-{number}", prompt_ids=tuple(self.ids(text)[: self._max_tokens - 1]))
            for number, text in enumerate(texts)
        ]

    def questions(self, items: Sequence[Item], *, generate: int = 1) -> list[Question]:
        """All items, checked before the first one runs."""
        return [self.question(item, generate=generate) for item in items]

    def _fitting(self, item: Item, ids: Sequence[int], generate: int) -> tuple[int, ...]:
        where = item.where or item.id
        if not ids:
            raise EvaluationError(f"{where}: the prompt has no tokens.")
        if len(ids) + generate > self._max_tokens:
            raise EvaluationError(
                f"{where}: the prompt has {len(ids)} tokens and {generate} must fit behind it; the model takes "
                f"{self._max_tokens} (--max-model-len)."
            )
        return tuple(ids)


def _shared(texts: Sequence[Sequence[int]]) -> int:
    """Length of the common beginning."""
    for place, tokens in enumerate(zip(*texts, strict=False)):
        if len(set(tokens)) > 1:
            return place
    return min(map(len, texts))
