"""The kernel benchmark on a machine without a GPU: its floors, its compiled code and its arguments."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_steps
import pytest
import torch
from helpers.kernel_process import Process
from helpers.ptx_machine import Machine

from .test_compile import TARGETS

SCRIPT = Path(__file__).resolve().parents[2] / "triton_kernels" / "bench" / "kernels.py"
HIDDEN_SIZE, DTYPE = 576, torch.bfloat16


def bench() -> Any:
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("kernel_bench", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


BENCH = bench()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-P", str(SCRIPT), *arguments], capture_output=True, text=True)


def test_every_operation_is_measured() -> None:
    names = " ".join(BENCH.PROGRAMS)
    for word in ("add", "ablate", "add_relative", "gate", "condition", "feature", "low_rank", "rotate", "probe"):
        assert word in names


@pytest.mark.parametrize("name", BENCH.PROGRAMS)
def test_the_floor_is_what_the_compiled_code_must_move(compiled: Process, name: str) -> None:
    """Different bytes of rows loaded, and bytes stored, by the code that a GPU would run."""
    program = BENCH.PROGRAMS[name]
    tables = BENCH.tables_for(HIDDEN_SIZE, 2, program, device="cpu")
    hidden, carried = (torch.randn(2, HIDDEN_SIZE).to(DTYPE) for _ in range(2))
    artifact = compiled.call(
        *("compile.compile_edit_residual", "sm_90", HIDDEN_SIZE, DTYPE),
        adds_only=False,
        num_sites=1,
        num_entries=BENCH.ROWS_PER_SLOT,
        num_probes=0 if tables.probed_TK is None else tables.probed_TK.shape[1],
    )
    rows = (hidden, carried, tables.bank_RD)
    machine = Machine(
        artifact.text,
        [
            *(*rows, tables.entries_SLEW, tables.counts_SL, tables.keep_norm_S, tables.slot_T, tables.pos_T),
            *(tables.windows_TJ, tables.measured_SQ, tables.bounds_SQ2, torch.zeros(1, dtype=torch.int32)),
            torch.zeros(1, 1, 1, dtype=DTYPE),
            *(tables.bounds_SQ2 if tables.probed_TK is None else tables.probed_TK, 0),
        ],
    )
    traffic = machine.run(1)
    moved = sum(len(traffic[at].loaded_at) + traffic[at].stored for row in rows if (at := row.data_ptr()) in traffic)
    assert moved == program.num_rows * HIDDEN_SIZE * DTYPE.itemsize


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the benchmark times the kernels instead")
@pytest.mark.slow
def test_without_a_gpu_it_reports_compiled_code_for_all_targets(tmp_path: Path) -> None:
    done = run("--hidden-size", "576", "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["target"] for row in rows} == set(TARGETS)
    assert_no_spills(rows)


def test_a_named_card_is_compiled_for(tmp_path: Path) -> None:
    """All kernels in both dtypes, even where there is a GPU."""
    done = run("--target", "sm_90", "--hidden-size", "576", "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stderr
    assert "no GPU" in done.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["target"] for row in rows} == {"sm_90"}
    assert {row.get("dtype") for row in rows} == {"bfloat16", "float32", None}
    kernels = {row["kernel"].split(",")[0] for row in rows}
    assert kernels == {"edit_residual", "add_rms_norm_edit", "route_rows", "advance_triggers"}
    assert_no_spills(rows)


def assert_no_spills(rows: list[dict[str, Any]]) -> None:
    assert all(row["spilled"] == 0 for row in rows)
    assert {row["of the floor"] for row in rows if row.get("floor")} == {1.0}


def test_an_unknown_card_is_refused() -> None:
    done = run("--target", "sm_20", "--plan")
    assert done.returncode == 2
    assert "sm_20" in done.stderr


def test_the_gpu_steps_know_every_target_and_kernel_test() -> None:
    assert gpu_steps.TARGETS == TARGETS
    here = Path(__file__).parent
    launching = [
        path.stem.removeprefix("test_") for path in here.glob("test_*.py") if "interpreted: Process" in path.read_text()
    ]
    assert sorted(gpu_steps.KERNEL_TESTS) == sorted(set(launching) - {"bench"})
