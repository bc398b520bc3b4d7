"""The two files of a batch: requests in OpenAI's format, and the answers that are there already."""

from __future__ import annotations

import asyncio
import json
import os
import zlib
from array import array
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from steer_engine.errors import BatchFileError

MAX_LINE_BYTES = 64 * 2**20
URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")

_UNKNOWN = 0
"""In the table of finished lines: not finished. A checksum of 0 is stored as 1."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the input: a request, or what is wrong with it."""

    number: int
    """From 0."""
    custom_id: str | None
    url: str = ""
    body: dict[str, Any] | None = None
    fault: str | None = None


def read_lines(path: Path) -> Iterator[Line]:
    """The requests of a file, one at a time; empty lines are left out, bad ones come as faults."""
    with path.open("rb") as file:
        number = 0
        while True:
            raw = file.readline(MAX_LINE_BYTES + 1)
            if not raw:
                return
            if len(raw) > MAX_LINE_BYTES:
                _skip_rest_of_line(file)
                fault = f"The line has more than {MAX_LINE_BYTES} bytes."
                yield Line(number=number, custom_id=None, fault=fault)
            elif raw.strip():
                yield parse_line(number, raw)
            number += 1


def parse_line(number: int, raw: bytes) -> Line:
    """One line, or what is wrong with it."""
    try:
        read = json.loads(raw)
    except (ValueError, RecursionError) as error:
        return Line(number=number, custom_id=None, fault=f"The line is not JSON: {error}"[:300])
    if not isinstance(read, dict):
        return Line(number=number, custom_id=None, fault=f"The line is no object but {type(read).__name__}.")
    custom_id = read.get("custom_id")
    if not isinstance(custom_id, str):
        return Line(number=number, custom_id=None, fault="custom_id must be a string.")
    method, url, body = read.get("method", "POST"), read.get("url"), read.get("body")
    fault = None
    if method != "POST":
        fault = f"method must be POST, not {str(method)[:20]}."
    elif url not in URLS:
        fault = f"url {str(url)[:80]} is none of {', '.join(URLS)}."
    elif not isinstance(body, dict):
        fault = "body must be an object."
    elif body.get("stream"):
        fault = "A batch answers whole: leave out 'stream'."
    elif body.get("background"):
        fault = "A batch waits for its answers: leave out 'background'."
    if fault is not None:
        return Line(number=number, custom_id=custom_id, fault=fault)
    return Line(number=number, custom_id=custom_id, url=str(url), body=body)


class Finished:
    """Which input lines have an answer: four bytes a line, whatever the answers' size."""

    def __init__(self) -> None:
        self._checksums = array("I")
        self.count = 0

    def add(self, number: int, custom_id: str | None) -> None:
        if number >= len(self._checksums):
            self._checksums.extend([_UNKNOWN] * (number + 1 - len(self._checksums)))
        self.count += self._checksums[number] == _UNKNOWN
        self._checksums[number] = _checksum(custom_id)

    def has(self, line: Line) -> bool:
        """Whether this very line is answered. Raises BatchFileError if the answer is of another line."""
        if line.number >= len(self._checksums) or self._checksums[line.number] == _UNKNOWN:
            return False
        if self._checksums[line.number] != _checksum(line.custom_id):
            raise BatchFileError(
                f"The output file has an answer to another line {line.number + 1}: it belongs to another input file. "
                "Name a new output file."
            )
        return True


def resume(path: Path, *, retry_errors: bool = False) -> Finished:
    """What an output file holds already; a last line that was cut off is removed.

    Args:
        retry_errors: forget the lines that failed, so that they are asked again.

    Raises:
        BatchFileError: the file is no output of a batch.
    """
    finished = Finished()
    if not path.exists():
        return finished
    kept = path.with_name(f".{path.name}.part")
    with path.open("rb") as old, kept.open("wb") as new:
        for raw in old:
            if not raw.endswith(b"\n"):
                break  # cut off when the last run was killed
            try:
                read = json.loads(raw)
                number, custom_id = int(read["id"].removeprefix("line-")) - 1, read["custom_id"]
                failed = read["error"] is not None or read["response"]["status_code"] >= 400
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                kept.unlink()
                raise BatchFileError(f"{path} is not the output of a batch; name another file.") from None
            if not (failed and retry_errors):
                finished.add(number, custom_id)
                new.write(raw)
        new.flush()
        os.fsync(new.fileno())
    os.replace(kept, path)
    return finished


def answer_line(line: Line, status: int, body: Any) -> bytes:
    """The output line for an answer of the server."""
    response = {"status_code": status, "request_id": f"line-{line.number + 1}", "body": body}
    return _output(line, response, None)


def fault_line(line: Line) -> bytes:
    """The output line for an input line that could not be asked."""
    return _output(line, None, {"code": "invalid_line", "message": line.fault})


def _output(line: Line, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    record = {"id": f"line-{line.number + 1}", "custom_id": line.custom_id, "response": response, "error": error}
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace") + b"\n"


def _checksum(custom_id: str | None) -> int:
    return zlib.crc32((custom_id or "").encode("utf-8", "surrogatepass")) or 1


def _skip_rest_of_line(file: BinaryIO) -> None:
    while (piece := file.readline(MAX_LINE_BYTES)) and not piece.endswith(b"\n"):
        pass


Ask = Callable[[str, dict[str, Any]], Awaitable[tuple[int, Any]]]
"""Path and body of a request -> HTTP status and body of its answer."""

RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Waits after 503: the server has no room right now."""


@dataclass
class Tally:
    """What became of the lines of this run."""

    answered: int = 0
    failed: int = 0
    skipped: int = 0

    @property
    def total(self) -> int:
        return self.answered + self.failed + self.skipped


async def run(
    source: Path,
    target: Path,
    ask: Ask,
    *,
    finished: Finished,
    at_once: int,
    progress: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Ask every line of `source` that has no answer in `target`; memory stays at `at_once` requests.

    An exception of `ask` (the engine died) ends the run; what is answered by then is in the file.
    """
    tally = Tally()
    lines = read_lines(source)
    with target.open("ab") as output:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(at_once):
                    group.create_task(_work(lines, output, ask, finished, tally, progress))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
    return tally


async def _work(
    lines: Iterator[Line],
    output: BinaryIO,
    ask: Ask,
    finished: Finished,
    tally: Tally,
    progress: Callable[[Tally], None],
) -> None:
    for line in lines:  # shared: each worker takes the next one
        if finished.has(line):
            tally.skipped += 1
        elif line.body is None:
            output.write(fault_line(line))
            tally.failed += 1
        else:
            try:
                status, body = await _patiently(ask, line)
            except RecursionError:
                fault = replace(line, fault="The body is nested too deeply.")
                output.write(fault_line(fault))
                status = 400
            else:
                output.write(answer_line(line, status, body))
            tally.answered += status < 400
            tally.failed += status >= 400
        output.flush()
        progress(tally)


async def _patiently(ask: Ask, line: Line) -> tuple[int, Any]:
    assert line.body is not None
    for seconds in RETRY_SECONDS:
        status, body = await ask(line.url, line.body)
        if status != 503:
            return status, body
        await asyncio.sleep(seconds)
    return await ask(line.url, line.body)
