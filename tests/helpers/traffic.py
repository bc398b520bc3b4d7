"""Mixed traffic, and what the oracle says of each answer: exact positions, whatever the engine does with the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from helpers.driving import edit, params, steering, tokens
from helpers.oracle import Oracle
from helpers.oracle_probes import assert_numbers
from steer_engine import LLM


class Start(Protocol):
    """The fixture `start`."""

    def __call__(self, **settings: Any) -> LLM: ...


Run = Callable[[LLM, Sequence["Ask"]], list[Any]]

BOUND = 1e-4
"""Of a float32 logprob against the oracle; edits make the stream a few times larger than its own rounding assumes."""

OPEN, CLOSE = 300, 301
"""Tokens that every prompt has: triggers."""

_HOLDS = {"vector": "r10", "blocks": [0], "above": -1.0, "at": "mean_prompt"}
_FAILS = {"vector": "r10", "blocks": [0, 1], "above": 0.9, "at": "max_prompt"}

SPECS: tuple[dict[str, Any] | None, ...] = (
    None,
    steering(edit("r0", 1.5)),
    steering(edit("r1", 1.5, scope="generation")),
    steering(edit("r8", 2.0, scope={"after": OPEN, "until": CLOSE, "each": True}), edit("r9", 0.5, scope="generation")),
    steering(edit("r2", 1.5, scope="prompt"), edit("r3", -1.0, blocks=1)),
    steering(edit("r4", op="ablate"), edit("r5", 1.0, scope={"start": 3, "end": -2})),
    steering(edit("r11", 2.0, when=_HOLDS), edit("r12", 2.0, blocks=2, when={"any": [_FAILS]})),
    steering({"vector": "r7", "op": "add_relative", "scale": 0.3}, preserve_norm=True),
    None,
    steering({"vector": "r6", "op": "set", "target": 4.0, "scope": {"start": -5}}),
    steering(edit("r13", 3.0, scope="last_prompt_token"), edit("r14", 2.0, blocks=2, when={"all": [_HOLDS, _FAILS]})),
    steering(
        edit("r15", 2.0, scope={"from": "generation", "end": 6}, schedule={"kind": "linear", "over": 4, "to": 0.0}),
        edit("r9", 0.6, op="ablate", scope={"except": {"after": OPEN, "tokens": 5}}),
    ),
    steering(
        edit("reft", op="low_rank", blocks=[0, 2], scope="generation"),
        {"vector": "relu", "op": "feature", "feature": [3, 40], "target": 2.0, "scope": {"start": -6}},
        {"vector": "r16", "op": "rotate", "toward": "r17", "degrees": 60, "blocks": 2, "scope": {"after": OPEN}},
    ),
)
"""Every kind of scope, sums over D, rows that are read and others that are written, conditions that hold and that do
not, and plain requests in between."""


PROBES: tuple[list[dict[str, Any]], ...] = (
    [],
    [{"name": "here", "vector": "r20", "blocks": 1}],
    [
        {"name": "before", "vector": "r21", "measure": "dot"},
        {"name": "after", "vector": "r21", "measure": "dot", "after": True},
        {"name": "words", "vector": "r22", "blocks": [2], "scope": {"after": OPEN, "until": CLOSE, "each": True}},
    ],
    [],
    [{"name": "all", "vector": "r23", "blocks": [0, 2], "scope": "all", "after": True}],
)
"""Five: with the specs, every spec meets every list of probes."""


AT_SITES: tuple[dict[str, Any] | None, ...] = (
    None,
    steering(edit("r0", 1.5, site="attn")),
    steering(edit("r1", 1.5, site="mlp", scope="generation"), edit("r2", 1.0, blocks=1)),
    steering(
        edit("r8", 2.0, site="mlp", scope={"after": OPEN, "until": CLOSE, "each": True}),
        edit("r9", 0.5, op="ablate", site="attn"),
    ),
    steering(edit("r11", 2.0, site="attn", blocks=[1, 2], when=_HOLDS), edit("r12", 1.0, site="mlp", blocks=0)),
    None,
    steering(
        edit("r15", 2.0, site="attn", scope="generation", schedule={"kind": "linear", "over": 4, "to": 0.5}),
        {"vector": "reft", "op": "low_rank", "site": "mlp", "blocks": [0, 2]},
        {"vector": "r16", "op": "rotate", "toward": "r17", "degrees": 60, "site": "attn", "blocks": 1},
        {"vector": "relu", "op": "feature", "feature": [3, 40], "target": 2.0, "site": "mlp"},
    ),
    steering(edit("r3", 1.5, site="mlp"), edit("r4", 1.0, site="attn"), edit("r5", 0.5), preserve_norm=True),
)
"""At the outputs of attention and MLP, and beside these at the block's."""

