"""When an edit applies, over HTTP: scopes, triggers, schedules and conditions on a server with both kinds of parsers.

`applied_tokens` is counted once more from the token ids of the answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from helpers.asking import events
from helpers.oracle import Oracle
from helpers.oracle_when import covered
from helpers.server_process import SMALL, Server, steer_engine_serve
from helpers.tiny_models import tiny_llama_path

from steer_engine.vectors import ControlVector, save

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
THINK, END_THINK, CALL, END_CALL = range(259, 263)
WINDOWS = {
    "thinking": {"after": THINK, "until": END_THINK, "each": True},
    "answer": {"after": END_THINK, "until": THINK, "each": True},
    "tool_calls": {"after": CALL, "until": END_CALL, "each": True},
}
"""What the words mean here."""

SAMPLING = {"temperature": 0, "max_tokens": 6, "ignore_eos": True, "return_token_ids": True}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Why?"}], **SAMPLING}
TEXT = {"model": "tiny", "prompt": "Why? Because", **SAMPLING}
TALK = [
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "<think>Hm.</think>So.<tool_call>{}</tool_call>Done."},
    {"role": "user", "content": "And?"},
]
"""A prompt in which every window opens and closes; the template opens `<think>` once more."""

EDIT = {"vector": "late", "scale": 1.0}
CONDITION = {"vector": "early", "measure": "cosine"}
LINEAR = {"kind": "linear", "over": 2, "to": 0.0}


def _vectors() -> dict[str, ControlVector]:
    rng = np.random.default_rng(0)
    found = {}
    for name, block, size in (("early", 0, 1.0), ("late", 1, 40.0)):
        direction_D = rng.normal(size=64)
        direction_D *= size / np.linalg.norm(direction_D)
        found[name] = ControlVector(directions={block: direction_D.astype(np.float32)})
    return found


VECTORS = _vectors()


@pytest.fixture(scope="module")
def oracle(tiny_models_dir: Path) -> Oracle:
    return Oracle(str(tiny_llama_path(tiny_models_dir, tags=TAGS)), VECTORS)


@pytest.fixture(scope="module")
def server(tiny_models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = tiny_llama_path(tiny_models_dir, tags=TAGS)
    folder = tmp_path_factory.mktemp("when")
    (folder / "vectors").mkdir()
    for name, vector in VECTORS.items():
        save(vector, folder / f"vectors/{name}.safetensors")
    preset = {
        "edits": [EDIT | {"scope": {"after": "</think>", "until": "<tool_call>", "each": True}}],
        "when": CONDITION | {"above": -1.0},
    }
    (folder / "vectors" / "answers.preset.json").write_text(json.dumps(preset))
    command = steer_engine_serve(
        str(model), "--served-model-name", "tiny", "--steering-vectors", str(folder / "vectors"),
        "--reasoning-parser", "deepseek_r1", "--enable-auto-tool-choice", "--tool-call-parser", "hermes", *SMALL,
    )  # fmt: skip
    running = Server(command, folder / "server.log")
    yield running
    running.kill()


def asked(server: Server, body: dict[str, Any], path: str = "/v1/chat/completions", **fields: Any) -> dict[str, Any]:
    answer = server.post(path, body | fields)
    assert answer.status_code == 200, answer.text
    assert_clean(answer)
    found: dict[str, Any] = answer.json()
    return found


def assert_clean(answer: httpx.Response) -> None:
    """What was measured travels inside the server in a field of vLLM's, which no client sees."""
    assert "_steer" not in answer.text
    bodies = events(answer) if "event-stream" in answer.headers["content-type"] else [answer.json()]
    assert not [body for body in bodies if body.get("kv_transfer_params")]


