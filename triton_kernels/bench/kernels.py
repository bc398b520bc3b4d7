"""Benchmark of the kernels: their speed on a GPU or, without a GPU, the resource use of the compiled code.

    python -P triton_kernels/bench/kernels.py [--hidden-size 4096 ...] [--target sm_90 ...] [--json FILE]

On a GPU: median time, bandwidth for the bytes that each case must move (its floor), and that bandwidth relative to a
device-to-device copy of as many bytes in the same run. Without a GPU, or with --target: for each target, bytes counted
from the loads and stores of the compiled code, compared with the minimum, and registers and spills; a kernel that
spills is an error. See `docs/cost_model.md`.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.testing
from rich.console import Console
from rich.progress import track
from rich.table import Table
from steer_kernels.add_rms_norm_edit import add_rms_norm_edit
from steer_kernels.advance_triggers import advance_triggers
from steer_kernels.compile import TARGETS, every_kernel
from steer_kernels.edit_residual import edit_residual
from steer_kernels.launch_table import MAX_NORMED_BYTES, launch_for
from steer_kernels.route_rows import route_rows
from steer_kernels.tables import (
    COSINE,
    DOT,
    JUMP,
    LAST,
    MAX_POSITION,
    MEMBER,
    PLANE,
    READ,
    Entry,
    Tables,
    encode_entry,
    encode_trigger,
)

DTYPE = torch.bfloat16
HIDDEN_SIZES = (576, 4096, 8192, 16384)
NUM_TOKENS = (1, 32, 256, 2048, 8192)
NUM_SLOTS = 256
EPSILON = 1e-5
Row = dict[str, Any]

NUM_RANKS = 4
"""Features of an edit, ranks of a low-rank edit, probes."""
ROWS_PER_SLOT = 8


class Program(NamedTuple):
    """The entries of every row, and the rows of D items that a steered token must move (the floor).

    Repeated loads of a row come from cache and are not counted; see the cost model. A row number is counted within a
    slot: each slot has bank rows of its own.
    """

    entries: tuple[Entry, ...]
    num_rows: int


def reading(mode: int, count: int, **numbers: float) -> tuple[Entry, ...]:
    """A group of entries that read the rows 0, 2, ... and write the rows 1, 3, ..."""
    places = [MEMBER] * (count - 1) + [LAST]
    return tuple(
        Entry(row=2 * n + 1, read_row=2 * n, mode=mode, parallel=place, **numbers)  # type: ignore[arg-type]
        for n, place in enumerate(places)
    )


def probing(measure: int, count: int, *, late: bool = False) -> tuple[Entry, ...]:
    return tuple(Entry(row=n, measure=measure, probe=n, late=late) for n in range(count))


ADD = Entry(row=7, c0=1e-3)
PROGRAMS = {
    "idle": Program((), 0),
    "add": Program((ADD,), 3),
    "4 adds": Program(tuple(Entry(row=n, c0=1e-3) for n in range(4)), 6),
    "add in windows": Program((Entry(row=0, c0=1e-3, trigger=0, over=8, slope=-0.1, to=0.2),), 3),
    "ablate": Program((Entry(row=0, c2=-1e-3),), 4),
    "add_relative": Program((Entry(row=0, c1=1e-6),), 4),
    "gated add": Program((Entry(row=0, c0=1e-3, gate_row=3, min_cos=-1.0, max_cos=1.0),), 5),
    "conditional add": Program((Entry(row=0, c0=1e-3, conditions=1),), 3),
    "feature": Program(reading(JUMP, 1, c2=-1e-6, c3=1e-3, lo=-inf, hi=inf), 5),
    "4 features": Program(reading(JUMP, NUM_RANKS, c2=-1e-6, c3=1e-3, lo=-inf, hi=inf), 3 + 2 * NUM_RANKS),
    "low_rank 4": Program(reading(READ, NUM_RANKS, c0=1e-3, c2=1e-6), 3 + 2 * NUM_RANKS),
    "rotate": Program(
        (
            Entry(row=0, read_row=1, mode=PLANE, c2=-1e-6, c3=1e-6, parallel=MEMBER),
            Entry(row=1, read_row=0, mode=PLANE, c2=-1e-6, c3=-1e-6, parallel=LAST),
        ),
        5,
    ),
    "probe": Program(probing(DOT, 1), 3),
    "4 probes": Program(probing(DOT, NUM_RANKS), 2 + NUM_RANKS),
    "4 probes, cosine, late": Program(probing(COSINE, NUM_RANKS, late=True), 2 + NUM_RANKS),
    "4 probes and an add": Program((*probing(DOT, NUM_RANKS), ADD), 2 + NUM_RANKS + 2),
}
"""Scales are small, so that values stay finite over a thousand launches."""

ADDS = ("idle", "add", "4 adds", "add in windows")
"""The programs that an engine armed only for adds can run."""


def is_probed(program: Program) -> bool:
    return any(entry.probe >= 0 for entry in program.entries)


def tables_for(hidden_size: int, num_tokens: int, program: Program, device: str = "cuda") -> Tables:
    """Tables in which tokens are spread over all slots. Each slot has the given entries and its own bank rows."""
    tables = Tables.allocate(
        num_slots=NUM_SLOTS + 1,
        num_sites=1,
        num_entries=ROWS_PER_SLOT,
        num_rows=ROWS_PER_SLOT * (NUM_SLOTS + 1),
        hidden_size=hidden_size,
        max_tokens=num_tokens,
        bank_dtype=DTYPE,
        device=device,
        num_probes=NUM_RANKS if is_probed(program) else 0,
    )
    tables.bank_RD.normal_()
    # Condition 0 holds in every slot.
    tables.bounds_SQ2[..., 0], tables.bounds_SQ2[..., 1] = -inf, inf
    if not program.entries:
        return tables
    for slot in range(1, NUM_SLOTS + 1):
        for e, entry in enumerate(program.entries):
            own = {
                field: ROWS_PER_SLOT * slot + number
                for field in ("row", "gate_row", "read_row")
                if (number := getattr(entry, field)) >= 0
            }
            tables.entries_SLEW[slot, 0, e] = torch.from_numpy(encode_entry(entry._replace(**own)))
        tables.counts_SL[slot] = len(program.entries)
        tables.span_S2[slot] = torch.tensor([0, MAX_POSITION])
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
    for name, program in PROGRAMS.items():
        tables = tables_for(hidden_size, num_tokens, program)

        def edit(adds_only: bool, tables: Tables = tables) -> None:
            edit_residual(hidden, residual, tables, 0, adds_only=adds_only, capture=False)

        def norm(adds_only: bool, tables: Tables = tables) -> None:
            add_rms_norm_edit(
                hidden, residual, weight_D, tables, 0, epsilon=EPSILON, adds_only=adds_only, capture=False
            )

        yield "edit_residual", name, program.num_rows, partial(edit, False)
        if name in ADDS:
            yield "edit_residual, adds", name, program.num_rows, partial(edit, True)
        if hidden_size * DTYPE.itemsize <= MAX_NORMED_BYTES:
            # Loads both parts and the weight (from cache), stores both. Bank rows are read as in `edit_residual`.
            kernel = "add_rms_norm_edit, adds" if name in ADDS else "add_rms_norm_edit"
            yield kernel, name, 4 + num_bank_rows(program), partial(norm, name in ADDS)
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


def num_bank_rows(program: Program) -> int:
    """Different bank rows that the entries of a slot read."""
    named = {number for entry in program.entries for number in (entry.row, entry.read_row, entry.gate_row)}
    return len(named - {-1})


def copy_seconds(num_bytes: int) -> float:
    """Seconds of a device-to-device copy that moves `num_bytes` in total, reads and writes together."""
    source = torch.empty(max(num_bytes // 2, 1), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return seconds(lambda: target.copy_(source))[0]


FLOORS = {"edit_residual, adds": 3, "add_rms_norm_edit, adds": 6}
"""Rows that the compiled code of one add moves, the norm's weight included. Other operations read a row again."""


