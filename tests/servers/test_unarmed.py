"""Plain vLLM with our package installed: everything as always, and 400 to a request for steering."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers.asking import STRONG
from helpers.server_process import Server, plain_vllm_serve


@pytest.fixture(scope="module")
def unarmed(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("unarmed") / "server.log"
    running = Server(plain_vllm_serve(tiny_llama, "--served-model-name", "tiny"), log, ready_path="/health")
    yield running
    running.kill()


BODIES = {
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/completions": {"model": "tiny", "prompt": "hi", "max_tokens": 2},
    "/v1/responses": {"model": "tiny", "input": "hi", "max_output_tokens": 2},
    "/v1/messages": {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_steering_is_refused_and_plain_requests_are_served(unarmed: Server, path: str, stream: bool) -> None:
    body = BODIES[path] | {"stream": stream}
    assert unarmed.post(path, body).status_code == 200
    for asked in ({"steering": STRONG}, {"vllm_xargs": {"steering": '{"edits": [{"vector": "east"}]}'}}):
        refused = unarmed.post(path, body | asked)
        assert refused.status_code == 400
        assert "not armed" in refused.json()["error"]["message"]
        assert path == "/v1/messages" or refused.json()["error"]["param"] == "steering"
    assert unarmed.post(path, body).status_code == 200


def test_the_model_s_blocks_are_untouched(unarmed: Server) -> None:
    assert "Steering is armed" not in unarmed.log
    assert unarmed.get("/v1/steering").status_code == 404