PROBES_AT_SITES: tuple[list[dict[str, Any]], ...] = (
    [],
    [{"name": site, "vector": "r20", "measure": "dot", "site": site} for site in ("block", "attn", "mlp")],
    [{"name": "after", "vector": "r21", "site": "mlp", "after": True, "scope": "all"}],
)


@dataclass(frozen=True)
class Ask:
    prompt: list[int]
    spec: dict[str, Any] | None
    max_tokens: int
    probes: Sequence[dict[str, Any]] = ()

    @property
    def steering(self) -> dict[str, Any] | None:
        """What the request asks for."""
        return (self.spec or {}) | {"probes": list(self.probes)} if self.probes else self.spec


def marked(prompt: list[int]) -> list[int]:
    """With the triggers: open near the start, closed in the middle, open again near the end."""
    middle = len(prompt) // 2
    return [*prompt[:1], OPEN, *prompt[1:middle], CLOSE, *prompt[middle:-1], OPEN, *prompt[-1:]]


def asks(
    num: int,
    *,
    shared: int = 40,
    longest: int = 60,
    max_tokens: int = 8,
    seed: int = 0,
    specs: Sequence[dict[str, Any] | None] = SPECS,
    probes: Sequence[Sequence[dict[str, Any]]] = PROBES,
) -> list[Ask]:
    """`num` requests over `specs`, every second one behind a prefix of `shared` tokens that they have in common."""
    prefix = marked(tokens(7_000 + seed, shared))[:shared]
    return [
        Ask(
            prompt=[*(prefix if i % 2 else []), *marked(tokens(8_000 + 100 * seed + i, 5 + (11 * i) % longest))],
            spec=specs[i % len(specs)],
            max_tokens=1 + (3 * i + max_tokens - 1) % max_tokens,
            probes=probes[i % len(probes)],
        )
        for i in range(num)
    ]


def run(llm: LLM, requested: Sequence[Ask], **fields: Any) -> list[Any]:
    """vLLM's outputs of one batch of `requested`."""
    inputs: Any = [{"prompt_token_ids": ask.prompt} for ask in requested]
    wanted = [params(ask.steering, max_tokens=ask.max_tokens, **fields) for ask in requested]
    return list(llm.generate(inputs, wanted, use_tqdm=False))


def assert_right(
    oracle: Oracle, requested: Sequence[Ask], outputs: Sequence[Any], allowed: Sequence[int] | None = None
) -> None:
    """Every sampled token of every answer has the logprob that the oracle computes for it under its own steering.

    allowed: the tokens that a grammar leaves, where one does.
    """
    shown = 0
    for ask, output in zip(requested, outputs, strict=True):
        for completion in output.outputs:
            shown += assert_completion(oracle, ask, completion, allowed)
    assert shown == sum(len(o.outputs) for a, o in zip(requested, outputs, strict=True) if a.spec and len(o.outputs))


def assert_completion(oracle: Oracle, ask: Ask, completion: Any, allowed: Sequence[int] | None = None) -> bool:
    """One answer; True if steering shows in it far above the bound."""
    ids = list(completion.token_ids)
    reported = np.array([step[token].logprob for token, step in zip(ids, completion.logprobs, strict=True)])
    whole = [*ask.prompt, *ids]
    expected, plain = (
        oracle.logprobs(whole, spec, prompt_len=len(ask.prompt))[len(ask.prompt) - 1 : -1] for spec in (ask.spec, None)
    )
    if allowed is not None:
        expected, plain = (among(rows_MV, allowed) for rows_MV in (expected, plain))
    rows = np.arange(len(ids))
    assert np.abs(reported - expected[rows, ids]).max() <= BOUND, ask
    if ask.probes:
        assert_numbers(oracle, ask.prompt, ids, ask.spec, ask.probes, completion.steering)
    return bool(np.abs(expected - plain).max() >= 100 * BOUND) if ask.spec else False


def among(logprobs_MV: np.ndarray, allowed: Sequence[int]) -> np.ndarray:
    """Logprobs if only `allowed` tokens can be sampled; 0 for the others."""
    result_MV = np.zeros_like(logprobs_MV)
    allowed_MA = logprobs_MV[:, allowed]
    result_MV[:, allowed] = allowed_MA - np.logaddexp.reduce(allowed_MA, axis=1, keepdims=True)
    return result_MV


def core_of(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core


def drafts_of(llm: LLM, requested: list[Ask], runs: Run = run) -> tuple[list[Any], int]:
    """The outputs, and how many drafted tokens were accepted."""
    accepted = 0
    scheduler = core_of(llm).scheduler
    original = scheduler.make_spec_decoding_stats

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal accepted
        accepted += kwargs.get("num_accepted_tokens", args[2] if len(args) > 2 else 0)
        return original(*args, **kwargs)

    scheduler.make_spec_decoding_stats = counted
    outputs = runs(llm, requested)
    del scheduler.make_spec_decoding_stats
    return outputs, accepted
