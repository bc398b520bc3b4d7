"""`steer-engine batch IN OUT --model MODEL [any flag of serve]`: options, progress and summary."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from steer_engine.api.batch import Finished, Tally, read_lines, resume, run
from steer_engine.errors import BatchFileError

AT_ONCE = 512
"""Requests sent at once by default: more than most engines run, so that some are always waiting."""


def batch(argv: Sequence[str]) -> int:
    """Answer a batch file, or continue an earlier run with the same files. Returns the exit status.

    Raises:
        SteerError: a file or a flag is invalid. No engine was started.
    """
    own, rest = _parser().parse_known_args(list(argv))
    if not own.source.is_file():
        raise BatchFileError(f"There is no file {own.source}.")
    if own.source.resolve() == own.target.resolve():
        raise BatchFileError(f"Input and output are the same file, {own.source}; name another output file.")
    finished = resume(own.target, retry_errors=own.retry_errors)
    if all(finished.has(line) for line in read_lines(own.source)):
        tally = Tally(skipped=finished.count)  # needs no engine
    else:
        from steer_engine.vllm.launch import parse_serve_flags

        tally = asyncio.run(_run(parse_serve_flags([own.model, *rest]), own, finished))
    Console(stderr=True).print(
        f"{tally.answered} answered, {tally.failed} failed"
        + (f", {tally.skipped} already answered" if tally.skipped else ""),
        highlight=False,
    )
    return 1 if tally.failed and not tally.answered and not tally.skipped else 0


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too small; give at least 1")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="steer-engine batch",
        allow_abbrev=False,
        description="Answer a file of requests in OpenAI's batch format.",
        epilog="Every other flag is one of `steer-engine serve`.",
    )
    parser.add_argument("source", type=Path, metavar="IN", help="JSON lines: custom_id, url, body")
    parser.add_argument("target", type=Path, metavar="OUT", help="answers, one per line, in the order of completion")
    parser.add_argument("--model", required=True, help="as for `steer-engine serve`")
    parser.add_argument(
        "--at-once", type=_at_least_one, default=AT_ONCE, metavar="N", help=f"requests sent at once (default {AT_ONCE})"
    )
    parser.add_argument("--retry-errors", action="store_true", help="send lines again that failed in an earlier run")
    return parser


async def _run(args: Any, own: argparse.Namespace, finished: Finished) -> Tally:
    from steer_engine.vllm.launch import serving_app

    total = await asyncio.to_thread(_count_lines, own.source)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    async with serving_app(args) as send:
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("requests", total=total)

            def progress(tally: Tally) -> None:
                bar.update(task, completed=tally.total, description=f"requests, {tally.failed} failed")

            return await run(own.source, own.target, send, finished=finished, at_once=own.at_once, progress=progress)


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for raw in file if raw.strip())