def compiled(hidden_sizes: Sequence[int], targets: Sequence[str], dtypes: Sequence[torch.dtype]) -> Iterator[Row]:
    """One row per compiled kernel."""
    jobs = [(target, size, dtype) for target in targets for size in hidden_sizes for dtype in dtypes]
    seen = set()
    for target, hidden_size, dtype in track(jobs, description="compiling", console=Console(stderr=True)):
        for name, artifact in every_kernel(target, hidden_size, dtype):
            used = {
                "registers": artifact.registers, "spilled": artifact.spilled_bytes, "shared": artifact.shared_bytes,
            }  # fmt: skip
            accesses = [access.width for access in artifact.accesses if access.of_a_row]
            if not accesses:  # it moves no rows, so it is the same for every D
                if (target, name) not in seen:
                    yield {"target": target, "kernel": name, **used}
                seen.add((target, name))
                continue
            launch, rows, moved = launch_for(hidden_size), FLOORS.get(name), None
            if rows is not None and (launch.hold or name.startswith("edit_residual")):
                moved = artifact.row_bytes(hidden_size, dtype.itemsize, launch.tile)
            floor = None if rows is None else rows * hidden_size * dtype.itemsize
            yield {
                "target": target, "kernel": name, "dtype": str(dtype).removeprefix("torch."), "D": hidden_size,
                "warps": launch.num_warps, "bytes a row": moved, "floor": floor,
                "of the floor": moved / floor if moved and floor else None, "access": max(accesses), **used,
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


def main() -> int:
    """Returns the exit status: 1 if compiled code spills registers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--hidden-size", type=int, nargs="+", default=HIDDEN_SIZES, metavar="D", help="hidden sizes to benchmark"
    )
    parser.add_argument(
        "--target",
        nargs="+",
        choices=TARGETS,
        metavar="TARGET",
        help=f"compile for these, in bfloat16 and float32, even on a GPU: {', '.join(TARGETS)}",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    parser.add_argument("--plan", action="store_true", help="check these arguments, and measure nothing")
    arguments = parser.parse_args()
    sizes = tuple(arguments.hidden_size)
    for size in sizes:
        try:
            launch_for(size)
        except ValueError as error:
            parser.error(str(error))
    if arguments.plan:
        print(f"{len(PROGRAMS)} programs at D = {', '.join(map(str, sizes))}")
        return 0
    on_gpu = torch.cuda.is_available() and not arguments.target
    device = torch.cuda.get_device_name() if on_gpu else f"compiled on {platform.machine()}, no GPU used"
    dtypes = (DTYPE, torch.float32) if arguments.target else (DTYPE,)
    named = ", ".join(map(str, dtypes))
    title = f"{device} · {named} · torch {torch.__version__} · triton {triton.__version__}"
    rows = list(measured(sizes) if on_gpu else compiled(sizes, arguments.target or tuple(TARGETS), dtypes))
    show(rows, title)
    if arguments.json:
        arguments.json.write_text(json.dumps({"title": title, "rows": rows}, indent=1) + "\n")
    if spilled := [row for row in rows if row.get("spilled")]:
        print(f"{len(spilled)} of {len(rows)} kernels spill registers; see the column spilled.")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
