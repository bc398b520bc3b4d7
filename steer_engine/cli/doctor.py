"""`steer-engine doctor MODEL`: its options and the table it prints. `vllm.examination` does the work."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from steer_engine.cli.checks import check_start
from steer_engine.errors import SteerError
from steer_engine.fields import block_ranges

if TYPE_CHECKING:
    from steer_engine.vllm.examination import Diagnosis

_MEMORY = {
    "bank": "bank",
    "programs": "programs",
    "routing": "routing",
    "probes": "numbers of probes",
    "device": "total on each rank's device",
    "host_vector": "one vector with all blocks, in host memory",
    "host_store": "limit for vectors in host memory",
}

_UNSEEN = {
    "real": "",
    "random": ", judging by a copy with random weights; the model's own weights were not examined",
    "": ", judging by its configuration; nothing was loaded",
}
"""What a yes does not cover, by the weights of the copy."""


def show(diagnosis: Diagnosis, console: Console) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows(diagnosis):
        table.add_row(name, Text(value))
    console.print(table)
    for reason in diagnosis.against:
        console.print(Text.assemble(("no: ", "bold red"), reason), soft_wrap=True)
    if diagnosis.serves:
        limits = _UNSEEN[diagnosis.weights]
        console.print(Text.assemble(("yes: ", "bold green"), f"it can be served steered{limits}"), soft_wrap=True)


def _refuse(reason: str, *, as_json: bool) -> int:
    """Print the reason found before anything was examined. Returns the exit status."""
    if as_json:
        print(json.dumps({"serves": False, "against": [reason]}, indent=2))
    else:
        Console(highlight=False).print(Text.assemble(("no: ", "bold red"), reason), soft_wrap=True)
    return 1


def rows(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    """Name and value of each line of the table, as far as the examination got."""
    found = [("model", diagnosis.model)]
    if diagnosis.vllm:
        same = diagnosis.num_symbols - diagnosis.num_different
        known = f"{same} of {diagnosis.num_symbols} symbols are as Steer Engine expects"
        found.append(("vLLM", f"{diagnosis.vllm}: {known}"))
    if not diagnosis.num_blocks:
        return found
    armed = block_ranges(diagnosis.armed_blocks)
    found += [
        ("architecture", f"{diagnosis.architecture}, hidden size {diagnosis.hidden_size}, {diagnosis.dtype}"),
        ("sites", f"{len(diagnosis.armed_blocks)} of {diagnosis.num_blocks} blocks: {armed}"),
        ("operations", ", ".join(diagnosis.ops)),
        ("model runner", f"{diagnosis.runner} on this machine: {diagnosis.runner_reason}"),
    ]
    for site in diagnosis.sites:
        modules = diagnosis.site_modules.get(site)
        where = f"after {', or after '.join(modules)}" if modules else "not examined"
        if modules and diagnosis.tensor_parallel_size > 1:
            where += (
                f"; of one rank: if the {diagnosis.tensor_parallel_size} ranks have shares of it, the server refuses it"
            )
        found.append((f"site {site}", where))
    found += [("refused", reason) for reason in diagnosis.refused]
    if diagnosis.probed_blocks:
        forms = "; ".join(f"{form} at {block_ranges(blocks)}" for form, blocks in diagnosis.forms.items())
        of = "" if diagnosis.probed_blocks == diagnosis.num_blocks else f" (of a copy of {diagnosis.probed_blocks})"
        found += [("stream", f"{forms}{of}"), ("kernel", diagnosis.kernel)]
    load = (
        f"{diagnosis.max_num_seqs} requests of {diagnosis.rows} rows, {diagnosis.max_num_batched_tokens} tokens a step"
    )
    found.append(("memory for", load))
    found += [(f"  {size(diagnosis.memory[name])}", words) for name, words in _MEMORY.items()]
    return found


def size(num_bytes: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} B"


def doctor(argv: Sequence[str]) -> int:
    """Examine a model and print the diagnosis. Returns the exit status: 0 if it can be served steered, else 1.

    argv: everything after `steer-engine doctor`.
    """
    parser = argparse.ArgumentParser(
        prog="steer-engine doctor",
        usage="steer-engine doctor MODEL [--json] [--memory-only] [any flag of steer-engine serve]",
        description="Check whether a model can be served steered with these flags, how, and with how much memory; if "
        "not, why. MODEL is a packaged model, a path or a Hugging Face id. A copy is started: of a small model in a "
        "folder with its own weights, of any other with random weights and fewer blocks. The exit status is 1 if the "
        "server would refuse to start.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print the diagnosis as JSON")
    parser.add_argument(
        "--memory-only",
        action="store_true",
        help="use only the configuration, start nothing; config.json suffices",
    )
    own, of_serve = parser.parse_known_args(argv)
    if not of_serve:
        parser.error("MODEL is missing")
    try:
        check_start(of_serve, listens=False)
    except SteerError as error:
        return _refuse(error.message, as_json=own.json)
    # Set before vLLM is imported: by default it logs to standard output, which carries only the diagnosis.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")

    from steer_engine.vllm.flags import name_plugins
    from steer_engine.vllm.plugin import hide_kernel_folder

    name_plugins()
    hide_kernel_folder()

    from steer_engine.vllm.examination import examine

    diagnosis = examine(of_serve, probe=not own.memory_only)
    if own.json:
        print(json.dumps(diagnosis.to_json(), indent=2))
    else:
        show(diagnosis, Console(highlight=False))
    return 0 if diagnosis.serves else 1
