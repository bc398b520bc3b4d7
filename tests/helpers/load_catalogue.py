"""Requests of a load test with the answers that the server gives to them alone."""

from __future__ import annotations

import base64
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np

from helpers.living import HIDDEN_SIZE, NUM_BLOCKS, features, low_rank
from helpers.load_judging import Known, Verdict, judged
from helpers.server_process import Server
from steer_engine.vectors import ControlVector, row_set_format
from steer_engine.vectors.safetensors_format import to_bytes

MODEL = "tiny"
LENGTH = 12
"""Tokens of a known answer."""
MARGIN = 0.005
"""Smallest distance of the best two logprobs at each token: fifty times what rounding in another batch changes."""
MAX_TRIES = 100
PROMPT_LENGTHS = (4, 9, 40, 150)
"""Tokens; the longest fills a block of the prefix cache."""
NUM_INLINE = 40
"""Inline vectors, one per request, that bursts send together."""

AXES = {"east": 5, "west": 9, "north": 14, "house": 20, "version-a": 30, "version-b": 40}
"""Vectors of the server's folder."""
VERSIONS = ("version-a", "version-b")
"""The vectors of the folder whose content changing names have."""
NUM_VERSION_REQUESTS = 8
LOUD = {"edits": [{"vector": "north", "scale": 0.7}]}
"""A preset of the server's folder."""

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
FORMS = ("whole", "stream", "logprobs", "n=2", "vllm_xargs", "chat", "chat stream")


def push(axis: int, size: float = 40.0) -> bytes:
    """A file of a vector along one axis at all blocks: strong enough that greedy text is another one for each."""
    direction = np.zeros(HIDDEN_SIZE, np.float32)
    direction[axis] = size
    return to_bytes(ControlVector(directions=dict.fromkeys(range(NUM_BLOCKS), direction)))


def inline(axis: int, size: float = 40.0) -> dict[str, Any]:
    return {"edits": [{"vector": {"data": base64.b64encode(push(axis, size)).decode()}}]}


def edits(*each: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"edits": list(each), **fields}


STEERINGS: dict[str, dict[str, Any]] = {
    "named": edits({"vector": "east"}),
    "scaled": edits({"vector": "east", "scale": -1.5}),
    "inline": inline(50),
    "preset": {"preset": "loud"},
    "add_relative": edits({"vector": "west", "op": "add_relative", "scale": 3.0}),
    "ablate and add": edits({"vector": "west", "op": "ablate"}, {"vector": "east", "scale": 0.8}),
    "clamp": edits({"vector": "east", "op": "clamp", "lo": 20.0}),
    "set": edits({"vector": "north", "op": "set", "target": -30.0}),
    "three blocks": edits(*({"vector": name, "blocks": n} for n, name in enumerate(("east", "west", "north")))),
    "prompt": edits({"vector": "east", "scope": "prompt"}),
    "generation": edits({"vector": "west", "scope": "generation"}),
    "span": edits({"vector": "north", "scope": {"start": 1, "end": -1}}, {"vector": "east", "scope": {"start": -1}}),
    "gate": edits({"vector": "east", "gate": {"vector": "west", "min_cos": -1.0}}),
    "preserve_norm": edits({"vector": "west", "scale": 2.0}, preserve_norm=True),
    "feature": edits({"vector": "sae", "op": "feature", "feature": 3, "add": 1.0}),
    "low_rank": edits({"vector": "reft", "op": "low_rank"}),
    "rotate": edits({"vector": "east"}, {"vector": "east", "op": "rotate", "toward": "west", "degrees": 90}),
    "site": edits({"vector": "east", "site": "mlp"}),
    "trigger": edits({"vector": "north", "scope": {"after": "a", "each": True, "tokens": 8}}),
    "except": edits({"vector": "north", "scope": {"from": "generation", "except": {"after": "a", "tokens": 2}}}),
    "schedule": edits({"vector": "east", "scope": "generation", "schedule": {"kind": "linear", "over": 6, "to": 0.2}}),
    "condition": edits(
        {"vector": "east", "when": {"vector": "west", "blocks": [0], "above": -1.0, "at": "mean_prompt"}}
    ),
    "probes": edits({"vector": "west"}, probes=[{"name": "east", "vector": "east", "blocks": [1], "measure": "dot"}]),
    "stop rule": edits(
        {"vector": "north"},
        probes=[{"name": "east", "vector": "east", "blocks": [1], "measure": "dot", "return": "none"}],
        stop=[{"probe": "east", "above": 1e9}],
    ),
}
"""The stop rule never ends an answer: known answers have one length."""


def write_folder(folder: Path) -> None:
    """What the server under load has from its operator."""
    for name, axis in AXES.items():
        (folder / f"{name}.safetensors").write_bytes(push(axis))
    (folder / "sae.safetensors").write_bytes(row_set_format.to_bytes(features()))
    (folder / "reft.safetensors").write_bytes(row_set_format.to_bytes(low_rank()))
    (folder / "loud.preset.json").write_text(json.dumps(LOUD))
    (folder / "house.preset.json").write_text(json.dumps(edits({"vector": "house"})))


