"""Parsing a batch, and continuing one: invalid lines have faults, incomplete answers are sent again."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from steer_engine.api import batch
from steer_engine.api.batch import (
    Context,
    Finished,
    Line,
    answer_line,
    fault_line,
    no_context,
    parse_line,
    read_lines,
    resume,
    writing,
)
from steer_engine.errors import BatchFileError


def request(custom_id: Any = "a", **fields: Any) -> bytes:
    return json.dumps(
        {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}} | fields
    ).encode()


def line(number: int, custom_id: str | None, fault: str | None = None) -> Line:
    """With the digest of its number and id."""
    digest = hashlib.sha256(f"{number} {custom_id}".encode()).hexdigest()[:16]
    return Line(number=number, digest=digest, custom_id=custom_id, fault=fault)


def test_good_lines_of_each_kind(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    urls = ["/v1/chat/completions", "/v1/completions", "/v1/responses"]
    path.write_bytes(b"\n\n".join(request(f"id {url}", url=url) for url in urls))
    found = list(read_lines(path))
    assert [(line.number, line.custom_id, line.url) for line in found] == [
        (2 * i, f"id {url}", url) for i, url in enumerate(urls)
    ]
    assert all(line.fault is None and line.body == {"prompt": "x"} for line in found)


def test_a_null_method_is_left_out() -> None:
    """Tables have null where a row has nothing."""
    assert parse_line(0, request(method=None)).fault is None


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "must be an object"),
        (b"3", "must be an object"),
        (request(None), "custom_id"),
        (request(3), "custom_id"),
        (request(method="GET"), "method"),
        (request(url="/v1/embeddings"), "url"),
        (request(url=None), "url"),
        (request(body="x"), "body"),
        (request(body={"stream": True}), "stream"),
        (request(body={"background": True}), "background"),
        (b'{"custom_id": "a", "url": "/v1/completions", "body": {"steering": {}, "steering": null}}', "twice"),
        (b'{"custom_id": "a", "url": "/v1/completions", "body": {"steering": {}}, "body": {}}', "twice"),
    ],
)
def test_bad_lines_say_what_is_wrong(raw: bytes, says: str) -> None:
    line = parse_line(7, raw)
    assert line.number == 7
    assert line.body is None
    assert says in (line.fault or "")
    written = json.loads(fault_line(line))
    assert (written["id"], written["response"]) == ("line-8", None)
    assert says in written["error"]["message"]


def test_a_line_that_is_too_long_is_one_fault_and_never_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "in.jsonl"
    path.write_bytes(request("a") + b"\n" + b"x" * 3_000_000 + b"\n" + request("b") + b"\n")
    tracemalloc.start()
    found = list(read_lines(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(line.number, line.custom_id) for line in found] == [(0, "a"), (1, None), (2, "b")]
    assert "1000 bytes" in (found[1].fault or "")
    assert peak < 1_000_000


def test_finished_lines_take_four_bytes_each(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with path.open("wb") as file:
        for number in range(100_000):
            file.write(answer_line(line(number, f"id {number}"), 200, {}))
    tracemalloc.start()
    finished = resume(path)
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert finished.count == 100_000
    assert used < 1_500_000


def test_resume_finds_the_answers_and_removes_an_incomplete_line(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    assert resume(path).count == 0
    good = answer_line(line(2, "c"), 200, {"text": "ü\n"})
    bad = answer_line(line(0, "a"), 404, {"error": {}})
    fault = fault_line(line(1, None, fault="no JSON"))
    incomplete = answer_line(line(3, "d"), 200, {})[:-5]
    path.write_bytes(good + bad + fault + incomplete)
    finished = resume(path)
    assert finished.count == 3
    assert path.read_bytes() == good + bad + fault
    for number, custom_id in ((2, "c"), (0, "a"), (1, None)):
        assert finished.has(line(number, custom_id))
    assert not finished.has(line(3, "d"))
    assert not finished.has(line(999, "z"))
    again = resume(path, retry_errors=True)
    assert again.count == 1
    assert path.read_bytes() == good


def answered(path: Path, *raw: bytes, context: Context = no_context) -> Finished:
    """As found by a second run, after a first run has answered these lines."""
    lines = [parse_line(number, each, context) for number, each in enumerate(raw)]
    path.write_bytes(b"".join(answer_line(each, 200, {}) for each in lines))
    return resume(path)


def test_the_same_request_has_its_answer(tmp_path: Path) -> None:
    finished = answered(tmp_path / "out", request("a"), request("b"), context=lambda body: b"model")
    assert finished.has(parse_line(1, request("b") + b"\n", lambda body: b"model"))


@pytest.mark.parametrize(
    ("raw", "context"),
    [
        (request("b"), b"model"),
        (request(body={"prompt": "y"}), b"model"),
        (request(body={"prompt": "x", "steering": {"edits": [{"vector": "v", "scale": 2}]}}), b"model"),
        (request(url="/v1/chat/completions"), b"model"),
        (request(), b"another model"),
        (b"no JSON", b"model"),
    ],
    ids=["another id", "another prompt", "steered", "another endpoint", "another context", "a fault"],
)
def test_the_answer_to_another_request_is_not_kept(tmp_path: Path, raw: bytes, context: bytes) -> None:
    finished = answered(tmp_path / "out", request(), context=lambda body: b"model")
    with pytest.raises(BatchFileError, match=r"line 1 .* another request.*new output file"):
        finished.has(parse_line(0, raw, lambda body: context))


def test_an_output_without_digests_is_not_continued(tmp_path: Path) -> None:
    """The format of earlier versions."""
    path = tmp_path / "out"
    answered(path, request())
    record = json.loads(path.read_bytes())
    del record["request_digest"]
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(BatchFileError, match="new output file"):
        resume(path).has(parse_line(0, request()))


def test_lines_that_are_too_long_differ_by_their_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "MAX_LINE_BYTES", 100)
    (tmp_path / "in").write_bytes(b"x" * 500 + b"\n" + b"x" * 500 + b"y\n" + b"x" * 500)
    digests = [each.digest for each in read_lines(tmp_path / "in")]
    assert len(set(digests[:2])) == 2


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with (
        writing(path),
        writing(tmp_path / "other.jsonl"),
        pytest.raises(BatchFileError, match=r"out\.jsonl: another run is writing this file"),
        writing(path),
    ):
        pass
    with writing(path):
        path.touch()
    with pytest.raises(BatchFileError, match="cannot be written"), writing(path / "out.jsonl"):
        pass


@pytest.mark.parametrize("text", ["hello\n", "{}\n", '{"id": "x", "custom_id": "a"}\n', "[]\n", "3\n"])
def test_a_file_that_is_not_an_output_is_not_changed(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(BatchFileError, match=r"notes\.txt"):
        resume(path)
    assert path.read_text() == text
    assert [each.name for each in tmp_path.iterdir()] == ["notes.txt"]
