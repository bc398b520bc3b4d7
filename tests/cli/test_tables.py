"""Tables on a terminal of 80 columns: every cell is there, and none is cut. Piped, digests are whole."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from steer_engine.cli import condition, probe
from steer_engine.derive.condition import choose
from steer_engine.derive.probe_quality import ProbeReport, Scores, report_block
from steer_engine.fields import block_ranges
from steer_engine.vectors import ControlVector, VectorMetadata, save
from steer_engine.vectors.metadata import ProbeBlock, StoredPlatt

SCRIPT = Path(sys.executable).with_name("steer-engine")
WIDTH = 80


def on_a_terminal(*arguments: str) -> str:
    """Output of a command whose standard output is a terminal of 80 columns."""
    leader, follower = pty.openpty()
    environment = os.environ | {"COLUMNS": str(WIDTH), "NO_COLOR": "1", "TERM": "dumb"}
    subprocess.run([SCRIPT, *arguments], stdout=follower, timeout=60, env=environment, check=True)
    os.close(follower)
    with os.fdopen(leader, "rb") as terminal:
        return terminal.read1(1 << 20).decode()


def rendered(table: Table, width: int = WIDTH) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(table)
    return out.getvalue().splitlines()


def assert_all_shown(table: Table) -> None:
    """At 80 columns, no row is folded: every cell of a row is in one line, as wide as it is."""
    lines = rendered(table)
    assert max(map(len, lines)) <= WIDTH
    rows = list(zip(*(list(column.cells) for column in table.columns), strict=True))
    assert rows
    for row in rows:
        assert any(all(str(cell) in line for cell in row) for line in lines), (row, lines)
    words = " ".join(lines).split()
    for column in table.columns:
        assert all(word in words for word in str(column.header).split()), column.header


@pytest.mark.parametrize("trained", [{}, {3: 0.987, 29: 1.0}])
def test_the_table_of_a_probe(trained: dict[int, float]) -> None:
    random = np.random.default_rng(0)
    at = ProbeBlock(auroc=0.9, threshold=-1234.567, platt=StoredPlatt(a=1.5, b=0.1))
    sides = [Scores(value_N=random.normal(mean, 900.0, 50), prompt_N=np.arange(50)) for mean in (-800.0, -1600.0)]
    by_block = {block: report_block(at, *sides, seed=0) for block in (3, 29)}
    found = ProbeReport(by_block=by_block, best=29, at="mean_prompt", num_positive=50, num_negative=50)
    table = probe.table_of(found, trained)
    assert "-1235" in "".join(rendered(table))
    assert_all_shown(table)


def test_the_table_of_a_condition() -> None:
    random = np.random.default_rng(0)
    positive, negative = random.normal(2.0, 1.0, (40, 3)), random.normal(-123456.0, 1.0, (40, 3))
    found = choose(positive, negative, (17, 18, 29), measure="dot", at="max_prompt", num_blocks=3, held_out=0.3, seed=0)
    assert_all_shown(condition.table_of(found))


def test_a_folder_of_vectors_at_80_columns_and_piped(tmp_path: Path) -> None:
    metadata = VectorMetadata(model="HuggingFaceTB/SmolLM2-135M-Instruct", method="diffmean")
    directions = {block: np.ones(8, dtype=np.float32) for block in (*range(8, 20), 25)}
    vector = ControlVector(directions=directions, metadata=metadata)
    save(vector, tmp_path / "a-rather-long-name-of-a-vector.safetensors")
    shown = on_a_terminal("vectors", "show", str(tmp_path))
    assert max(map(len, shown.splitlines())) <= WIDTH
    joined = "".join(shown.split())
    for cell in ("diffmean", "8-19,", "25", vector.digest[:19]):
        assert cell in joined
    assert "…" not in shown
    done = subprocess.run(
        [SCRIPT, "vectors", "show", str(tmp_path)], capture_output=True, text=True, timeout=60, check=True,
        env=os.environ | {"COLUMNS": "40"},
    )  # fmt: skip
    (row,) = (line for line in done.stdout.splitlines() if "diffmean" in line)
    for cell in ("a-rather-long-name-of-a-vector", "8-19, 25", metadata.model, vector.digest):
        assert cell in row


@pytest.mark.parametrize(
    ("blocks", "text"), [((), ""), ((4,), "4"), ((0, 1, 2), "0-2"), ((1, 3, 4, 9), "1, 3-4, 9"), (range(1, 31), "1-30")]
)
def test_blocks_are_shown_as_ranges(blocks: tuple[int, ...], text: str) -> None:
    assert block_ranges(blocks) == text
