"""Bodies that no client should send: each is refused with a 4xx."""

from __future__ import annotations

import base64
import json
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np

BODIES: dict[str, bytes] = {
    "nothing": b"",
    "a brace": b"{",
    "null": b"null",
    "a list": b"[]",
    "a number": b"1e999",
    "text": b'"x"',
    "bytes": bytes(range(256)),
    "UTF-16": '{"edits": []}'.encode("utf-16"),
    "UTF-8 cut": b'{"edits": "\xc3',
    "half a surrogate": b'{"edits": [{"vector": "\\ud800"}]}',
    "a preset with half a surrogate": b'{"preset": "\\udfff"}',
    "NUL": b'{"edits": [{"vector": "\\u0000"}]}',
    "10,000 brackets": b"[" * 10_000,
    "10,000 braces": b'{"edits":' * 1_000,
    "a huge number": b'{"edits": [{"vector": "house", "scale": ' + b"9" * 5_000 + b"}]}",
    "NaN": b'{"edits": [{"vector": "house", "scale": NaN}]}',
    "infinity": b'{"edits": [{"vector": "house", "scale": -Infinity}]}',
    "a block of 10^30": b'{"edits": [{"vector": "house", "blocks": 1000000000000000000000000000000}]}',
    "blocks of a long range": b'{"edits": [{"vector": "house", "blocks": "0-99999999999999999999"}]}',
    "a long list of blocks": b'{"edits": [{"vector": "house", "blocks": [' + b"1," * 5_000 + b"1]}]}",
    "a long key": b'{"edits": [{"vector": "house", "' + b"k" * 9_000 + b'": 1}]}',
    "a long operation": b'{"edits": [{"vector": "house", "op": "' + b"o" * 9_000 + b'"}]}',
    "a scope of 10^30": b'{"edits": [{"vector": "house", "scope": {"start": 1000000000000000000000000000000}}]}',
    "9 edits": json.dumps({"edits": [{"vector": "house"}] * 9}).encode(),
    "preset of a preset": b'{"preset": {"preset": "house"}}',
    **{
        name: json.dumps({"edits": [{"vector": "house", **edit}]}).encode()
        for name, edit in {
            "a feature without a number": {"op": "feature", "scale": 0},
            "a feature of 10^30": {"op": "feature", "feature": 10**30, "scale": 0},
            "a low rank with a target": {"op": "low_rank", "target": 1.0},
            "a rotation toward nothing": {"op": "rotate", "degrees": 30},
            "a rotation by 10^30": {"op": "rotate", "toward": "house", "degrees": 10**30},
            "an unknown site": {"site": "head"},
            "a trigger of nothing": {"scope": {"after": ""}},
            "a trigger that closes where it opens": {"scope": {"after": "a", "until": "a"}},
            "an exception of nothing": {"scope": {"except": {}}},
            "a schedule over no token": {"schedule": {"kind": "linear", "over": 0, "to": 0.5}},
            "a schedule to 10^300": {"schedule": {"kind": "exponential", "over": 9, "to": 1e300}},
            "a condition that never holds": {"when": {"vector": "house", "above": 1.0, "below": 0.0}},
            "no condition": {"when": {"any": []}},
            "conditions in conditions": {"when": {"all": [{"any": [{"vector": "house"}]}]}},
        }.items()
    },
    "a stop rule without a probe": b'{"edits": [{"vector": "house"}], "stop": [{"probe": "p", "above": 1}]}',
    "a probe without a vector": b'{"probes": [{"name": "p"}]}',
    "a probe with a long name": b'{"probes": [{"vector": "house", "name": "' + b"p" * 9_000 + b'"}]}',
    "a capture of another word": b'{"capture": {"positions": "first"}}',
    "other servers' vectors without an end": b'{"vectors": [{"source": "house", "apply": ' + b"[" * 5_000,
}
"""By what they are: not a valid `steering` field for a server with a vector and a preset called house."""


@dataclass(frozen=True, kw_only=True)
class Hostile:
    """One request, sent as it is. name: what is wrong with it."""

    name: str
    method: str
    path: str
    content: bytes
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}: {self.method} {self.path} {self.content[:200]!r}"


GENERATING: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "tiny", "prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/v1/responses": {"model": "tiny", "input": "a", "max_output_tokens": 1},
}


