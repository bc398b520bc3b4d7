"""The clients that people have: curl, and the official OpenAI client, plain, streaming and asynchronous."""

from __future__ import annotations

import json
import subprocess

import openai
import pytest
from helpers.asking import CHAT, COMPLETIONS, MESSAGES, MODEL, PROMPT, STRONG
from helpers.server_process import Server

EXTRA = {"steering": STRONG}


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_curl(server: Server) -> None:
    def curl(body: dict[str, object]) -> tuple[str, dict[str, object]]:
        command = ["curl", "-sS", "-i", "-H", "Content-Type: application/json", "-d", json.dumps(body)]
        done = subprocess.run(
            [*command, f"{server.url}/v1/chat/completions"], capture_output=True, text=True, check=True, timeout=60
        )
        head, _, rest = done.stdout.replace("\r\n", "\n").partition("\n\n")
        return head.lower(), json.loads(rest)

    plain_head, plain = curl(CHAT.body)
    head, steered = curl(CHAT.body | EXTRA)
    assert "x-steering: sha256:" in head
    assert "x-steering" not in plain_head
    assert CHAT.text(steered) != CHAT.text(plain)


def test_openai_client(server: Server, client: openai.OpenAI) -> None:
    request = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 6}
    plain = client.chat.completions.create(**request)
    raw = client.chat.completions.with_raw_response.create(**request, extra_body=EXTRA)
    steered = raw.parse()
    assert steered.choices[0].message.content != plain.choices[0].message.content
    assert raw.headers["X-Steering"] == steered.steering["digest"]
    assert not hasattr(plain, "steering")


def test_openai_client_streaming(client: openai.OpenAI) -> None:
    request = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 6}
    whole = client.chat.completions.create(**request, extra_body=EXTRA)
    chunks = list(client.chat.completions.create(**request, stream=True, extra_body=EXTRA))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert [chunk.steering for chunk in chunks if hasattr(chunk, "steering")] == [whole.steering]


async def test_openai_async_client(server: Server) -> None:
    request = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 6}
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        plain = await client.completions.create(**request)
        steered = await client.completions.create(**request, extra_body=EXTRA)
        stream = await client.completions.create(**request, stream=True, extra_body=EXTRA)
        text = "".join([chunk.choices[0].text async for chunk in stream])
    assert steered.choices[0].text == text != plain.choices[0].text
    assert steered.steering["edits"][0]["name"] == "east"


def test_openai_responses(client: openai.OpenAI) -> None:
    request = {"model": MODEL, "input": PROMPT, "temperature": 0, "max_output_tokens": 6}
    plain = client.responses.create(**request)
    steered = client.responses.create(**request, extra_body=EXTRA)
    assert steered.output_text != plain.output_text
    assert steered.steering["digest"].startswith("sha256:")
    events = list(client.responses.create(**request, stream=True, extra_body=EXTRA))
    assert events[-1].response.output_text == steered.output_text
    assert events[-1].response.steering == steered.steering


def test_the_client_sees_our_errors_as_its_own(client: openai.OpenAI) -> None:
    request = {"model": MODEL, "messages": MESSAGES}
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(**request, extra_body={"steering": {"edits": [{"vector": "nobody"}]}})
    assert unknown.value.param == "steering.edits[0].vector"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(**request, stream=True, extra_body={"steering": {"edits": []}})
    assert bad.value.param == "steering.edits"


def test_completions_by_curl_like_body(server: Server) -> None:
    assert COMPLETIONS.ask(server, steering=STRONG).status_code == 200
