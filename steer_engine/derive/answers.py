"""Contrast pairs from a model's own answers: right against wrong ones, as Højer et al. (ICLR 2025) do for GSM8K."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from steer_engine.derive.engine_options import engine_defaults
from steer_engine.derive.pairs import Pair, parse_lines, read_bytes
from steer_engine.errors import DerivationError

_NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?"
_MARKED = (re.compile(rf"####\s*({_NUMBER})"), re.compile(rf"[Tt]he answer is:?\s*({_NUMBER})"))
_ANY = re.compile(_NUMBER)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A prompt and its right answer. line: of its file, from 1."""

    prompt: str
    answer: str
    line: int = 0


def load_questions(path: str) -> list[Question]:
    """Read a JSONL file with `prompt` and `answer` per line; DerivationError names the line that is not so."""
    found = []
    data = read_bytes(path, "Give a JSONL file with 'prompt' and 'answer'.")
    for line, entry in parse_lines(data, path, required=("prompt", "answer"), optional={"id"}):
        if not entry["prompt"].strip() or not entry["answer"].strip():
            raise DerivationError(f"{path}:{line}: the prompt or the answer is empty.")
        found.append(Question(prompt=entry["prompt"], answer=entry["answer"], line=line))
    return found


def is_right(completion: str, answer: str) -> bool:
    """Whether a completion gives the answer.

    A number is taken after `####`, else after "The answer is", else it is the last number; other answers must be what
    the completion begins with, as a whole word, whatever the case.
    """
    wanted = _value(answer.rpartition("####")[2])
    if wanted is None:
        text, start = completion.strip().casefold(), answer.strip().casefold()
        return text.startswith(start) and not text[len(start) : len(start) + 1].isalnum()
    for pattern in _MARKED:
        if marked := pattern.findall(completion):
            return _value(marked[-1]) == wanted
    numbers = _ANY.findall(completion)
    return bool(numbers) and _value(numbers[-1]) == wanted


def answer_all(
    model: str,
    questions: Sequence[Question],
    *,
    samples: int,
    max_tokens: int,
    temperature: float,
    seed: int = 0,
    chat: bool = False,
    engine_args: dict[str, Any] | None = None,
) -> list[list[str]]:
    """`samples` completions of each question, by the model itself, in one batch on one engine."""
    # One process, which ends with the command. Read when vLLM is imported.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import torch

    from steer_engine.llm import LLM

    defaults = engine_defaults() | {"enable_prefix_caching": True}
    if not torch.cuda.is_available():
        # vLLM's V1 runner on a processor ends where a seeded prompt is read in parts ("does not use offset").
        defaults["enable_chunked_prefill"] = False
    llm = LLM(model, **(defaults | (engine_args or {})))
    params = llm.get_default_sampling_params()
    params.n, params.max_tokens, params.temperature, params.seed = samples, max_tokens, temperature, seed
    prompts = [question.prompt for question in questions]
    if chat:
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        outputs = llm.chat(turns, params, use_tqdm=False)
    else:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    return [[completion.text for completion in output.outputs] for output in outputs]


def from_answers(questions: Sequence[Question], completions: Sequence[Sequence[str]]) -> Iterator[Pair]:
    """A pair per question that was answered both rightly and wrongly: the first right against the first wrong answer.

    A question without either gives none: there is nothing of the model's own to contrast.
    """
    for question, given in zip(questions, completions, strict=True):
        told = [completion for completion in given if completion.strip()]
        right = next((text for text in told if is_right(text, question.answer)), None)
        wrong = next((text for text in told if not is_right(text, question.answer)), None)
        if right is not None and wrong is not None:
            yield Pair(prompt=question.prompt, positive=right, negative=wrong, line=question.line)


def _value(text: str) -> float | None:
    try:
        return float(text.strip().replace(",", "").replace("$", ""))
    except ValueError:
        return None
