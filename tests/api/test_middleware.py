"""Headers say what was applied, and steering is lost on no path."""

from __future__ import annotations

import asyncio
import json
import time
import tracemalloc
from itertools import chain, repeat
from typing import Any

import httpx
import pytest
from starlette.middleware.cors import CORSMiddleware

from steer_engine.api import answers
from steer_engine.api.gates import DrainGate
from steer_engine.api.middleware import CARRYING_PATHS, MESSAGES, Receive, Scope, Send, SteeringMiddleware
from steer_engine.errors import CapacityError, SteerError, SteeringRequestError
from steer_engine.settings import ApiLimits

SPEC = {"edits": [{"vector": "cheerful"}]}
CARRYING = "/v1/chat/completions"
OTHER = "/v1/embeddings"


class App:
    """Reads and keeps the body like a real handler, and answers. `report`: what the check of the steering found."""

    def __init__(self, *, report: dict[str, Any] | None = None, status: int = 200) -> None:
        self.report, self.status = report, status
        self.retry_after: float | None = None
        self.refusal: SteerError | None = None
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        self.bodies.append(body)
        note = answers.begin_note()
        note.report, note.retry_after, note.refusal = self.report, self.retry_after, self.refusal
        headers = [(b"a", b"b"), (b"Content-Length", b"12")]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"first ", "more_body": True})
        await send({"type": "http.response.body", "body": b"second"})


async def post(app: App, path: str, content: bytes, root_path: str = "") -> httpx.Response:
    transport = httpx.ASGITransport(app=SteeringMiddleware(app), root_path=root_path)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        return await client.post(path, content=content)


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


async def test_a_steered_answer_has_the_headers() -> None:
    app = App(report={"digest": "sha256:ab", "preset": "calm", "edits": []})
    answer = await post(app, CARRYING, body(steering=SPEC))
    assert answer.status_code == 200
    assert answer.headers["X-Steering"] == "sha256:ab"
    assert answer.headers["X-Steering-Preset"] == "calm"
    assert answer.headers["a"] == "b"
    assert answer.text == "first second"
    assert app.bodies == [body(steering=SPEC)]


async def test_an_unsteered_answer_has_none() -> None:
    answer = await post(App(), CARRYING, body(prompt="x"))
    assert not [name for name in answer.headers if name.startswith("x-steering")]


async def test_an_error_does_not_claim_that_steering_was_applied() -> None:
    answer = await post(App(report={"digest": "sha256:ab", "edits": []}, status=404), CARRYING, body(steering=SPEC))
    assert answer.status_code == 404
    assert "x-steering" not in answer.headers


async def test_a_refused_message_names_the_field() -> None:
    """vLLM's handler has dropped it. Headers stay, and answers of other paths are the handler's."""
    for path, root_path in ((MESSAGES, ""), (MESSAGES, "/root"), (CARRYING, "")):
        app = App(status=503)
        app.refusal, app.retry_after = CapacityError("Full.", 7.0), 7.0
        answer = await post(app, root_path + path, body(steering=SPEC), root_path)
        assert (answer.status_code, answer.headers["a"], answer.headers["Retry-After"]) == (503, "b", "7")
        if path == CARRYING:
            assert answer.text == "first second"
            continue
        app.refusal, app.status = SteeringRequestError("Wrong.", "steering.edits[0].scale"), 400
        answer = await post(app, root_path + path, body(steering=SPEC), root_path)
        error = {"message": "Wrong.", "type": "BadRequestError", "param": "steering.edits[0].scale", "code": 400}
        assert (answer.status_code, answer.json()) == (400, {"type": "error", "error": error})
        assert answer.headers.get_list("content-length") == [str(len(answer.content))]


