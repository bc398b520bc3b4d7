"""The kernel benchmark on a machine without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "triton_kernels" / "bench" / "kernels.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the benchmark times the kernels instead")
def test_without_a_gpu_it_reports_compiled_code(tmp_path: Path) -> None:
    command = [sys.executable, "-P", str(SCRIPT), "--hidden-size", "576", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "no GPU" in done.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert all(row["spilled"] == 0 for row in rows)
    assert {row["of the floor"] for row in rows if row.get("floor")} == {1.0}
