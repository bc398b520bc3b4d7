"""Features, low-rank edits and rotations over HTTP, by uploaded files, inline ones and presets: each answer is the
oracle's, token by token.
"""

from __future__ import annotations

import base64
import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from helpers.engines import ROW_SETS, random_vector
from helpers.living import OPERATOR, USER
from helpers.oracle import Oracle
from helpers.server_process import Server

from steer_engine.vectors import ControlVector, RowSet
from steer_engine.vectors.files import to_bytes

FILES: dict[str, ControlVector | RowSet] = {
    "relu": ROW_SETS["relu"],
    "reft": ROW_SETS["reft"],
    "north": random_vector(40),
    "east": random_vector(41),
}
SPECS: dict[str, dict[str, Any]] = {
    "feature": {"edits": [{"vector": "relu", "op": "feature", "feature": [3, 40], "target": 4.0}]},
    "low_rank": {"edits": [{"vector": "reft", "op": "low_rank", "blocks": 1, "scale": 1.5, "scope": {"start": 2}}]},
    "rotate": {"edits": [{"vector": "north", "op": "rotate", "toward": "east", "degrees": 70}]},
    "all": {
        "edits": [
            {"vector": "relu", "op": "feature", "feature": 3, "add": 2.0, "scope": "generation"},
            {"vector": "north", "op": "rotate", "toward": "east", "to_degrees": 30, "blocks": [0, 2]},
            {"vector": "reft", "op": "low_rank", "blocks": 1},
        ]
    },
}
BOUND = 1e-4
"""Of a float32 logprob against the oracle."""
SAMPLING = {"model": "tiny", "temperature": 0, "max_tokens": 6, "ignore_eos": True, "return_token_ids": True}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Why? Because", "logprobs": 0, **SAMPLING},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Why?"}], "logprobs": True, **SAMPLING},
}
paths = pytest.mark.parametrize("path", BODIES)
specs = pytest.mark.parametrize("name", SPECS)


@pytest.fixture(scope="module")
def server(living: Server) -> Iterator[Server]:
    """With FILES uploaded, and a preset for each of SPECS."""
    changed = {f"vectors/{name}": to_bytes(file) for name, file in FILES.items()}
    for path, content in changed.items():
        answer = living.client.put(f"/v1/steering/{path}", content=content, headers=OPERATOR)
        assert answer.status_code == 201, answer.text
    for name, spec in SPECS.items():
        answer = living.client.put(f"/v1/steering/presets/does-{name}", json=spec, headers=OPERATOR)
        assert answer.status_code == 201, answer.text
    yield living
    for path in (*(f"presets/does-{name}" for name in SPECS), *changed):
        assert living.client.delete(f"/v1/steering/{path}", headers=OPERATOR).status_code == 200


@pytest.fixture(scope="module")
def oracle(tiny_llama: str) -> Oracle:
    vectors = {name: file for name, file in FILES.items() if isinstance(file, ControlVector)}
    return Oracle(tiny_llama, vectors, {name: file for name, file in FILES.items() if isinstance(file, RowSet)})


def asked(server: Server, path: str, steering: Any, **fields: Any) -> dict[str, Any]:
    answer = server.post(path, BODIES[path] | {"steering": steering} | fields, headers=USER)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def sampled(answer: dict[str, Any]) -> tuple[list[int], list[int], list[float]]:
    """Token ids of the prompt and of the answer, and the logprobs of the answer's."""
    (choice,) = answer["choices"]
    told = choice["logprobs"]
    logprobs = [each["logprob"] for each in told["content"]] if "content" in told else told["token_logprobs"]
    return choice.get("prompt_token_ids") or answer["prompt_token_ids"], choice["token_ids"], logprobs


def inline(spec: dict[str, Any]) -> dict[str, Any]:
    """`spec` with each file in the request itself."""
    spec = copy.deepcopy(spec)
    for edit in spec["edits"]:
        for key in edit.keys() & {"vector", "toward"}:
            edit[key] = {"data": base64.b64encode(to_bytes(FILES[edit[key]])).decode()}
    return spec


@specs
@paths
def test_an_answer_is_the_oracles(server: Server, oracle: Oracle, path: str, name: str) -> None:
    answer = asked(server, path, SPECS[name])
    prompt, ids, logprobs = sampled(answer)
    assert [edit["op"] for edit in answer["steering"]["edits"]] == [edit["op"] for edit in SPECS[name]["edits"]]
    whole, rows = [*prompt, *ids], np.arange(len(prompt) - 1, len(prompt) + len(ids) - 1)
    steered, plain = (oracle.logprobs(whole, spec, len(prompt))[rows, ids] for spec in (SPECS[name], None))
    assert np.abs(logprobs - steered).max() <= BOUND
    assert np.abs(steered - plain).max() >= 100 * BOUND


@specs
@paths
def test_presets_and_inline_files_do_the_same(server: Server, path: str, name: str) -> None:
    uploaded = asked(server, path, SPECS[name])
    preset = f"does-{name}"
    others = [
        asked(server, path, {"preset": preset}),
        server.post(path, BODIES[path] | {"model": f"tiny:{preset}"}, headers=USER).json(),
        asked(server, path, inline(SPECS[name])),
    ]
    for answer in others:
        assert answer["steering"]["digest"] == uploaded["steering"]["digest"]
        assert sampled(answer)[:2] == sampled(uploaded)[:2]
        assert np.abs(np.subtract(sampled(answer)[2], sampled(uploaded)[2])).max() <= BOUND
    assert [answer["steering"].get("preset") for answer in others] == [preset, preset, None]


@specs
def test_validate_says_what_a_request_would_get(server: Server, name: str) -> None:
    told = asked(server, "/v1/completions", SPECS[name])["steering"]
    for spec in (SPECS[name], inline(SPECS[name]), {"preset": f"does-{name}"}):
        answer = server.post("/v1/steering/validate", spec, headers=USER)
        assert answer.status_code == 200, answer.text
        assert answer.json()["digest"] == told["digest"]
        assert [edit["op"] for edit in answer.json()["edits"]] == [edit["op"] for edit in told["edits"]]


@pytest.mark.parametrize(
    ("edit", "status", "param"),
    [
        ({"vector": "relu", "op": "feature", "feature": 4, "target": 1.0}, 400, "feature"),
        ({"vector": "relu", "op": "low_rank"}, 400, "vector"),
        ({"vector": "reft", "op": "feature", "feature": 3, "target": 1.0}, 400, "vector"),
        ({"vector": "relu"}, 400, "vector"),
        ({"vector": "north", "op": "rotate", "toward": "nobody", "degrees": 5}, 404, "toward"),
        ({"vector": "north", "op": "rotate", "toward": "north", "degrees": 5}, 400, "toward"),
        ({"vector": "north", "blocks": 1, "gate": {"vector": "relu", "feature": 9, "min_dot": 0}}, 400, "gate.feature"),
    ],
)  # fmt: skip
def test_wrong_rows_are_refused(server: Server, edit: dict[str, Any], status: int, param: str) -> None:
    for path, body in BODIES.items():
        answer = server.post(path, body | {"steering": {"edits": [edit]}}, headers=USER)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, f"steering.edits[0].{param}"), (
            answer.text
        )