async def test_a_script_of_another_origin_can_read_the_headers() -> None:
    """With vLLM's CORS middleware outside, as in a server: it lets the origin read the answer, we name the headers."""
    app = App(report={"digest": "sha256:ab", "preset": "calm", "edits": []})
    for allowed in (["*"], ["https://lab.example"]):
        outside = CORSMiddleware(SteeringMiddleware(app), allow_origins=allowed)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=outside), base_url="http://server") as client:
            own = await client.post(CARRYING, content=body(steering=SPEC))
            other = await client.post(CARRYING, content=body(steering=SPEC), headers={"Origin": "https://lab.example"})
        assert "access-control-expose-headers" not in own.headers
        assert other.headers["access-control-allow-origin"] == allowed[0]
        assert other.headers["access-control-expose-headers"] == "x-steering, x-steering-preset"
        assert other.headers["x-steering"] == "sha256:ab"


async def test_retry_after_belongs_to_503() -> None:
    for status, expected in ((503, "3"), (400, None)):
        app = App(status=status)
        app.retry_after = 2.6
        answer = await post(app, CARRYING, body(steering=SPEC))
        assert answer.headers.get("retry-after") == expected


@pytest.mark.parametrize(
    "content",
    [
        body(steering=SPEC),
        body(steering="x"),
        b'{"\\u0073teering": {"edits": []}}',
        body(vllm_xargs={"steering": "{}"}),
        body(sampling_params={"extra_args": {"steering": "{}"}}),
        body(sampling_params={"extra_args": {"_steer_program": "{}"}}),
        b'[{"steering": {}}, {"steering": {"edits": []}}]',
        b'--x\r\ncontent-disposition: form-data; name="steering"\r\n\r\n{}\r\n--x--',
        b"model=m&steering=%7B%7D",
        json.dumps({"steering": SPEC}).encode("utf-16"),
        json.dumps({"steering": SPEC}).encode("utf-16-be"),
        json.dumps({"steering": SPEC}).encode("utf-32-le"),
        json.dumps({"steering": SPEC}).encode("utf-8-sig"),
    ],
)
async def test_a_path_that_cannot_carry_steering_refuses_it_before_its_handler(content: bytes) -> None:
    app = App()
    answer = await post(app, OTHER, content)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "steering"
    assert answer.json()["error"]["code"] == 400
    assert OTHER in answer.json()["error"]["message"]
    assert app.bodies == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json: steering",
        body(steering=None),
        body(input="steering"),
        b"\xff\\u steering",
        b"[" * 9999,
        '{"input": "steering"}'.encode("utf-16"),
        b"\xff\xfe{\0s\0\x01",
    ],
)
async def test_other_bodies_pass_untouched(content: bytes) -> None:
    app = App()
    answer = await post(app, OTHER, content)
    assert answer.status_code == 200
    assert app.bodies == [content]


@pytest.mark.parametrize(
    "content",
    [
        b'{"steering": {"edits": []}, "steering": null}',
        b'{"steering": null, "\\u0073teering": {"edits": []}}',
        body(Steering=SPEC),
        body(**{"STEERING ": SPEC}),
        b'{"vllm_xargs": {"steering": "{}", "steering": null}}',
        b'[{"prompt": "x"}, {"Steering": {}}]',
        json.dumps({"Steering": SPEC}).encode("utf-16"),
        '{"ſteering": {"edits": []}}'.encode(),
    ],
)
async def test_a_field_that_would_be_lost_without_a_word_is_refused(content: bytes) -> None:
    app = App()
    answer = await post(app, CARRYING, content)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "steering"
    assert app.bodies == []


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (b'{"vllm_xargs": {"steering": "{}"}, "vllm_xargs": {}}', "vllm_xargs"),
        (b'{"model": "base:calm", "prompt": "x", "model": "base"}', "model"),
    ],
)
async def test_a_repeated_field_whose_first_copy_steers_is_refused(content: bytes, param: str) -> None:
    app = App()
    answer = await post(app, CARRYING, content)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert app.bodies == []


@pytest.mark.parametrize("zero", [b"0", b"0.0", b"-0.0", b'""', b"[]"])
async def test_what_equals_false_in_python_specifies_steering(zero: bytes) -> None:
    """Only null and false mean none. Here the path cannot carry steering; elsewhere the schema refuses the value."""
    app = App()
    assert (await post(app, OTHER, b'{"steering": ' + zero + b"}")).status_code == 400
    assert app.bodies == []


