"""Parsing a batch, and continuing one: invalid lines have faults, incomplete answers are sent again."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from steer_engine.api import batch
from steer_engine.api.batch import Line, answer_line, fault_line, parse_line, read_lines, resume
from steer_engine.errors import BatchFileError


def request(custom_id: Any = "a", **fields: Any) -> bytes:
    return json.dumps(
        {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}} | fields
    ).encode()


def test_good_lines_of_each_kind(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    urls = ["/v1/chat/completions", "/v1/completions", "/v1/responses"]
    path.write_bytes(b"\n\n".join(request(f"id {url}", url=url) for url in urls))
    found = list(read_lines(path))
    assert [(line.number, line.custom_id, line.url) for line in found] == [
        (2 * i, f"id {url}", url) for i, url in enumerate(urls)
    ]
    assert all(line.fault is None and line.body == {"prompt": "x"} for line in found)


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
            file.write(answer_line(Line(number=number, custom_id=f"id {number}"), 200, {}))
    tracemalloc.start()
    finished = resume(path)
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert finished.count == 100_000
    assert used < 1_500_000


def test_resume_finds_the_answers_and_removes_an_incomplete_line(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    assert resume(path).count == 0
    good = answer_line(Line(number=2, custom_id="c"), 200, {"text": "ü\n"})
    bad = answer_line(Line(number=0, custom_id="a"), 404, {"error": {}})
    fault = fault_line(Line(number=1, custom_id=None, fault="no JSON"))
    incomplete = answer_line(Line(number=3, custom_id="d"), 200, {})[:-5]
    path.write_bytes(good + bad + fault + incomplete)
    finished = resume(path)
    assert finished.count == 3
    assert path.read_bytes() == good + bad + fault
    for number, custom_id in ((2, "c"), (0, "a"), (1, None)):
        assert finished.has(Line(number=number, custom_id=custom_id))
    assert not finished.has(Line(number=3, custom_id="d"))
    assert not finished.has(Line(number=999, custom_id="z"))
    again = resume(path, retry_errors=True)
    assert again.count == 1
    assert path.read_bytes() == good


def test_the_output_of_another_input_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(answer_line(Line(number=0, custom_id="a"), 200, {}))
    with pytest.raises(BatchFileError, match="line 1"):
        resume(path).has(Line(number=0, custom_id="b"))


@pytest.mark.parametrize("text", ["hello\n", "{}\n", '{"id": "x", "custom_id": "a"}\n', "[]\n", "3\n"])
def test_a_file_that_is_not_an_output_is_not_changed(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(BatchFileError, match=r"notes\.txt"):
        resume(path)
    assert path.read_text() == text
    assert [each.name for each in tmp_path.iterdir()] == ["notes.txt"]
