"""Fuzz the routes of a server: thousands of damaged bodies, and raw bytes on sockets.

A server of a tiny random model is started, unless --url names one; two cores and no GPU are enough. Valid requests to
every route that carries or manages steering are damaged and sent: values, keys and places in the JSON, bytes,
encodings, headers, vector files. Then raw bytes are sent that no HTTP client sends.

A body that clearly asks for steering must be steered or refused. Wrong are also: an answer of 5xx that is not promised
(promised are 503 with Retry-After, and 507 for a full registry), a hang, a cut connection, steering that was not asked
for, and an error that shows something of the server. Afterwards plain and steered reference answers, the processes, the
folder of uploads and the log are checked.

What plain vLLM answers with 5xx too is counted separately: those requests are sent again to an unarmed server.

The same seed gives the same requests. `--only NUMBER` sends one of them again and shows it with its answer. The exit
status is 1 if anything is wrong.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # for `helpers`, as in the tests

from fuzzing.sending import Finding, Result, Sender, send_all
from fuzzing.sequence import request
from fuzzing.target import (
    check_references,
    clean_up,
    differences,
    left_behind,
    own_server,
    processes,
    references,
    unarmed_server,
)
from helpers.living import ADMIN, INFERENCE

SHOWN = 20
"""Findings that are printed; --out has all."""


def fuzz(sender: Sender, seed: int, bodies: int, raw: int, at_once: int, console: Console) -> Result:
    """Send everything; one bar for the bodies, one for the sockets."""
    result = Result()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn(), TextColumn("{task.fields[found]} findings"))  # fmt: skip
    with Progress(*columns, console=console) as progress:
        for what, count, one in (("bodies", bodies, sender.body), ("raw sockets", raw, sender.raw)):
            bar = progress.add_task(what, total=count, found=0)
            for _ in send_all(partial(one, seed), range(count), at_once, result):
                progress.update(bar, advance=1, found=len(result.findings))
    return result


def split_by_plain_vllm(findings: list[Finding]) -> tuple[list[Finding], list[Finding]]:
    """Findings that stay, and those of 5xx that plain vLLM answers with 5xx too."""
    again = [each for each in findings if each.sent is not None and each.what[:1] == "5"]
    if not again:
        return findings, []
    with unarmed_server() as server:
        sender = Sender(server.client, INFERENCE, INFERENCE, 60.0)
        theirs = {id(each) for each in again if each.sent and sender.answer(each.sent).status_code >= 500}
    return ([each for each in findings if id(each) not in theirs], [each for each in findings if id(each) in theirs])


def table(result: Result) -> Table:
    """One row per group of requests, one column per class of statuses."""
    kinds = sorted({kind for classes in result.classes.values() for kind in classes})
    shown = Table("requests", "sent", *kinds)
    for group, classes in {**result.classes, "all": sum(result.classes.values(), Counter())}.items():
        shown.add_row(group, f"{classes.total():,}", *(f"{classes[kind]:,}" for kind in kinds))
    return shown


def figures(seed: int, result: Result, ours: list[Finding], theirs: list[Finding], checks: list[str]) -> dict[str, Any]:
    """Everything for --out."""
    described = [[{**vars(replace(each, sent=None))} for each in found] for found in (ours, theirs)]
    return {
        "seed": seed,
        "seconds": round(result.seconds, 1),
        "classes": {group: dict(classes) for group, classes in result.classes.items()},
        "mutations": dict(result.mutations),
        "checks": checks,
        "findings": described[0],
        "plain_vllm": described[1],
    }


def show_one(sender: Sender, seed: int, number: int) -> None:
    sent = request(seed, number)
    answer = sender.answer(sent)
    print(f"{sent.method} {sent.path}\n{dict(sent.headers)}\n{list(sent.mutations)}\n{sent.content!r}\n")
    print(f"{answer.status_code} {dict(answer.headers)}\n{answer.text}")


def main(
    seed: Annotated[int, typer.Option(help="The same seed gives the same requests.")] = 0,
    bodies: Annotated[int, typer.Option(min=0, help="Requests with a body, or to a path, over HTTP.")] = 12_000,
    raw: Annotated[int, typer.Option(min=0, help="Connections with raw bytes.")] = 670,
    url: Annotated[str | None, typer.Option(help="A running server instead, of the model `tiny`, armed as own_server() "
                                                 "in scripts/fuzzing/target.py does it.")] = None,
    key: Annotated[str, typer.Option(envvar="FUZZ_KEY", help="Inference key of --url.")] = INFERENCE,
    admin_key: Annotated[str, typer.Option(envvar="FUZZ_ADMIN_KEY", help="Admin key of --url.")] = ADMIN,
    pid: Annotated[int | None, typer.Option(help="Process of --url, to check that none of its processes ends.")] = None,
    at_once: Annotated[int, typer.Option(min=1, help="Requests at the same time.")] = 12,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which an answer counts as a hang.")] = 60.0,
    only: Annotated[int | None, typer.Option(min=0, help="Send only the body with this number and show it.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for all figures and findings.")] = None,
) -> None:  # fmt: skip
    """Fuzz the routes of a server with seeded bodies and raw bytes. Ends with 1 if anything is wrong."""
    console = Console(stderr=True)
    with ExitStack() as stack:
        if url is None:
            console.print("Starting a server of a tiny model; about a minute.")
            server = stack.enter_context(own_server())
            client, pid = server.client, server.process.pid
        else:
            server, client = None, stack.enter_context(httpx.Client(base_url=url))
        sender = Sender(client, key, admin_key, timeout)
        if only is not None:
            show_one(sender, seed, only)
            return
        before, alive = references(sender), processes(pid) if pid else {}
        check_references(before)
        result = fuzz(sender, seed, bodies, raw, at_once, console)
        try:
            result.findings += differences(before, references(sender))
            clean_up(sender)
        except httpx.TransportError as error:
            result.findings.append(Finding("after the fuzz", 0, f"the server does not answer: {error}", ""))
        checks = [f"{len(before)} reference answers"]
        if pid:
            checks.append(f"{len(alive)} processes")
            if processes(pid) != alive:
                result.findings.append(Finding("after the fuzz", 0, "other processes", f"{alive} -> {processes(pid)}"))
        if server is not None:
            checks.append("uploads and log")
            result.findings += left_behind(server)
    ours, theirs = split_by_plain_vllm(result.findings) if url is None else (result.findings, [])
    Console(width=160).print(table(result))
    for each in ours[:SHOWN]:
        typer.echo(f"{each.group} {each.number}: {each.what}\n    {each.shown}")
    typer.echo(f"seed {seed}, {result.seconds:.0f} s; afterwards checked: {', '.join(checks)}")
    for (what, path), count in Counter((each.what, each.sent.path) for each in theirs if each.sent).items():
        typer.echo(f"plain vLLM answers so too: {path}: {count} x {what}")
    typer.echo(f"{len(ours)} findings; {len(theirs)} answers of 5xx that plain vLLM gives too")
    if out is not None:
        out.write_text(json.dumps(figures(seed, result, ours, theirs, checks), indent=1) + "\n")
    raise typer.Exit(1 if ours else 0)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command(help=__doc__)(main)

if __name__ == "__main__":
    app()