async def test_a_large_body_costs_little_more_than_parsing_it() -> None:
    """Eight megabytes of small objects: the keys of each would be 11 seconds of Python."""
    content = b'{"x":"steer","y":[' + b"{}," * (8 * 2**20 // 3) + b"{}]}"
    began = time.process_time()
    app = App()
    assert (await post(app, CARRYING, content)).status_code == 200
    spent = time.process_time() - began
    began = time.process_time()
    json.loads(content)
    assert spent < 6 * (time.process_time() - began) + 0.5


async def test_the_word_in_a_client_s_own_objects_is_its_own() -> None:
    content = b'{"tools": [{"properties": {"Steering": {"steering": 1, "steering": 2}}}]}'
    app = App()
    assert (await post(app, CARRYING, content)).status_code == 200
    assert app.bodies == [content]


@pytest.mark.parametrize("path", sorted(CARRYING_PATHS))
async def test_an_unsteered_answer_to_a_steered_request_is_replaced(path: str) -> None:
    answer = await post(App(), path, body(steering=SPEC))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "steering"
    assert (await post(App(), path, body(prompt="x"))).text == "first second"
    assert (await post(App(status=422), path, body(steering=SPEC))).status_code == 422


async def test_a_trailing_slash_or_a_root_path_is_the_same_path() -> None:
    app = App(report={"digest": "sha256:ab", "edits": []})
    assert (await post(app, CARRYING + "/", body(steering=SPEC))).status_code == 200
    assert (await post(app, "/root" + CARRYING, body(steering=SPEC), root_path="/root")).status_code == 200
    assert (await post(App(), "/root" + OTHER, body(steering=SPEC), root_path="/root")).status_code == 400


async def test_our_own_routes_take_specs() -> None:
    assert (await post(App(), "/v1/steering/validate", body(steering=SPEC))).status_code == 200


async def test_a_body_in_pieces_is_read_whole_and_listening_goes_on() -> None:
    pieces = [b'{"steer', b'ing": ', b'{"edits": []}}']
    messages = [{"type": "http.request", "body": piece, "more_body": piece is not pieces[-1]} for piece in pieces]
    incoming = chain(messages, repeat({"type": "http.disconnect"}))
    seen, sent = [], []

    async def receive() -> Any:
        return next(incoming)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend([await receive() for _ in range(3)])

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": CARRYING, "headers": []}
    await SteeringMiddleware(app)(scope, receive, send)
    whole = {"type": "http.request", "body": b"".join(pieces), "more_body": False}
    assert seen == [whole, {"type": "http.disconnect"}, {"type": "http.disconnect"}]
    incoming = iter(messages)
    await SteeringMiddleware(app)(scope | {"path": OTHER}, receive, send)
    assert sent[0]["status"] == 400


async def test_a_client_that_goes_while_it_sends_is_told_to_the_handler() -> None:
    incoming = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])
    seen = []

    async def receive() -> Any:
        return next(incoming)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend([await receive(), await receive()])

    async def send(message: Any) -> None:
        raise AssertionError("there is nobody")

    await SteeringMiddleware(app)({"type": "http", "method": "POST", "path": OTHER, "headers": []}, receive, send)
    assert seen == [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]


async def test_concurrent_requests_do_not_see_each_other() -> None:
    assert answers.current_note.get() is None
    await post(App(report={"digest": "sha256:ab", "edits": []}), CARRYING, body(steering=SPEC))
    assert answers.current_note.get() is None
    answer = await post(App(), CARRYING, body(prompt="x"))
    assert "x-steering" not in answer.headers


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_that_is_too_large_is_refused_by_its_length_or_by_counting(declared: bool) -> None:
    reads = []
    pieces = iter([b"x" * 40] * 10)

    async def receive() -> Any:
        reads.append(True)
        return {"type": "http.request", "body": next(pieces), "more_body": True}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("not called")

    headers = [(b"content-length", b"400")] if declared else []
    scope = {"type": "http", "method": "POST", "path": CARRYING, "headers": headers}
    await SteeringMiddleware(app, ApiLimits(max_body_bytes=100))(scope, receive, send)
    assert sent[0]["status"] == 413
    assert json.loads(sent[1]["body"])["error"]["code"] == 413
    assert len(reads) == (0 if declared else 3)


