"""The offline engine: `vllm.LLM`, armed. Steers per request, and reads the residual stream."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import vllm

from steer_engine.api.frontend import STEERING_KEY, Frontend
from steer_engine.capture import CAPTURE_KEY, WORDS, CaptureRequest
from steer_engine.errors import SteeringRequestError
from steer_engine.models import resolve_model
from steer_engine.program import SCORE_KEY, Score
from steer_engine.settings import SteeringConfig
from steer_engine.vectors import ControlVector, Registry
from steer_engine.vllm import engine_client
from steer_engine.vllm.plugin import register

register()


SamplingParams = vllm.SamplingParams

Prompt = str | list[int]
Position = str | list[int]


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """About one next-token distribution P, in float64.

    answers: log-probabilities (nats) of the tokens that were asked for. kl: KL(P_0 || P) in nats, P_0 being the
    baseline's. entropy: of P, in nats. top_changed: P and P_0 have different most probable tokens.
    """

    answers: list[float]
    kl: float
    entropy: float
    top_changed: bool


class LLM(vllm.LLM):  # type: ignore[misc]  # vLLM is untyped here
    """A `vllm.LLM` whose requests can be steered and read.

        llm = LLM("smollm2-135m", vectors={"cheerful": vector})
        params = vllm.SamplingParams(extra_args={"steering": {"edits": [{"vector": "cheerful", "scale": 0.3}]}})
        llm.generate("My day was", params)

    Args:
        model: a path, a Hugging Face id, or the name of a packaged model.
        vectors: a folder of vector files, or vectors by name.
        steering: what is armed (all blocks and operations by default).
        capture: arm reading of the residual stream; `capture_blocks` says where (all armed blocks by default).
        kwargs: anything that `vllm.LLM` takes.

    Raises:
        UnsupportedEngineError: this model or configuration cannot be armed.
    """

    def __init__(
        self,
        model: str,
        *,
        vectors: str | Path | Mapping[str, ControlVector] | None = None,
        steering: SteeringConfig | None = None,
        capture: bool = False,
        capture_blocks: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        config = steering or SteeringConfig()
        if capture:
            blocks = config.blocks if capture_blocks is None else tuple(capture_blocks)
            config = config.model_copy(update={"capture": blocks})
        additional = {**kwargs.pop("additional_config", {}), **config.to_additional_config()}
        super().__init__(resolve_model(model), additional_config=additional, **kwargs)
        if isinstance(vectors, Mapping):
            for name, vector in vectors.items():
                self.vectors.add(name, vector)
        elif vectors is not None:
            self._frontend.registry = Registry(Path(vectors))
        self._status = engine_client.check_status([engine_client.call(self.llm_engine, "steer_status")])

    @property
    def _frontend(self) -> Frontend:
        return cast(Frontend, self.llm_engine.input_processor.steering)

    @property
    def vectors(self) -> Registry:
        """The vectors that requests can name; `add(name, vector)` registers one."""
        return self._frontend.registry

    @property
    def hidden_size(self) -> int:
        return self._frontend.model.hidden_size

    @property
    def num_blocks(self) -> int:
        return self._frontend.model.num_blocks

    @property
    def armed_blocks(self) -> tuple[int, ...]:
        return self._frontend.model.armed_blocks

    @property
    def capture_blocks(self) -> tuple[int, ...]:
        """The blocks that `capture` reads, in the order of its first axis."""
        return tuple(sorted({block for worker in self._status["workers"] for block in worker["capture_blocks"]}))

    def beam_search(self, prompts: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        """As in vLLM. Raises SteeringRequestError if `params` ask for steering: its steps would be unsteered."""
        if (getattr(params, "extra_args", None) or {}).get(STEERING_KEY):
            raise SteeringRequestError("Beam search cannot be steered; use generate.", STEERING_KEY)
        return super().beam_search(prompts, params, *args, **kwargs)

    def steering_status(self) -> dict[str, Any]:
        """How the workers are armed right now, as they say themselves."""
        return engine_client.check_status([engine_client.call(self.llm_engine, "steer_status")])

    def capture(
        self,
        prompts: Sequence[Prompt],
        position: Position = "last",
        *,
        steering: Mapping[str, Any] | None = None,
        after: bool = False,
        use_tqdm: bool = False,
    ) -> list[np.ndarray]:
        """Read the residual stream of prompts at `capture_blocks`, before any edit of the same block.

        position: "last" token, "mean" over the prompt, "all" tokens, or a list of positions (negative: from the end).
        steering: steer the prompts while they are read. after: read the stream as the block's edit leaves it.

        Returns one float32 array per prompt: [blocks, positions, D]; one position for "last" and "mean".
        """
        if isinstance(position, str) and position not in WORDS:
            raise SteeringRequestError(f"position {position!r} is none of 'last', 'mean', 'all', or a list of numbers.")
        positions = position if isinstance(position, str) else tuple(position)
        captures = [CaptureRequest(key=uuid.uuid4().hex, positions=positions, after=after) for _ in prompts]
        params = []
        for capture in captures:
            extra_args: dict[str, Any] = {CAPTURE_KEY: capture}
            if steering is not None:
                extra_args[STEERING_KEY] = dict(steering)
            params.append(vllm.SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, extra_args=extra_args))
        inputs = [{"prompt_token_ids": prompt} if isinstance(prompt, list) else prompt for prompt in prompts]
        outputs = self.generate(cast(Any, inputs), params, use_tqdm=use_tqdm)
        return [self._take(capture, output) for capture, output in zip(captures, outputs, strict=True)]

    def score(
        self,
        prompts: Sequence[list[int]],
        *,
        steering: Sequence[Mapping[str, Any] | None],
        baselines: Sequence[int],
        answers: Sequence[Sequence[int]],
    ) -> list[Numbers]:
        """Numbers about the distribution of the token after each prompt, reduced by the worker that has the logits.

        steering: of each prompt, as in a request. baselines: for each prompt, which of `prompts` is its P_0: itself, or
        one that comes before it. answers: token ids whose log-probabilities are wanted.
        """
        if wrong := [number for number, baseline in enumerate(baselines) if not 0 <= baseline <= number]:
            raise ValueError(
                f"Prompt {wrong[0]} has the baseline {baselines[wrong[0]]}, which does not come before it."
            )
        size = int(self.model_config.get_vocab_size())
        if unknown := [token for tokens in answers for token in tokens if not 0 <= token < size]:
            raise ValueError(f"Answer token {unknown[0]} is not in the vocabulary, which has 0 to {size - 1}.")
        call = uuid.uuid4().hex
        keys = [f"{call}-{number}" for number in range(len(prompts))]
        params = []
        for key, spec, baseline, tokens in zip(keys, steering, baselines, answers, strict=True):
            score = Score(key=key, baseline=keys[baseline], answers=tuple(int(token) for token in tokens))
            extra_args: dict[str, Any] = {SCORE_KEY: score}
            if spec is not None:
                extra_args[STEERING_KEY] = dict(spec)
            params.append(vllm.SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, extra_args=extra_args))
        self.generate(cast(Any, [{"prompt_token_ids": prompt} for prompt in prompts]), params, use_tqdm=False)
        reply = engine_client.call(self.llm_engine, "steer_scores", keys)
        if not reply["ok"] or None in reply["numbers"]:
            raise RuntimeError(f"Scoring failed in the worker: {reply.get('reason', 'not every prompt was scored')}")
        return [Numbers(**numbers) for numbers in reply["numbers"]]

    def _take(self, capture: CaptureRequest, output: Any) -> np.ndarray:
        reply = engine_client.call(self.llm_engine, "steer_take", capture.key)
        return capture.arranged(engine_client.rows_of(reply), len(output.prompt_token_ids))[1]