def sequences(answer: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Of each choice, the token ids of its prompt and its own."""
    return [
        (choice.get("prompt_token_ids") or answer["prompt_token_ids"], choice["token_ids"])
        for choice in answer["choices"]
    ]


def counted(scope: Any, answer: dict[str, Any]) -> int:
    """Computed positions in the scope: all but the last token of each answer, which is sampled only."""
    spelled = spelled_out(scope)
    return sum(
        int(covered(spelled, [*prompt, *tokens[:-1]], len(prompt))[0].sum()) for prompt, tokens in sequences(answer)
    )


def steering(scope: Any = "all", **fields: Any) -> dict[str, Any]:
    return {"edits": [EDIT | {"scope": scope}], **fields}


SCOPES: dict[str, Any] = {
    "last prompt token": "last_prompt_token",
    "first tokens of the answer": {"from": "generation", "end": 3},
    "later tokens of the answer": {"from": "generation", "start": 2},
    "thinking": "thinking",
    "answer": "answer",
    "tool calls": "tool_calls",
    "except tool calls": {"except": "tool_calls"},
    "the generated answer": {"after": END_THINK, "from": "generation"},
    "tokens": {"after": [END_THINK], "tokens": 2, "each": True},
}


@pytest.mark.parametrize("name", SCOPES)
@pytest.mark.parametrize("forced", [None, END_THINK, CALL], ids=["free", "</think>", "<tool_call>"])
def test_every_scope_of_a_chat(server: Server, name: str, forced: int | None) -> None:
    """A forced token makes the answer close its reasoning, or call a tool, at once."""
    bias = {} if forced is None else {"logit_bias": {str(forced): 100}}
    answer = asked(server, CHAT, messages=TALK, **bias, steering=steering(SCOPES[name]))
    ((prompt, tokens),) = sequences(answer)
    assert prompt[-2] == THINK, "the template opens it"
    assert forced is None or tokens == [forced] * 6
    (edit,) = answer["steering"]["edits"]
    assert edit["applied_tokens"] == counted(SCOPES[name], answer)
    assert edit["applied_tokens"] > 0 or (name == "the generated answer" and forced != END_THINK)


GENTLE = {"vector": "late", "scale": 0.05}
"""A push of norm 2: the stream keeps its size, and so do its rounding errors."""
BOUND = 1e-4
"""Of a float32 logprob against the oracle."""


@pytest.mark.parametrize(
    "scope", ["thinking", "answer", "tool_calls", *({"except": word} for word in WINDOWS)], ids=str
)
@pytest.mark.parametrize("forced", [None, END_THINK, CALL], ids=["free", "</think>", "<tool_call>"])
def test_the_words_steer_their_tokens_and_no_others(
    server: Server, oracle: Oracle, scope: Any, forced: int | None
) -> None:
    """Every token of prompt and answer is as likely as in a model that is steered at exactly these positions.

    The logprobs are those before a forced token is forced.
    """
    bias = {} if forced is None else {"logit_bias": {str(forced): 100}}
    fields = {"logprobs": True, "prompt_logprobs": 1, "steering": {"edits": [GENTLE | {"scope": scope}]}}
    answer = asked(server, CHAT, messages=TALK, **bias, **fields)
    ((prompt, tokens),) = sequences(answer)
    whole = [*prompt, *tokens]
    told = [step[str(token)]["logprob"] for step, token in zip(answer["prompt_logprobs"][1:], prompt[1:], strict=True)]
    told += [each["logprob"] for each in answer["choices"][0]["logprobs"]["content"]]
    spelled = {"edits": [GENTLE | {"scope": spelled_out(scope)}]}
    rows = np.arange(len(whole) - 1)
    steered_T, plain_T = (oracle.logprobs(whole, spec, len(prompt))[rows, whole[1:]] for spec in (spelled, None))
    assert np.abs(told - steered_T).max() <= BOUND
    moved_T, inside_T = np.abs(steered_T - plain_T), covered(spelled_out(scope), whole, len(prompt))[0].numpy()[:-1]
    assert moved_T.max() >= 100 * BOUND
    # Outside and before, nothing moves; some tokens of each kind are there.
    assert not moved_T[: inside_T.argmax()].any()
    assert inside_T.any()
    assert not inside_T.all()


def spelled_out(scope: Any) -> Any:
    """`scope` with the tokens of its word."""
    if isinstance(scope, str):
        return WINDOWS.get(scope, scope)
    spelled = dict(scope)
    if isinstance(spelled.get("except"), str):
        spelled["except"] = WINDOWS[spelled["except"]]
    return spelled


def test_texts_are_the_tokens_of_the_vocabulary(server: Server) -> None:
    by_word, by_text, by_ids = (
        asked(server, CHAT, messages=TALK, steering=steering(scope))
        for scope in ("thinking", {"after": "<think>", "until": "</think>", "each": True}, WINDOWS["thinking"])
    )
    assert by_word["steering"]["digest"] == by_text["steering"]["digest"] == by_ids["steering"]["digest"]
    assert sequences(by_word) == sequences(by_text) == sequences(by_ids)


def test_windows_change_the_answer_only_where_they_are(server: Server) -> None:
    plain = sequences(asked(server, CHAT))[0][1]
    late = sequences(asked(server, CHAT, steering=steering({"from": "generation", "start": 3})))[0][1]
    assert late[:3] == plain[:3]
    assert late != plain
    never = asked(server, CHAT, steering=steering({"after": END_CALL}))
    assert sequences(never)[0][1] == plain
    assert never["steering"]["edits"][0]["applied_tokens"] == 0


def test_a_schedule(server: Server) -> None:
    edit = EDIT | {"scope": {"from": "generation"}, "schedule": LINEAR}
    faded = asked(server, CHAT, steering={"edits": [edit]})
    full = asked(server, CHAT, steering=steering({"from": "generation"}))
    assert faded["steering"]["edits"][0]["schedule"] == LINEAR
    assert faded["steering"]["digest"] != full["steering"]["digest"]
    assert sequences(faded)[0][1][0] == sequences(full)[0][1][0], "in full at the first token"
    assert sequences(faded) != sequences(full)


# Conditions


def value_of(server: Server, body: dict[str, Any], path: str, **fields: Any) -> Any:
    answer = asked(server, body, path, steering=steering(when=CONDITION | {"above": -1.0} | fields))
    (condition,) = answer["steering"]["conditions"]
    assert condition["held"] is True
    return condition["value"]


@pytest.mark.parametrize("at", ["last_prompt_token", "mean_prompt", "max_prompt"])
@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)], ids=["chat", "completions"]
)
def test_a_condition_decides(server: Server, path: str, body: dict[str, Any], at: str) -> None:
    value = value_of(server, body, path, at=at)
    assert -1 < value < 1
    plain = sequences(asked(server, body, path))
    always = sequences(asked(server, body, path, steering=steering("generation")))
    assert always != plain
    for above, held in ((value - 1e-3, True), (value + 1e-3, False)):
        when = CONDITION | {"above": above, "at": at}
        answer = asked(server, body, path, steering=steering(when=when))
        (condition,), (edit,) = answer["steering"]["conditions"], answer["steering"]["edits"]
        assert condition["held"] is held
        assert condition["value"] == pytest.approx(value, abs=1e-5)
        assert condition["at"] == at
        assert edit["when"] == {"all": [0]}
        assert edit["applied_tokens"] == (6 if held else 0)
        assert sequences(answer) == (always if held else plain)


def test_several_choices_and_several_prompts(server: Server) -> None:
    path, prompts = "/v1/completions", ["Why? Because", "No.", "Once upon a time there was"]
    single = [value_of(server, TEXT | {"prompt": prompt}, path) for prompt in prompts]
    middle = sorted(single)[1]
    when = CONDITION | {"above": middle - 1e-3}
    held = [value > middle - 1e-3 for value in single]
    assert sorted(held) == [False, True, True]
    scope = {"from": "generation", "end": 2}
    many = asked(server, TEXT, path, prompt=prompts, steering=steering(scope, when=when))
    (condition,) = many["steering"]["conditions"]
    assert condition["value"] == pytest.approx(single, abs=1e-4)
    assert condition["held"] == held
    assert many["steering"]["edits"][0]["applied_tokens"] == 2 * 2
    three = asked(server, TEXT, path, n=3, temperature=1.0, seed=1, steering=steering("thinking", when=when))
    assert three["steering"]["conditions"][0]["held"] == [held[0]] * 3
    unconditional = asked(server, TEXT, path, n=3, temperature=1.0, steering=steering({"from": "generation", "end": 2}))
    assert len(unconditional["choices"]) == 3
    assert unconditional["steering"]["edits"][0]["applied_tokens"] == 3 * 2


def test_any_and_all(server: Server) -> None:
    yes, no = CONDITION | {"above": -1.0}, CONDITION | {"above": 0.99}
    for when, applied in (({"any": [yes, no]}, 6), ({"all": [yes, no]}, 0)):
        report = asked(server, CHAT, steering=steering(when=when))["steering"]
        assert sorted(condition["held"] for condition in report["conditions"]) == [False, True]
        assert report["edits"][0]["applied_tokens"] == applied


# Other endpoints, streams, presets


def test_responses(server: Server) -> None:
    body = {"model": "tiny", "input": "Why?", "temperature": 0, "max_output_tokens": 6, "ignore_eos": True}
    when = CONDITION | {"above": -1.0}
    answer = asked(server, body, "/v1/responses", steering=steering({"from": "generation", "end": 4}, when=when))
    assert answer["steering"]["edits"][0]["applied_tokens"] == 4
    assert answer["steering"]["conditions"][0]["held"] is True


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)], ids=["chat", "completions"]
)
@pytest.mark.parametrize("num_choices", [1, 2])
def test_the_last_chunk_of_a_stream_says_what_was_applied(
    server: Server, path: str, body: dict[str, Any], num_choices: int
) -> None:
    spec = steering({"from": "generation", "end": 4}, when=CONDITION | {"above": -1.0})
    fields = {"steering": spec, "n": num_choices, "temperature": 1.0, "seed": 1}
    whole = asked(server, body, path, **fields)["steering"]
    answer = server.post(path, body | fields | {"stream": True})
    assert answer.status_code == 200
    assert_clean(answer)
    chunks = events(answer)
    finished = [chunk for chunk in chunks if "steering" in chunk]
    assert len(finished) == num_choices
    assert all(choice["finish_reason"] for chunk in finished for choice in chunk["choices"])
    last = finished[-1]["steering"]
    assert last["edits"][0]["applied_tokens"] == whole["edits"][0]["applied_tokens"] == 4 * num_choices
    assert last["conditions"][0]["held"] == whole["conditions"][0]["held"]
    assert last["conditions"][0]["value"] == pytest.approx(whole["conditions"][0]["value"], abs=1e-4)


def test_a_preset_with_a_trigger_and_a_condition(server: Server) -> None:
    named = asked(server, CHAT, messages=TALK, steering={"preset": "answers"})
    by_model = asked(server, CHAT, messages=TALK, model="tiny:answers")
    assert by_model["steering"] == named["steering"]
    assert named["steering"]["preset"] == "answers"
    assert named["steering"]["conditions"][0]["held"] is True
    # With a condition, an edit begins at the last prompt token: the windows of the prompt are over.
    assert named["steering"]["edits"][0]["applied_tokens"] == 0
    forced = asked(server, CHAT, messages=TALK, steering={"preset": "answers"}, logit_bias={str(END_THINK): 100})
    assert forced["steering"]["edits"][0]["applied_tokens"] == 4, "from the token after the first one, without the last"


def test_the_description_of_the_server(server: Server) -> None:
    found = server.get("/v1/steering").json()
    words = [scope for scope in found["scopes"] if isinstance(scope, str)]
    assert words == ["all", "prompt", "generation", "last_prompt_token", "thinking", "answer", "tool_calls"]
    assert {"max_triggers", "max_trigger_tokens", "max_conditions"} <= set(found["limits"])
    schema = server.get("/openapi.json").json()["components"]["schemas"]
    assert {"from", "except", "after", "until", "each", "tokens"} <= set(schema["ScopeSpec"]["properties"])
    assert {"schedule", "when", "scope"} <= set(schema["EditSpec"]["properties"])
    validated = server.post("/v1/steering/validate", steering("thinking", when=CONDITION | {"above": 0.5}))
    assert validated.status_code == 200
    assert validated.json()["conditions"][0]["above"] == 0.5


# What is refused


BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "an unknown word": (steering("reasoning"), 400, "edits[0].scope"),
    "a token beyond the vocabulary": (steering({"after": 512}), 400, "edits[0].scope.after"),
    "too many tokens": (steering({"until": "a long text"}), 400, "edits[0].scope.until"),
    "the same tokens": (steering({"after": "<think>", "until": THINK}), 400, "edits[0].scope.until"),
    "nothing is left": (steering({**WINDOWS["tool_calls"], "except": "tool_calls"}), 400, "edits[0].scope.except"),
    "an empty window": (steering({"from": "generation", "end": 0}), 400, "edits[0].scope.end"),
    "each without after": (steering({"each": True}), 400, "edits[0].scope.each"),
    "an unknown field": (steering({"except": {"from": 0}}), 400, "edits[0].scope.except.from"),
    "a schedule of one token": (
        {"edits": [EDIT | {"scope": "last_prompt_token", "schedule": LINEAR}]},
        400,
        "edits[0].schedule",
    ),
    "a schedule of one token of the answer": (
        {"edits": [EDIT | {"scope": {"from": "generation", "end": 1}, "schedule": LINEAR}]},
        400,
        "edits[0].schedule",
    ),
    "a schedule of windows of one token": (
        {"edits": [EDIT | {"scope": {"after": THINK, "tokens": 1}, "schedule": LINEAR}]},
        400,
        "edits[0].schedule",
    ),
    "no bound": (steering(when=CONDITION), 400, "when.above"),
    "an unknown vector": (steering(when=CONDITION | {"vector": "x", "above": 0}), 404, "when.vector"),
    "too late": (steering(when={"vector": "late", "above": 0}), 400, "when.blocks"),
    "two conditions": (
        {"edits": [EDIT | {"when": CONDITION | {"above": 0}}], "when": CONDITION | {"above": 0}},
        400,
        "when",
    ),
}


@pytest.mark.parametrize(("spec", "status", "param"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_bad_input_is_refused_before_an_answer_begins(
    server: Server, spec: dict[str, Any], status: int, param: str, stream: bool
) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        answer = server.post(path, body | {"stream": stream, "steering": spec})
        assert answer.status_code == status, answer.text
        assert answer.headers["content-type"].startswith("application/json")
        assert answer.json()["error"]["param"] == f"steering.{param}"
