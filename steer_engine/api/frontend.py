"""Steering in the API process: resolves what a request asks for, compiles it, and knows what the engines hold.

One `Frontend` per API process or offline engine, made by `vllm/intake.py` and reachable as `input_processor.steering`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from steer_engine.api.foreign_forms import ForeignSteering
from steer_engine.api.gates import DrainGate, QueueLimit
from steer_engine.api.monitors import resolve_monitors
from steer_engine.capture import PARAM
from steer_engine.errors import SteeringRequestError, UnknownVectorError
from steer_engine.model_shape import ModelShape
from steer_engine.monitor import Monitor, monitors_of_environment
from steer_engine.parse import parse_spec
from steer_engine.program import PROGRAM_KEY, SCORE_KEY, Program, Score
from steer_engine.resolve import NO_VOCABULARY, ResolvedSpec, resolve, with_probes
from steer_engine.resolve_capture import resolve_capture
from steer_engine.resolve_probes import check_prompt_numbers
from steer_engine.resolve_vectors import Repeated
from steer_engine.settings import (
    ARMED_ENV,
    DEFAULT_PRESET_ENV,
    PIN_SECONDS,
    STRICT_ENV,
    VECTORS_ENV,
    Limits,
    SteeringConfig,
)
from steer_engine.vectors import ControlVector
from steer_engine.vectors.cache import InlineVectors
from steer_engine.vectors.files import AnyVector
from steer_engine.vectors.registry import Registry

STEERING_KEY = "steering"
"""Key of `SamplingParams.extra_args`: a spec as the client wrote it, or a `ResolvedSpec`, which no client can write."""

RESERVED_PREFIX = "_steer"
"""Keys of `SamplingParams.extra_args` that only Steer Engine writes."""

NOT_ARMED = f"This server is not armed for steering: start it with 'steer-engine serve', or set {ARMED_ENV}=1."

FRESH_SECONDS = PIN_SECONDS / 2
"""An engine keeps a vector for PIN_SECONDS after it was shipped or confirmed. Half of that remains for the request."""


class Frontend:
    """Resolves, compiles and tracks. An unarmed frontend (`config` None) refuses steering and does nothing else.

    model: what requests are checked against.
    """

    def __init__(self, config: SteeringConfig | None, model: ModelShape | None) -> None:
        self.config = config
        self.limits = Limits.from_environment()
        self.inline = InlineVectors(self.limits.max_inline_bytes)
        self.shipped = ShippedVectors()
        self.drain = DrainGate()
        """Closed when the engine client shuts down: the server admits nothing new."""
        self.queue_limit: QueueLimit | None = None
        """Set by a server whose bank can fill up."""
        self.log_requests = False
        """Log each steered request at level INFO (`--enable-log-requests`) instead of DEBUG."""
        self.default_preset: str | None = None
        """Preset for requests that do not mention steering."""
        self.vocabulary = NO_VOCABULARY
        """Set when the engine's tokenizer is there, and once more when a server's tool parser is known."""
        self.registry = Registry(None)
        self._model = model
        self._repeated = Repeated[ResolvedSpec]()
        if config is not None:
            self.default_preset = os.environ.get(DEFAULT_PRESET_ENV) or None
            folder = os.environ.get(VECTORS_ENV)
            strict = os.environ.get(STRICT_ENV) == "1"
            self.registry = Registry(Path(folder) if folder else None, strict=strict)

    @cached_property
    def monitors(self) -> tuple[tuple[Monitor, ...], dict[str, ControlVector]]:
        """What a server watches on all traffic, and the vectors for it. They stay as they are until the server ends.

        Raises:
            UnsupportedEngineError: one of them cannot be measured.
        """
        specs = monitors_of_environment()
        return resolve_monitors(specs, self.registry.get, self.model, self.limits) if specs else ((), {})

    @property
    def armed(self) -> bool:
        return self.config is not None

    @property
    def model(self) -> ModelShape:
        """Raises SteeringRequestError where the engine is not armed."""
        if self._model is None:
            raise SteeringRequestError(NOT_ARMED, STEERING_KEY)
        return self._model

    @cached_property
    def capture_slots(self) -> asyncio.Semaphore:
        """A capturing request holds one, so that the workers keep the rows of a few requests at most."""
        return asyncio.Semaphore(self.limits.max_captures)

    def found(self, name_or_digest: str) -> AnyVector:
        """What is registered, or was seen inline before. Raises UnknownVectorError."""
        try:
            return self.registry.find(name_or_digest)
        except UnknownVectorError:
            if (inline := self.inline.find(name_or_digest)) is not None:
                return inline
            raise

    def resolve(self, requested: Any, *, can_capture: bool = False) -> ResolvedSpec | None:
        """What `requested` means now: a spec as a mapping or JSON text, or in another server's form; None or False for
        no steering.

        A `ResolvedSpec` is returned as it is. can_capture: the caller delivers captured rows to the client.

        Raises:
            SteeringRequestError: the request is wrong, or this engine is not armed.
        """
        if isinstance(requested, ResolvedSpec):
            return requested
        if isinstance(requested, ForeignSteering):
            requested = requested.to_spec(self.limits, self.model)
        spec = parse_spec(requested, self.limits.max_spec_bytes, self.limits.max_inline_bytes)
        if spec is None:
            return None
        model = self.model
        if spec.capture is not None and not can_capture:
            raise SteeringRequestError(
                "Captured rows cannot be returned this way; offline, use LLM.capture or LLM.capture_answers.", PARAM
            )
        spec, inline = self.inline.take(spec)

        def source(name: str) -> AnyVector:
            return inline[name] if name in inline else self.found(name)

        if spec.preset is None:
            repeated = None if inline else self._repeated
            return resolve(spec, source, model, self.limits, vocabulary=self.vocabulary, repeated=repeated)
        capture = resolve_capture(spec.capture, model, self.limits)
        base = replace(self._resolve_preset(spec.preset, model), capture=capture)
        if spec.probes is None and spec.stop is None:
            return base
        return with_probes(base, spec, source, model, self.limits, vocabulary=self.vocabulary)

    def _resolve_preset(self, name: str, model: ModelShape) -> ResolvedSpec:
        try:
            spec = parse_spec(self.registry.preset(name))
        except UnknownVectorError as error:
            raise UnknownVectorError(error.message, "steering.preset") from None
        assert spec is not None
        assert spec.capture is None
        try:
            found = resolve(
                spec, self.found, model, self.limits, vocabulary=self.vocabulary, preset=name, repeated=self._repeated
            )
            return replace(found, num_preset_probes=len(found.template.probes))
        except SteeringRequestError as error:
            # The client wrote the preset's name only; what is wrong inside is its author's.
            raise type(error)(f"Preset {name!r}: {error.message}", "steering.preset") from None

    def missing(self, resolved: ResolvedSpec) -> list[str]:
        """Digests that must be shipped or confirmed before the request is sent to the engines."""
        return [digest for digest in resolved.vectors if not self.shipped.is_fresh(digest)]

    def compile(self, extra_args: Mapping[str, Any], prompt_len: int, max_tokens: int) -> dict[str, Any]:
        """New `extra_args` with the program for a prompt of `prompt_len` tokens, in plain data.

        max_tokens: upper bound on the tokens of the answer.

        Raises:
            SteeringRequestError: as `resolve`; or the client wrote a reserved key.
        """
        check_reserved_keys(extra_args)
        rest = {key: value for key, value in extra_args.items() if key not in (STEERING_KEY, SCORE_KEY)}
        resolved = self.resolve(extra_args.get(STEERING_KEY))
        score: Score | None = extra_args.get(SCORE_KEY)
        if resolved is None and score is None:
            return rest
        program = Program() if resolved is None else resolved.template.at(prompt_len)
        if program.probes is not None:
            check_prompt_numbers(program.probes, prompt_len, self.limits)
        if resolved is not None and resolved.capture is not None:
            program = replace(program, capture=resolved.capture.at(prompt_len, max_tokens))
        if score is not None:
            program = replace(program, score=score)
        return rest | {PROGRAM_KEY: program.to_wire()}


class ShippedVectors:
    """Which vectors this process believes its engines hold, and when they confirmed it last.

    Only a hint; the engine core decides. Other API processes make room for vectors of their own without telling this
    one, so a confirmation counts for FRESH_SECONDS.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._confirmed: dict[str, float] = {}

    def __contains__(self, digest: str) -> bool:
        """Whether the engines held the vector when they were last asked."""
        return digest in self._confirmed

    def is_fresh(self, digest: str) -> bool:
        """Whether the engines will keep the vector for a request that is sent now."""
        confirmed = self._confirmed.get(digest)
        return confirmed is not None and self._clock() - confirmed < FRESH_SECONDS

    def confirm(self, digest: str, asked: float) -> None:
        """All engines held the vector when they were asked at `asked`, and keep it for PIN_SECONDS from then on."""
        self._confirmed[digest] = asked

    def forget(self, digests: Iterable[str]) -> None:
        for digest in digests:
            self._confirmed.pop(digest, None)

    def now(self) -> float:
        return self._clock()


def check_reserved_keys(extra_args: Mapping[str, Any]) -> None:
    """Raise SteeringRequestError for a key that only Steer Engine may write."""
    for key, value in extra_args.items():
        if key == SCORE_KEY and isinstance(value, Score):  # no client can write this object
            continue
        if isinstance(key, str) and key.startswith(RESERVED_PREFIX):
            raise SteeringRequestError(f"{key[:80]!r} is a reserved key; use the field 'steering'.", key[:80])
