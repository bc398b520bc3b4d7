"""Random ordered mixes of every operation, in batches, inside the engine: each request is what the oracle computes."""

from __future__ import annotations

from typing import Any

import numpy as np
from helpers.driving import generate, prompt_logprobs, tokens
from helpers.engines import RUNNER, TINY_BLOCKS, random_vector
from helpers.oracle import Oracle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steer_engine import LLM
from steer_engine.errors import SteeringRequestError
from steer_engine.spec import Op

BATCH = 4
EXAMPLES = 25 if RUNNER == "v1" else 3
PROMPTS = [tokens(300 + i, 18 + 5 * i) for i in range(BATCH)]
VECTORS = {f"r{seed}": random_vector(seed) for seed in range(32)}

names = st.sampled_from([f"r{seed}" for seed in range(6)])
scales = st.sampled_from([-1.5, -0.5, 0.25, 0.6, 1.0, 2.0])
offsets = st.none() | st.integers(-20, 20)
scopes = st.sampled_from(["all", "prompt", "generation"]) | st.builds(
    lambda start, end: {"start": start, "end": end}, offsets, offsets
)
blocks = st.just("all") | st.lists(st.integers(0, TINY_BLOCKS - 1), min_size=1, unique=True)
operations = st.one_of(
    st.builds(lambda scale: {"op": "add", "scale": scale}, scales),
    st.builds(lambda scale: {"op": "add", "scale": scale}, scales),
    st.builds(lambda scale: {"op": "add_relative", "scale": scale / 4}, scales),
    st.builds(lambda scale: {"op": "ablate", "scale": scale}, scales),
    st.builds(lambda low, width: {"op": "clamp", "lo": low, "hi": low + width}, scales, st.sampled_from([0.0, 1.0])),
    st.builds(lambda target: {"op": "set", "target": target}, scales),
    st.builds(lambda scale: {"op": "low_rank", "vector": "reft", "scale": scale}, scales),
    st.builds(
        lambda vector, numbers, change: {"op": "feature", "vector": vector, "feature": numbers, "blocks": 1, **change},
        st.sampled_from(["relu", "jump"]),
        st.sampled_from([3, 40, [40, 3]]),
        st.sampled_from([{"target": 0.0}, {"target": 2.5}, {"scale": 0.0}, {"scale": -1.5}, {"add": 0.75}]),
    ),
    st.builds(
        lambda angle, degrees: {"op": "rotate", "toward": "r6", angle: degrees},
        st.sampled_from(["degrees", "to_degrees"]),
        st.sampled_from([-30.0, 70.0, 180.0, 350.0]),
    ),
)
bounds = st.floats(-0.2, 0.2)
gates = st.none() | st.builds(
    lambda vector, side, bound: {"vector": vector, side: bound},
    names,
    st.sampled_from(["min_cos", "max_cos", "min_dot", "max_dot"]),
    bounds,
)
gates_on_features = st.builds(
    lambda number, side, bound: {"vector": "relu", "feature": number, side: bound},
    st.sampled_from([3, 40]),
    st.sampled_from(["min_dot", "max_dot"]),
    bounds,
)


@st.composite
def specs(draw: st.DrawFn) -> dict[str, Any]:
    edits = []
    for _ in range(draw(st.integers(1, 4))):
        edit = {"vector": draw(names), "blocks": draw(blocks), "scope": draw(scopes), **draw(operations)}
        gate = draw(gates | gates_on_features if edit["blocks"] in (1, [1]) else gates)
        edits.append(edit if gate is None else {**edit, "gate": gate})
    return {"edits": edits, "preserve_norm": draw(st.booleans())}


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(requested=st.lists(specs(), min_size=BATCH, max_size=BATCH))
def test_random_mixes(tiny: LLM, oracle: Oracle, requested: list[dict[str, Any]]) -> None:
    for spec in requested:
        try:
            tiny.llm_engine.input_processor.steering.resolve(spec)
        except SteeringRequestError:
            spec["edits"] = spec["edits"][:1]  # the mix needs more rows than the engine has
    tiny.llm_engine.reset_prefix_cache()
    outputs = generate(tiny, PROMPTS, requested, prompt_logprobs=0, max_tokens=1)
    for prompt, spec, output in zip(PROMPTS, requested, outputs, strict=True):
        oracle.closest_gate = np.inf
        expected, plain = (
            np.array([row_V[token] for row_V, token in zip(oracle.logprobs(prompt, s), prompt[1:], strict=False)])
            for s in (spec, None)
        )
        if oracle.closest_gate < 1e-4:
            continue  # rounding may open or close this gate
        ours = prompt_logprobs(output)
        # float32 roundings of a stream that edits may have made several times larger; see the effect below.
        bound = 3e-5 * max(1.0, float(np.abs(expected).max()) / 10)
        assert np.abs(ours - expected).max() <= bound, spec
        EFFECTS.append(float(np.abs(expected - plain).max()) / bound)
        OPERATIONS.update(Op(edit["op"]) for edit in spec["edits"])


EFFECTS: list[float] = []
OPERATIONS: set[Op] = set()
"""In the specs that were compared."""


def test_the_mixes_had_effects() -> None:
    """Most random specs move the logprobs by far more than the bound of the comparison; every operation was in some."""
    assert len(EFFECTS) >= 2 * EXAMPLES
    assert RUNNER == "v2" or OPERATIONS.issuperset(Op)
    assert np.median(EFFECTS) >= 1000
