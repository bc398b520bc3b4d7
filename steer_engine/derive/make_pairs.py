"""Make contrast pairs: from templates and word lists, from shuffled prompts, and from a model's own answers.

The last two are the contrasts of Højer et al. (ICLR 2025).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from steer_engine.derive.capture_config import engine_defaults
from steer_engine.derive.text_sources import parse_lines, read_bytes
from steer_engine.derive.texts import Pair
from steer_engine.errors import DerivationError

SLOT = "{word}"

SHUFFLED_CHARS = 75
"""Characters at the beginning of a prompt that are permuted."""

_NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?"
_MARKED = (re.compile(rf"####\s*({_NUMBER})"), re.compile(rf"[Tt]he answer is:?\s*({_NUMBER})"))
_ANY = re.compile(_NUMBER)


def from_template(
    templates: Sequence[str], positive: Sequence[tuple[int, str]], negative: Sequence[tuple[int, str]]
) -> Iterator[Pair]:
    """One pair per template and list index: `{word}` becomes the n-th positive word, and the n-th negative word.

    Word lists are line numbers and words (see `read_words`).

    Raises:
        DerivationError: a template has no `{word}`, the lists differ in length, or two words are the same.
    """
    for template in templates:
        if SLOT not in template:
            raise DerivationError(f"The template {template[:64]!r} has no {SLOT} for the words.")
    if not templates or not positive or len(positive) != len(negative):
        raise DerivationError(
            f"{len(templates)} template(s), {len(positive)} positive and {len(negative)} negative words; at least one "
            "template is needed, and lists of equal length."
        )
    for (line, good), (_, bad) in zip(positive, negative, strict=True):
        if good == bad:
            raise DerivationError(f"Line {line} of both word lists is {good[:64]!r}; a pair needs two words.")
        for template in templates:
            yield Pair(positive=template.replace(SLOT, good), negative=template.replace(SLOT, bad))


def read_words(path: Path, what: str = "word or phrase") -> list[tuple[int, str]]:
    """Line number and content of each line that is not empty. what: what a line is, for messages."""
    try:
        lines = read_bytes(path, f"Give a file with one {what} a line.").decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise DerivationError(f"{path}: not UTF-8.") from None
    return [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]


def from_shuffled(prompts: Iterable[tuple[int, str]], source: str, *, seed: int = 0) -> Iterator[Pair]:
    """Each prompt against a random permutation of its first 75 characters.

    prompts: line numbers and prompts. source: their file, for messages.

    Raises:
        DerivationError: every permutation equals the prompt; names the line.
    """
    random = Random(f"shuffled prompts {seed}")
    for line, prompt in prompts:
        letters = list(prompt[:SHUFFLED_CHARS])
        if len(set(letters)) < 2:
            raise DerivationError(f"{source}:{line}: {prompt[:16]!r} stays the same however it is shuffled.")
        shuffled = "".join(letters)
        while shuffled == prompt[:SHUFFLED_CHARS] or not shuffled.strip():
            random.shuffle(letters)
            shuffled = "".join(letters)
        yield Pair(positive=prompt, negative=shuffled, line=line)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A prompt and its correct answer. line: of its file, from 1; 0 if it has none."""

    prompt: str
    answer: str
    line: int = 0


def load_questions(path: str) -> list[Question]:
    """Load a JSONL file with `prompt` and `answer` per line. A DerivationError names the line that is wrong."""
    questions = []
    data = read_bytes(path, "Give a JSONL file with 'prompt' and 'answer'.")
    for line, entry in parse_lines(data, path, required=("prompt", "answer"), optional={"id"}):
        if not entry["prompt"].strip() or not entry["answer"].strip():
            raise DerivationError(f"{path}:{line}: the prompt or the answer is empty.")
        questions.append(Question(prompt=entry["prompt"], answer=entry["answer"], line=line))
    return questions


def answer_all(
    model: str,
    questions: Sequence[Question],
    *,
    samples: int,
    max_tokens: int,
    temperature: float,
    seed: int = 0,
    chat: bool = False,
    engine_args: Mapping[str, Any] | None = None,
) -> list[list[str]]:
    """`samples` completions of each question, generated in one batch on one engine."""
    # vLLM reads the variable when it is imported. One process: it ends with the command.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import torch

    from steer_engine.llm import LLM

    defaults = engine_defaults() | {"enable_prefix_caching": True}
    if not torch.cuda.is_available():
        # vLLM's V1 runner on a CPU fails on a chunked prompt with a seed ("does not use offset").
        defaults["enable_chunked_prefill"] = False
    llm = LLM(model, **(defaults | dict(engine_args or {})))
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
    """The first correct completion of each question against the first wrong one.

    A question without both gives no pair.
    """
    for question, texts in zip(questions, completions, strict=True):
        if (chosen := contrast(question, texts)) is not None:
            right, wrong = (texts[number] for number in chosen)
            yield Pair(prompt=question.prompt, positive=right, negative=wrong, line=question.line)


def contrast(question: Question, texts: Sequence[str]) -> tuple[int, int] | None:
    """The numbers of the first correct answer and of the first wrong one that is not empty; None without both."""
    not_empty = [number for number, text in enumerate(texts) if text.strip()]
    right = next((number for number in not_empty if is_correct(texts[number], question.answer)), None)
    wrong = next((number for number in not_empty if not is_correct(texts[number], question.answer)), None)
    return None if right is None or wrong is None else (right, wrong)


def is_correct(completion: str, answer: str) -> bool:
    """Whether a completion gives the answer.

    A number is taken after `####`, else after "The answer is", else it is the last number. The completion must begin
    with any other answer, as a whole word in upper or lower case.
    """
    expected = _value(answer.rpartition("####")[2])
    if expected is None:
        text, start = completion.strip().casefold(), answer.strip().casefold()
        return text.startswith(start) and not text[len(start) : len(start) + 1].isalnum()
    for pattern in _MARKED:
        if marked := pattern.findall(completion):
            return _value(marked[-1]) == expected
    numbers = _ANY.findall(completion)
    return bool(numbers) and _value(numbers[-1]) == expected


def _value(text: str) -> float | None:
    try:
        return float(text.strip().replace(",", "").replace("$", ""))
    except ValueError:
        return None


def to_jsonl(pairs: Iterable[Pair]) -> bytes:
    """JSON lines that `load_pairs` accepts."""
    lines = []
    for pair in pairs:
        entry = {"prompt": pair.prompt, "positive": pair.positive, "negative": pair.negative, "id": pair.id}
        lines.append(json.dumps({name: value for name, value in entry.items() if value}, ensure_ascii=False))
    return "".join(line + "\n" for line in lines).encode()
