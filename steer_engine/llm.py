"""The offline engine: `vllm.LLM`, armed. It steers per request, captures the residual stream, and scores prompts."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from steer_engine.applied import Applied
from steer_engine.capture import WORDS, CaptureRequest
from steer_engine.errors import SteeringRequestError
from steer_engine.models import resolve_model
from steer_engine.probe_report import ProbeAnswer
from steer_engine.program import SCORE_KEY, Score
from steer_engine.resolve import ResolvedSpec
from steer_engine.resolve_capture import check_rows_known
from steer_engine.settings import SteeringConfig
from steer_engine.site import Site, describe_sites, points_at
from steer_engine.vectors.files import AnyVector
from steer_engine.vectors.registry import Registry
from steer_engine.vllm.plugin import register

register()

import vllm  # noqa: E402  (the folder triton_kernels must be hidden before vLLM is imported)

from steer_engine.api.frontend import STEERING_KEY, Frontend  # noqa: E402
from steer_engine.api.request_field import is_absent, parsed_null  # noqa: E402
from steer_engine.vllm import engine_client, measured, probed  # noqa: E402
from steer_engine.vllm.flags import cpu_kv_cache_bytes  # noqa: E402

SamplingParams = vllm.SamplingParams

Prompt = str | list[int]
Position = str | list[int]


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """About one next-token distribution P, in float64.

    answers: log-probabilities (nats) of the requested tokens. kl: KL(P_0 || P) in nats, with P_0 the baseline's
    distribution. entropy: of P, in nats. top_changed: P and P_0 have different most probable tokens.
    """

    answers: list[float]
    kl: float
    entropy: float
    top_changed: bool


class LLM(vllm.LLM):  # type: ignore[misc]  # vLLM is untyped here
    """A `vllm.LLM` whose requests can be steered and captured.

        llm = LLM("smollm2-135m", vectors={"cheerful": vector})
        params = vllm.SamplingParams(extra_args={"steering": {"edits": [{"vector": "cheerful", "scale": 0.3}]}})
        llm.generate("My day was", params)

    Args:
        model: a path, a Hugging Face id, or the name of a packaged model.
        vectors: a folder of vector files, or vectors by name.
        steering: what is armed (default: all blocks and operations).
        capture: arm capture of the residual stream, at `capture_blocks` (default: all armed blocks).
        kwargs: passed to `vllm.LLM`. On a CPU, the KV cache gets a quarter of the free memory unless they or
            VLLM_CPU_KVCACHE_SPACE say otherwise.

    Raises:
        UnsupportedEngineError: this model or configuration cannot be armed.
    """

    def __init__(
        self,
        model: str,
        *,
        vectors: str | Path | Mapping[str, AnyVector] | None = None,
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
        if not {"kv_cache_memory_bytes", "gpu_memory_utilization"} & kwargs.keys():
            num_workers = kwargs.get("tensor_parallel_size", 1) * kwargs.get("pipeline_parallel_size", 1)
            kwargs["kv_cache_memory_bytes"] = cpu_kv_cache_bytes(num_workers)
        super().__init__(resolve_model(model), additional_config=additional, **kwargs)
        if isinstance(vectors, Mapping):
            for name, vector in vectors.items():
                self.vectors.add(name, vector)
        elif vectors is not None:
            self._frontend.registry = Registry(Path(vectors))
        self._status = engine_client.check_status([engine_client.call(self.llm_engine, "status")])

    @property
    def _frontend(self) -> Frontend:
        return cast(Frontend, self.llm_engine.input_processor.steering)

    @property
    def vectors(self) -> Registry:
        """The registered vectors; `add(name, vector)` registers another."""
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
    def sites(self) -> tuple[Site, ...]:
        """The armed sites besides the blocks' outputs."""
        return self._frontend.model.sites

    @property
    def capture_blocks(self) -> tuple[int, ...]:
        """The blocks on the first axis of `capture`, ascending."""
        return tuple(sorted({block for worker in self._status["workers"] for block in worker["capture_blocks"]}))

    def generate(self, prompts: Any, sampling_params: Any = None, *args: Any, **kwargs: Any) -> list[Any]:
        """As in vLLM. Each output of a steered prompt has one more attribute, `steering`: what was applied, with the
        fields of a server's answers (`applied_tokens` of each edit, `value` and `held` of each condition). With probes,
        each of its `outputs` has `steering` too: their numbers.
        """
        run = super().generate
        return self._telling(sampling_params, lambda params: run(prompts, params, *args, **kwargs))

    def chat(self, messages: Any, sampling_params: Any = None, *args: Any, **kwargs: Any) -> list[Any]:
        """As in vLLM, with `steering` as in `generate`."""
        run = super().chat
        return self._telling(sampling_params, lambda params: run(messages, params, *args, **kwargs))

    def _telling(self, sampling_params: Any, run: Callable[[Any], list[Any]]) -> list[Any]:
        """Runs with the steering of each prompt resolved, and adds to the outputs what was applied."""
        single = not isinstance(sampling_params, Sequence)
        given = [sampling_params] if single else list(sampling_params)
        resolved = [self._resolved(params) for params in given]
        params = [
            params if spec is None else self._with_steering(params, spec)
            for params, spec in zip(given, resolved, strict=True)
        ]
        outputs = run(params[0] if single else params)
        for output, spec in zip(outputs, resolved * len(outputs) if single else resolved, strict=True):
            numbers = measured.take(output)
            if spec is not None and (spec.edits or spec.template.probes) and output.prompt_token_ids is not None:
                output.steering = spec.report()
                applied = Applied(spec, output.steering)
                for choice in output.outputs:
                    applied.add(output.prompt_token_ids, choice.token_ids, numbers, choice.index)
                    if spec.template.probes:
                        choice.steering = probed_numbers(output, choice, spec)
        return outputs

    def _resolved(self, params: Any) -> ResolvedSpec | None:
        extra_args = getattr(params, "extra_args", None) or {}
        requested = extra_args.get(STEERING_KEY)
        return None if requested is None else self._frontend.resolve(requested)

    @staticmethod
    def _with_steering(params: Any, resolved: ResolvedSpec) -> Any:
        params = copy.copy(params)
        params.extra_args = {**(params.extra_args or {}), STEERING_KEY: resolved}
        return params

    def beam_search(self, prompts: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        """As in vLLM. Raises SteeringRequestError if `params` request steering: its steps would be unsteered."""
        if not is_absent(parsed_null((getattr(params, "extra_args", None) or {}).get(STEERING_KEY))):
            raise SteeringRequestError("Beam search cannot be steered; use generate.", STEERING_KEY)
        return super().beam_search(prompts, params, *args, **kwargs)

    def steering_status(self) -> dict[str, Any]:
        """How the workers are armed, and what they hold now."""
        return engine_client.check_status([engine_client.call(self.llm_engine, "status")])

    def capture(
        self,
        prompts: Sequence[Prompt],
        position: Position = "last",
        *,
        steering: Mapping[str, Any] | None = None,
        after: bool = False,
        site: str = "block",
        use_tqdm: bool = False,
    ) -> list[np.ndarray]:
        """Capture the residual stream of prompts at `capture_blocks`, before the edit of the same block.

        position: "last" token, "mean" over the prompt, "all" tokens, or a list of positions (negative: from the end).
        steering: a spec that steers the prompts meanwhile. after: capture the stream after the block's edit instead.
        site: "attn" or "mlp" captures the output of the blocks' attentions or MLPs instead of the stream; `steering`
        of the engine must arm it.

        Returns one float32 array per prompt: [blocks, positions, D]; one position for "last" and "mean".
        """
        points = points_at(self.capture_blocks, self._armed_site(site))
        return self.capture_points(prompts, position, points, steering=steering, after=after, use_tqdm=use_tqdm)

    def capture_points(
        self,
        prompts: Sequence[Prompt],
        position: Position,
        points: tuple[int, ...],
        *,
        steering: Mapping[str, Any] | None = None,
        after: bool = False,
        use_tqdm: bool = False,
    ) -> list[np.ndarray]:
        """As `capture`, at ascending points (see `steer_engine.site`): [points, positions, D]."""
        if isinstance(position, str) and position not in WORDS:
            raise SteeringRequestError(f"position {position!r} is none of 'last', 'mean', 'all', or a list of numbers.")
        resolved = self._frontend.resolve(steering) or ResolvedSpec()
        positions = position if isinstance(position, str) else tuple(position)
        captures = [
            CaptureRequest(key=uuid.uuid4().hex, positions=positions, points=points, after=after) for _ in prompts
        ]
        params = [self._one_token({STEERING_KEY: replace(resolved, capture=capture)}) for capture in captures]
        return [rows_LPD for _, rows_LPD in self._capture(prompts, captures, params, use_tqdm)]

    def capture_answers(
        self,
        prompts: Sequence[Prompt],
        sampling_params: Any = None,
        *,
        scope: Literal["generation", "all"] = "generation",
        position: Literal["last", "mean", "all"] = "all",
        after: bool = False,
        site: str = "block",
        use_tqdm: bool = False,
    ) -> list[Any]:
        """Answer prompts as `generate` does, and capture the residual stream of the answers in the same pass.

        sampling_params: for all prompts, or one for each; steering belongs there, and `n` is 1. scope: "generation" is
        one row for each token of the answer, at the position that chose it (the first at the last token of the prompt);
        "all" is the rest of the prompt as well. position: which rows of the scope. after, site: as in `capture`. The
        rows of all prompts are in memory at once: pass long answers a few at a time.

        Returns vLLM's outputs. Each has one more attribute, `captured`: float32 [blocks, positions, D].
        """
        if scope not in ("generation", "all") or position not in WORDS:
            raise SteeringRequestError(
                f"scope {scope!r} or position {position!r} is wrong: the scope is 'generation' or 'all', the position "
                "'last', 'mean' or 'all'. To capture prompts, use LLM.capture."
            )
        given = self.get_default_sampling_params() if sampling_params is None else sampling_params
        each = list(given) if isinstance(given, Sequence) else [given] * len(prompts)
        if any(params.n != 1 for params in each):
            raise SteeringRequestError("A capture is of one answer: leave n out, and repeat the prompt instead.")
        points = points_at(self.capture_blocks, self._armed_site(site))
        captures, params = [], []
        for asked in each:
            captures.append(
                CaptureRequest(key=uuid.uuid4().hex, positions=position, points=points, scope=scope, after=after)
            )
            resolved = replace(self._resolved(asked) or ResolvedSpec(), capture=captures[-1])
            params.append(self._with_steering(asked, resolved))
        found = self._capture(prompts, captures, params, use_tqdm)
        for output, rows_LPD in found:
            output.captured = rows_LPD
        return [output for output, _ in found]

    def _armed_site(self, site: str) -> Site:
        """Raises SteeringRequestError if the engine has no such site."""
        if site not in (Site.BLOCK, *self.sites):
            raise SteeringRequestError(
                f"Site {site!r} is not armed on this engine; armed: {describe_sites(self.sites)}. Valid sites: "
                f"{', '.join(Site)}; steer_engine.LLM(..., steering=SteeringConfig(sites=(...,))) arms them."
            )
        return Site(site)

    def _capture(
        self, prompts: Sequence[Prompt], captures: list[CaptureRequest], params: list[Any], use_tqdm: bool
    ) -> list[tuple[Any, np.ndarray]]:
        """Runs the prompts: vLLM's output and the captured rows of each."""
        if not self.capture_blocks:
            raise SteeringRequestError("Capture is not armed on this engine: steer_engine.LLM(..., capture=True).")
        check_rows_known(self._frontend.model)
        inputs = [{"prompt_token_ids": prompt} if isinstance(prompt, list) else prompt for prompt in prompts]
        try:
            outputs = self.generate(cast(Any, inputs), params, use_tqdm=use_tqdm)
        except BaseException:
            for capture in captures:
                engine_client.call(self.llm_engine, "fetch_capture", capture.key, False)
            raise
        return [(output, self._fetch(capture, output)) for capture, output in zip(captures, outputs, strict=True)]

    def score(
        self,
        prompts: Sequence[list[int]],
        *,
        steering: Sequence[Mapping[str, Any] | None],
        baselines: Sequence[int],
        answers: Sequence[Sequence[int]],
    ) -> list[Numbers]:
        """Numbers about the next-token distribution of each prompt, computed in the worker that has the logits.

        steering: the spec of each prompt. baselines: for each prompt, the index of the prompt that gives P_0: its own,
        or an earlier one. answers: token ids whose log-probabilities are returned.
        """
        if wrong := [number for number, baseline in enumerate(baselines) if not 0 <= baseline <= number]:
            raise ValueError(
                f"Prompt {wrong[0]} has baseline {baselines[wrong[0]]}; it must be the prompt itself or an earlier one."
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
            params.append(self._one_token(extra_args))
        self.generate(cast(Any, [{"prompt_token_ids": prompt} for prompt in prompts]), params, use_tqdm=False)
        reply = engine_client.call(self.llm_engine, "scores", keys)
        if not reply["ok"] or None in reply["numbers"]:
            raise RuntimeError(f"Scoring failed in the worker: {reply.get('reason', 'not every prompt was scored')}")
        return [Numbers(**numbers) for numbers in reply["numbers"]]

    @staticmethod
    def _one_token(extra_args: dict[str, Any]) -> Any:
        return vllm.SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, extra_args=extra_args)

    def _fetch(self, capture: CaptureRequest, output: Any) -> np.ndarray:
        lengths = len(output.prompt_token_ids), len(output.outputs[0].token_ids)
        reply = engine_client.call(self.llm_engine, "fetch_capture", capture.key, True, capture.end(*lengths))
        return capture.arranged(engine_client.rows_of(reply), *lengths)[1]


def probed_numbers(output: Any, choice: Any, resolved: ResolvedSpec) -> dict[str, Any]:
    """The numbers of probes of one of the output's choices, as in a server's answers."""
    answer = ProbeAnswer(resolved.template.probes)
    if (queue := probed.numbers_offline(output)) is not None:
        queue.move(choice.index, answer)
    answer.pad(len(choice.token_ids))
    answer.finished = True
    return answer.take()
