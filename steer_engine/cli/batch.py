"""`steer-engine batch IN OUT --model MODEL [any flag of serve]`: options, progress and summary."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from steer_engine.api.batch import Context, Finished, Tally, read_lines, resume, run, writing
from steer_engine.api.request_field import SEPARATOR, steering_of
from steer_engine.cli.checks import check_start
from steer_engine.errors import BatchFileError, SteerError
from steer_engine.models import PACKAGED
from steer_engine.settings import DEFAULT_PRESET_ENV, MIRROR_URL_ENV
from steer_engine.vectors.registry import Registry

AT_ONCE = 512
"""Requests sent at once by default: more than most engines run, so that some are always waiting."""

SIZES = (
    "--gpu-memory-utilization", "--kv-cache-memory-bytes", "--max-num-seqs", "--max-num-batched-tokens",
    "--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp", "--data-parallel-size", "-dp",
    "--steering-rows", "--steering-bank-rows", "--steering-limit",
)  # fmt: skip
"""Flags with one value that may differ between the runs of a batch: a request either fails or has the same answer."""


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
    check_start([own.model, *rest], listens=False)
    with writing(own.target):
        tally = _answer(own, rest)
    Console(stderr=True).print(
        f"{tally.answered} answered, {tally.failed} failed"
        + (f", {tally.skipped} already answered" if tally.skipped else ""),
        highlight=False,
    )
    return 1 if tally.failed and not tally.answered and not tally.skipped else 0


def _answer(own: argparse.Namespace, rest: list[str]) -> Tally:
    # This imports vLLM, for seconds. It must come first if it decides which folder is read, or fills the folder.
    args = _parsed([own.model, *rest]) if _changes_the_folder(rest) else None
    context = context_of(own.model, rest)
    finished = resume(own.target, retry_errors=own.retry_errors)
    # Every line is checked before the engine starts.
    if not sum(not finished.has(line) for line in read_lines(own.source, context)):
        return Tally(skipped=finished.count)
    return asyncio.run(_run(args or _parsed([own.model, *rest]), own, finished, context))


def _parsed(serve_flags: list[str]) -> argparse.Namespace:
    from steer_engine.vllm.launch import parse_serve_flags

    return parse_serve_flags(serve_flags)


def _changes_the_folder(flags: Sequence[str]) -> bool:
    names = {word.replace("_", "-").partition("=")[0] for word in flags}
    return not names.isdisjoint({"--config", "--steering-mirror"}) or bool(os.environ.get(MIRROR_URL_ENV))


def context_of(model: str, flags: Sequence[str]) -> Context:
    """What the answers of a run depend on besides their lines: weights, flags, and the vectors and presets in use.

    flags: those of `serve`. The content of a file that a flag names counts, too.
    """
    from steer_engine.derive.capture_engine import fingerprint
    from steer_engine.vllm.flags import own_flags, vectors_folder

    own = own_flags(flags)
    registry = Registry(vectors_folder(own.steering_vectors))
    vectors, presets = registry.names(), registry.presets()
    default = own.steering_default or os.environ.get(DEFAULT_PRESET_ENV)
    weights = PACKAGED[model].sha256 if model in PACKAGED else fingerprint(model) or model
    settings = json.dumps([weights, default, [[word, _content(word)] for word in _decisive(flags)]]).encode()

    def context(body: dict[str, Any]) -> bytes:
        named = _named(body, default, vectors, presets)
        return settings + json.dumps(named, sort_keys=True).encode()

    return context


def _decisive(flags: Sequence[str]) -> Iterator[str]:
    """The words of `flags` without those that change no answer, and without the folder of vectors."""
    words = iter(flags)
    for word in words:
        name, equals, _ = word.replace("_", "-").partition("=")
        if name not in (*SIZES, "--steering-vectors"):
            yield word
        elif not equals:
            next(words, None)


def _content(word: str) -> str | None:
    """Digest of the file that a word of the flags names, such as a chat template."""
    try:
        with Path(word.partition("=")[2] or word).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError):  # no file, or a text too long to be a path
        return None


def _named(
    body: dict[str, Any], default: str | None, vectors: Mapping[str, str], presets: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """Digests of the vectors and specs of the presets that a request may name, directly or through a preset."""
    try:
        specified = steering_of(body)
        if isinstance(specified, str):  # among the extra arguments it is JSON text
            specified = json.loads(specified)
    except (SteerError, ValueError, RecursionError):
        return {}  # the request will be refused
    preset = str(body.get("model") or "").partition(SEPARATOR)[2]
    pending = {*_strings(specified), preset, default if specified is None else None}
    found: dict[str, Any] = {}
    while pending:
        name = pending.pop()
        if name in found or (name not in vectors and name not in presets):
            continue
        found[str(name)] = [vectors.get(str(name)), presets.get(str(name))]
        pending |= set(_strings(presets.get(str(name))))
    return found


def _strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, except keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


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


async def _run(args: Any, own: argparse.Namespace, finished: Finished, context: Context) -> Tally:
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

            return await run(
                own.source, own.target, send, finished=finished, at_once=own.at_once, context=context, progress=progress
            )


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for raw in file if raw.strip())