async def test_the_largest_body_is_let_through() -> None:
    app = App()
    middleware = SteeringMiddleware(app, ApiLimits(max_body_bytes=100))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=middleware), base_url="http://server") as client:
        assert (await client.post(CARRYING, content=b"x" * 100)).status_code == 200
        assert (await client.post(CARRYING, content=b"x" * 101)).status_code == 413
    assert app.bodies == [b"x" * 100]


async def test_a_path_that_cannot_carry_steering_takes_smaller_bodies() -> None:
    app = App()
    middleware = SteeringMiddleware(app, ApiLimits(max_body_bytes=1000, max_other_body_bytes=100))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=middleware), base_url="http://server") as client:
        for path in ("/tokenize", "/nope", "/v1/load_lora_adapter"):
            assert (await client.post(path, content=b"x" * 100)).status_code == 200
            answer = await client.post(path, content=b"x" * 101)
            assert answer.status_code == 413
            assert "100 bytes (max_other_body_bytes)" in answer.json()["error"]["message"]
        for path in (CARRYING, "/v1/audio/transcriptions"):
            assert (await client.post(path, content=b"x" * 1000)).status_code == 200
            answer = await client.post(path, content=b"x" * 1001)
            assert answer.status_code == 413
            assert "1000 bytes (max_body_bytes)" in answer.json()["error"]["message"]
    assert max(map(len, app.bodies)) == 1000


async def test_the_smaller_of_both_limits_holds() -> None:
    app = App()
    middleware = SteeringMiddleware(app, ApiLimits(max_body_bytes=50))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=middleware), base_url="http://server") as client:
        assert (await client.post("/tokenize", content=b"x" * 50)).status_code == 200
        assert (await client.post("/tokenize", content=b"x" * 51)).status_code == 413


async def test_a_long_chat_fits_where_it_is_counted_in_tokens() -> None:
    """A million tokens, the longest contexts that vLLM serves, are about four megabytes of English."""
    chat = body(messages=[{"role": "user", "content": "word" * 10_000}] * 100)
    assert len(chat) > 4_000_000
    assert (await post(App(), "/tokenize", chat)).status_code == 200


class Client:
    """Sends a body in pieces of `size` bytes and may stop before its end; keeps what it is answered."""

    def __init__(self, middleware: SteeringMiddleware, path: str = CARRYING) -> None:
        self.pieces: asyncio.Queue[Any] = asyncio.Queue()
        self.sent: list[Any] = []
        scope = {"type": "http", "method": "POST", "path": path, "headers": []}
        self.task = asyncio.ensure_future(middleware(scope, self.pieces.get, self._keep))

    async def _keep(self, message: Any) -> None:
        self.sent.append(message)

    async def send(self, size: int, *, ends: bool = False) -> None:
        self.pieces.put_nowait({"type": "http.request", "body": bytes(size), "more_body": not ends})
        for _ in range(5):
            await asyncio.sleep(0)

    async def leave(self) -> None:
        self.pieces.put_nowait({"type": "http.disconnect"})
        await self.task

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None


async def test_unfinished_bodies_share_a_budget() -> None:
    piece = 600 * 1024
    middleware = SteeringMiddleware(App(), ApiLimits(max_bodies_bytes=4 * 2**20))
    clients = [Client(middleware) for _ in range(10)]
    for client in clients:
        await client.send(piece)
    assert [client.status for client in clients] == [None] * 6 + [503] * 4
    start, content = clients[-1].sent
    error = json.loads(content["body"])["error"]
    assert (error["code"], error["type"]) == (503, "ServiceUnavailableError")
    assert "4194304 bytes (max_bodies_bytes)" in error["message"]
    assert int(dict(start["headers"])[b"retry-after"]) >= 1
    small = Client(middleware)
    await small.send(200 * 1024, ends=True)
    await small.task
    assert small.status == 200, "large bodies cannot keep small ones out"
    for client in clients[:6]:
        await client.leave()
    again = [Client(middleware) for _ in range(6)]
    for client in again:
        await client.send(piece, ends=True)
        await client.task
    assert [client.status for client in again] == [200] * 6, "what is over is no longer counted"


