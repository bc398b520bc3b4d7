"""`pairs answers --vector`: a control vector from a model's own answers, captured while the model answers.

A second pass over prompt and answer, as `derive` makes over a file of pairs, would compute the same rows again. It
would also encode the text anew, where the tokens may differ from those that were generated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from steer_engine.derive.capture_config import CaptureConfig
from steer_engine.derive.capture_engine import MAX_CAPTURE_BYTES, Answer, CaptureEngine, EngineFacts
from steer_engine.derive.derivation import num_pairs_to_keep
from steer_engine.derive.dump_folder import DumpManifest
from steer_engine.derive.fit import CapturedRows
from steer_engine.derive.make_pairs import Question, contrast
from steer_engine.derive.methods import require_method
from steer_engine.derive.moments import Chunk
from steer_engine.derive.progress import Progress
from steer_engine.derive.texts import MIN_PAIRS, Pair, Pairs, from_pairs
from steer_engine.errors import DerivationError
from steer_engine.vectors.control_vector import ControlVector

POSITIONS = ("last", "mean")


def derive_from_answers(
    model: str,
    questions: Sequence[Question],
    *,
    samples: int,
    max_tokens: int,
    temperature: float,
    seed: int = 0,
    chat: bool = False,
    method: str = "diffmean",
    blocks: str = "all",
    position: str = "last",
    source: str = "questions",
    engine_args: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> tuple[Pairs, ControlVector]:
    """Let a model answer each question `samples` times, and contrast its first correct answer with its first wrong one.

    position: the row of an answer: `last` chose its last token, `mean` is the mean of the rows that chose its tokens.
    source: file of the questions, for messages.

    Raises:
        DerivationError: settings are wrong, or too few questions have both a correct and a wrong answer.
        UnsupportedEngineError: the model cannot be armed.
    """
    require_method(method)
    if position not in POSITIONS:
        raise DerivationError(f"Position {position[:64]!r} of the model's own answers is neither 'last' nor 'mean'.")
    config = CaptureConfig.of(
        model,
        position=position,
        blocks=blocks,
        chat=chat,
        source=source,
        dtype="auto",
        # The samples of a question share its prompt.
        engine_args={"enable_prefix_caching": True, **(engine_args or {})},
        local=True,
    )
    engine = CaptureEngine(config)
    facts = engine.facts()
    keep_rows_of = num_pairs_to_keep(method, len(questions), facts)
    per_call = questions_per_call(facts, samples, max_tokens)
    rows, pairs = CapturedRows(), list[Pair]()
    with (
        Progress(enabled=progress) as shown,
        shown.counting("answering", total=len(questions), unit="questions") as advance,
    ):
        for start in range(0, len(questions), per_call):
            asked = questions[start : start + per_call]
            answers = engine.answer(asked, samples=samples, max_tokens=max_tokens, temperature=temperature, seed=seed)
            if found := _contrasts(asked, answers):
                keep_rows = len(pairs) < keep_rows_of
                positive, negative = ([answer.sample for answer in side] for side in list(zip(*found, strict=True))[1:])
                rows.add(Chunk.of(positive, negative, keep_rows=keep_rows))
            pairs += [
                Pair(prompt=question.prompt, positive=right.text, negative=wrong.text, line=question.line)
                for question, right, wrong in found
            ]
            advance(len(asked))
    if len(pairs) < MIN_PAIRS:
        raise DerivationError(
            f"{len(pairs)} of {len(questions)} questions have both a correct and a wrong answer; at least {MIN_PAIRS} "
            "are needed. Take other questions, or more samples."
        )
    made = Pairs(tuple(pairs), source)
    manifest = DumpManifest.of(model, config, facts, from_pairs(made))
    metadata = replace(manifest.vector_metadata(method), position=f"answer {position}")
    return made, rows.fit(method, facts.blocks, metadata)


def questions_per_call(facts: EngineFacts, samples: int, max_tokens: int) -> int:
    """How many questions are answered at a time, so that all rows of their answers fit in MAX_CAPTURE_BYTES."""
    row_bytes = len(facts.blocks) * facts.hidden_size * np.dtype(np.float32).itemsize
    return max(1, MAX_CAPTURE_BYTES // (samples * max_tokens * row_bytes))


def _contrasts(
    questions: Sequence[Question], answers: Sequence[Sequence[Answer]]
) -> list[tuple[Question, Answer, Answer]]:
    """Each question that has both, with its first correct answer and its first wrong one."""
    found = []
    for question, given in zip(questions, answers, strict=True):
        if (chosen := contrast(question, [answer.text for answer in given])) is not None:
            found.append((question, given[chosen[0]], given[chosen[1]]))
    return found
