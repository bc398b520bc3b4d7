"""Batches: requests from a file in OpenAI's format, sent at once up to a limit, and answers into another file.

Memory does not grow with the files. Answers are written in the order of completion; a run can be continued.
"""

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

from steer_engine.api.request_field import object_without_duplicates
from steer_engine.errors import BatchFileError, SteeringRequestError

MAX_LINE_BYTES = 64 * 2**20
MAX_FAULT_CHARS = 300
URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")

RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Waits before a request is sent again that got 503 (retry later)."""

_NOT_FINISHED = 0
"""Entry of a line without an answer. A checksum of 0 is stored as 1."""

Send = Callable[[str, dict[str, Any]], Awaitable[tuple[int, Any]]]
"""Sends a request: path and body -> HTTP status and body of the answer."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the input: a request, or the reason why it is invalid."""

    number: int
    """Counted from 0, empty lines included."""
    custom_id: str | None
    url: str = ""
    body: dict[str, Any] | None = None
    fault: str | None = None


def read_lines(path: Path) -> Iterator[Line]:
    """Yield the lines of a file. Empty lines are left out; invalid ones have a `fault`."""
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
    """Parse one line of the input. An invalid one has a `fault`."""
    try:
        # Of two equal keys a parser keeps the last; the first may be the one that asks for steering.
        parsed = json.loads(raw, object_pairs_hook=object_without_duplicates)
    except SteeringRequestError as error:
        return Line(number=number, custom_id=None, fault=error.message)
    except (ValueError, RecursionError) as error:
        return Line(number=number, custom_id=None, fault=f"The line is not JSON: {error}"[:MAX_FAULT_CHARS])
    if not isinstance(parsed, dict):
        return Line(number=number, custom_id=None, fault=f"The line must be an object, not {type(parsed).__name__}.")
    custom_id = parsed.get("custom_id")
    if not isinstance(custom_id, str):
        return Line(number=number, custom_id=None, fault="custom_id must be a string.")
    method, url, body = parsed.get("method", "POST"), parsed.get("url"), parsed.get("body")
    fault = None
    if method != "POST":
        fault = f"method must be POST, not {str(method)[:20]}."
    elif url not in URLS:
        fault = f"url must be one of {', '.join(URLS)}, not {str(url)[:80]}."
    elif not isinstance(body, dict):
        fault = "body must be an object."
    elif body.get("stream"):
        fault = "A batch has no streams: leave out 'stream'."
    elif body.get("background"):
        fault = "A batch waits for each answer: leave out 'background'."
    if fault is not None:
        return Line(number=number, custom_id=custom_id, fault=fault)
    return Line(number=number, custom_id=custom_id, url=str(url), body=body)


class Finished:
    """The input lines that have an answer. Uses four bytes per line."""

    def __init__(self) -> None:
        self._checksums = array("I")
        self.count = 0

    def add(self, number: int, custom_id: str | None) -> None:
        if number >= len(self._checksums):
            self._checksums.extend([_NOT_FINISHED] * (number + 1 - len(self._checksums)))
        self.count += self._checksums[number] == _NOT_FINISHED
        self._checksums[number] = _checksum(custom_id)

    def has(self, line: Line) -> bool:
        """Whether the line has an answer. Raises BatchFileError if that answer belongs to another line."""
        if line.number >= len(self._checksums) or self._checksums[line.number] == _NOT_FINISHED:
            return False
        if self._checksums[line.number] != _checksum(line.custom_id):
            raise BatchFileError(
                f"The answer to line {line.number + 1} in the output file has another custom_id: it belongs to another "
                "input file. Name a new output file."
            )
        return True


def resume(path: Path, *, retry_errors: bool = False) -> Finished:
    """Find the lines that an output file already answers. Removes an incomplete last line.

    Args:
        retry_errors: also remove the lines that failed, so that they are sent again.

    Raises:
        BatchFileError: the file is not the output of a batch. It is not changed.
    """
    finished = Finished()
    if not path.exists():
        return finished
    kept = path.with_name(f".{path.name}.part")
    with path.open("rb") as old, kept.open("wb") as new:
        for raw in old:
            if not raw.endswith(b"\n"):
                break  # incomplete: the last run was killed
            try:
                parsed = json.loads(raw)
                number, custom_id = int(parsed["id"].removeprefix("line-")) - 1, parsed["custom_id"]
                failed = parsed["error"] is not None or parsed["response"]["status_code"] >= 400
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
    """The output line of a request that the server answered."""
    response = {"status_code": status, "request_id": f"line-{line.number + 1}", "body": body}
    return _output(line, response, None)


def fault_line(line: Line) -> bytes:
    """The output line of an invalid input line."""
    return _output(line, None, {"code": "invalid_line", "message": line.fault})


def _output(line: Line, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    record = {"id": f"line-{line.number + 1}", "custom_id": line.custom_id, "response": response, "error": error}
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace") + b"\n"


def _checksum(custom_id: str | None) -> int:
    return zlib.crc32((custom_id or "").encode("utf-8", "surrogatepass")) or 1


def _skip_rest_of_line(file: BinaryIO) -> None:
    while (piece := file.readline(MAX_LINE_BYTES)) and not piece.endswith(b"\n"):
        pass


@dataclass
class Tally:
    """How many lines of a run were answered, failed, or were skipped because they had an answer."""

    answered: int = 0
    failed: int = 0
    skipped: int = 0

    @property
    def total(self) -> int:
        return self.answered + self.failed + self.skipped


async def run(
    source: Path,
    target: Path,
    send: Send,
    *,
    finished: Finished,
    at_once: int,
    progress: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Send every line of `source` that has no answer in `target`, at most `at_once` at a time.

    An exception of `send` (the engine has died) ends the run. All answers until then are in the file.
    """
    tally = Tally()
    lines = read_lines(source)
    with target.open("ab") as output:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(at_once):
                    group.create_task(_work(lines, output, send, finished, tally, progress))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
    return tally


async def _work(
    lines: Iterator[Line],
    output: BinaryIO,
    send: Send,
    finished: Finished,
    tally: Tally,
    progress: Callable[[Tally], None],
) -> None:
    for line in lines:  # shared by all workers: each takes the next one
        if finished.has(line):
            tally.skipped += 1
        elif line.body is None:
            output.write(fault_line(line))
            tally.failed += 1
        else:
            try:
                status, body = await _send_with_retries(send, line)
            except RecursionError:
                output.write(fault_line(replace(line, fault="The body is nested too deeply.")))
                status = 400
            else:
                output.write(answer_line(line, status, body))
            tally.answered += status < 400
            tally.failed += status >= 400
        output.flush()
        progress(tally)


async def _send_with_retries(send: Send, line: Line) -> tuple[int, Any]:
    assert line.body is not None
    for seconds in RETRY_SECONDS:
        status, body = await send(line.url, line.body)
        if status != 503:
            return status, body
        await asyncio.sleep(seconds)
    return await send(line.url, line.body)
