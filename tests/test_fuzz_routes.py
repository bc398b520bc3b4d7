"""The fuzz of routes without a server: its requests, what it takes for steering, its verdicts, and how it is sent."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import fuzz_routes
import httpx
import pytest
from fuzzing import corpus, mutate, sequence, sockets, verdicts
from fuzzing.sending import One, Result, Sender, send_all
from fuzzing.target import CHECKS, check_references, differences, own_tracebacks, said
from helpers.living import along, features, low_rank
from helpers.random_specs import MODEL
from typer.testing import CliRunner

from steer_engine.api.body_search import search_body
from steer_engine.api.foreign_forms import is_easysteer
from steer_engine.api.frontend import Frontend
from steer_engine.api.middleware import CARRYING_PATHS
from steer_engine.api.request_field import steering_of
from steer_engine.errors import SteeringRequestError, VectorFileError
from steer_engine.settings import SteeringConfig
from steer_engine.site import SITES_IN_BLOCKS
from steer_engine.spec import Op, SteeringSpec
from steer_engine.vectors import files
from steer_engine.vocabulary import Vocabulary

MANY = 3000
STEERING = {"edits": [{"vector": "house"}]}
COMPLETIONS = corpus.GENERATING["/v1/completions"]


@pytest.fixture(scope="module")
def requests() -> list[corpus.Sent]:
    return [sequence.request(0, number) for number in range(MANY)]


def post(path: str = "/v1/completions", **fields: Any) -> corpus.Sent:
    return corpus.Sent("g", "POST", path, json.dumps({"model": "tiny", **fields}).encode())


def test_the_corpus_is_valid_and_has_every_carrying_path() -> None:
    assert set(corpus.GENERATING) == CARRYING_PATHS
    for spec in corpus.specs():
        assert is_easysteer(spec) or SteeringSpec.model_validate(spec)
    model = replace(MODEL, hidden_size=corpus.HIDDEN_SIZE, num_blocks=3, armed_blocks=(0, 1, 2), ops=tuple(Op))
    model = replace(model, sites=SITES_IN_BLOCKS, capture_blocks=(0, 1, 2))
    frontend = Frontend(SteeringConfig(), model)
    frontend.vocabulary = Vocabulary(lambda text: list(text.encode()), 512, lambda name: "there are no tags.")
    for name, file in (("house", along(5)), ("sae", features()), ("reft", low_rank())):
        frontend.registry.add(name, file)
    asked = [{"steering": spec} for spec in corpus.specs() if "preset" not in spec and "thinking" not in str(spec)]
    for body in (*asked, *corpus.foreign()):
        assert frontend.resolve(steering_of(body), can_capture=True) is not None
    ops = {edit.get("op", "add") for spec in corpus.specs() for edit in spec.get("edits", ())}
    assert ops == {op.value for op in Op}
    for file in corpus.vector_files():
        assert files.from_bytes(file).hidden_size == corpus.HIDDEN_SIZE


def test_a_seed_gives_the_same_requests_in_any_order(requests: list[corpus.Sent]) -> None:
    for number in reversed(range(0, MANY, 7)):
        assert sequence.request(0, number) == requests[number]
        assert sockets.raw_request(0, number) == sockets.raw_request(0, number)
    assert sum(sequence.request(1, number) == requests[number] for number in range(300)) < 30
    assert sockets.raw_request(1, 0) != sockets.raw_request(0, 0)


def test_every_kind_of_request_and_mutation_occurs(requests: list[corpus.Sent]) -> None:
    kinds = Counter(kind for each in requests for kind in each.mutations)
    assert set(kinds) >= {*mutate.TREE, *mutate.ENCODED, *mutate.HEADERS, *mutate.FILE}
    assert min(kinds.values()) >= 20
    groups = Counter(each.group for each in requests)
    assert {name: pytest.approx(100 * groups[name] / MANY, abs=4) for name in groups} == sequence.GROUPS
    assert {each.path for each in requests} >= {*CARRYING_PATHS, *corpus.OTHER_POSTS, corpus.VALIDATE}
    assert {each.method for each in requests} >= {"POST", "PUT", "GET", "DELETE", "PATCH"}
    assert {sockets.raw_request(0, number).kind for number in range(len(sockets.KINDS))} == set(sockets.KINDS)


def test_no_request_deletes_or_replaces_what_the_reference_answers_need(requests: list[corpus.Sent]) -> None:
    changing = [each.path for each in requests if each.method in ("PUT", "DELETE")]
    assert len(changing) > 300
    assert not [path for path in changing if path.rpartition("/")[2] == corpus.HOUSE]


def test_mutations_leave_the_corpus_as_it_is() -> None:
    before = json.dumps([corpus.GENERATING, corpus.specs(), mutate.HOSTILE], default=str)
    for number in range(500):
        sequence.request(5, number)
    assert json.dumps([corpus.GENERATING, corpus.specs(), mutate.HOSTILE], default=str) == before


@pytest.mark.parametrize("kind", mutate.TREE)
def test_each_mutation_of_a_tree_changes_the_text(kind: str) -> None:
    changed = 0
    for number in range(50):
        body = mutate.copy({**COMPLETIONS, "steering": STEERING})
        before = mutate.dump(body)
        changed += mutate.dump(mutate.TREE[kind](Random(number), body)) != before
    assert changed >= 45


@pytest.mark.parametrize("kind", mutate.FILE)
def test_each_mutation_of_a_file_is_mostly_no_vector_any_more(kind: str) -> None:
    file, _, gguf, *_ = corpus.vector_files()
    changed = [mutate.FILE[kind](Random(number), each) for number in range(20) for each in (file, gguf)]
    assert sum(each in (file, gguf) for each in changed) < 8
    refused = 0
    for each in changed:
        try:
            files.from_bytes(each)
        except VectorFileError:
            refused += 1
    assert refused >= (0 if kind in ("flip bits", "zeros", "grow", "damaged header", "put in a piece") else 15)


@pytest.mark.parametrize(
    "body",
    [
        {"steering": STEERING},
        {"steering": 0},
        {"vllm_xargs": {"steering": json.dumps(STEERING)}},
        {"metadata": {"steering": STEERING}},
        {"extra_body": json.dumps({"steering": STEERING})},
        {"messages": [{"role": "user", "content": "x", "steering": STEERING}]},
        {"messages": [[{"role": "user", "content": "x", "steering": STEERING}]]},
        {"model": "tiny:house"},
    ],
    ids=str,
)
def test_what_clearly_asks(body: dict[str, Any]) -> None:
    text = json.dumps(body)
    forms = [text.encode(), text.encode("utf-16"), gzip.compress(text.encode()), text.replace("i", r"\u0069").encode()]
    assert [verdicts.asks(form) for form in forms] == [True] * len(forms)
    assert not any(verdicts.asks_nothing(form) for form in forms)
    assert not verdicts.asks(text.encode()[:-1])


@pytest.mark.parametrize(
    "text",
    ['{"steering": null}', '{"steering": false}', '{"steering": " null "}', '{"prompt": "steering"}', "[]", "1", "",
     '{"tools": [{"steering": {"type": "object"}}]}', '{"steer": 1}', "[" * 100_000],
)  # fmt: skip
def test_what_does_not_clearly_ask(text: str) -> None:
    assert not verdicts.asks(text.encode())


def test_of_two_equal_keys_each_may_ask() -> None:
    assert verdicts.asks(b'{"steering": {"edits": []}, "steering": null}')
    assert verdicts.asks(b'{"steering": null, "steering": {"edits": []}}')
    assert not verdicts.asks(b'{"steering": null, "steering": false}')


def test_the_middleware_finds_steering_wherever_the_fuzz_sees_it(requests: list[corpus.Sent]) -> None:
    """Two programs, written apart, on the same bodies."""
    seen = 0
    for each in requests:
        if each.path not in CARRYING_PATHS or not verdicts.asks(each.content) or each.content[:2] == b"\x1f\x8b":
            continue
        if verdicts.asks_by_model(each.content):
            continue  # the check of the model finds this one, not the search of the body
        with contextlib.suppress(SteeringRequestError):
            assert search_body(each.content) is not None, each
        seen += 1
    assert seen > 600


STEERED = {"x-steering": "sha256:0", "content-type": "application/json"}
STREAM = STEERED | {"content-type": "text/event-stream"}


@pytest.mark.parametrize(
    ("sent", "status", "headers", "text", "wrong"),
    [
        (post(), 200, {}, "{}", None),
        (post(), 400, {}, "{}", None),
        (post(steering=STEERING), 400, {}, "{}", None),
        (post(steering=STEERING), 200, STEERED, '{"steering": {}}', None),
        (post(steering=STEERING), 200, {}, '{"choices": []}', "silently unsteered: no X-Steering"),
        (post(steering=STEERING), 200, STEERED, "{}", "silently unsteered: no 'steering' in the answer"),
        (post("/v1/responses", steering=STEERING), 200, STEERED, '{"error": null}',
         "silently unsteered: no 'steering' in the answer"),
        (post("/v1/messages", steering=STEERING), 200, STEERED, "{}", None),
        (post("/v1/messages", steering=STEERING), 200, {}, "{}", "silently unsteered: no X-Steering"),
        (post(), 200, STEERED, '{"steering": {}}', "steered without being asked"),
        (post("/tokenize", steering=STEERING), 200, {}, "{}", "steering ignored by a route"),
        (post("/tokenize"), 200, {}, "{}", None),
        (post(corpus.VALIDATE, edits=[]), 200, {}, "{}", None),
        (post(), 500, {}, "Internal Server Error", "500, not promised"),
        (post(), 503, {}, "", "503, not promised"),
        (post(), 503, {"retry-after": "2"}, "", None),
        (post(), 507, {}, "", "507, not promised"),
        (corpus.Sent("g", "PUT", f"{corpus.VECTORS}/a"), 507, {}, "", None),
        (post(steering=STEERING), 500, {}, "Internal server error", "500, not promised"),
        (post(steering=STEERING), 200, STREAM, 'data: {"error": {"code": 500}}', "500 within a stream"),
        (post(steering=STEERING), 200, STREAM, 'data: {"error": {"code": 400}}', None),
        (corpus.Sent("g", "PUT", f"{corpus.VECTORS}/a"), 400, {}, "Traceback",
         "400 shows something of the server, or repeats too much of the request"),
    ],
)  # fmt: skip
def test_verdicts(sent: corpus.Sent, status: int, headers: dict[str, str], text: str, wrong: str | None) -> None:
    assert verdicts.verdict(sent, status, headers, text) == wrong


def test_raw_requests_that_must_be_answered() -> None:
    whole = sockets.Raw("slow body", (b"x",), complete=True)
    part = sockets.Raw("half-closed", (b"x",))
    ok, bad = b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 500 Internal Server Error\r\n\r\n"
    busy = b"HTTP/1.1 503 Service Unavailable\r\n"
    assert sockets.raw_verdict(whole, ok, True) is None
    assert sockets.raw_verdict(whole, b"", True) == sockets.raw_verdict(whole, ok, False) == "no answer"
    assert sockets.raw_verdict(part, b"", False) is None
    assert sockets.raw_verdict(part, ok + bad, True) == "500, not promised"
    assert sockets.raw_verdict(part, busy + b"\r\n", True) == "503, not promised"
    assert sockets.raw_verdict(part, busy + b"Retry-After: 2\r\n\r\n", True) is None


def test_a_slow_body_arrives_in_pieces() -> None:
    raw = sockets.Raw("slow body", (b"ab", b"cd"), pause=0.01, complete=True)
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as pool:

        def serve() -> bytes:
            connection, _ = listening.accept()
            with connection:
                received = b""
                while len(received) < 4:
                    received += connection.recv(10)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                return received

        served = pool.submit(serve)
        received, ended = sockets.exchange(listening.getsockname(), raw, 10.0)
        assert served.result() == b"abcd"
    assert (sockets.statuses_of(received), ended) == ([400], True)


def test_hangs_and_cut_connections_are_findings() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            raise httpx.ReadTimeout("slow")
        if request.method == "PUT":
            raise httpx.RemoteProtocolError("Server disconnected without sending a response.")
        return httpx.Response(500 if request.method == "DELETE" else 200)

    result = Result()
    with httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer)) as client:
        sender = Sender(client, "k", "a", 1.0)
        advanced = list(send_all(partial(sender.body, 0), range(200), 4, result))
    kinds = sum(result.classes.values(), Counter())
    assert kinds.total() == len(advanced) == 200
    assert {"hang", "no answer", "500", "2xx"} <= set(kinds)
    assert Counter(each.what.partition(":")[0] for each in result.findings) == {
        "hang": kinds["hang"], "no answer": kinds["no answer"], "500, not promised": kinds["500"],
    }  # fmt: skip
    number = result.findings[0].number
    assert result.findings[0].sent == sequence.request(0, number)


def test_references_that_show_no_difference_are_refused() -> None:
    good = {f"{kind} {path}": (200, kind, kind == "steered" or None) for path in CARRYING_PATHS for kind in
            ("plain", "steered")}  # fmt: skip
    check_references(good)
    assert differences(good, good) == []
    (found,) = differences(good, good | {"plain /v1/messages": (200, "else", None)})
    assert (found.group, found.what) == (CHECKS, "the reference answer 'plain /v1/messages' changed")
    with pytest.raises(SystemExit, match="/v1/messages does not give the reference answers"):
        check_references(good | {"steered /v1/messages": (200, "plain", True)})


def test_a_reference_answer_is_what_was_said() -> None:
    responses = {"id": "x", "output": [{"content": [{"text": "a", "logprobs": None}]}], "usage": {"tokens": 3}}
    assert said(responses) == ["a"]
    assert said({"choices": [{"message": {"content": "b"}}, {"token_ids": [1, 2]}, {"text": "c"}]}) == [
        "b",
        [1, 2],
        "c",
    ]
    assert said({"content": []}) == []


def test_only_tracebacks_that_end_in_our_code_are_ours() -> None:
    def traceback(*files: str) -> str:
        frames = "".join(f'  File "/site/{file}", line 1, in f\n    f()\n' for file in files)
        after = 'INFO:  POST\n  File "/steer_engine/a.py", line 1'
        return f"Traceback (most recent call last):\n{frames}ValueError: x\n{after}"

    theirs = traceback("starlette/a.py", "steer_engine/api/middleware.py", "vllm/b.py")
    ours = traceback("vllm/b.py", "steer_engine/resolve.py")
    assert own_tracebacks("INFO: start\n" + theirs) == []
    assert len(own_tracebacks(theirs + "\n" + ours + "\n" + theirs)) == 1


def test_the_table_and_the_figures_have_every_group() -> None:
    result = Result()
    one = One("uploads", "4xx", ("truncate",))
    assert len(list(send_all(lambda _: one, range(3), 2, result))) == 3
    shown = fuzz_routes.table(result)
    assert [column.header for column in shown.columns] == ["requests", "sent", "4xx"]
    assert shown.row_count == 2
    found = fuzz_routes.figures(0, result, [], [], [])
    assert found["classes"] == {"uploads": {"4xx": 3}}
    assert found["mutations"] == {"truncate": 3}


def test_one_request_is_shown_with_its_answer(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(418, text="short and stout")

    with httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer)) as client:
        fuzz_routes.show_one(Sender(client, "k", "a", 1.0), 0, 7)
    sent = sequence.request(0, 7)
    assert (seen[0].method, seen[0].url.raw_path.decode(), seen[0].content) == (sent.method, sent.path, sent.content)
    shown = capsys.readouterr().out
    assert repr(sent.content) in shown
    assert "418" in shown
    assert "short and stout" in shown


def test_the_help_says_what_is_wrong() -> None:
    shown = CliRunner().invoke(fuzz_routes.app, ["--help"]).output
    for words in ("--seed", "--bodies", "--only", "Retry-After", "plain vLLM"):
        assert words in shown
