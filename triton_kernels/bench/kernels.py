"""Benchmark of the kernels: their speed on a GPU or, without a GPU, the resource use of the compiled code.

    python -P triton_kernels/bench/kernels.py [--hidden-size 4096 ...] [--json FILE]

On a GPU: median time, bandwidth for the bytes that each case must move, and that bandwidth relative to a
device-to-device copy of as many bytes in the same run. Without a GPU: for each target, bytes counted from the loads
and stores of the compiled code, compared with the minimum, and registers and spills. See `docs/cost_model.md`.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.testing
from rich.console import Console
from rich.progress import track
from rich.table import Table
from steer_kernels.add_rms_norm_edit import add_rms_norm_edit
from steer_kernels.advance_triggers import advance_triggers
from steer_kernels.compile import (
    TARGETS,
    compile_add_rms_norm_edit,
    compile_advance_triggers,
    compile_edit_residual,
    compile_route_rows,
)
from steer_kernels.edit_residual import edit_residual
from steer_kernels.launch_table import MAX_NORMED_BYTES, launch_for
from steer_kernels.route_rows import route_rows
from steer_kernels.tables import MAX_POSITION, Entry, Tables, encode_entry, encode_trigger

DTYPE = torch.bfloat16
HIDDEN_SIZES = (576, 4096, 8192, 16384)
NUM_TOKENS = (1, 32, 256, 2048, 8192)
NUM_SLOTS = 256
EPSILON = 1e-5
Row = dict[str, Any]

PROGRAMS: dict[str, list[Entry]] = {
    "idle": [],
    "add": [Entry(row=0, c0=1e-3)],
    "4 adds": [Entry(row=0, c0=1e-3)] * 4,
    "ablate": [Entry(row=0, c2=-1e-3)],
    "add_relative": [Entry(row=0, c1=1e-6)],
    "add in windows": [Entry(row=0, c0=1e-3, trigger=0, over=8, slope=-0.1, to=0.2)],
    "gated add": [Entry(row=0, c0=1e-3, gate_row=1, min_cos=-1.0, max_cos=1.0)],
}
"""The entries of every row. Scales are small, so that values stay finite over a thousand launches."""

ADDS = ("idle", "add", "4 adds", "add in windows")
"""The programs that an engine armed only for adds can run."""

STREAM_ROWS = {"idle": 0, "add": 3, "4 adds": 6, "add in windows": 3, "ablate": 4, "add_relative": 4, "gated add": 6}
"""Rows of D items that a steered token must move; see the cost model. Repeated loads of a row come from cache."""


def tables_for(hidden_size: int, num_tokens: int, entries: list[Entry]) -> Tables:
    """Tables in which tokens are spread over all slots. Each slot has the given entries and its own bank rows."""
    tables = Tables.allocate(
        num_slots=NUM_SLOTS + 1,
        num_sites=1,
        num_entries=4,
        num_rows=4 * (NUM_SLOTS + 1),
        hidden_size=hidden_size,
        max_tokens=num_tokens,
        bank_dtype=DTYPE,
        device="cuda",
    )
    tables.bank_RD.normal_()
    if not entries:
        return tables
    for slot in range(1, NUM_SLOTS + 1):
        for e, entry in enumerate(entries):
            own = entry._replace(row=4 * slot + e, gate_row=4 * slot + 3 if entry.gate_row >= 0 else -1)
            tables.entries_SLEW[slot, 0, e] = torch.from_numpy(encode_entry(own))
        tables.counts_SL[slot] = len(entries)
        tables.span_S2[slot] = torch.tensor([0, 2**31 - 1])
    tables.slot_T.copy_(torch.arange(num_tokens) % NUM_SLOTS + 1)
    return tables


def seconds(call: Callable[[], object]) -> tuple[float, float, float]:
    """Time of a call in seconds: median, 20th and 80th percentile."""
    median, low, high = triton.testing.do_bench(call, warmup=25, rep=100, quantiles=[0.5, 0.2, 0.8])
    return median / 1e3, low / 1e3, high / 1e3


def measured(hidden_sizes: tuple[int, ...]) -> Iterator[Row]:
    """One row per case, with the time of a copy that moves as many bytes."""
    shapes = [(hidden_size, num_tokens) for hidden_size in hidden_sizes for num_tokens in NUM_TOKENS]
    for hidden_size, num_tokens in track(shapes, description="timing", console=Console(stderr=True)):
        for kernel, program, num_rows, call in cases(hidden_size, num_tokens):
            num_bytes = num_rows * num_tokens * hidden_size * DTYPE.itemsize
            copied = copy_seconds(num_bytes)
            took, low, high = seconds(call)
            yield {
                "kernel": kernel, "program": program, "D": hidden_size, "tokens": num_tokens, "us": took * 1e6,
                "us_20": low * 1e6, "us_80": high * 1e6, "GB/s": num_bytes / took / 1e9,
                "of a copy": copied / took if num_rows else None,
            }  # fmt: skip


def cases(hidden_size: int, num_tokens: int) -> Iterator[tuple[str, str, int, Callable[[], object]]]:
    """Yields kernel, program, rows of D items that a token must move, and the launch."""
    hidden, residual = (torch.randn(num_tokens, hidden_size, dtype=DTYPE, device="cuda") for _ in range(2))
    weight_D = torch.ones(hidden_size, dtype=DTYPE, device="cuda")
    for program, entries in PROGRAMS.items():
        tables = tables_for(hidden_size, num_tokens, entries)

        def edit(adds_only: bool, tables: Tables = tables) -> None:
            edit_residual(hidden, residual, tables, 0, adds_only=adds_only, capture=False)

        def norm(tables: Tables = tables) -> None:
            add_rms_norm_edit(hidden, residual, weight_D, tables, 0, epsilon=EPSILON, adds_only=True, capture=False)

        num_rows = STREAM_ROWS[program]
        yield "edit_residual", program, num_rows, partial(edit, False)
        if program in ADDS:
            yield "edit_residual, adds", program, num_rows, partial(edit, True)
        if program in ADDS and hidden_size * DTYPE.itemsize <= MAX_NORMED_BYTES:
            # Loads two rows and the weight (from cache), stores two rows. Each add loads one more row.
            yield "add_rms_norm_edit", program, 4 + len(entries), norm
    num_requests = min(num_tokens, NUM_SLOTS)
    starts = torch.linspace(0, num_tokens, num_requests + 1, device="cuda").to(torch.int32)
    mapping = torch.arange(num_requests, dtype=torch.int32, device="cuda")
    positions = torch.arange(num_tokens, device="cuda")
    tables = tables_for(hidden_size, num_tokens, PROGRAMS["add"])
    yield "route_rows", "", 0, partial(route_rows, starts, mapping, positions, tables, num_tokens)
    tokens = positions.to(torch.int32) % 4
    trigger_P = torch.from_numpy(encode_trigger((1, 2), (3,), each=True, length=MAX_POSITION))
    for num_triggers in (1, 8):
        tables = tables_for(hidden_size, num_tokens, PROGRAMS["add"])
        tables.triggers_SJP.copy_(trigger_P)
        tables.num_triggers_S[1:] = num_triggers
        call = partial(advance_triggers, starts, mapping, positions, tokens, tables)
        yield "advance_triggers", f"{num_triggers} triggers", 0, call


def copy_seconds(num_bytes: int) -> float:
    """Seconds of a device-to-device copy that moves `num_bytes` in total, reads and writes together."""
    source = torch.empty(max(num_bytes // 2, 1), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return seconds(lambda: target.copy_(source))[0]


def compiled(hidden_sizes: tuple[int, ...]) -> Iterator[Row]:
    """One row per compiled kernel."""
    jobs = [(target, hidden_size) for target in TARGETS for hidden_size in hidden_sizes]
    for target, hidden_size in track(jobs, description="compiling", console=Console(stderr=True)):
        kernels: dict[str, tuple[Any, bool, int | None]] = {
            "edit_residual, adds": (compile_edit_residual, True, 3),
            "edit_residual": (compile_edit_residual, False, None),
            "add_rms_norm_edit, adds": (compile_add_rms_norm_edit, True, 6),
        }
        for name, (compile_it, adds_only, rows) in kernels.items():
            artifact = compile_it(target, hidden_size, DTYPE, adds_only=adds_only)
            launch = launch_for(hidden_size)
            moved = None
            if rows is not None and (launch.hold or compile_it is compile_edit_residual):
                moved = artifact.row_bytes(hidden_size, DTYPE.itemsize, launch.tile)
            floor = None if rows is None else rows * hidden_size * DTYPE.itemsize
            yield {
                "target": target, "kernel": name, "D": hidden_size, "warps": launch.num_warps,
                "bytes a row": moved, "floor": floor, "of the floor": moved / floor if moved and floor else None,
                "access": max(access.width for access in artifact.accesses if access.of_a_row),
                "registers": artifact.registers, "spilled": artifact.spilled_bytes, "shared": artifact.shared_bytes,
            }  # fmt: skip
    for target in TARGETS:
        for name, artifact in (
            ("route_rows", compile_route_rows(target)),
            ("advance_triggers", compile_advance_triggers(target)),
        ):
            yield {
                "target": target, "kernel": name, "registers": artifact.registers,
                "spilled": artifact.spilled_bytes, "shared": artifact.shared_bytes,
            }  # fmt: skip


def show(rows: list[Row], title: str) -> None:
    table = Table(title=title)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column, justify="left" if isinstance(rows[0].get(column), str) else "right")
    for row in rows:
        table.add_row(*(cell(row.get(column)) for column in columns))
    Console(width=140).print(table)


def cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--hidden-size", type=int, nargs="+", default=HIDDEN_SIZES, metavar="D", help="hidden sizes to benchmark"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    arguments = parser.parse_args()
    sizes = tuple(arguments.hidden_size)
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else f"compiled on {platform.machine()}, no GPU"
    title = f"{device} · {DTYPE} · torch {torch.__version__} · triton {triton.__version__}"
    rows = list(measured(sizes) if on_gpu else compiled(sizes))
    show(rows, title)
    if arguments.json:
        arguments.json.write_text(json.dumps({"title": title, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