class HostileBodies:
    """A seeded source of requests that must be refused.

    vector: a safetensors file that the server would accept. operator: the headers of an admin.
    """

    def __init__(self, rng: random.Random, vector: bytes, operator: dict[str, str]) -> None:
        self._rng, self._vector, self._operator = rng, vector, operator
        self._too_much = {name: json.dumps(spec).encode() for name, spec in excesses(vector).items()}
        self._foreign = foreign(vector)
        self._kinds = (
            self._spec,
            self._spec,
            self._cut,
            self._twice,
            self._excess,
            self._foreign_form,
            self._unknown,
            self._upload,
            self._no_key,
        )

    def next(self) -> Hostile:
        return self._rng.choice(self._kinds)()

    def _generating(self, name: str, spec: bytes) -> Hostile:
        path = self._rng.choice(list(GENERATING))
        content = json.dumps(GENERATING[path]).encode()[:-1] + b', "steering": ' + spec + b"}"
        return self._json(name, "POST", path, content)

    def _json(self, name: str, method: str, path: str, content: bytes) -> Hostile:
        headers = {"content-type": "application/json", **(self._operator if method == "PUT" else {})}
        return Hostile(name=name, method=method, path=path, content=content, headers=headers)

    def _spec(self) -> Hostile:
        name, spec = self._rng.choice(list(BODIES.items()))
        kind = self._rng.choice(("generate", "validate", "preset"))
        if kind == "generate" and spec != b"null":  # null asks for nothing
            return self._generating(name, spec)
        if kind == "preset":
            return self._json(name, "PUT", "/v1/steering/presets/hostile", spec)
        return self._json(name, "POST", "/v1/steering/validate", spec)

    def _cut(self) -> Hostile:
        path = self._rng.choice(list(GENERATING))
        whole = json.dumps(GENERATING[path] | {"steering": {"edits": [{"vector": "house"}]}}).encode()
        return self._json("a cut body", "POST", path, whole[: self._rng.randrange(1, len(whole))])

    def _twice(self) -> Hostile:
        return self._generating("steering twice", b'{"preset": "house"}, "steering": {"edits": [{"vector": "house"}]}')

    def _excess(self) -> Hostile:
        name = self._rng.choice(list(self._too_much))
        return self._generating(name, self._too_much[name])

    def _foreign_form(self) -> Hostile:
        name = self._rng.choice(list(self._foreign))
        path = self._rng.choice(("/v1/completions", "/v1/chat/completions"))
        return self._json(name, "POST", path, json.dumps(GENERATING[path] | self._foreign[name]).encode())

    def _unknown(self) -> Hostile:
        """Another word each time: nothing may keep them."""
        word = f"nobody{self._rng.random()}"
        field, edit = {"strength" + word: 2}, {"vector": "house"}
        spec = self._rng.choice(({"edits": [edit | field]}, {"edits": [{"vector": word}]}, {"preset": word}, field))
        return self._generating("an unknown name", json.dumps(spec).encode())

    def _upload(self) -> Hostile:
        contents = {
            "a cut file": self._vector[: self._rng.randrange(len(self._vector))],
            "a file of NaN": _scaled(self._vector, np.nan),
            "a file of zeros": _scaled(self._vector, 0.0),
            "random bytes": self._rng.randbytes(2000),
        }
        name = self._rng.choice(list(contents))
        path = "/v1/steering/vectors/hostile"
        return Hostile(name=name, method="PUT", path=path, content=contents[name], headers=self._operator)

    def _no_key(self) -> Hostile:
        key = {"Authorization": f"Bearer {self._rng.random()}"}
        path = f"/v1/steering/vectors/{self._rng.choice(('house', 'east', 'load-0'))}"
        method = self._rng.choice(("PUT", "DELETE"))
        return Hostile(name="a wrong key", method=method, path=path, content=self._vector, headers=key)


def _scaled(file: bytes, factor: float) -> bytes:
    """The safetensors file with all numbers multiplied."""
    from safetensors.numpy import load, save

    header = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    tensors = {name: tensor * np.float32(factor) for name, tensor in load(file).items()}
    with np.errstate(invalid="ignore"):
        return bytes(save(tensors, header.get("__metadata__")))


def excesses(vector: bytes) -> dict[str, dict[str, Any]]:
    """Specs that exceed a limit or overflow. vector: a safetensors file that the server would accept."""
    huge, nan = (base64.b64encode(_scaled(vector, factor)).decode() for factor in (1e30, np.nan))
    house = {"vector": "house"}
    return {
        "a huge spec": {"edits": [house | {"blocks": list(range(1000)) * 30}]},
        "2,000 edits": {"edits": [house] * 2000},
        "a scale beyond the limit": {"edits": [house | {"scale": 1e30}]},
        "a dose beyond the limit": {"edits": [house | {"op": "add_relative", "scale": 999.0}]},
        "a target that overflows": {"edits": [house | {"op": "set", "target": 1e38}]},
        "an inline vector that overflows": {"edits": [{"vector": {"data": huge}}]},
        "an inline vector of NaN": {"edits": [{"vector": {"data": nan}}]},
        "an inline vector of 9 MiB": {"edits": [{"vector": {"data": "A" * (12 * 2**20)}}]},
        "a body of 17 MiB": {"edits": [house], "padding": "A" * (17 * 2**20)},
        "an inline vector that is none": {"edits": [{"vector": {"data": "AAAA"}}]},
        "a block that there is not": {"edits": [house | {"blocks": 7}]},
    }


def foreign(vector: bytes) -> dict[str, dict[str, Any]]:
    """Fields of requests in other servers' forms that cannot be served. vector: as in `excesses`."""
    zeros = base64.b64encode(bytes(64)).decode()
    tensor = {"data": zeros, "dtype": "float32", "original_dtype": "torch.float32", "shape": [1, 16]}
    lens = {"activations": tensor, "layer_indices": [1], "scale": 1.0}

    def xargs(name: str, value: Any) -> dict[str, Any]:
        return {"vllm_xargs": {name: value if isinstance(value, str) else json.dumps(value)}}

    return {
        "hotwire that is no JSON": xargs("hotwire", "{"),
        "hotwire of a path": xargs("hotwire", {"id": "../house.pt", "layer": 1, "scale": 1.0}),
        "hotwire of 10^30": xargs("hotwire", {"id": "house", "layer": 10**30, "scale": 1.0}),
        "hotwire twice at one layer": xargs("hotwire", [{"id": "house", "layer": 1, "scale": 1.0}] * 2),
        "vllm-lens of another width": xargs("apply_steering_vectors", [lens]),
        "vllm-lens that declares too much": xargs(
            "apply_steering_vectors", [lens | {"activations": tensor | {"shape": [256, 65536]}}]
        ),
        "20,000 vectors of vllm-lens": xargs("apply_steering_vectors", [{}] * 20_000),
        "EasySteer with a tensor": {
            "steering": {"vectors": [{"source": "x", "data": base64.b64encode(vector).decode()}]}
        },
    }
