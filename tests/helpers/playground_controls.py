"""What each control of the playground changes in a request: entries, and what differs in `steering` after them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np

from helpers.playground import EDIT
from steer_engine.demo.__main__ import NAME
from steer_engine.probe import Platt
from steer_engine.vectors import ControlVector, save
from steer_engine.vectors.files import AnyVector
from steer_engine.vectors.metadata import FittedCondition, FittedProbe, ProbeBlock
from steer_engine.vectors.row_set import RowSet

FEATURES, LOW_RANK, FITTED = "some-features", "a-low-rank", "fitted"
BLOCK = 10
"""Where the features and the low-rank edit are."""

Entries = list[tuple[str, str]]
Changes = dict[str, Any]
"""Path -> value; None removes the field. "edits.0": the whole edit."""


def more_files(folder: Path, vector: ControlVector) -> list[Path]:
    """Files of the other kinds beside the demo's `vector`, in its blocks and size. Returns their paths."""
    rng = np.random.default_rng(7)

    def rows(count: int) -> np.ndarray:
        drawn = rng.standard_normal((count, vector.hidden_size)) / vector.hidden_size**0.5
        return np.asarray(drawn, np.float32)

    numbers = np.array([7, 12, 31])
    no_bias = {BLOCK: np.zeros(3, np.float32)}
    orthonormal = {BLOCK: np.asarray(np.linalg.qr(rows(3).T)[0].T, np.float32)}
    turned = {block: np.roll(direction, 1) for block, direction in vector.directions.items()}
    calibrated = {block: ProbeBlock(auroc=0.9, threshold=0.5, platt=Platt(0.1, 0.0)) for block in (8, 9)}
    made: dict[str, AnyVector] = {
        FEATURES: RowSet(
            kind="features", read={BLOCK: rows(3)}, write={BLOCK: rows(3)}, bias=no_bias, indices={BLOCK: numbers},
        ).with_labels({BLOCK: {7: "praise"}}),
        LOW_RANK: RowSet(kind="low_rank", read={BLOCK: rows(3)}, write=orthonormal, bias=no_bias),
        FITTED: ControlVector(directions=turned, metadata=vector.metadata).with_metadata(
            condition=FittedCondition(blocks=(8,), measure="cosine", at="last_prompt_token", above=-1.0),
            probe=FittedProbe(blocks=calibrated, at="last_prompt_token"),
        ),
    }  # fmt: skip
    paths = []
    for name, content in made.items():
        paths.append(folder / f"{name}.safetensors")
        save(content, paths[-1])
    return paths


def expected(steering: dict[str, Any], changes: Changes) -> dict[str, Any]:
    """`steering` with some fields changed."""
    changed: Any = copy.deepcopy(steering)
    for path, value in changes.items():
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        place = changed
        for part in parents:
            place = place[part]
        if value is None:
            del place[last]
        elif isinstance(place, list) and last == len(place):
            place.append(value)
        else:
            place[last] = value
    return dict(changed)


def edit(**values: str) -> Entries:
    """Entries into the form of the only edit."""
    return [(f"{EDIT} [data-field={name}]", value) for name, value in values.items()]


def condition(number: int, **values: str) -> Entries:
    return [(f"{EDIT} .condition:nth-of-type({number}) [data-field={name}]", value) for name, value in values.items()]


def probe(number: int, **values: str) -> Entries:
    return [(f"#probes > .part:nth-of-type({number}) [data-field={name}]", value) for name, value in values.items()]


AFTER, UNTIL = "<|im_start|>", "<|im_end|>"
"""Special tokens of the model, so that their ids do not depend on what is around them."""
HIGH = 1_000_000
WINDOW = {"after": AFTER, "until": UNTIL, "each": True, "tokens": 9}
DIRECTION = {"vector": NAME, "blocks": "8-10"}

OPERATIONS: list[tuple[Entries, Changes]] = [
    (edit(unit="residual", scale="0.2"), {"edits.0.unit": "residual", "edits.0.scale": 0.2}),
    (edit(unit="vector", scale="0.15"), {"edits.0.unit": None, "edits.0.scale": 0.15}),
    (edit(op="add_relative", scale="0.05"), {"edits.0.op": "add_relative", "edits.0.scale": 0.05}),
    (edit(op="ablate", scale="0.5"), {"edits.0.op": "ablate", "edits.0.scale": 0.5}),
    (
        edit(op="clamp", lo="-1", hi="2.5"),
        {"edits.0.op": "clamp", "edits.0.scale": None, "edits.0.lo": -1, "edits.0.hi": 2.5},
    ),
    (edit(op="set", target="-0.5"), {"edits.0": DIRECTION | {"op": "set", "target": -0.5}}),
    (
        edit(op="rotate", toward=FITTED, degrees="30"),
        {"edits.0": DIRECTION | {"op": "rotate", "toward": FITTED, "degrees": 30}},
    ),
    (edit(turn="to_degrees"), {"edits.0.degrees": None, "edits.0.to_degrees": 30}),
    (edit(vector=FEATURES, amount="2"), {"edits.0": {"vector": FEATURES, "op": "feature", "feature": 7, "target": 2}}),
    ([(f"{EDIT} .pick", "31")], {"edits.0.feature": [7, 31]}),
    (edit(feature="12"), {"edits.0.feature": 12}),
    (edit(change="scale", amount="0"), {"edits.0.target": None, "edits.0.scale": 0}),
    (edit(change="add", amount="-0.5"), {"edits.0.scale": None, "edits.0.add": -0.5}),
    (edit(vector=LOW_RANK), {"edits.0": {"vector": LOW_RANK, "op": "low_rank", "scale": 1}}),
    (edit(scale="0.5"), {"edits.0.scale": 0.5}),
    (edit(more='{"blocks": [10]}'), {"edits.0.blocks": [10]}),
]