async def test_a_body_is_counted_until_its_answer_ends_and_kept_once() -> None:
    size, piece, held = 8 * 2**20, 2**16, []
    go_on = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if len((await receive())["body"]) != size:
            return
        await asyncio.sleep(0)
        held.append(tracemalloc.get_traced_memory()[0])
        await go_on.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    middleware = SteeringMiddleware(app, ApiLimits(max_bodies_bytes=size))
    tracemalloc.start()
    try:
        first = Client(middleware)
        for number in range(size // piece):
            await first.send(piece, ends=number == size // piece - 1)
        async with asyncio.timeout(60):
            while not held:
                await asyncio.sleep(0.01)
    finally:
        tracemalloc.stop()
    assert held[0] < 1.5 * size
    second = Client(middleware)
    await second.send(2**19)
    assert second.status == 503
    go_on.set()
    await first.task
    assert first.status == 200
    third = Client(middleware)
    await third.send(2**19)
    assert third.status is None
    await third.leave()


@pytest.mark.parametrize(
    ("content", "model"),
    [(body(model="a:b"), "a:b"), (body(model=3), None), (b"[]", None), (b"{", None), (b"[" * 99_999, None)],
)
async def test_the_model_of_an_invocation_is_kept_for_the_check(content: bytes, model: str | None) -> None:
    notes = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        notes.append(answers.current_note.get())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=SteeringMiddleware(app)), base_url="http://server"
    ) as client:
        await client.post("/invocations", content=content)
        await client.post(CARRYING, content=content)
    assert [note.body_model for note in notes] == [model, None]


async def ask_at(gate: DrainGate, app: Any, method: str = "POST") -> httpx.Response:
    transport = httpx.ASGITransport(app=SteeringMiddleware(app, drain=gate))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        return await client.request(method, CARRYING, content=body(prompt="x"))


def assert_refused(answer: httpx.Response) -> None:
    assert answer.status_code == 503
    assert answer.json()["error"]["message"].startswith("This server is shutting down")
    assert int(answer.headers["Retry-After"]) >= 1
    assert answer.headers["Connection"] == "close"


async def test_a_request_counts_as_running_until_its_answer_is_sent() -> None:
    gate, running = DrainGate(), []

    class Watching(App):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            running.append(gate.running)
            await super().__call__(scope, receive, send)
            running.append(gate.running)

    assert (await ask_at(gate, Watching())).status_code == 200
    assert (running, gate.running) == ([1, 1], 0)
    running.clear()
    await ask_at(gate, Watching(), "GET")
    assert running == [0, 0]


async def test_a_closed_gate_refuses_before_the_handler_runs() -> None:
    gate, app = DrainGate(), App()
    gate.close()
    assert_refused(await ask_at(gate, app))
    assert app.bodies == []
    read = await ask_at(gate, app, "GET")
    assert (read.status_code, read.headers["Connection"]) == (200, "close")


async def test_an_error_after_the_gate_closed_is_a_503_and_other_answers_stay() -> None:
    class Closing(App):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            gate.close()
            await super().__call__(scope, receive, send)

    async def breaking(scope: Scope, receive: Receive, send: Send) -> None:
        gate.close()
        raise RuntimeError("the engine is gone")

    for app in (Closing(status=500), breaking):
        gate = DrainGate()
        assert_refused(await ask_at(gate, app))
        assert gate.running == 0
    for status in (200, 400):
        gate = DrainGate()
        assert (await ask_at(gate, Closing(status=status))).status_code == status


async def test_an_error_while_the_gate_is_open_is_not_hidden() -> None:
    async def breaking(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("a bug")

    gate = DrainGate()
    with pytest.raises(RuntimeError, match="a bug"):
        await ask_at(gate, breaking)
    assert gate.running == 0
    assert (await ask_at(gate, App(status=500))).status_code == 500