class Recorder:
    """Asks the server for one answer at a time, and keeps those that rounding cannot change."""

    def __init__(self, server: Server, seed: int) -> None:
        self._server, self._rng = server, random.Random(seed)

    def catalogue(self) -> list[Known]:
        """Every steering with three forms, and plain requests of the same prompts in every form."""
        found: list[Known] = []
        forms = [*FORMS] * math.ceil(3 * len(STEERINGS) / len(FORMS))
        self._rng.shuffle(forms)
        for number, (name, spec) in enumerate(STEERINGS.items()):
            for form in forms[3 * number : 3 * number + 3]:
                found += self.pair(name, spec, form)
        return [*found, self.pair("preset as a model", {"preset": "loud"}, "model name")[0]]

    def inline_vectors(self) -> list[Known]:
        """Requests with an own vector each."""
        return [self.pair(f"inline {axis}", inline(axis, 45.0), "whole")[0] for axis in range(NUM_INLINE)]

    def versions(self) -> dict[str, tuple[Known, ...]]:
        """The versions of changing names -> their answers to the same requests, which differ from each other."""
        found: dict[str, list[Known]] = {name: [] for name in VERSIONS}
        for _ in range(MAX_TRIES):
            prompt = self.prompt(chat=False)
            answers = [self._clear(prompt, edits({"vector": name})) for name in VERSIONS]
            plain = self._clear(prompt, None)
            clear = [each[0] for each in (*answers, plain) if each is not None]
            if plain is None or len(set(clear)) <= len(VERSIONS):
                continue
            for name, answer in zip(VERSIONS, answers, strict=True):
                assert answer is not None
                spec = edits({"vector": name})
                found[name].append(self._known(name, prompt, "whole", answer, plain[0], spec))
            if len(found[VERSIONS[0]]) == NUM_VERSION_REQUESTS:
                return {name: tuple(answers) for name, answers in found.items()}
        raise AssertionError("no prompts have clear and different answers")

    def pair(self, name: str, spec: dict[str, Any], form: str) -> tuple[Known, Known]:
        """A steered request and the plain one of the same prompt, which have clearly different answers."""
        chat = form.startswith("chat")
        for _ in range(MAX_TRIES):
            prompt = self.prompt(chat)
            plain, steered = self._clear(prompt, None), self._clear(prompt, spec)
            if plain is None or steered is None or plain[0] == steered[0]:
                continue
            known = tuple(
                self._known(f"{name}, {form}", prompt, form, each, plain[0], given)
                for each, given in ((steered, spec), (plain, None))
            )
            for each in known:
                response = self._server.post(each.path, each.body)
                assert judged(each, response) == (Verdict.RIGHT, ""), (each, response.text)
            return known[0], known[1]
        raise AssertionError(f"{name}, {form}: no prompt of {MAX_TRIES} has clear and different answers")

    def prompt(self, chat: bool) -> dict[str, Any]:
        length = self._rng.choice(PROMPT_LENGTHS)
        if chat:
            text = "".join(self._rng.choices("abcdefghijklmnopqrstuvwxyz ", k=length))
            return {"messages": [{"role": "user", "content": text}]}
        return {"prompt": self._rng.choices(range(256), k=length)}

    def _clear(
        self, prompt: dict[str, Any], spec: dict[str, Any] | None
    ) -> tuple[tuple[int, ...], tuple[float, ...], str | None] | None:
        """Tokens, logprobs and digest; None if two tokens were nearly equal somewhere."""
        chat = "messages" in prompt
        body = request_body(prompt, spec) | ({"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2})
        response = self._server.post(path_of(prompt), body | {"return_tokens_as_token_ids": True})
        assert response.status_code == 200, response.text
        answer = response.json()
        (choice,) = answer["choices"]
        if chat:
            content = choice["logprobs"]["content"]
            steps = [[entry["logprob"] for entry in token["top_logprobs"]] for token in content]
            logprobs = [token["logprob"] for token in content]
        else:
            steps = [list(step.values()) for step in choice["logprobs"]["top_logprobs"]]
            logprobs = choice["logprobs"]["token_logprobs"]
        assert len(choice["token_ids"]) == len(steps) == LENGTH
        best = [sorted(step, reverse=True)[:2] for step in steps]
        if min(first - second for first, second in best) < MARGIN:
            return None
        digest = answer["steering"]["digest"] if spec is not None else None
        return tuple(choice["token_ids"]), tuple(logprobs), digest

    def _known(
        self,
        name: str,
        prompt: dict[str, Any],
        form: str,
        answer: tuple[tuple[int, ...], tuple[float, ...], str | None],
        plain: tuple[int, ...],
        spec: dict[str, Any] | None,
    ) -> Known:
        tokens, logprobs, digest = answer
        body = request_body(prompt, spec) | fields_of(form, spec)
        if form == "vllm_xargs" and spec is not None:
            del body["steering"]
        if form == "model name" and spec is not None:
            body |= {"model": f"{MODEL}:{body.pop('steering')['preset']}"}
        return Known(
            name=name if spec else f"plain, {form}", path=path_of(prompt), body=body, tokens=tokens,
            logprobs=logprobs, plain=plain, digest=digest,
        )  # fmt: skip


def path_of(prompt: dict[str, Any]) -> str:
    return CHAT if "messages" in prompt else COMPLETIONS


def request_body(prompt: dict[str, Any], spec: dict[str, Any] | None) -> dict[str, Any]:
    body = {"model": MODEL, "max_tokens": LENGTH, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return body | prompt | ({} if spec is None else {"steering": spec})


def fields_of(form: str, spec: dict[str, Any] | None) -> dict[str, Any]:
    """What a form adds to a request."""
    if form in ("stream", "chat stream"):
        return {"stream": True}
    if form == "logprobs":
        return {"logprobs": 1, "stream": True}
    if form == "n=2":
        # vLLM refuses several greedy choices; one candidate token is the same.
        return {"n": 2, "temperature": 1.0, "top_k": 1}
    if form == "vllm_xargs" and spec is not None:
        return {"vllm_xargs": {"steering": json.dumps(spec)}}
    return {}