WHERE: list[tuple[Entries, Changes]] = [
    (edit(site="mlp"), {"edits.0.site": "mlp"}),
    (edit(blocks="9, 10"), {"edits.0.blocks": [9, 10]}),
    *[(edit(scope=word), {"edits.0.scope": word}) for word in ("prompt", "generation", "last_prompt_token")],
    (edit(scope="answer_tokens", start="1", end="6"), {"edits.0.scope": {"from": "generation", "start": 1, "end": 6}}),
    (edit(scope="positions", end="-1"), {"edits.0.scope": {"start": 1, "end": -1}}),
    (edit(scope="window", after=AFTER, until=UNTIL, tokens="9", each="on"), {"edits.0.scope": WINDOW}),
    (edit(within="positions"), {"edits.0.scope": WINDOW | {"start": 1, "end": -1}}),
    (edit(within="answer_tokens", end=""), {"edits.0.scope": WINDOW | {"from": "generation", "start": 1}}),
    (edit(**{"except": "window"}, except_after=UNTIL, except_tokens="2", except_each="on"),
     {"edits.0.scope.except": {"after": UNTIL, "tokens": 2, "each": True}}),
    (edit(until="[2, 198]"), {"edits.0.scope.until": [2, 198]}),
    (edit(scope="all_but"), {"edits.0.scope": {"except": {"after": UNTIL, "tokens": 2, "each": True}}}),
    (edit(schedule="linear", over="5", to="0.5"), {"edits.0.schedule": {"kind": "linear", "over": 5, "to": 0.5}}),
    (edit(schedule="exponential"), {"edits.0.schedule.kind": "exponential"}),
    (edit(gate_vector=FITTED, gate_low="-1"), {"edits.0.gate": {"vector": FITTED, "min_cos": -1}}),
    (edit(gate_measure="dot", gate_high="1000000"),
     {"edits.0.gate": {"vector": FITTED, "min_dot": -1, "max_dot": HIGH}}),
    (edit(blocks="10", gate_vector=FEATURES, gate_measure="feature", gate_feature="12"),
     {"edits.0.blocks": [10], "edits.0.gate": {"vector": FEATURES, "feature": 12, "min_dot": -1, "max_dot": HIGH}}),
]  # fmt: skip

FIRST = {"vector": FITTED, "blocks": [8], "above": -1}
CONDITIONS: list[tuple[Entries, Changes]] = [
    (edit(mode="one") + condition(1, vector=FITTED, blocks="8", above="-1"),
     {"edits.0.when": FIRST}),
    (condition(1, measure="dot", at="mean_prompt", below="1000000"),
     {"edits.0.when": FIRST | {"measure": "dot", "at": "mean_prompt", "below": HIGH}}),
    (condition(1, bound="stored"), {"edits.0.when": {"vector": FITTED}}),
    ([*edit(mode="any"), (f"{EDIT} .add-condition", ""), *condition(2, vector=FITTED, blocks="9", above="-1")],
     {"edits.0.when": {"any": [{"vector": FITTED}, {"vector": FITTED, "blocks": [9], "above": -1}]}}),
    (edit(mode="all"), {"edits.0.when": {"all": [{"vector": FITTED}, {"vector": FITTED, "blocks": [9], "above": -1}]}}),
    (edit(mode=""), {"edits.0.when": None}),
    ([(f"#when-all [data-field={field}]", value) for field, value in (("mode", "one"), ("vector", FITTED))]
     + [("#when-all [data-field=bound]", "stored")], {"when": {"vector": FITTED}}),
    ([("#preserve_norm", "on")], {"preserve_norm": True}),
]  # fmt: skip

TONE = {"name": "playground", "vector": FITTED, "blocks": [9], "measure": "dot"}
PROBES: list[tuple[Entries, Changes]] = [
    (probe(1, vector=FITTED, blocks="9", measure="dot"), {"probes": [TONE]}),
    (probe(1, name="tone", after="on", site="mlp"),
     {"probes.0": TONE | {"name": "tone", "after": True, "site": "mlp"}}),
    (probe(1, scope="all"), {"probes.0.scope": "all"}),
    (probe(1, blocks="8-9"), {"probes.0.blocks": "8-9"}),
    (probe(1, rule="below", below="-1000000", stop_block="9"),
     {"stop": [{"probe": "tone", "block": 9, "below": -HIGH}]}),
    (probe(1, rule="between", above="-2000000"), {"stop.0.above": -2 * HIGH}),
    (probe(1, **{"for": "2"}), {"stop.0.for": 2}),
    (probe(1, **{"return": "summary"}), {"probes.0.return": "summary"}),
    ([("#add-probe", ""), *probe(2, vector=FITTED, blocks="8")],
     {"probes.1": {"name": "playground", "vector": FITTED, "blocks": [8], "measure": "probability"}}),
    (probe(2, **{"return": "none"}), {"probes.1.return": "none"}),
]  # fmt: skip

CONTROLS = {"operations": OPERATIONS, "tokens": WHERE, "conditions": CONDITIONS, "probes": PROBES}

REASONS = dict.fromkeys(
    ("#preserve_norm", f"{EDIT} [data-field=gate_vector]", f"{EDIT} [data-field=mode]", "#when-all [data-field=mode]",
     "#probes [data-field=vector]", "#add-probe"),
    "only op add armed (--steering-ops)",
)  # fmt: skip
"""Controls that a server without the other operations does not allow, and why."""
