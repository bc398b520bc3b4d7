"""Asks a batch's lines with bounded concurrency and writes each answer as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from steer_engine.serving.batch.lines import Finished, Line, answer_line, fault_line, read_lines

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
