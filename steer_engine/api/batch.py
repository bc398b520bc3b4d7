"""Batches: requests from a file in OpenAI's format, sent at once up to a limit, and answers into another file.

Memory does not grow with the files. Answers are written in the order of completion; a run can be continued. Each answer
has a digest of its request, so that no run continues another one's file.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from array import array
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from steer_engine.api.request_field import object_without_duplicates
from steer_engine.errors import BatchFileError, SteeringRequestError

MAX_LINE_BYTES = 64 * 2**20
MAX_FAULT_CHARS = 300
URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")

RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Waits before a request is sent again that got 503 (retry later)."""

DIGEST_CHARS = 16
"""Hexadecimal digits of a request's digest in the output."""

_NOT_FINISHED = 0
"""Entry of a line without an answer. A checksum of 0 is stored as 1."""

Send = Callable[[str, dict[str, Any]], Awaitable[tuple[int, Any]]]
"""Sends a request: path and body -> HTTP status and body of the answer."""

Context = Callable[[dict[str, Any]], bytes]
"""Everything besides its line that the answer to a request body depends on: model, settings, content of vectors."""


def no_context(body: dict[str, Any]) -> bytes:
    return b""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the input: a request, or the reason why it is invalid."""

    number: int
    """Counted from 0, empty lines included."""
    digest: str
    """Of the line and its context."""
    custom_id: str | None
    url: str = ""
    body: dict[str, Any] | None = None
    fault: str | None = None


def read_lines(path: Path, context: Context = no_context) -> Iterator[Line]:
    """Yield the lines of a file. Empty lines are left out; invalid ones have a `fault`."""
    with path.open("rb") as file:
        number = 0
        while True:
            raw = file.readline(MAX_LINE_BYTES + 1)
            if not raw:
                return
            if len(raw) > MAX_LINE_BYTES:
                digest = _digest_of_rest(file, raw)
                fault = f"The line has more than {MAX_LINE_BYTES} bytes."
                yield Line(number=number, digest=digest, custom_id=None, fault=fault)
            elif raw.strip():
                yield parse_line(number, raw, context)
            number += 1


def parse_line(number: int, raw: bytes, context: Context = no_context) -> Line:
    """Parse one line of the input. An invalid one has a `fault`."""
    sha = hashlib.sha256(raw.strip())
    digest = sha.hexdigest()[:DIGEST_CHARS]
    try:
        # Of two equal keys a parser keeps the last; the first may be the one that asks for steering.
        parsed = json.loads(raw, object_pairs_hook=object_without_duplicates)
    except SteeringRequestError as error:
        return Line(number=number, digest=digest, custom_id=None, fault=error.message)
    except (ValueError, RecursionError) as error:
        fault = f"The line is not JSON: {error}"[:MAX_FAULT_CHARS]
        return Line(number=number, digest=digest, custom_id=None, fault=fault)
    if not isinstance(parsed, dict):
        fault = f"The line must be an object, not {type(parsed).__name__}."
        return Line(number=number, digest=digest, custom_id=None, fault=fault)
    custom_id = parsed.get("custom_id")
    if not isinstance(custom_id, str):
        return Line(number=number, digest=digest, custom_id=None, fault="custom_id must be a string.")
    url, body = parsed.get("url"), parsed.get("body")
    wrong = _fault_of(parsed.get("method"), url, body)
    if wrong is not None or not isinstance(body, dict):
        return Line(number=number, digest=digest, custom_id=custom_id, fault=wrong)
    sha.update(b"\n" + context(body))
    digest = sha.hexdigest()[:DIGEST_CHARS]
    return Line(number=number, digest=digest, custom_id=custom_id, url=str(url), body=body)


def _fault_of(method: Any, url: Any, body: Any) -> str | None:
    if method is not None and method != "POST":
        return f"method must be POST, not {str(method)[:20]}."
    if url not in URLS:
        return f"url must be one of {', '.join(URLS)}, not {str(url)[:80]}."
    if not isinstance(body, dict):
        return "body must be an object."
    if body.get("stream"):
        return "A batch has no streams: leave out 'stream'."
    if body.get("background"):
        return "A batch waits for each answer: leave out 'background'."
    return None


class Finished:
    """The input lines that have an answer. Uses four bytes per line."""

    def __init__(self) -> None:
        self._checksums = array("I")
        self.count = 0

    def add(self, number: int, digest: str) -> None:
        if number >= len(self._checksums):
            self._checksums.extend([_NOT_FINISHED] * (number + 1 - len(self._checksums)))
        self.count += self._checksums[number] == _NOT_FINISHED
        self._checksums[number] = _checksum(digest)

    def has(self, line: Line) -> bool:
        """Whether the line has an answer. Raises BatchFileError if that answer belongs to another request."""
        if line.number >= len(self._checksums) or self._checksums[line.number] == _NOT_FINISHED:
            return False
        if self._checksums[line.number] != _checksum(line.digest):
            raise BatchFileError(
                f"The answer to line {line.number + 1} in the output file is to another request: the line, the model, "
                "a flag, or the content of a vector or preset has changed. Name a new output file, or undo the change. "
                "Lines that failed may change with --retry-errors."
            )
        return True


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Exclusive right to write the output file `path`. The system releases the lock if the process dies.

    Raises:
        BatchFileError: another run is writing it, or its folder cannot be written.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BatchFileError(
            f"{path}: another run is writing this file; wait for it, end it, or name another file."
        ) from None
    except OSError as error:
        raise BatchFileError(f"{path}: cannot be written ({error.strerror}).") from None
    try:
        yield
    finally:
        lock.release()


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
                number = int(parsed["id"].removeprefix("line-")) - 1
                failed = parsed["error"] is not None or parsed["response"]["status_code"] >= 400
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                kept.unlink()
                raise BatchFileError(f"{path} is not the output of a batch; name another file.") from None
            if not (failed and retry_errors):
                finished.add(number, str(parsed.get("request_digest")))
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
    record["request_digest"] = line.digest
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace") + b"\n"


def _checksum(digest: str) -> int:
    try:
        return int(digest[:8], 16) or 1
    except ValueError:  # an output file of an earlier version
        return 1


def _digest_of_rest(file: BinaryIO, begun: bytes) -> str:
    """Skip the rest of a line that is too long to keep. Returns the digest of the whole line."""
    sha = hashlib.sha256(begun)
    piece = begun
    while not piece.endswith(b"\n") and (piece := file.readline(MAX_LINE_BYTES)):
        sha.update(piece)
    return sha.hexdigest()[:DIGEST_CHARS]


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
    context: Context = no_context,
    progress: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Send every line of `source` that has no answer in `target`, at most `at_once` at a time.

    An exception of `send` (the engine has died) ends the run. All answers until then are in the file.
    """
    tally = Tally()
    lines = read_lines(source, context)
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
