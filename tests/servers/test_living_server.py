"""A server whose registry changes while it serves: keys, a default preset, vectors that come and go, metrics, drain."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import openai
import pytest
from helpers import browser
from helpers.browser import Page
from helpers.living import (
    ADMIN,
    HIDDEN_SIZE,
    INFERENCE,
    NUM_BLOCKS,
    OPERATOR,
    USER,
    Follower,
    along,
    complete,
    put,
    spec,
    tokens,
)
from helpers.otlp_receiver import OtlpReceiver
from helpers.server_process import Server, steer_engine_serve

from steer_engine.vectors import ControlVector
from steer_engine.vectors.safetensors_format import to_bytes


def test_the_default_preset_is_for_requests_that_say_nothing(living: Server) -> None:
    silent, explicit = complete(living), complete(living, steering=spec("house"))
    plain = complete(living, steering=False)
    assert silent.headers["X-Steering-Preset"] == "house"
    assert silent.headers["X-Steering"] == explicit.headers["X-Steering"]
    assert tokens(silent) == tokens(explicit) != tokens(plain)
    assert silent.json()["model"] == "tiny"
    assert "X-Steering" not in plain.headers
    beams = complete(living, use_beam_search=True, n=2)
    assert beams.status_code == 400
    assert complete(living, use_beam_search=True, n=2, steering=False).status_code == 200
    tokenized = living.post("/tokenize", {"model": "tiny", "prompt": "abc"}, headers=USER)
    assert tokenized.status_code == 200


def test_keys(living: Server) -> None:
    logged = len(living.log)  # an attacker has put keys into queries before, where the access log shows them
    assert living.get("/readyz").status_code == 200
    assert living.get("/v1/steering").status_code == 401
    assert living.get("/v1/steering", headers=USER).status_code == 200
    assert living.get("/v1/steering", headers=OPERATOR).status_code == 200
    url = f"{living.url}/v1/steering/vectors/guarded"
    for headers, status in (({}, 401), (USER, 401), (USER | {"X-Steering-Admin-Key": ADMIN}, 201), (OPERATOR, 200)):
        answer = httpx.put(url, content=to_bytes(along(1)), headers=headers, timeout=60)
        assert answer.status_code == status, answer.text
    assert httpx.delete(url, headers=USER, timeout=60).status_code == 401
    assert httpx.delete(url, headers=OPERATOR, timeout=60).status_code == 200
    assert ADMIN not in living.log[logged:]
    assert INFERENCE not in living.log[logged:]


def test_a_vector_that_is_put_steers_the_next_request(living: Server) -> None:
    assert complete(living, steering=spec("new")).status_code == 404
    assert put(living, "new", along(7)).status_code == 201
    first = complete(living, steering=spec("new"))
    assert first.json()["steering"]["edits"][0]["vector"] == along(7).digest
    assert put(living, "new", along(9), **{"If-Match": along(7).digest}).status_code == 200
    second = complete(living, steering=spec("new"))
    assert second.json()["steering"]["edits"][0]["vector"] == along(9).digest
    assert tokens(second) != tokens(first)
    misfit = put(living, "wide", ControlVector(directions={1: np.ones(8, np.float32)}))
    assert misfit.status_code == 422
    deep = put(living, "deep", ControlVector(directions={NUM_BLOCKS: np.ones(HIDDEN_SIZE, np.float32)}))
    assert deep.status_code == 422
    deleted = httpx.delete(f"{living.url}/v1/steering/vectors/new", headers=OPERATOR, timeout=60)
    assert deleted.json()["digest"] == along(9).digest
    assert complete(living, steering=spec("new")).status_code == 404


def test_changes_under_load_neither_fail_nor_missteer_a_request(living: Server) -> None:
    expected: dict[str, list[int]] = {}
    vectors: list[ControlVector] = []
    for axis in range(20, 50):
        put(living, "moving", along(axis), **({"If-Match": "*"} if axis > 20 else {}))
        found = tokens(complete(living, steering=spec("moving")))
        if found not in expected.values():
            expected[along(axis).digest] = found
            vectors.append(along(axis))
    assert len(vectors) >= 4
    stop = threading.Event()
    faults: list[Any] = []
    served: list[str] = []

    def ask() -> None:
        while not stop.is_set():
            answer = complete(living, steering=spec("moving"))
            if answer.status_code != 200:
                faults.append(answer.text)
                continue
            digest = answer.json()["steering"]["edits"][0]["vector"]
            served.append(digest)
            if tokens(answer) != expected[digest]:
                faults.append((digest, tokens(answer)))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for change in range(30):
        began = time.monotonic()
        vector = vectors[change % 4]
        moved = put(living, "moving", vector, **{"If-Match": "*"})
        added = put(living, f"extra{change}", along(50 + change % 14))
        gone = httpx.delete(f"{living.url}/v1/steering/vectors/extra{change}", headers=OPERATOR, timeout=60)
        assert [answer.status_code for answer in (moved, added, gone)] == [200, 201, 200]
        assert complete(living, steering=spec("moving")).json()["steering"]["edits"][0]["vector"] == vector.digest
        time.sleep(max(0.0, 0.1 - (time.monotonic() - began)))
    stop.set()
    for thread in threads:
        thread.join()
    assert faults == []
    assert len(set(served)) >= 2


def test_presets_over_http_are_models(living: Server) -> None:
    body = {"edits": [{"vector": "house", "scale": -1.0}]}
    url = f"{living.url}/v1/steering/presets/away"
    assert httpx.put(url, json=body, headers=OPERATOR, timeout=60).status_code == 201
    assert "tiny:away" in [card["id"] for card in living.get("/v1/models", headers=USER).json()["data"]]
    by_model = complete(living, model="tiny:away")
    assert by_model.headers["X-Steering-Preset"] == "away"
    assert tokens(by_model) == tokens(complete(living, steering=body))
    assert httpx.delete(url, headers=OPERATOR, timeout=60).status_code == 200
    assert complete(living, model="tiny:away").status_code == 404


def test_metrics(living: Server) -> None:
    def read() -> dict[str, float]:
        lines = [line for line in living.get("/metrics").text.splitlines() if line.startswith("steer_engine_")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    deadline = time.monotonic() + 60
    before = read()
    while not before["steer_engine_armed"] and time.monotonic() < deadline:  # an engine under load may answer late
        time.sleep(1)
        before = read()
    assert before["steer_engine_armed"] == 1
    complete(living, steering=spec("house"))
    complete(living, steering=spec("nobody"))
    complete(living, steering=False)
    put(living, "bad", ControlVector(directions={1: np.ones(8, np.float32)}))
    after = read()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown('steer_engine_requests_total{outcome="steered"}') == 1
    assert grown('steer_engine_requests_total{outcome="refused"}') == 1
    assert grown('steer_engine_vector_requests_total{vector="house"}') == 1
    assert grown('steer_engine_upload_rejections_total{status="422"}') == 1
    assert grown("steer_engine_admission_seconds_count") == 1
    assert after['steer_engine_bank_rows{state="free"}'] > 0
    stats = living.get("/v1/steering/stats", headers=USER).json()
    assert stats["api"]["steer_engine_requests_total{outcome=steered}"] >= 1
    assert stats["engine"]["ok"]


def test_openapi_documents_field_and_routes(living: Server) -> None:
    page = living.get("/openapi.json").json()
    schemas = page["components"]["schemas"]
    for name in ("ChatCompletionRequest", "CompletionRequest", "ResponsesRequest", "AnthropicMessagesRequest"):
        assert "steering" in schemas[name]["properties"]
    assert "edits" in schemas["SteeringSpec"]["properties"]
    assert {"put", "get", "delete"} <= set(page["paths"]["/v1/steering/vectors/{name}"])
    assert "/readyz" in page["paths"]


def test_a_mirror_s_vectors_come_change_and_go(living: Server, mirrored: Path) -> None:
    def digest() -> str | None:
        answer = complete(living, steering=spec("reflected"))
        return answer.json()["steering"]["edits"][0]["vector"] if answer.status_code == 200 else None

    def wait_for(expected: str | None) -> None:
        deadline = time.monotonic() + 60
        while (found := digest()) != expected:
            assert time.monotonic() < deadline, found
            time.sleep(0.1)

    assert digest() == along(15).digest
    assert put(living, "reflected", along(17), **{"If-Match": "*"}).status_code in (409, 412)
    (mirrored / "reflected.safetensors").write_bytes(to_bytes(along(16)))
    wait_for(along(16).digest)
    (mirrored / "reflected.safetensors").unlink()
    wait_for(None)
    assert "steer_engine_mirror_failing 0.0" in living.get("/metrics").text


def test_spans_of_steered_requests_say_by_what(living: Server, traces: OtlpReceiver) -> None:
    requested = {"steered": {"preset": "house"}, "named": spec("house"), "plain": False}
    answers = {
        request_id: living.post(
            "/v1/completions",
            {"model": "tiny", "prompt": "abc", "max_tokens": 2, "steering": steering, "n": 2, "temperature": 1},
            headers=USER | {"X-Request-Id": f"span-of-{request_id}"},
        )
        for request_id, steering in requested.items()
    }
    spans = {request_id: traces.wait_for(f"span-of-{request_id}") for request_id in requested}
    report = answers["steered"].json()["steering"]
    assert spans["steered"]["steer_engine.digest"] == report["digest"]
    assert spans["steered"]["steer_engine.preset"] == "house"
    assert spans["steered"]["steer_engine.names"] == ["house"]
    assert spans["steered"]["steer_engine.vectors"] == [along(5).digest]
    assert spans["steered"]["steer_engine.edits"] == [edit["digest"] for edit in report["edits"]]
    assert spans["named"]["steer_engine.digest"] == report["digest"]
    assert "steer_engine.preset" not in spans["named"]
    assert not [key for key in spans["plain"] if key.startswith("steer_engine")]
    assert spans["plain"]["gen_ai.usage.completion_tokens"] == 2


def test_the_span_of_a_probed_request_has_its_numbers(living: Server, traces: OtlpReceiver) -> None:
    probes = [
        {"name": "p", "vector": "house", "blocks": [1]},
        {"name": "q", "vector": "house", "blocks": [1], "measure": "dot", "return": "none"},
    ]
    stop = [{"probe": "q", "above": -1e9, "for": 3}]
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 5, "n": 2, "temperature": 1, "ignore_eos": True}
    body |= {"steering": {"probes": probes, "stop": stop}}
    for stream in (False, True):
        request_id = f"probed-{stream}"
        answer = living.post("/v1/completions", body | {"stream": stream}, headers=USER | {"X-Request-Id": request_id})
        assert answer.status_code == 200
        span = traces.wait_for(request_id)
        assert span["steer_engine.probes"] == ["p", "q"]
        assert span["steer_engine.probe_vectors"] == [along(5).digest] * 2
        assert span["steer_engine.stopped_by"] == "q"
        assert span["gen_ai.usage.completion_tokens"] == 3
        if stream:
            continue
        told = [choice["steering"]["probes"]["p"]["1"] for choice in answer.json()["choices"]]
        means = [sum(numbers) / len(numbers) for numbers in told]
        assert min(abs(span["steer_engine.probe.p.1.mean"] - mean) for mean in means) < 1e-6
        assert span["steer_engine.probe.p.1.max"] in [max(numbers) for numbers in told]
        assert span["steer_engine.probe.q.1.mean"] <= span["steer_engine.probe.q.1.max"]


def test_the_log_says_what_steered_a_request_and_what_was_changed(living: Server) -> None:
    """As JSON, by digest, with the ids that clients sent."""
    logged = len(living.log)
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 1, "steering": spec("house")}
    assert living.post("/v1/completions", body, headers=USER | {"X-Request-Id": "sent-by-a-test"}).status_code == 200
    put(living, "logged", along(12), **{"X-Request-Id": "put-by-a-test"})
    put(living, "logged", along(13), **{"If-Match": "*"})
    living.request("DELETE", "/v1/steering/vectors/logged", None)  # without a key: no change
    httpx.delete(f"{living.url}/v1/steering/vectors/logged", headers=OPERATOR, timeout=60)
    preset = f"{living.url}/v1/steering/presets/logged"
    digest = httpx.put(preset, json=spec("house"), headers=OPERATOR, timeout=60).json()["digest"]
    httpx.delete(preset, headers=OPERATOR, timeout=60)
    lines = living.log[logged:]
    (steered,) = [json.loads(line) for line in re.findall(r"\] steered (\{.*\})", lines)]
    assert "sent-by-a-test" in steered["request_id"]
    assert steered["vectors"] == [along(5).digest]
    assert [json.loads(line) for line in re.findall(r"\] changed (\{.*\})", lines)] == [
        {"change": "put", "vector": "logged", "digest": along(12).digest, "request_id": "put-by-a-test"},
        {"change": "replace", "vector": "logged", "digest": along(13).digest},
        {"change": "delete", "vector": "logged", "digest": along(13).digest},
        {"change": "put", "preset": "logged", "digest": digest},
        {"change": "delete", "preset": "logged", "digest": digest},
    ]


def test_every_route_by_curl_and_by_the_openai_client(living: Server, tmp_path: Path) -> None:
    (tmp_path / "curled.safetensors").write_bytes(to_bytes(along(14)))
    (tmp_path / "spec").write_text(json.dumps(spec("curled")))

    def curl(method: str, path: str, *more: str) -> tuple[int, bytes]:
        out = tmp_path / "answer"
        command = [
            "curl",
            "-sS",
            "-X",
            method,
            "-o",
            str(out),
            "-w",
            "%{http_code}",
            "-H",
            f"Authorization: Bearer {ADMIN}",
        ]
        done = subprocess.run(
            [*command, *more, living.url + path], capture_output=True, text=True, check=True, timeout=60
        )
        return int(done.stdout), out.read_bytes()

    own, as_json = "/v1/steering", ("-H", "Content-Type: application/json", "--data-binary", f"@{tmp_path / 'spec'}")
    assert curl("PUT", f"{own}/vectors/curled", "--data-binary", f"@{tmp_path / 'curled.safetensors'}")[0] == 201
    assert curl("PUT", f"{own}/presets/curled", *as_json)[0] == 201
    status, checked = curl("POST", f"{own}/validate", *as_json)
    assert (status, json.loads(checked)["edits"][0]["vector"]) == (200, along(14).digest)
    for path in (
        "",
        "/vectors",
        "/vectors/curled",
        f"/vectors/{along(14).digest}",
        "/presets",
        "/presets/curled",
        "/stats",
    ):
        assert curl("GET", own + path)[0] == 200, path
    assert curl("GET", f"{own}/vectors/curled?download") == (200, to_bytes(along(14)))
    assert [curl("GET", path)[0] for path in ("/readyz", "/playground", "/v1/models")] == [200, 200, 200]

    with openai.OpenAI(base_url=f"{living.url}/v1", api_key=ADMIN, max_retries=0) as client:
        assert "tiny:curled" in [model.id for model in client.models.list()]
        answers = [
            client.completions.create(model=model, prompt="abc", max_tokens=4, temperature=0, extra_body=extra)
            for model, extra in (
                ("tiny:curled", {}), ("tiny", {"steering": spec("curled")}), ("tiny", {"steering": False})
            )
        ]  # fmt: skip
        assert answers[0].steering["digest"] == answers[1].steering["digest"] == json.loads(checked)["digest"]
        assert not hasattr(answers[2], "steering")
        assert client.get("/steering/vectors/curled", cast_to=dict[str, Any])["digest"] == along(14).digest
        assert client.post("/steering/validate", body=spec("curled"), cast_to=dict[str, Any]) == json.loads(checked)
        client.delete("/steering/presets/curled", cast_to=dict[str, Any])
        with pytest.raises(openai.NotFoundError):
            client.delete("/steering/presets/curled", cast_to=dict[str, Any])
    assert curl("DELETE", f"{own}/vectors/curled")[0] == 200
    assert curl("DELETE", f"{own}/vectors/curled")[0] == 404


def test_the_example_for_curl(living: Server, tmp_path: Path) -> None:
    (tmp_path / "shown.safetensors").write_bytes(to_bytes(along(18)))
    script = Path(__file__).resolve().parents[2] / "examples" / "curl.sh"
    environment = os.environ | {"STEER_ENGINE_URL": living.url, "STEER_ENGINE_ADMIN_KEY": ADMIN}
    done = subprocess.run(
        ["bash", str(script), str(tmp_path / "shown.safetensors")],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if not line.startswith("==")]
    assert lines[0] == {"name": "shown", "digest": along(18).digest}
    checked, silent, by_field, by_preset = lines[2:6]
    assert by_field == by_preset
    assert by_field[1] == checked["digest"] != silent[1]
    assert lines[6:] == ["shown-soft", {"name": "shown", "in_flight": 0}]


@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium")
def test_the_playground_with_a_key(living: Server, tmp_path: Path) -> None:
    """Typed in, it opens the server, and it is nowhere but in its field."""
    shared = quote(json.dumps({"prompt": "abc", "tokens": 4, "steering": {"edits": [{"vector": "house", "scale": 2}]}}))
    with Page(f"{living.url}/playground#{shared}", tmp_path / "profile") as page:
        missing = page.wait_for("document.getElementById('error')?.textContent")
        assert missing == "This server needs an API key. Enter it at the top; nothing you typed is lost."
        assert page.focused() == "key"
        page.write("#prompt", "typed before the key")
        page.write("#key", "wrong")
        page.press("Enter")
        page.wait_for("document.getElementById('error').textContent.startsWith('The server refused this API key.')")
        page.write("#key", INFERENCE)
        page.press("Enter")
        page.wait_for("document.getElementById('about').textContent.startsWith('tiny')")
        assert page.the("#prompt", "value") == "typed before the key"
        assert page.the(".edit [data-field=vector]", "value") == "house"
        assert page.the(".edit [data-field=scale]", "value") == "2"
        assert page.the("#error", "hidden")
        page.click("#compare")
        page.wait_for("document.getElementById('status').textContent.startsWith('2 of 2')")
        assert page.each(".applied:not([hidden]) summary", "textContent")[0].startswith("Steered house: ")
        for name in ("curl", "python", "node", "link"):
            page.click(f"#copy-{name}")
            copied = page.wait_for("document.getElementById('code').textContent")
            assert INFERENCE not in copied
            assert name == "link" or "API_KEY" in copied
        kept = "JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])"
        assert INFERENCE not in page.evaluate(kept)
        assert "typed before the key" in page.evaluate(kept)
        assert page.the("#key", "value") == INFERENCE


def test_drain(living: Server) -> None:
    """Last: on SIGTERM running requests finish, new ones get 503, and the server ends."""
    brief = [Follower(living, 5, stream=number % 2 == 1) for number in range(6)]
    long = Follower(living, 400, stream=True)
    followers = [*brief, long]
    for follower in followers:
        assert follower.begun.wait(60)
    # At the start of an answer: near its end, the next could begin before the signal is there.
    long.begun.clear()
    assert long.begun.wait(60)
    living.process.terminate()
    for follower in brief:
        follower.join()
    refused, ready = complete(living), living.get("/readyz")
    assert (refused.status_code, ready.status_code) == (503, 503)
    before_the_gate_closed = len(long.answered)
    assert int(ready.headers["Retry-After"]) >= 1
    long.join()
    # Every answer that began is complete, and none began after the gate closed.
    assert len(long.answered) == long.num_begun <= before_the_gate_closed + 1
    for follower in followers:
        follower.assert_sent_away()
    assert living.process.wait(30) == 0


@pytest.mark.slow
def test_ctrl_c_reaches_the_engine_too_and_cuts_nothing_without_a_word(tiny_llama: str, tmp_path: Path) -> None:
    """The engine refuses what it has not begun, as soon as it hears of it; the server says so."""
    (tmp_path / "house.safetensors").write_bytes(to_bytes(along(5)))
    command = steer_engine_serve(tiny_llama, "--served-model-name", "tiny", "--steering-vectors", str(tmp_path))
    server = Server(command, tmp_path / "server.log")
    try:
        followers = [Follower(server, 5, stream=number % 2 == 1) for number in range(6)]
        followers += [Follower(server, 400, stream=stream) for stream in (True, False)]
        for follower in followers[:-1]:
            assert follower.begun.wait(60)
        os.killpg(server.process.pid, signal.SIGINT)
        for follower in followers:
            follower.join()
            assert {len(answer) for answer in follower.answered} <= {follower.length}
            assert isinstance(follower.refused, httpx.Response), follower.refused
            assert "shutting down" in follower.refused.text
            assert follower.refused.status_code == 503 or "event-stream" in follower.refused.headers["content-type"]
        server.process.wait(60)
    finally:
        server.kill()
