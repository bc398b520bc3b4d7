"""Which vectors an API process believes its engines hold, and since when it has not asked."""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer_engine.api.drain import Door
from steer_engine.capture import CAPTURE_KEY, PARAM, CaptureRequest
from steer_engine.engine.admission import PIN_SECONDS
from steer_engine.errors import SteeringRequestError, UnknownVectorError
from steer_engine.program import PROGRAM_KEY, SCORE_KEY, Capture, Score
from steer_engine.resolve import ResolvedSpec, resolve, resolve_capture
from steer_engine.settings import Limits, SteeringConfig
from steer_engine.spec import parse_spec
from steer_engine.vectors import ControlVector, Registry
from steer_engine.vectors.loaded import InlineVectors
from steer_engine.vllm.supported import check_supported, longest_seeded_prompt, model_shape

if TYPE_CHECKING:
    from vllm.config import VllmConfig


FRESH_SECONDS = PIN_SECONDS / 2
"""An engine keeps what it was given or asked for PIN_SECONDS; half of it is left for the request to arrive."""


class Held:
    """A hint: the engine core decides. Other API processes of the same engines, and each of several engines, make room
    for their own vectors, and only the one who asked hears of it: so a belief is good for FRESH_SECONDS.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._confirmed: dict[str, float] = {}

    def __contains__(self, digest: str) -> bool:
        """Whether the engines had it when they were last asked."""
        return digest in self._confirmed

    def is_fresh(self, digest: str) -> bool:
        """Whether the engines keep it for a request that is sent now."""
        confirmed = self._confirmed.get(digest)
        return confirmed is not None and self._clock() - confirmed < FRESH_SECONDS

    def confirm(self, digest: str, asked: float) -> None:
        """All engines held it when they were asked at `asked`, and keep it for PIN_SECONDS from then on."""
        self._confirmed[digest] = asked

    def forget(self, digests: Iterable[str]) -> None:
        for digest in digests:
            self._confirmed.pop(digest, None)

    def now(self) -> float:
        return self._clock()


logger = logging.getLogger(__name__)

STEERING_KEY = "steering"
_RESERVED_PREFIX = "_steer"
_SPEC_CACHE = 1024


class Frontend:
    """One per `InputProcessor`, as `input_processor.steering`. Not armed: refuses steering, does nothing else."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.config = SteeringConfig.from_additional_config(vllm_config.additional_config)
        self.armed = self.config is not None
        self.limits = Limits.from_environment()
        self.registry = Registry(None)
        self.inline = InlineVectors(self.limits.max_inline_bytes)
        self.default_preset: str | None = None
        """Applied by the server to requests that say nothing of steering."""
        self.door = Door()
        """Closed when the engine client shuts down: the server takes nothing new."""
        self.queue_length: Any = None
        """Set by the server where the bank can be full: its `enter()` refuses requests while too many wait."""
        self.log_requests = False
        """Set by `--enable-log-requests`: a line for each steered request at level INFO instead of DEBUG."""
        self.captures: Any = None
        """Set by a server with the first request that reads: the rows on their way into the answers."""
        self.held = Held()
        """What this process believes the engines hold."""
        self._resolved: OrderedDict[str, ResolvedSpec] = OrderedDict()
        if self.config is not None:
            check_supported(vllm_config)
            self.model = model_shape(vllm_config, self.config)
            self.seeded_tokens = longest_seeded_prompt(vllm_config)
            self.default_preset = os.environ.get("STEER_ENGINE_DEFAULT_PRESET") or None
            folder = os.environ.get("STEER_ENGINE_VECTORS")
            strict = os.environ.get("STEER_ENGINE_STRICT") == "1"
            self.registry = Registry(Path(folder) if folder else None, strict=strict)

    def vector(self, name_or_digest: str) -> ControlVector:
        """The registered vector; raises UnknownVectorError."""
        try:
            return self.registry.get(name_or_digest)
        except UnknownVectorError:
            if (inline := self.inline.find(name_or_digest)) is not None:
                return inline
            raise

    def resolve(self, raw: Any, *, returns: bool = False) -> ResolvedSpec | None:
        """What `raw` (a spec as a mapping or JSON text; None or False = not asked) means now.

        returns: the caller sees to it that what is read reaches whoever asks.

        Raises:
            SteeringRequestError: what is asked is wrong, or this engine is not armed.
        """
        spec = parse_spec(raw)
        if spec is None:
            return None
        if not self.armed:
            raise SteeringRequestError(
                "This server is not armed for steering: start it with 'steer-engine serve', or set STEER_ENGINE=1.",
                "steering",
            )
        if spec.capture is not None and not returns:
            raise SteeringRequestError("What is read cannot be returned this way; offline, use LLM.capture.", PARAM)
        if spec.preset is None:
            return resolve(self.inline.take(spec), self.vector, self.model, self.limits)
        return replace(self._resolve_preset(spec.preset), capture=resolve_capture(spec.capture, self.model))

    def _resolve_preset(self, name: str) -> ResolvedSpec:
        try:
            spec = parse_spec(self.registry.preset(name))
        except UnknownVectorError as error:
            raise UnknownVectorError(error.message, "steering.preset") from None
        assert spec is not None
        assert spec.capture is None
        try:
            return resolve(spec, self.vector, self.model, self.limits, preset=name)
        except SteeringRequestError as error:
            # The caller's field is the preset; what is wrong inside is its author's.
            raise type(error)(f"Preset {name!r}: {error.message}", "steering.preset") from None

    def missing(self, resolved: ResolvedSpec) -> list[str]:
        """Digests that the engines may lack: they are to be shipped, or confirmed, before the request is sent."""
        return [digest for digest in resolved.vectors if not self.held.is_fresh(digest)]

    def compile(self, extra_args: dict[str, Any], prompt_len: int) -> dict[str, Any]:
        """A new `extra_args` in which the request's steering is compiled for a prompt of `prompt_len` tokens.

        Raises:
            SteeringRequestError: as `resolve`; or the client wrote a key of ours.
        """
        check_reserved_keys(extra_args)
        rest = {key: value for key, value in extra_args.items() if key not in (STEERING_KEY, CAPTURE_KEY, SCORE_KEY)}
        resolved = self._resolve_cached(extra_args.get(STEERING_KEY))
        capture = self._capture(extra_args.get(CAPTURE_KEY), prompt_len)
        score: Score | None = extra_args.get(SCORE_KEY)
        if resolved is None and capture is None and score is None:
            return rest
        program: dict[str, Any] = {"sites": [], "vectors": [], "identity": [], "keep_norm": False}
        if resolved is not None:
            program = resolved.template.at(prompt_len).to_wire()
        if capture is not None:
            program["capture"] = capture.to_wire()
        if score is not None:
            program["score"] = score.to_wire()
        return rest | {PROGRAM_KEY: program}

    def _resolve_cached(self, raw: Any) -> ResolvedSpec | None:
        # By digest a spec means the same for ever, so its compiled form is kept; by name it does not.
        if not isinstance(raw, str):
            return self.resolve(raw)
        cached = self._resolved.get(raw)
        if cached is not None:
            self._resolved.move_to_end(raw)
            return cached
        resolved = self.resolve(raw)
        if resolved is not None and resolved.to_wire() == raw:
            self._resolved[raw] = resolved
            if len(self._resolved) > _SPEC_CACHE:
                self._resolved.popitem(last=False)
        return resolved

    def _capture(self, raw: Any, prompt_len: int) -> Capture | None:
        if raw is None:
            return None
        if self.config is None or self.config.capture == ():
            raise SteeringRequestError("Reading is not armed on this engine: steer_engine.LLM(..., capture=True).")
        assert isinstance(raw, CaptureRequest)  # others are refused as a reserved key
        return raw.at(prompt_len)


def check_reserved_keys(extra_args: dict[str, Any]) -> None:
    """Raise SteeringRequestError for a key that only we may write."""
    for key, value in extra_args.items():
        # No client can write these objects.
        if (key == CAPTURE_KEY and isinstance(value, CaptureRequest)) or (
            key == SCORE_KEY and isinstance(value, Score)
        ):
            continue
        if isinstance(key, str) and key.startswith(_RESERVED_PREFIX):
            raise SteeringRequestError(f"{key[:80]!r} is a reserved key; ask for steering with 'steering'.", key[:80])
